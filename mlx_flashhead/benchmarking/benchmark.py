"""A benchmark whole: the heads, the matrix of runs, loading, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import click
from tqdm import tqdm

from ..cli import check_exists, check_outputs
from ..compute.device import on_gpu
from . import community, conditions, loading, report
from .competitors import check, heads, other
from .energy import meter
from .latency import spread
from .matrix import Cell, Row, cells, limits, measure, n_runs


def benchmark(
    model: str,
    against: tuple[str, ...],
    kinds: tuple[str, ...],
    samplers: tuple[str, ...],
    prompt_tokens: tuple[int, ...] | None,
    batch_sizes: tuple[int, ...] | None,
    max_tokens: int | None,
    repeats: int | None,
    n_probes: int | None,
    verify_every: int | None,
    exact: bool | None,
    flashhead: str | None,
    quick: bool,
    everything: bool,
    energy: bool,
    load: bool,
    json_path: str | None,
    markdown: str | None,
    plot: str | None,
    command: str,
) -> None:
    """What the command does; its options by their names.

    Args:
        kinds: Of the heads, as ``--heads`` names them.
        exact: Whether of exact and approximate FlashHeads only the one or the other.
        everything: ``--all``.
        json_path: ``--json``.
        command: The command line, for the footer.

    Raises:
        ValueError: An option does not fit, or a model has no FlashHead; one line.
        RuntimeError: A folder does not open in a process of its own.
    """
    for option, path in (("model", model), *(("against", a) for a in against)):
        check_exists(option, path)
    check_outputs({"--json": json_path, "--markdown": markdown, "--plot": plot})
    bounds = limits(quick)
    chosen, left = cells(batch_sizes, prompt_tokens, None if everything else bounds)
    max_tokens, repeats = max_tokens or bounds.max_tokens, repeats or bounds.repeats
    seen = dict.fromkeys([*conditions.missing(energy), *conditions.warnings()])
    for warning in seen:
        click.echo(f"Warning: {warning}", err=True)
    check(model, flashhead)
    # Before this process fills the memory.
    opened = []
    if load:
        opened = _loading(model, against, 1 if quick else repeats, flashhead)
    other_one = None if exact is None else "flash" if exact else "exact"
    kinds = tuple(kind for kind in kinds if kind != other_one)
    if not kinds:
        raise ValueError("--heads names only what --exact/--approximate leaves out")
    competitors, note = heads(model, kinds, n_probes, verify_every, flashhead)
    for name in against:
        try:
            competitors.append(other(name))
        except (ValueError, OSError, KeyError, RuntimeError) as e:
            raise ValueError(f"--against {name}: {e}") from e

    machine = report.machine()
    title = f"{Path(model).name} on {machine['device']}"
    text = [f"# {title}"]
    notes = [
        note,
        f"Medians of {repeats} runs in turn, {max_tokens} tokens each, the first token "
        "apart. Head time: from hidden state to token, measured alone; its share is of "
        "the time of a decode step. Peak memory: of a model with this head alone. "
        "top-p is 0.95 at temperature 0.8.",
    ]
    if against:
        notes.append("Other models have their own bodies, tokenizers and texts.")
    if left:
        notes.append(f"Left out on this device: {_listed(left)} (--all: nothing).")
    click.echo(f"{title}\n")
    n = n_runs(len(competitors), len(chosen), len(samplers), repeats)
    rows: list[Row] = []
    with meter(energy) as power, _bar(n) as bar:
        for cell, openings in measure(
            competitors, chosen, samplers, max_tokens, repeats, power, bar.update
        ):
            rows += openings
            section = f"## {str(cell).capitalize()}\n\n{report.cell_table(openings)}"
            text.append(section)
            bar.clear()
            click.echo(f"{section}\n")
            seen |= dict.fromkeys(conditions.warnings(before=False))
        if energy:
            notes.append(power.note)
    if load:
        text.append(f"## Load\n\n{report.load_table(opened)}")
        notes.append("Load: in a new process, the disk's cache warm, imports apart.")
        click.echo(f"{text[-1]}\n")
    notes += conditions.command_buffers()
    notes += [f"Warning: {warning}." for warning in seen]
    text += ["\n\n".join(notes), report.footer(machine, command)]
    click.echo("\n\n".join(text[-2:]))

    if json_path:
        result = {
            "model": model,
            "rows": rows,
            "load": opened,
            "left_out": [cell._asdict() for cell in left],
            "notes": notes,
            "warnings": list(seen),
            "machine": machine,
            "gpu": on_gpu(),
            "command": command,
        }
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n")
    if markdown:
        shared = community.record(model, rows, machine, list(seen))
        text.append(f"To share (docs/community.md):\n\n{community.block(shared)}")
        Path(markdown).write_text("\n\n".join(text) + "\n")
    if plot:
        report.plot(rows, plot, title)


def _bar(total: int) -> tqdm[NoReturn]:
    """A bar that is moved run by run."""
    return tqdm(total=total, unit="run", leave=False, disable=None)


def _listed(cells: list[Cell]) -> str:
    """Cells by their batch sizes, as words."""
    by_batch: dict[int, list[str]] = {}
    for cell in cells:
        by_batch.setdefault(cell.batch_size, []).append(f"{cell.prompt_tokens:,}")
    parts = (f"batch {b}: {', '.join(n)}" for b, n in by_batch.items())
    return f"prompt tokens at {'; at '.join(parts)}"


def _loading(
    model: str, against: tuple[str, ...], repeats: int, flashhead: str | None
) -> list[report.LoadRow]:
    """How long the model and those it is compared with take to open."""
    ways = {"stock": "dense, mlx_lm.load", "flash": "FlashHead, mlx_flashhead.load"}
    if not on_gpu():
        ways["dense"] = "dense in float32, mlx_flashhead.load"
    openings = loading.in_turn([model], list(ways), repeats, flashhead)
    openings |= loading.in_turn(list(against), ["flash"], repeats)
    rows: list[report.LoadRow] = []
    for (folder, way), each in openings.items():
        name = f"{Path(folder).name}, {ways[way]}" if folder == model else folder
        rows.append({"name": name, "seconds": spread(e["seconds"] for e in each)})
    return rows
