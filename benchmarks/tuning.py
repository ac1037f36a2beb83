"""What decoding chooses by itself against the best of all, each run in full.

    python benchmarks/tuning.py [MODEL ...]
    python benchmarks/tuning.py --folder FOLDER

Whole models of real shapes and made weights (``models.py``), or converted folders. Of
exact decoding the stored number of probes and half of it, each with every number of
positions that can be chosen, and dense decoding, are run; approximately, batches of
several sizes among candidates and densely. "Off" is by how much longer the chosen one
takes than the best in these runs. "Left alone" is decoding that measures itself, and
"stock" mlx-lm with the plain model.

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
from mlx_lm.sample_utils import make_sampler
from models import MODELS, body, flash
from samplers import SAMPLERS

from mlx_flashhead import load, patch_decoding, unpatch
from mlx_flashhead.benchmarking import decoding
from mlx_flashhead.benchmarking.report import markdown_table
from mlx_flashhead.compute.device import on_gpu
from mlx_flashhead.folder.section import Draft
from mlx_flashhead.integration.locate import slot_of
from mlx_flashhead.integration.samplers import read_sampler
from mlx_flashhead.integration.slots import FlashLinear, Origin
from mlx_flashhead.integration.tuner import tuner_of, watch
from mlx_flashhead.kernels import doctor
from mlx_flashhead.tuning import Cell, cheapest, dense_wins, kind_of

SIZES = (4, 8, 16, 32)
PROMPT_TOKENS = 32
HEADER = ["model", "sampler", "decoding", "chosen", "ms", "best", "ms", "off"]
HEADER += ["left alone, ms", "stock, ms", "measured in"]


@dataclass
class Setup:
    """A model with a head, the plain one, and how they are run."""

    name: str
    model: nn.Module
    plain: nn.Module
    prompts: Callable[[int], list[list[int]]]
    options: dict[str, Any]
    tokens: int
    repeats: int
    clock: Callable[[], float]

    @property
    def slot(self) -> FlashLinear:
        return slot_of(self.model)

    def seconds(self, n: int = 1, stock: bool = False) -> float:
        """Of a step of n sequences, the best of all repeats."""
        unpatch() if stock else patch_decoding()
        model, found = self.plain if stock else self.model, []
        for _ in range(self.repeats + on_gpu()):
            mx.random.seed(1)
            ran = decoding.run(
                model,
                self.prompts(n),
                make_sampler(**self.options),
                self.tokens if n == 1 else max(3, self.tokens // 3),
                clock=self.clock,
            )
            found.append(ran.step)
            self.acceptance = ran.verified.acceptance
        # On a GPU the first run compiles.
        return min(found[on_gpu() :])

    def pinned(self, draft: Draft | None) -> None:
        """Decode as the slot is set to, or by what is measured."""
        self.slot.origin = None if draft is None else Origin(self.name, draft)
        if draft is not None:
            tuner_of(self.slot).clock = self.clock


def made_prompts(n: int) -> list[list[int]]:
    """Token ids for n sequences, of a model that knows no text."""
    return [[5 + i + j for j in range(PROMPT_TOKENS)] for i in range(n)]


def exact(setup: Setup, sampler: str) -> list[str]:
    """A row of the table: one sequence, decoded exactly."""
    slot, settings = setup.slot, read_sampler(make_sampler(**setup.options))
    stored = slot.head.n_probes, slot.verify_every
    ran: dict[tuple[int, int], float] = {}

    def run(way: tuple[int, int]) -> None:
        setup.pinned(None)
        slot.head.n_probes, slot.verify_every = way
        ran[way] = setup.seconds()
        slot.head.n_probes, slot.verify_every = stored

    for way in product((stored[0], stored[0] // 2), SIZES):
        run(way)
        if way == stored:
            accepted = setup.acceptance
    draft = Draft(*stored, accepted)
    setup.pinned(draft)
    cells = ("dense", 1), ("draft", stored[0]), ("verify", stored[1])
    tuner_of(slot).times[kind_of(settings)] = {
        Cell(*cell): 1e-9 if cell[0] == "dense" else 1.0 for cell in cells
    }
    ran[stored[0], 0] = setup.seconds()
    setup.pinned(draft)
    begin = setup.clock()
    times = tuner_of(slot).exact(slot, setup.model, settings)
    took = setup.clock() - begin
    chosen = stored  # as without any measurement
    if times is not None:
        plan = cheapest(times, watch(slot, times).acceptance)
        chosen = (stored[0], 0) if plan.dense else plan[:2]
        if chosen not in ran:
            run(chosen)
            setup.pinned(draft)

    def words(way: tuple[int, int]) -> str:
        return f"{way[0]} probes, {way[1]} at once" if way[1] else "dense"

    return row(setup, sampler, "exact", ran, chosen, words, 1, took)


def batch(setup: Setup, sampler: str, n: int) -> list[str]:
    """A row of the table: n sequences, decoded approximately."""
    slot, own = setup.slot, make_sampler(**setup.options)
    settings = read_sampler(own)
    draft, ran = Draft(slot.head.n_probes, 16, 1.0), {}
    for dense in (False, True):
        setup.pinned(draft)
        group = f"{kind_of(settings)}, p {slot.head.n_probes}"
        forced = {Cell("stock", n): 1e-9 if dense else 1.0, Cell("approximate", n): 0.1}
        tuner_of(slot).times[group] = forced
        ran[dense] = setup.seconds(n)
    setup.pinned(draft)
    begin = setup.clock()
    times = tuner_of(slot).batches(slot, setup.model, settings, own, [n])
    took = setup.clock() - begin
    chosen = bool(dense_wins(times, n))

    def words(dense: bool) -> str:
        return "dense" if dense else "candidates"

    many = f"approximate, {n} sequence" + "s" * (n > 1)
    return row(setup, sampler, many, ran, chosen, words, n, took)


def row(setup, sampler, what, ran, chosen, words, n, took) -> list[str]:
    best = min(ran, key=ran.__getitem__)
    alone, stock = setup.seconds(n), setup.seconds(n, stock=True)
    shown = [
        *(setup.name, sampler, what, words(chosen), f"{1e3 * ran[chosen]:.2f}"),
        *(words(best), f"{1e3 * ran[best]:.2f}"),
        f"{100 * (ran[chosen] / ran[best] - 1):.1f} %",
        *(f"{1e3 * alone:.2f}", f"{1e3 * stock:.2f}", f"{took:.2f} s"),
    ]
    every = ", ".join(f"{words(k)} {1e3 * s:.2f}" for k, s in ran.items())
    click.echo(f"{' | '.join(shown)}  ({every})")
    return shown


@click.command(context_settings={"show_default": True})
@click.argument("names", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--folder", "folders", multiple=True, help="A converted folder, instead.")
@click.option("--bits", default=8, help="Of made models.")
@click.option("--tokens", default=129, help="Of a sequence; of batches a third.")
@click.option("--repeats", default=2)
@click.option("--samplers", default="greedy,top-p", help=f"Of {', '.join(SAMPLERS)}.")
@click.option("--batch-sizes", default="1,4,16")
@click.option("--decoding", "kinds", default="exact,approximate")
@click.option("--processor-time", is_flag=True, help="Time by the processor's clock.")
@click.option("--shard", default="0/1", help="Only a part, to compile.")
def main(
    names,
    folders,
    bits,
    tokens,
    repeats,
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
        options = (SAMPLERS[sampler], tokens, repeats if parts == 1 else 1)
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
