"""How long a converted folder takes to open, against the same folder in stock mlx-lm.

    python benchmarks/load.py FOLDER ...
    python benchmarks/load.py --flashhead FILE MODEL ...

Every opening is a process of its own; ways and folders take turns, and the disk's cache
is warm. On a CPU mlx-flashhead computes in float32, which stock mlx-lm does not: there
"dense" (mlx_flashhead.load with the dense head) is what FlashHead is like.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlx_flashhead.benchmarking.latency import spread
from mlx_flashhead.benchmarking.loading import WAYS, in_turn

ALL = [*WAYS, *(f"{way}, lazy" for way in ("stock", "flash"))]


@click.command(context_settings={"show_default": True})
@click.argument("folders", nargs=-1, required=True)
@click.option("--repeats", default=5, help="Openings of each that count.")
@click.option("--way", "ways", multiple=True, default=ALL, help="Only these ways.")
@click.option(
    "--flashhead", help="A FlashHead of the model, where its folder has none."
)
@click.option("--json", "json_path", help="Write the figures here, too.")
def main(folders, repeats, ways, flashhead, json_path):
    """Time mlx_lm.load and mlx_flashhead.load of converted folders."""
    found = in_turn(list(folders), ways, repeats, flashhead)
    click.echo(
        "| folder | way | seconds (min to max) | x stock "
        "| without tokenizer | CPU seconds | x stock | peak MB |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for (folder, way), each in found.items():
        s = spread(e["seconds"] for e in each)
        rest = spread(e["seconds"] - e["tokenizer"] for e in each)["median"]
        plain = "stock, lazy" if way.endswith("lazy") else "stock"
        stock = found.get((folder, plain), each)
        ratio = s["median"] / spread(e["seconds"] for e in stock)["median"]
        cpu, cpu_stock = (
            spread(e["cpu_seconds"] for e in runs)["median"] for runs in (each, stock)
        )
        peak = max(e["peak_bytes"] for e in each) / 1e6
        click.echo(
            f"| {Path(folder).name} | {way} | {s['median']:.2f} ({s['min']:.2f} to "
            f"{s['max']:.2f}) | {ratio:.2f} | {rest:.2f} | {cpu:.2f} | "
            f"{cpu / cpu_stock:.2f} | {peak:.0f} |"
        )
        rows.append({"folder": folder, "way": way, **s, "ratio": ratio, "runs": each})
    if json_path:
        Path(json_path).write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
