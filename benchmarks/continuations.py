"""Greedy continuations with different heads on the same body, token by token.

    python benchmarks/continuations.py --model CONVERTED_FOLDER

The reference is the folder's dense head as it is stored (16 bits, unless converted
with -q). Beside it: the same head quantized to 8 and to 4 bits as ``mlx_lm.convert
-q`` would (the embedding of a tied model stays the reference's, so that only the head
differs; ``--tied`` shares the quantized table as a tied model would), and FlashHead.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from mlx_flashhead.attach import find_head, flash_heads, get_module, set_module
from mlx_flashhead.load import load

PROMPTS = Path(__file__).with_name("prompts.jsonl")


class Heads(nn.Module):
    """An embedding, and a head of its own behind ``as_linear``."""

    def __init__(self, embedding: nn.Module, head: nn.Module):
        super().__init__()
        self.embedding, self.head = embedding, head

    def __call__(self, ids):
        return self.embedding(ids)

    def as_linear(self, x):
        return (
            self.head.as_linear(x) if hasattr(self.head, "as_linear") else self.head(x)
        )


@click.command(context_settings={"show_default": True})
@click.option("--model", "folder", required=True, help="A converted folder.")
@click.option("--prompts", default=str(PROMPTS), help='JSON lines with "prompt".')
@click.option("--max-tokens", default=64)
@click.option("--tied", is_flag=True, help="Quantized heads serve as embedding, too.")
@click.option("--json", "json_path", help="Write the continuations here, too.")
def main(folder, prompts, max_tokens, tied, json_path):
    lines = Path(prompts).read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    dense, tokenizer = load(folder, dense=True)
    path = find_head(dense)
    reference = get_module(dense, path)
    is_tied = isinstance(reference, (nn.Embedding, nn.QuantizedEmbedding))
    flash, _ = load(folder)
    head = next(flash_heads(flash))
    runs = {}

    def run(name, model):
        runs[name] = [
            _continue(model, tokenizer.encode(p), max_tokens) for p in prompts
        ]
        click.echo(f"{name} done", err=True)

    run("dense, as stored", dense)
    for bits in (8, 4):
        weight = reference.weight
        layer = (
            nn.Embedding(*weight.shape)
            if is_tied
            else nn.Linear(*weight.shape[::-1], bias=False)
        )
        layer.weight = weight
        quantized = layer.to_quantized(group_size=64, bits=bits)
        if is_tied and not tied:
            quantized = Heads(reference, quantized)
        set_module(dense, path, quantized)
        run(f"dense, {bits} bits", dense)
        set_module(dense, path, reference)
    if is_tied and not tied:
        set_module(dense, path, Heads(reference, head))
    share = 100 * head.rows_read() / head.vocab_size
    run(
        f"FlashHead, {head.rows.bits} bits, {share:.1f} % of rows",
        dense if is_tied and not tied else flash,
    )

    want = runs["dense, as stored"]
    click.echo("| head | identical continuations | median first difference |")
    click.echo("| --- | --- | --- |")
    for name, got in runs.items():
        first = [_first_difference(a, b) for a, b in zip(want, got)]
        same = sum(f is None for f in first)
        differing = [f for f in first if f is not None]
        median = f"token {statistics.median(differing):g}" if differing else "-"
        click.echo(f"| {name} | {same} of {len(want)} | {median} |")
    if json_path:
        Path(json_path).write_text(json.dumps(runs))


def _continue(model, prompt: list[int], max_tokens: int) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=max_tokens)
    return [int(token) for token, _ in steps]


def _first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first token that differs, from 1; None where there is none."""
    return next((i for i, (x, y) in enumerate(zip(a, b), 1) if x != y), None)


if __name__ == "__main__":
    main()
