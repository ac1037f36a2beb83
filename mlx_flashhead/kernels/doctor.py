"""What the kernels do on this machine, for a bug report: ``mlx_flashhead.doctor``."""

import importlib
import json
import platform
import time
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from . import backend

KERNELS = ("centroid_logits", "select_probes", "probe_logits", "blocks", "draft")


def report(run: bool = True) -> dict[str, Any]:
    """Device, versions, back-end and the state of each kernel.

    Args:
        run (bool): Run every kernel next to its plain reference, on small
          inputs. On a machine without a GPU there is nothing to run.

    Returns:
        dict: ``device``, ``backend``, ``versions``, ``kernels`` (what this process
        has used so far) and, after a run, ``self_test`` (threads per threadgroup and
        milliseconds, compilation included, or what went wrong). On Metal also
        ``bounds_registers``: whether kernels can tell the compiler of their threads.
    """
    result: dict[str, Any] = {
        "device": backend.device_name(),
        "machine": platform.platform(),
        "backend": backend.kind(),
        "versions": {"python": platform.python_version(), "mlx": backend.mlx_version()},
        "kernels": {name: state.words for name, state in backend.states.items()},
    }
    if backend.kind() == "metal":
        result["bounds_registers"] = backend.bounds_registers()
    for package in ("mlx-flashhead", "mlx-lm"):
        try:
            result["versions"][package] = version(package)
        except PackageNotFoundError:
            result["versions"][package] = "not installed"
    if run and backend.kind() != "plain":
        result["self_test"] = self_test()
    return result


def self_test(brief: bool = False) -> dict[str, str]:
    """Run every case of each kernel next to its plain reference: what came of it.

    Args:
        brief (bool): Only a few of them, as for a slow tool.
    """
    result = {}
    for name in KERNELS:
        kernel = importlib.import_module(f".{name}", __package__)
        for case in kernel.CASES[:: 5 if brief else 1]:
            begin = time.perf_counter()
            most = kernel.largest(case)
            state = backend.attempt(most, partial(kernel.check, case))
            spent = 1e3 * (time.perf_counter() - begin)
            took = f", {spent:.0f} ms" if state.threads else ""
            result[f"{name}: {_described(case)}"] = state.words + took
    return result


def _described(case: Any) -> str:
    """A case by what differs from the usual, as ``K 300, dtype float16``."""
    usual = case._field_defaults
    return ", ".join(
        f"{name} {backend.short(value)}"
        for name, value in case._asdict().items()
        if name not in usual or str(value) != str(usual[name])
    )


def describe() -> str:
    """One line: the device and the versions."""
    checked = report(run=False)
    versions = ", ".join(f"{k} {v}" for k, v in checked["versions"].items())
    return f"{checked['device']} ({checked['backend']}), {versions}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(as_json: bool) -> None:
    """Check the kernels on this machine and print a report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        checked = report()
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
    main()
