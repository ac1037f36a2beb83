"""What decoding chooses by itself against the best of all, each run in full.

    python benchmarks/tuning.py [MODEL ...]
    python benchmarks/tuning.py --folder FOLDER

Whole models of real shapes and made weights (``models.py``), or converted folders. Of
exact decoding the stored number of probes and half of it, each with every number of
positions that can be chosen, and dense decoding, are run; approximately, batches of
several sizes among candidates and densely. "Left alone" is decoding that measures
itself, and "stock" mlx-lm with the plain model. All take turns of some tokens; means of
all rounds are compared, with the quartiles of single ones. "Off" is by how much longer
the chosen one takes than the best.

MLX compiles CUDA kernels as they are first used, seconds each, and keeps them on disk:
``--shard 0/8`` to ``--shard 7/8`` side by side fill that store before the run that
counts. On a CPU that is busy with other work, ``--processor-time`` counts only this
process's own.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
from in_turn import in_turn, mean, quartiles, ratio
from mlx_lm.sample_utils import make_sampler
from models import MODELS, body, flash
from samplers import SAMPLERS

from mlx_flashhead import load, patch_decoding, unpatch
from mlx_flashhead.benchmarking import decoding
from mlx_flashhead.benchmarking.report import markdown_table
from mlx_flashhead.folder.section import Draft
from mlx_flashhead.integration.locate import slot_of
from mlx_flashhead.integration.samplers import read_sampler
from mlx_flashhead.integration.slots import FlashLinear, Origin
from mlx_flashhead.integration.tuner import tuner_of, watch
from mlx_flashhead.kernels import doctor
from mlx_flashhead.tuning import Cell, dense_wins, kind_of

SIZES = (4, 8, 16, 32)
PROMPT_TOKENS = 32
HEADER = ["model", "sampler", "decoding", "chosen", "ms", "best", "ms", "off"]
HEADER += ["left alone, ms", "stock, ms", "left alone / stock", "measured in"]


@dataclass
class Way:
    """How a model is set to decode; ``stock``: mlx-lm with the plain one."""

    origin: Origin | None = None
    n_probes: int = 0
    verify_every: int = 0
    stock: bool = False


@dataclass
class Setup:
    """A model with a head, the plain one, and how they are run."""

    name: str
    model: nn.Module
    plain: nn.Module
    prompts: Callable[[int], list[list[int]]]
    options: dict[str, Any]
    rounds: int
    turn: int
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.stored = self.slot.head.n_probes, self.slot.verify_every

    @property
    def slot(self) -> FlashLinear:
        return slot_of(self.model)

    def way(self, draft: Draft | None, *pinned: int) -> Way:
        """Decoding with so many probes and positions at once, by default as stored; by
        what is measured, where there is a draft."""
        origin = None if draft is None else Origin(self.name, draft)
        return Way(origin, *(pinned or self.stored))

    def prepare(self, way: Way) -> None:
        unpatch() if way.stock else patch_decoding()
        self.slot.origin = way.origin
        self.slot.head.n_probes, self.slot.verify_every = way.n_probes, way.verify_every
        if way.origin is not None:
            tuner_of(self.slot).clock = self.clock

    def seconds(self, ways: dict[Any, Way], n: int) -> dict[Any, list[float]]:
        """Of a step of n sequences, round by round."""
        mx.random.seed(1)
        own = make_sampler(**self.options)
        streams = {
            name: decoding.steps(
                self.plain if way.stock else self.model,
                self.prompts(n),
                own,
                self.turn * (self.rounds + 2),
            )
            for name, way in ways.items()
        }

        def prepare(name: Any) -> None:
            self.prepare(ways[name])

        found = in_turn(streams, prepare, self.rounds, self.turn, self.clock)
        for name, stream in streams.items():
            prepare(name)
            stream.close()
        return found


def made_prompts(n: int) -> list[list[int]]:
    """Token ids for n sequences, of a model that knows no text."""
    return [[5 + i + j for j in range(PROMPT_TOKENS)] for i in range(n)]


def exact(setup: Setup, sampler: str) -> list[str]:
    """A row of the table: one sequence, decoded exactly."""
    slot, own = setup.slot, make_sampler(**setup.options)
    settings = read_sampler(own)
    p, k = setup.stored
    setup.prepare(setup.way(None))
    ran = decoding.run(setup.model, setup.prompts(1), own, 4 * setup.turn)
    draft = Draft(p, k, ran.verified.acceptance)
    ways = {each: setup.way(None, *each) for each in product((p, p // 2), SIZES)}
    ways[p, 0] = setup.way(draft)
    setup.prepare(ways[p, 0])
    cells = ("stock", 1), ("dense", 1), ("draft", p), ("verify", k)
    tuner_of(slot).times[kind_of(settings)] = {
        Cell(*cell): 1e-9 if cell[0] == "stock" else 1.0 for cell in cells
    }
    ways["alone"] = setup.way(draft)
    setup.prepare(ways["alone"])
    begin = setup.clock()
    times = tuner_of(slot).exact(slot, setup.model, settings, own)
    took = setup.clock() - begin
    chosen = setup.stored  # as without any measurement
    if times is not None:
        plan = watch(slot, times).choice
        chosen = (p, 0) if plan.dense else plan[:2]
        ways.setdefault(chosen, setup.way(None, *chosen))

    def words(way: tuple[int, int]) -> str:
        return f"{way[0]} probes, {way[1]} at once" if way[1] else "dense"

    return row(setup, sampler, "exact", ways, chosen, words, 1, took)


def batch(setup: Setup, sampler: str, n: int) -> list[str]:
    """A row of the table: n sequences, decoded approximately."""
    slot, own = setup.slot, make_sampler(**setup.options)
    settings = read_sampler(own)
    draft, ways = Draft(slot.head.n_probes, 16, 1.0), {}
    for dense in (False, True):
        ways[dense] = setup.way(draft)
        setup.prepare(ways[dense])
        group = f"{kind_of(settings)}, p {slot.head.n_probes}"
        forced = {Cell("stock", n): 1e-9 if dense else 1.0, Cell("approximate", n): 0.1}
        tuner_of(slot).times[group] = forced
    ways["alone"] = setup.way(draft)
    setup.prepare(ways["alone"])
    begin = setup.clock()
    times = tuner_of(slot).batches(slot, setup.model, settings, own, [n])
    took = setup.clock() - begin
    chosen = bool(dense_wins(times, n))

    def words(dense: bool) -> str:
        return "dense" if dense else "candidates"

    many = f"approximate, {n} sequence" + "s" * (n > 1)
    return row(setup, sampler, many, ways, chosen, words, n, took)


def row(setup, sampler, what, ways, chosen, words, n, took) -> list[str]:
    ran = setup.seconds({**ways, "stock": Way(None, *setup.stored, stock=True)}, n)
    setup.prepare(setup.way(None))
    alone, stock = ran.pop("alone"), ran.pop("stock")
    best = min(ran, key=lambda way: mean(ran[way]))
    off = [100 * (a / b - 1) for a, b in zip(ran[chosen], ran[best], strict=True)]
    low, _, high = quartiles(off)
    whole = 100 * (mean(ran[chosen]) / mean(ran[best]) - 1)
    shown = [
        *(setup.name, sampler, what, words(chosen), f"{1e3 * mean(ran[chosen]):.2f}"),
        *(words(best), f"{1e3 * mean(ran[best]):.2f}"),
        f"{whole:.1f} % ({low:.1f} to {high:.1f})" if chosen != best else "0 %",
        *(f"{1e3 * mean(alone):.2f}", f"{1e3 * mean(stock):.2f}"),
        *(ratio(alone, stock), f"{took:.2f} s"),
    ]
    every = ", ".join(f"{words(way)} {1e3 * mean(s):.2f}" for way, s in ran.items())
    click.echo(f"{' | '.join(shown)}  ({every})")
    return shown


@click.command(context_settings={"show_default": True})
@click.argument("names", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--folder", "folders", multiple=True, help="A converted folder, instead.")
@click.option("--bits", default=8, help="Of made models.")
@click.option("--rounds", default=6, help="In which all take turns.")
@click.option("--turn", default=64, help="Tokens of a turn.")
@click.option("--samplers", default="greedy,top-p", help=f"Of {', '.join(SAMPLERS)}.")
@click.option("--batch-sizes", default="1,4,16")
@click.option("--decoding", "kinds", default="exact,approximate")
@click.option("--processor-time", is_flag=True, help="Time by the processor's clock.")
@click.option("--shard", default="0/1", help="Only a part, to compile.")
def main(
    names,
    folders,
    bits,
    rounds,
    turn,
    samplers,
    batch_sizes,
    kinds,
    processor_time,
    shard,
):
    """Compare what decoding chooses by itself with the best of all."""
    # What was measured before does not count.
    cache = tempfile.TemporaryDirectory()
    os.environ["MLX_FLASHHEAD_CACHE"] = cache.name
    os.environ.pop("MLX_FLASHHEAD_TUNE", None)
    click.echo(doctor.describe())
    part, parts = map(int, shard.split("/"))
    cells = [
        (name, sampler)
        for name in folders or names or MODELS
        for sampler in samplers.split(",")
    ]
    table = [HEADER]
    for name, sampler in cells[part::parts]:
        options = (SAMPLERS[sampler], rounds if parts == 1 else 1, turn)
        for kind in kinds.split(","):
            if folders:
                plain, tokenizer = load(name, dense=True)
                model, _ = load(name, exact=kind == "exact")
                prompts = partial(decoding.prompts, tokenizer, PROMPT_TOKENS)
            else:
                plain, model = body(name, bits), flash(name, bits, kind == "exact")
                prompts = made_prompts
            clock = time.process_time if processor_time else time.perf_counter
            setup = Setup(Path(name).name, model, plain, prompts, *options, clock)
            if kind == "exact":
                table.append(exact(setup, sampler))
                continue
            for n in map(int, batch_sizes.split(",")):
                table.append(batch(setup, sampler, n))
    unpatch()
    click.echo(markdown_table(table, left=4))


if __name__ == "__main__":
    main()
