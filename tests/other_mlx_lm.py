"""What models write with the mlx-lm that is found first, as JSON: with FlashHead
exactly, with all of it probed, and, the reference, with the dense head and no patch.

Run by ``test_versions.py``.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import mlx_flashhead

PROMPT = "The quick brown fox"
WAYS = {
    "default": {},
    "greedy": {"sampler": make_sampler()},
    "penalty": {"logits_processors": make_logits_processors({5: 3.0}, 4.0)},
    "sampled": {"sampler": make_sampler(0.9, top_p=0.9, min_p=0.01)},
}


DECODINGS = {
    "exact": {"exact": True, "verify_every": 8},
    "approximate": {"exact": False, "n_probes": 126},
    "dense": {"dense": True},
}


def written(folder: str, way: str) -> dict[str, list]:
    mlx_flashhead.patch(**DECODINGS[way])
    model, tokenizer = mlx_lm.load(folder)
    if way == "dense":
        mlx_flashhead.unpatch()
    found: dict[str, list] = {}
    for name, options in WAYS.items():
        mx.random.seed(1)
        stream = mlx_lm.stream_generate(
            model, tokenizer, PROMPT, max_tokens=24, **options
        )
        found[name] = [response.token for response in stream]
    for n in (1, 2):
        prompts = [tokenizer.encode(text) for text in ("A cat", "1, 2,")[:n]]
        batch = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=16)
        found[f"batch of {n}"] = batch.texts
    found["joined"] = joined(model, tokenizer)
    return found


def joined(model, tokenizer) -> list:
    """Tokens of a sequence with a bias that joins when one without has left."""
    batch, tokens = BatchGenerator(model), []
    bias = make_logits_processors({7: 4.0})
    prompts = [tokenizer.encode(text) for text in ("A cat", "1, 2,")]
    batch.insert(prompts[:1], max_tokens=[3])
    for n in range(16):
        if n == 6:
            batch.insert(prompts[1:], max_tokens=[8], logits_processors=[bias])
        tokens += [r.token for r in batch.next()[1]]
    batch.close()
    return tokens


def main(folder: str) -> None:
    warnings.filterwarnings("error", message="mlx-flashhead does not know")
    with mlx_flashhead.verification() as count:
        found: dict[str, Any] = {way: written(folder, way) for way in DECODINGS}
    found |= {"version": mlx_lm.__version__, "drafted": count.drafted}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
