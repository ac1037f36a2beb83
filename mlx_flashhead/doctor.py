"""``mlx_flashhead.doctor``: checks the kernels on this machine."""

from __future__ import annotations

import json
import warnings

import click

from .cli import HELP
from .kernels import doctor


@click.command(context_settings=HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(as_json: bool) -> None:
    """Check the kernels on this machine and print a report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        checked = doctor.report()
    if as_json:
        click.echo(json.dumps(checked, indent=2))
        return
    for key in ("device", "machine", "backend"):
        click.echo(f"{key:10}{checked[key]}")
    if checked.get("bounds_registers") is False:
        click.echo("The compiler takes no bound on threads: large groups may not fit.")
    for package, number in checked["versions"].items():
        click.echo(f"{package:15}{number}")
    for name, state in {**checked["kernels"], **checked.get("self_test", {})}.items():
        click.echo(f"{name:72}{state}")
    click.echo(
        "Rows: kernels for affine 4, 5, 6, 8 bits and for 16; plain MLX for others."
    )
    if checked["backend"] == "plain":
        click.echo("No GPU back-end: plain MLX operations do the kernels' work.")
    elif any(not s.startswith("ok") for s in checked.get("self_test", {}).values()):
        raise click.ClickException("a kernel failed; plain MLX takes its place")


if __name__ == "__main__":
    main(prog_name="mlx_flashhead.doctor")
