"""Tokens per second under a JSON schema: dense, approximate and exact decoding.

    python benchmarks/grammar.py FOLDER [--schema FILE] [--samplers greedy,top-p]

Objects of the schema are decoded by mlx-lm's ``stream_generate``, one after another
with each head, in turn. ``stock`` is mlx-lm itself, unpatched, with the dense head and
the same processor, as it runs a grammar today; ``no grammar`` is exact decoding of the
same prompts without one. The grammar is llguidance's. The time of the prompt does not
count.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler
from samplers import SAMPLERS

from mlx_flashhead import LLGuidanceMask, load, patch_decoding, unpatch, verification
from mlx_flashhead.benchmarking.report import markdown_table
from mlx_flashhead.sampling import masked

# What a tool call or an extraction asks for: keys, strings, numbers, words of a list.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "summary": {"type": "string", "minLength": 40, "maxLength": 240},
        "category": {"enum": ["person", "place", "event", "thing"]},
        "year": {"type": "integer", "minimum": -3000, "maximum": 2100},
        "keywords": {
            "type": "array",
            "items": {"type": "string", "maxLength": 24},
            "minItems": 2,
            "maxItems": 5,
        },
        "certain": {"type": "boolean"},
    },
    "required": ["name", "summary", "category", "year", "keywords", "certain"],
    "additionalProperties": False,
}
SUBJECTS = [
    "the steam engine",
    "Marie Curie",
    "the city of Vienna",
    "the French Revolution",
    "a bicycle",
]
PROMPT = "Describe {} as a JSON object with name, summary, category, year, keywords.\n"


@click.command(context_settings={"show_default": True})
@click.argument("folder")
@click.option("--schema", help="A file with another JSON schema.")
@click.option("--max-tokens", default=160)
@click.option("--samplers", default="greedy,top-p", help=f"Of {', '.join(SAMPLERS)}.")
@click.option("--subjects", default=len(SUBJECTS), help="How many are described.")
@click.option("--repeats", default=1, help="Times that each object is decoded.")
def main(folder, schema, max_tokens, samplers, subjects, repeats):
    """Decode objects of a JSON schema with each head."""
    wanted = json.loads(Path(schema).read_text()) if schema else SCHEMA
    ways = {
        "stock": load(folder, dense=True),
        "approximate": load(folder, exact=False),
        "exact": load(folder),
    }
    ways["no grammar"] = ways["exact"]
    tokenizer = ways["exact"][1]
    start = time.perf_counter()
    LLGuidanceMask(tokenizer, wanted)
    print(f"The first grammar of a tokenizer: {time.perf_counter() - start:.1f} s\n")
    prompts = [PROMPT.format(subject) for subject in SUBJECTS[:subjects]]
    rows = []
    for name in samplers.split(","):
        sampler = make_sampler(**SAMPLERS[name])
        seconds, made, same = defaultdict(float), defaultdict(int), 0
        shares, counts = defaultdict(int), None
        for seed, prompt in enumerate(prompts * repeats):
            texts = {}
            for way, (model, _) in ways.items():
                unpatch() if way == "stock" else patch_decoding()
                mask = (
                    None if way == "no grammar" else LLGuidanceMask(tokenizer, wanted)
                )
                mx.random.seed(seed)
                with verification() as count:
                    texts[way], took = decode(
                        model, tokenizer, prompt, max_tokens, sampler, mask
                    )
                seconds[way] += took
                made[way] += len(texts[way]) - 1
                if way == "exact":
                    counts = count if counts is None else counts + count
            same += texts["exact"] == texts["stock"]
            count_kinds(ways["exact"][0], tokenizer, wanted, prompt, texts, shares)
        for way in ways:
            speed = made[way] / seconds[way]
            row = [name, way, f"{speed:.1f}"]
            row.append(f"{speed * seconds['stock'] / made['stock']:.2f}")
            is_exact = way == "exact"
            row.append(f"{counts.acceptance:.1%}" if is_exact else "")
            row.append(f"{same} of {len(prompts) * repeats}" if is_exact else "")
            rows.append(row)
        total = sum(shares.values())
        kinds = ", ".join(f"{kind} {n / total:.0%}" for kind, n in shares.items())
        print(f"{name}: of {total} tokens of exact texts, by what may come: {kinds}\n")
    head = ["sampler", "decoding", "tokens/s", "x stock", "accepted", "same as stock"]
    print(markdown_table([head, *rows], left=2))


def decode(model, tokenizer, prompt, max_tokens, sampler, mask):
    """The tokens of a text, and the seconds from the first to the last."""
    options = {"logits_processors": [mask]} if mask is not None else {}
    made, start = [], None
    for response in stream_generate(
        model, tokenizer, prompt, max_tokens=max_tokens, sampler=sampler, **options
    ):
        start = start or time.perf_counter()
        made.append(response.token)
    return made, time.perf_counter() - start


def count_kinds(model, tokenizer, schema, prompt, texts, shares) -> None:
    """Count the tokens of a text where one, few and many were allowed."""
    from mlx_flashhead import flash_heads
    from mlx_flashhead.sampling.masks import allowed

    head, mask = next(flash_heads(model)), LLGuidanceMask(tokenizer, schema)
    so_far = list(tokenizer.encode(prompt))
    for token in texts["exact"]:
        found = allowed(head, [mask], so_far)
        few = "few" if masked.sure(head, found) else "many"
        shares["one" if found.n == 1 else few] += 1
        so_far.append(token)


if __name__ == "__main__":
    main()
