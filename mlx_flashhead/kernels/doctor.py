"""What the kernels do on this machine, for a bug report."""

import importlib
import platform
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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
