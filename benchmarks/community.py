"""Results from users' machines: take them in, check them, and write their page.

    python benchmarks/community.py add PASTED.md
    python benchmarks/community.py check
    python benchmarks/community.py page

``add`` takes what ``mlx_flashhead.benchmark --markdown`` wrote, or an issue in which
its end was pasted, and keeps the record in ``benchmarks/community/``. ``page`` writes
``docs/community.md`` and, once there are records, its picture. Needs jsonschema, and
matplotlib for the picture: both are in the extra ``test``.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import click
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from mlx_flashhead.benchmarking.community import FENCE
from mlx_flashhead.benchmarking.report import markdown_table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks/community"
PAGE, PICTURE = ROOT / "docs/community.md", ROOT / "docs/community.svg"
# Where one file ends that somebody pasted by mistake.
MAX_CHARACTERS = 1 << 20
# Kinds of heads, as the page names them; the rest of a record's rows stays in its file.
COLUMNS = {
    "16": "dense, as is",
    "8": "dense 8-bit",
    "4": "dense 4-bit",
    "flash": "approximate",
    "exact": "exact",
}


@cache
def validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads((FOLDER / "schema.json").read_text()))


def read(text: str) -> dict[str, Any]:
    """The record in a pasted text, or in a file that is nothing but one.

    Raises:
        ValueError: There is none, or its figures cannot be; one line.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS} characters")
    found = re.search(rf"{re.escape(FENCE)}\s*\n(.*?)\n```", text, re.S)
    if found is None and not text.lstrip().startswith("{"):
        raise ValueError(
            f"it has no block that begins with {FENCE}: paste the end of what "
            "mlx_flashhead.benchmark --markdown wrote"
        )
    try:
        record = json.loads(found[1] if found else text, parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"it is not JSON: {e}") from None
    if wrong := best_match(validator().iter_errors(record)):
        message = " ".join(wrong.message.split())[:200]
        raise ValueError(f"{wrong.json_path}: {message}")
    for i, row in enumerate(record["rows"]):
        median, least, most = row["tokens_per_second"]
        if not least <= median <= most:
            raise ValueError(f"$.rows[{i}]: the median is outside of its extremes")
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def name_of(record: dict[str, Any]) -> str:
    """File name of a record: what it is of, and a digest of all of it."""
    text = json.dumps(record, sort_keys=True)
    words = f"{record['device']}-{record['model']}-{record['date']}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^a-z0-9.]+', '-', words.lower()).strip('-')}-{digest}.json"


