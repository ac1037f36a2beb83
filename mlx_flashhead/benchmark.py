"""``mlx_flashhead.benchmark``: dense heads and FlashHead on one body, in turn."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection
from typing import Any

import click

from .benchmarking.benchmark import benchmark
from .benchmarking.competitors import HEADS
from .benchmarking.matrix import SAMPLERS
from .cli import HELP, Listed, flashhead_option, one_line_errors
from .compute.device import blas_hint


def _one_of(names: Collection[str]) -> Callable[[str], str]:
    def read(word: str) -> str:
        if word not in names:
            raise ValueError(f"{word!r} is not one of {', '.join(names)}")
        return word

    return read


def _at_least(least: int) -> Callable[[str], int]:
    def read(word: str) -> int:
        if not word.isdigit() or int(word) < least:
            raise ValueError(f"{word!r} is not a whole number from {least}")
        return int(word)

    return read


class _Command(click.Command):
    """Remembers its words, to print the command that repeats a benchmark."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["words"] = list(args)
        return super().parse_args(ctx, args)


@click.command(cls=_Command, context_settings=HELP)
@click.option("--model", required=True, help="A folder, or a hub id.")
@click.option(
    "--against",
    multiple=True,
    metavar="HF_OR_DIR",
    help="Another model, whole, to compare with. Repeat the option for several.",
)
@click.option(
    "--heads",
    "kinds",
    type=Listed(_one_of(HEADS)),
    default=HEADS,
    help="Of 16 (unquantized), 8, 4, flash (approximate) and exact.  [default: all]",
)
@click.option(
    "--samplers",
    type=Listed(_one_of(SAMPLERS)),
    default=tuple(SAMPLERS),
    help="Of greedy and top-p (0.95, at temperature 0.8).  [default: both]",
)
@click.option(
    "--prompt-tokens",
    type=Listed(_at_least(2)),
    help="Lengths of the prompt.  [default: 32,512,4096]",
)
@click.option(
    "--batch-sizes",
    type=Listed(_at_least(1)),
    help="Sequences at once.  [default: 1,4,16]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=3),
    help="Tokens that each sequence decodes.  [default: 64 on a GPU, 16 on a CPU]",
)
@click.option("--repeats", type=click.IntRange(min=1), help="[default: 3]")
@click.option("--n-probes", type=click.IntRange(min=1), help="As in other commands.")
@click.option(
    "--verify-every",
    type=click.IntRange(min=1),
    help="Tokens that exact decoding verifies at once.  [default: as converted]",
)
@click.option(
    "--exact/--approximate",
    default=None,
    help="Only one of exact and flash.  [default: both]",
)
@flashhead_option
@click.option("--quick", is_flag=True, help="Only a short prompt and one sequence.")
@click.option("--all", "everything", is_flag=True, help="Leave nothing out.")
@click.option("--energy/--no-energy", default=True, help="Measure energy.")
@click.option("--load/--no-load", default=True, help="Measure the time to load.")
@click.option("--json", "json_path", metavar="OUT", help="Write all figures here.")
@click.option("--markdown", metavar="OUT", help="Write the tables here.")
@click.option("--plot", metavar="OUT.png", help="Draw tokens per second here.")
@click.pass_context
def main(ctx: click.Context, /, **options: Any) -> None:
    """Compare dense heads and FlashHead on the same body.

    Prompts and samplers are the same, runs take turns and are repeated; medians count.
    Where batch sizes or prompts are not named, a GPU is given at most 16,384 prompt
    tokens at once; a CPU one sequence of at most 512. What is left out is said.
    """
    if message := blas_hint():
        click.echo(message, err=True)
    words = ["mlx_flashhead.benchmark", *ctx.meta["words"]]
    preload = os.environ.get("LD_PRELOAD")
    command = f"LD_PRELOAD={preload} " * bool(preload) + shlex.join(words)
    with one_line_errors():
        benchmark(command=command, **options)


if __name__ == "__main__":
    main(prog_name="mlx_flashhead.benchmark")
