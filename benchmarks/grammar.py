"""Tokens per second under a JSON schema: dense, approximate and exact decoding.

    python benchmarks/grammar.py FOLDER [--schema FILE] [--samplers greedy,top-p]

Objects of the schema are decoded by mlx-lm's ``stream_generate``, one after another
with each head, in turn. ``stock`` is mlx-lm itself, unpatched, with the dense head and
the same processor, as it runs a grammar today. The grammar is llguidance's. The time of
the prompt does not count. Seconds are the clock's, and those that the process computed:
on a CPU these are comparable where other work runs beside it.
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

from mlx_flashhead import (
    LLGuidanceMask,
    flash_heads,
    load,
    patch_decoding,
    unpatch,
    verification,
)
from mlx_flashhead.benchmarking.report import markdown_table
from mlx_flashhead.sampling import masked
from mlx_flashhead.sampling.masks import allowed

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
    tokenizer = ways["exact"][1]
    start = time.perf_counter()
    LLGuidanceMask(tokenizer, wanted)
    print(f"The first grammar of a tokenizer: {time.perf_counter() - start:.1f} s\n")
    prompts = [PROMPT.format(subject) for subject in SUBJECTS[:subjects]]
    rows = []
    for name in samplers.split(","):
        sampler = make_sampler(**SAMPLERS[name])
        seconds, computed = defaultdict(float), defaultdict(float)
        made, same = defaultdict(int), 0
        shares, counts = defaultdict(int), None
        for seed, prompt in enumerate(prompts * repeats):
            texts = {}
            for way, (model, _) in ways.items():
                unpatch() if way == "stock" else patch_decoding()
                mask = LLGuidanceMask(tokenizer, wanted)
                mx.random.seed(seed)
                with verification() as count:
                    texts[way], *took = decode(
                        model, tokenizer, prompt, max_tokens, sampler, mask
                    )
                seconds[way] += took[0]
                computed[way] += took[1]
                made[way] += len(texts[way]) - 1
                if way == "exact":
                    counts = count if counts is None else counts + count
            same += texts["exact"] == texts["stock"]
            count_kinds(ways["exact"][0], tokenizer, wanted, prompt, texts, shares)
        for way in ways:
            row = [name, way]
            for taken in (seconds, computed):
                speed = made[way] / taken[way]
                row.append(f"{speed:.1f}")
                row.append(f"{speed * taken['stock'] / made['stock']:.2f}")
            is_exact = way == "exact"
            row.append(f"{counts.acceptance:.1%}" if is_exact else "")
            is_greedy = is_exact and name == "greedy"  # another draw is another text
            row.append(f"{same} of {len(prompts) * repeats}" if is_greedy else "")
            rows.append(row)
        total = sum(shares.values())
        kinds = ", ".join(f"{kind} {n / total:.0%}" for kind, n in shares.items())
        print(f"{name}: of {total} tokens of exact texts, by what may come: {kinds}\n")
    head = ["sampler", "decoding", "tokens/s", "x stock", "tokens/CPU s", "x stock"]
    head += ["accepted", "same as stock"]
    print(markdown_table([head, *rows], left=2))


def decode(model, tokenizer, prompt, max_tokens, sampler, mask):
    """The tokens of a text, and the seconds from the first to the last, by the clock
    and computed."""
    made, start = [], None
    for response in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=[mask],
    ):
        start = start or (time.perf_counter(), time.process_time())
        made.append(response.token)
    return made, time.perf_counter() - start[0], time.process_time() - start[1]


def count_kinds(model, tokenizer, schema, prompt, texts, shares) -> None:
    """Count the tokens of a text where one, few and many were allowed."""
    head, mask = next(flash_heads(model)), LLGuidanceMask(tokenizer, schema)
    so_far = list(tokenizer.encode(prompt))
    for token in texts["exact"]:
        found = allowed(head, [mask], so_far)
        few = "few" if masked.sure(head, found) else "many"
        shares["one" if found.n == 1 else few] += 1
        so_far.append(token)


if __name__ == "__main__":
    main()
