"""One of several processes that share a model: what each of them writes.

Run by ``mlx.launch``; ``test_distributed.py`` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import sharded_load

import mlx_flashhead

PROMPT = "The quick brown fox"
N = 16
# Of the first process. By 0 this model happens to draw its greedy text.
SEED = 1
SAMPLERS = {
    "greedy": {},
    "sampled": {"temp": 1.0},
    "top-p": {"temp": 1.0, "top_p": 0.9},
}


def texts(load, seed: int) -> dict[str, list]:
    """Tokens by decoding and sampler, alone and in a batch; ``load(exact)`` gives the
    model."""
    found = {}
    for exact in (True, False):
        model, tokenizer = load(exact)
        for name, options in SAMPLERS.items():
            sampler = make_sampler(**options)
            mx.random.seed(seed)
            stream = mlx_lm.stream_generate(
                model, tokenizer, PROMPT, max_tokens=N, sampler=sampler
            )
            found[f"{exact} {name}"] = [r.token for r in stream]
            prompts = [tokenizer.encode(text) for text in ("A cat", "1, 2,")]
            batch = mlx_lm.batch_generate(
                model, tokenizer, prompts, max_tokens=N, sampler=sampler
            )
            found[f"{exact} {name} batch"] = batch.texts
    return found


def main(folder: str, out: str) -> None:
    group = mx.distributed.init(strict=True)
    assert group.size() == 2

    def load(exact):
        mlx_flashhead.patch(exact=exact)
        return sharded_load(folder, None, group)

    # Not seeded alike.
    found = texts(load, seed=SEED + group.rank())
    Path(out, f"{group.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
