"""``mlx_flashhead.tune``: how long decode steps take here, and what is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import mlx.nn as nn
from mlx_lm.sample_utils import make_sampler

from .benchmarking.report import markdown_table
from .cli import HELP, check_exists, flashhead_option, one_line_errors
from .compute.device import blas_hint
from .integration.locate import slot_of
from .integration.samplers import read_sampler
from .integration.slots import FlashLinear
from .integration.tuner import tuner_of, watch
from .kernels import doctor
from .load import load
from .sampling import Settings
from .tuning import Cell, Times, cost, dense_wins, forget

# One sampler of each kind.
SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temp": 0.0},
    "temperature": {"temp": 0.8},
    "top-p": {"temp": 0.8, "top_p": 0.95},
}
BATCH_SIZES = (1, 2, 4, 8, 16)


def exact_table(slot: FlashLinear, times: dict[str, Times]) -> list[list[str]]:
    """Milliseconds of exact decoding's steps, and of a token that stands, a column for
    each sampler."""
    cells = sorted({cell for some in times.values() for cell in some})
    names = {
        "stock": "dense step",
        "dense": "dense step between drafts",
        "draft": "step with a draft of {} probes",
        "verify": "last step and verification of {}",
    }
    rows = [[names[c.what].format(c.n)] for c in cells]
    for row, cell in zip(rows, cells):
        row += [_ms(some.get(cell)) for some in times.values()]
    drafts, sizes = ([c.n for c in cells if c.what == w] for w in ("draft", "verify"))
    stored = slot.head.n_probes, slot.verify_every
    for p, k in [
        (p, k) for p in drafts for k in sizes if stored[0] == p or stored[1] == k
    ]:
        row = [f"a token, {p} probes, {k} at once"]
        for some in times.values():
            known = {Cell("draft", p), Cell("verify", k)} <= some.keys()
            stands = watch(slot, some).acceptance(p)
            row.append(_ms(cost(some, p, k, stands) if known else None))
        rows.append(row)
    return [["ms", *times], *rows]


def choices(slot: FlashLinear, times: dict[str, Times]) -> list[str]:
    """What is chosen for each sampler, in words."""
    found = []
    for name, some in times.items():
        plan = watch(slot, some).choice
        words = f"{plan.n_probes} probes, {plan.verify_every} at once"
        gain = some[Cell("stock", 1)] / plan.seconds
        how = "dense" if plan.dense else f"{words}: {gain:.2f} times dense"
        found.append(f"{name}: {how}")
    return found


def batch_table(times: dict[str, Times]) -> list[list[str]]:
    """Milliseconds of a step of a batch, by mlx-lm's dense head and among
    candidates."""
    table = [["sequences", *(f"{name}: dense / approximate, ms" for name in times)]]
    for n in BATCH_SIZES:
        row = [str(n)]
        for some in times.values():
            both = [_ms(some.get(Cell(what, n))) for what in ("stock", "approximate")]
            wins = dense_wins(some, n)
            how = "" if wins is None else ", dense" if wins else ", approximate"
            row.append(f"{' / '.join(both)}{how}")
        table.append(row)
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def measured(
    slot: FlashLinear, model: nn.Module, seconds: float
) -> tuple[dict[str, Times], list[list[str]]]:
    """Times of a model's steps by sampler, what was missing measured now, and the table
    of them."""
    tuner = tuner_of(slot)
    tuner.seconds, tuner.say = seconds, lambda line: None
    found: dict[str, Times] = {}
    for name, options in SAMPLERS.items():
        sampler = make_sampler(**options)
        settings = read_sampler(sampler) or Settings()
        if slot.exact:
            times = tuner.exact(slot, model, settings, sampler, complete=True)
        else:
            times = tuner.batches(slot, model, settings, sampler, BATCH_SIZES)
        if times:
            found[name] = times
    assert slot.origin is not None  # load() has set it
    if not found:
        return found, []
    if slot.exact:
        return found, exact_table(slot, found)
    return found, batch_table(found)


@click.command(context_settings=HELP)
@click.option("--model", required=True, help="A converted folder, or a hub id of one.")
@click.option(
    "--exact/--approximate",
    default=True,
    help="Which decoding.  [default: exact]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.01),
    default=5.0,
    show_default=True,
    help="What measuring a sampler, or a batch size of it, may take.",
)
@click.option("--reset", is_flag=True, help="Forget what was measured of this model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@flashhead_option
def main(
    model: str,
    exact: bool,
    seconds: float,
    reset: bool,
    as_json: bool,
    flashhead: str | None,
) -> None:
    """Show how long a model's decode steps take on this device, and what is chosen.

    What was not measured before is measured now, and kept for all commands.
    """
    if message := blas_hint():
        click.echo(message, err=True)
    with one_line_errors():
        check_exists("model", model)
        loaded, _ = load(model, exact=exact, lazy=reset, flashhead=flashhead)
        slot = slot_of(loaded)
        if slot is None or slot.origin is None:
            raise ValueError(
                f"--model {model} has no FlashHead, or MLX_FLASHHEAD=0 switches it off"
            )
        if reset:
            n = forget(slot.origin.sha256)
            click.echo(f"Forgot {n} measurements." if n else "Nothing was measured.")
            return
        times, table = measured(slot, loaded, seconds)
        if not times:
            raise ValueError(
                f"--model {model} cannot be measured: its steps take longer than "
                f"--seconds {seconds:g}, or its prompt cache cannot be rolled back"
            )
    if as_json:
        steps = {
            name: {f"{cell.what} {cell.n}": s for cell, s in some.items()}
            for name, some in times.items()
        }
        click.echo(json.dumps({"seconds": steps}, indent=2))
        return
    click.echo(f"{Path(model).name} on {doctor.describe()}\n")
    click.echo(markdown_table(table))
    if exact:
        acceptance = slot.origin.draft.acceptance
        click.echo(
            f"\nOf a token: where {100 * acceptance:.1f} % of the drafts stand, as the "
            "converter expects of the stored probes; with half of them twice as many "
            "fall. Fastest:"
        )
        for line in choices(slot, times):
            click.echo(f"  {line}")


if __name__ == "__main__":
    main(prog_name="mlx_flashhead.tune")
