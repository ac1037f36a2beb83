"""What the kernels do on this machine, for a bug report: ``mlx_flashhead.doctor``."""

import importlib
import json
import platform
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click
import mlx.core as mx

from . import backend

# One check per kind of code that a kernel has: name, module, arguments of its _check.
_VARIANTS: list[tuple[str, tuple[Any, ...]]] = [
    *[("select_probes", (C, mx.float32)) for C in (300, 8000, 16_384)],
    ("select_probes", (40_000, mx.bfloat16, mx.float32)),
    *[
        ("probe_logits", (True, (dtype, 640), 16, scales, 64, bits))
        for dtype, scales in (
            (mx.float16, mx.float16),
            (mx.bfloat16, mx.float16),
            (mx.float32, mx.float32),
        )
        for bits in (4, 5, 6, 8)
    ],
    *[
        ("probe_logits", (True, (dtype, 640), 16, None, 32, 8 * dtype.size))
        for dtype in (mx.float16, mx.bfloat16, mx.float32)
    ],
    *[
        ("probe_logits", (False, (mx.bfloat16, D), m, mx.bfloat16, group_size, 8))
        for D, m, group_size in ((32, 1, 32), (896, 7, 128), (2048, 40, 32))
    ],
    ("greedy", (mx.float32, False, False)),
    ("greedy", (mx.float32, True, True)),
    ("sample", (300, mx.float32, (False, False, False))),
    ("sample", (16_384, mx.float32, (True, False, False))),
    ("sample", (40_000, mx.bfloat16, (True, True, True))),
]


def report(run: bool = True) -> dict[str, Any]:
    """Device, versions, back-end and the state of each kernel.

    Args:
        run (bool): Run every kernel next to its plain reference, on small
          inputs. On a machine without a GPU there is nothing to run.

    Returns:
        dict: ``device``, ``backend``, ``versions``, ``kernels`` (what this process
        has used so far) and, after a run, ``self_test`` (milliseconds, compilation
        included, or what went wrong).
    """
    result: dict[str, Any] = {
        "device": backend.device_name(),
        "machine": platform.platform(),
        "backend": backend.kind(),
        "versions": {"python": platform.python_version(), "mlx": backend.mlx_version()},
        "kernels": dict(backend.states),
    }
    for package in ("mlx-flashhead", "mlx-lm"):
        try:
            result["versions"][package] = version(package)
        except PackageNotFoundError:
            result["versions"][package] = "not installed"
    if run and backend.kind() != "plain":
        result["self_test"] = self_test()
    return result


def self_test(brief: bool = False) -> dict[str, str]:
    """Run each kind of kernel next to its plain reference: what came of it, by name.

    Args:
        brief (bool): Only a few of them, as for a slow tool.
    """
    chosen = [*_VARIANTS[3::5], _VARIANTS[-2]] if brief else _VARIANTS
    return {_name(kernel, args): _test(kernel, args) for kernel, args in chosen}


def _name(kernel: str, args: tuple[Any, ...]) -> str:
    return f"{kernel}{args}".replace("mlx.core.", "")


def _test(kernel: str, args: tuple[Any, ...]) -> str:
    module = importlib.import_module(f".{kernel}", __package__)
    if kernel == "probe_logits":
        stats, (dtype, D), *rest = args
        args = (stats, mx.zeros((1, D), dtype), *rest)
    begin = time.perf_counter()
    try:
        module._check(*args)
    except Exception as error:  # whatever the device's compiler or runtime says
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return f"ok, {1e3 * (time.perf_counter() - begin):.0f} ms"


def describe() -> str:
    """One line: the device and the versions."""
    checked = report(run=False)
    versions = ", ".join(f"{k} {v}" for k, v in checked["versions"].items())
    return f"{checked['device']} ({checked['backend']}), {versions}"


@click.command()
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
    for package, number in checked["versions"].items():
        click.echo(f"{package:15}{number}")
    for name, state in {**checked["kernels"], **checked.get("self_test", {})}.items():
        click.echo(f"{name:64}{state}")
    if checked["backend"] == "plain":
        click.echo("No GPU back-end: plain MLX operations do the kernels' work.")
    elif any(not s.startswith("ok") for s in checked.get("self_test", {}).values()):
        raise click.ClickException("a kernel failed; plain MLX takes its place")


if __name__ == "__main__":
    main()
