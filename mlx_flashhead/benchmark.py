"""``mlx_flashhead.benchmark``: dense heads and FlashHead on one body, in turn."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

import click
from tqdm import tqdm

from .benchmarking import conditions, loading, report
from .benchmarking.competitors import HEADS, check, heads, other
from .benchmarking.energy import meter
from .benchmarking.latency import spread
from .benchmarking.matrix import SAMPLERS, Cell, Row, cells, limits, measure, n_runs
from .cli import Listed, check_outputs, one_line_errors
from .compute.device import blas_hint, on_gpu
from .generate import _check_exists


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


@click.command(cls=_Command)
@click.option("--model", required=True, help="A converted folder, or a hub id of one.")
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
    help="Of 16 (unquantized), 8, 4 and flash.  [default: all]",
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
        everything: ``--all``.
        json_path: ``--json``.
        command: The command line, for the footer.

    Raises:
        ValueError: An option does not fit, or a model has no FlashHead; one line.
        RuntimeError: A folder does not open in a process of its own.
    """
    for option, path in (("model", model), *(("against", a) for a in against)):
        _check_exists(option, path)
    check_outputs({"--json": json_path, "--markdown": markdown, "--plot": plot})
    bounds = limits(quick)
    chosen, left = cells(batch_sizes, prompt_tokens, None if everything else bounds)
    max_tokens, repeats = max_tokens or bounds.max_tokens, repeats or bounds.repeats
    seen = dict.fromkeys([*conditions.missing(energy), *conditions.warnings()])
    for warning in seen:
        click.echo(f"Warning: {warning}", err=True)
    check(model)
    # Before this process fills the memory.
    opened = _loading(model, against, 1 if quick else repeats) if load else []
    competitors, note = heads(model, kinds, n_probes)
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
        for cell, found in measure(
            competitors, chosen, samplers, max_tokens, repeats, power, bar.update
        ):
            rows += found
            section = f"## {str(cell).capitalize()}\n\n{report.cell_table(found)}"
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
    model: str, against: tuple[str, ...], repeats: int
) -> list[report.LoadRow]:
    """How long the model and those it is compared with take to open."""
    ways = {"stock": "dense, mlx_lm.load", "flash": "FlashHead, mlx_flashhead.load"}
    if not on_gpu():
        ways["dense"] = "dense in float32, mlx_flashhead.load"
    found = loading.in_turn([model], list(ways), repeats)
    found |= loading.in_turn(list(against), ["flash"], repeats)
    rows: list[report.LoadRow] = []
    for (folder, way), each in found.items():
        name = f"{Path(folder).name}, {ways[way]}" if folder == model else folder
        rows.append({"name": name, "seconds": spread(e["seconds"] for e in each)})
    return rows


if __name__ == "__main__":
    main(prog_name="mlx_flashhead.benchmark")