def records(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """What is kept, by device, model and date.

    Raises:
        ValueError: A file is not a record, or not named as its content asks.
    """
    found = []
    for file in folder.glob("*.json"):
        if file.name == "schema.json":
            continue
        try:
            record = read(file.read_text("utf-8"))
        except (ValueError, OSError) as e:
            raise ValueError(f"{file}: {e}") from None
        if file.name != (name := name_of(record)):
            raise ValueError(f"{file}: changed since it was added; its name is {name}")
        found.append(record)
    return sorted(found, key=lambda r: (r["device"], r["model"], r["date"]))


def table(found: list[dict[str, Any]]) -> str:
    """One sequence and a short prompt: tokens per second by head."""
    lines = [["device", "model", "sampler", *COLUMNS.values(), "MLX", "date"]]
    for record in found:
        single = [r for r in record["rows"] if r["batch_size"] == 1]
        shortest = min((r["prompt_tokens"] for r in single), default=0)
        for sampler in dict.fromkeys(r["sampler"] for r in single):
            speed = {
                r["kind"]: f"{r['tokens_per_second'][0]:.1f}"
                for r in single
                if (r["sampler"], r["prompt_tokens"]) == (sampler, shortest)
            }
            memory = record["memory_gb"]
            size = f", {memory} GB" if memory and record["backend"] != "CPU" else ""
            busy = " *" if record["warnings"] else ""
            lines.append(
                [f"{record['device']}{size}{busy}", record["model"], sampler]
                + [speed.get(kind, "-") for kind in COLUMNS]
                + [record["versions"].get("mlx", "-"), record["date"]]
            )
    return markdown_table(lines, left=3)


def page(found: list[dict[str, Any]]) -> str:
    """The page, whole."""
    if not found:
        results = (
            "There are none yet: nobody has run this on a Mac and shared it. What is\n"
            "predicted is in [benchmarks/RESULTS.md](../benchmarks/RESULTS.md).\n\n"
            "![Predicted, not measured: tokens per second](pictures/predicted.svg)"
        )
    else:
        results = (
            "Tokens per second of one sequence after the shortest prompt measured, "
            "medians. A star marks a machine that was busy, hot or on battery; spreads "
            "and the rest are in the files.\n\n"
            f"![Tokens per second, dense and with FlashHead]({PICTURE.name})\n\n"
            f"{table(found)}"
        )
    return f"{TEXT}\n{results}\n"


TEXT = """# Results from users' machines

Written by `benchmarks/community.py` from the files in
[benchmarks/community](../benchmarks/community/schema.json).

## Share yours

With the machine plugged in and idle, a few minutes:

```bash
mlx_flashhead.benchmark --model FOLDER --quick --markdown results.md
```

`results.md` ends with a block of JSON: what was measured, the chip, the versions, and
nothing of you or your files but the model's name. Paste it into an issue ("Results from
a machine"), whatever it says: a machine on which it does not pay is as welcome. Whoever
keeps the repository runs

```bash
python benchmarks/community.py add results.md
python benchmarks/community.py page
```

## Results
"""


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Bars by device and model, greedy, one sequence: exact and approximate over the
    fastest dense head."""
    from matplotlib.figure import Figure

    bars: list[tuple[str, dict[str, float]]] = []
    for record in found:
        speed = {
            r["kind"]: r["tokens_per_second"][0]
            for r in reversed(record["rows"])
            if r["batch_size"] == 1 and r["sampler"] == "greedy"
        }
        dense = max((v for k, v in speed.items() if k.isdigit()), default=None)
        if dense is not None:
            shown = {k: v / dense for k, v in speed.items() if k in ("flash", "exact")}
            bars.append((f"{record['device']}\n{record['model']}", shown))
    figure = Figure((7, 1.2 + 0.7 * max(1, len(bars))), layout="constrained")
    axes = figure.subplots()
    for i, (_, shown) in enumerate(bars):
        for j, kind in enumerate(("exact", "flash")):
            axes.barh(
                *(i + 0.36 * j - 0.18, shown.get(kind, 0), 0.34),
                color=f"C{j}",
                label=COLUMNS[kind] if i == 0 else None,
            )
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.axvline(1, color="grey", lw=0.8)
    axes.set_xlabel("tokens per second, of the fastest dense head's (greedy)")
    axes.spines[["top", "right"]].set_visible(False)
    if bars:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


@click.group()
def main() -> None:
    """Results from users' machines."""


@main.command()
@click.argument("pasted", type=click.File(encoding="utf-8"))
def add(pasted: Any) -> None:
    """Keep the record in a text, or in the standard input ("-")."""
    try:
        record = read(pasted.read(MAX_CHARACTERS + 1))
    except ValueError as e:
        raise click.ClickException(f"{pasted.name}: {e}") from None
    path = FOLDER / name_of(record)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(path.relative_to(ROOT))


@main.command()
def check() -> None:
    """Check every record that is kept."""
    try:
        click.echo(f"{len(records())} records")
    except ValueError as e:
        raise click.ClickException(str(e)) from None


@main.command("page")
def write_page() -> None:
    """Write the page and its picture."""
    try:
        found = records()
    except ValueError as e:
        raise click.ClickException(str(e)) from None
    PAGE.write_text(page(found), encoding="utf-8")
    if found:
        draw(found, PICTURE)


if __name__ == "__main__":
    main()
