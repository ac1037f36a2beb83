"""What a decoded token takes of the host, which small models wait for.

    python benchmarks/host.py

Time of the thread that decodes, through mlx-lm's own ``generate_step``, a few tokens of
dense, approximate and exact decoding in turn: to build a step's graph and to submit it.
What the device computes in other threads does not count, and no GPU is needed: graphs
are made as for one, kernels only stand in them (``launches.py``), and all drafts stand.
The model has few narrow layers, so that the head's share can be seen; what it takes
beyond the dense head, in microseconds, is that of any model. Kernels that stand in are
dearer to submit than real ones.
"""

from __future__ import annotations

import time
from unittest.mock import patch

import click
import mlx.core as mx
from in_turn import TURN, mean, quartiles
from launches import as_on_a_gpu
from models import MODELS, body, flash, speeds

from mlx_flashhead import kernels
from mlx_flashhead.benchmarking.report import markdown_table
from mlx_flashhead.sampling import coupled

NARROW = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 4096,
}


def zeros(rows: mx.array, *_: object) -> mx.array:
    """What the kernels that stand in draw."""
    return mx.zeros(len(rows), mx.uint32)


@click.command(context_settings={"show_default": True})
@click.option("--layers", default=4)
@click.option("--batch-size", default=1)
@click.option("--rounds", default=30, help=f"Of {TURN} tokens of each.")
@click.option("--samplers", default="greedy,temperature,top-p,top-k")
def main(layers: int, batch_size: int, rounds: int, samplers: str) -> None:
    """Time the host's part of dense, approximate and exact decoding."""
    MODELS["narrow"] = ("llama", MODELS["llama-3.2-1b"][1] | NARROW)
    MODELS["narrow"][1]["num_hidden_layers"] = layers
    models = {
        "dense": body("narrow", 8),
        "approximate": flash("narrow", 8, exact=False),
        "exact": flash("narrow", 8, exact=True),
    }

    def choose(head: object, settings: object, kept: coupled.Kept, noise: object):
        return zeros(kept.masses)

    table = [["us a token", *models, "approximate - dense", "exact - dense"]]
    for name in samplers.split(","):
        with (
            as_on_a_gpu(),
            patch.object(kernels, "lowest", zeros),
            patch.object(coupled, "choose", choose),
        ):
            found = speeds(models, name, rounds, batch_size, time.thread_time)
        row = [name, *(f"{1e6 * mean(each):.0f}" for each in found.values())]
        for way in ("approximate", "exact"):
            pairs = zip(found[way], found["dense"], strict=True)
            more = [1e6 * (a - b) for a, b in pairs]
            low, _, high = quartiles(more)
            row.append(f"{mean(more):.0f} ({low:.0f} to {high:.0f})")
        table.append(row)
    click.echo(markdown_table(table))


if __name__ == "__main__":
    main()
