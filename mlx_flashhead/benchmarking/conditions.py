"""What makes a machine slower than it is: battery, heat, other work.

Battery and load come from ``psutil``, an NVIDIA GPU's speed from ``nvidia-ml-py``, both
of the extra ``bench``; a Mac's heat from its own ``pmset``.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import mlx.core as mx

from ..compute.device import on_gpu

Ask = Callable[[list[str]], str]

# Load of others, in busy cores per core, from which on it is mentioned.
BUSY = 0.25
# What MLX reads of how long a command buffer may get.
_BUFFERS = ("MLX_MAX_MB_PER_BUFFER", "MLX_MAX_OPS_PER_BUFFER")
# Why a GPU is slowed, by the names in pynvml.
_SLOWED = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "heat, software",
    "HwThermalSlowdown": "heat, hardware",
    "HwPowerBrakeSlowdown": "power brake",
}


def ask(command: list[str]) -> str:
    """What a command prints; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def missing(energy: bool = True) -> list[str]:
    """What is done without, as packages of the extra are not installed: no line or one.

    Args:
        energy: Whether energy is asked for.
    """
    told = {"psutil": ["battery", "load"]}
    if platform.system() == "Darwin":
        told["zeus_apple_silicon"] = ["energy"] * energy
    elif mx.cuda.is_available():
        told["pynvml"] = ["whether the GPU is slowed"] + ["energy"] * energy
    left = [what for name in told if find_spec(name) is None for what in told[name]]
    if not left:
        return []
    return [f"not looked at: {', '.join(left)}; pip install 'mlx-flashhead[bench]'"]


def command_buffers() -> list[str]:
    """On Metal how MLX cuts its work into command buffers, which counts for a head
    whose table is large (docs/kernels.md): no line or one."""
    if not on_gpu() or not mx.metal.is_available():
        return []
    chosen = [f"{n}={os.environ[n]}" for n in _BUFFERS if n in os.environ]
    said = ", ".join(chosen) or "MLX_MAX_MB_PER_BUFFER is the device's default"
    return [f"MLX's command buffers: {said} (docs/kernels.md)."]


def warnings(ask: Ask = ask, before: bool = True) -> list[str]:
    """What can be seen now that makes measurements slower, a line each.

    Args:
        ask: Runs a command and gives what it prints.
        before: Whether the measurements are still to come: afterwards the load is
            their own.
    """
    conditions = []
    if find_spec("psutil") is not None:
        import psutil

        conditions += _battery(psutil)
        conditions += _load(psutil) if before else []
    if platform.system() == "Darwin":
        conditions += _mac(ask)
    if find_spec("pynvml") is not None:
        import pynvml

        conditions += _nvidia(pynvml)
    return conditions


def _battery(psutil: ModuleType) -> list[str]:
    try:
        battery = psutil.sensors_battery()
    except OSError:  # where Linux has no folder of power supplies
        return []
    unplugged = battery is not None and battery.power_plugged is False
    return ["running on battery power"] if unplugged else []


def _load(psutil: ModuleType) -> list[str]:
    busy, cores = psutil.getloadavg()[0], psutil.cpu_count() or 1
    if busy <= BUSY * cores:
        return []
    return [f"the machine is busy: load average {busy:.1f} on {cores} cores"]


def _mac(ask: Ask) -> list[str]:
    conditions = []
    therm = ask(["pmset", "-g", "therm"])
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", therm)
    if limit and int(limit[1]) < 100:
        conditions.append(
            f"thermal pressure: the CPU is held to {limit[1]} % of its speed"
        )
    level = re.search(r"thermal warning level:?\s*(?:=\s*)?(\d+)", therm, re.I)
    if level and int(level[1]) > 0:
        conditions.append(f"thermal pressure: warning level {level[1]}")
    if re.search(r"\b(low)?powermode\s+1\b", ask(["pmset", "-g"])):
        conditions.append("low power mode is on")
    return conditions


def _nvidia(pynvml: ModuleType) -> list[str]:
    conditions = []
    try:
        pynvml.nvmlInit()
        for i in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(i)
            reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
            bits = {n: getattr(pynvml, f"nvmlClocksEventReason{n}") for n in _SLOWED}
            why = [text for n, text in _SLOWED.items() if reasons & bits[n]]
            if why:
                conditions.append(f"GPU {i} is slowed: {', '.join(why)}")
    except pynvml.NVMLError:  # there is no GPU, or its driver does not tell
        pass
    return conditions
