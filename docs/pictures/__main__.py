"""Draw the pictures of the documentation, all or those that are named.

    python docs/pictures [--folder FOLDER] [NAME ...]

Needs matplotlib. (demo.svg is a recording: recording.py.)
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import click

HERE = Path(__file__).parent
NAMES = ("retrieval", "sequence", "fidelity", "predicted", "conversion_time")


@click.command()
@click.option("--folder", default=str(HERE), help="Where to.  [default: beside this]")
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
def main(folder: str, names: tuple[str, ...]) -> None:
    """Draw the pictures of the documentation, all or those that are named."""
    # What is predicted is computed there.
    sys.path.append(str(HERE.parents[1] / "benchmarks"))
    for name in names or NAMES:
        import_module(name).draw().save(Path(folder, f"{name}.svg"))


if __name__ == "__main__":
    main()
