"""Energy of the device while it decodes, where the device counts it.

Apple's chips tell theirs through ``zeus-apple-silicon``, which needs no root, NVIDIA's
GPUs through ``nvidia-ml-py``: two packages of the extra ``bench``.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import mlx.core as mx
import numpy as np

# Seconds between readings.
INTERVAL = 0.05

# Gives the joules since some moment.
Counter = Callable[[], float]


class Meter:
    """Reads a counter while it is open.

    Args:
        note: What to say of it.
        counter: What is read; ``None`` if nothing tells.
    """

    def __init__(self, note: str, counter: Counter | None = None):
        self.note = note
        self._counter = counter
        self._readings: list[tuple[float, float]] = []

    def settle(self) -> None:
        """Wait for the readings that now is between."""
        if self._counter is not None:
            time.sleep(5 * INTERVAL)

    def joules(self, begin: float, end: float) -> float | None:
        """Energy between two moments of ``time.perf_counter``; ``None`` where the
        counter did not move three times in between, too little to tell by."""
        readings = list(self._readings)
        inside = sum(begin <= at <= end for at, _ in readings)
        if inside < 3 or readings[-1][0] < end:
            return None
        at, joules = zip(*readings)
        first, last = np.interp([begin, end], at, joules)
        return float(last - first)

    def _watch(self, counter: Counter, stop: threading.Event) -> None:
        """Note when the counter moves: some do so ten times a second only."""
        # One that fails is read no more.
        with suppress(Exception):
            while not stop.wait(INTERVAL):
                joules = counter()
                if not self._readings or joules != self._readings[-1][1]:
                    self._readings.append((time.perf_counter(), joules))


def apple_counter() -> Counter:
    """Of CPU, GPU, neural engine and memory, as far as the chip counts them."""
    from zeus_apple_silicon import AppleEnergyMonitor

    monitor = AppleEnergyMonitor()

    def joules() -> float:
        now = monitor.get_cumulative_energy()
        parts = (now.cpu_total_mj, now.gpu_mj, now.ane_mj, now.dram_mj)
        return sum(part for part in parts if part is not None) / 1e3

    return joules


def nvidia_counter() -> Counter:
    """Of the first GPU, since its driver was loaded."""
    import pynvml

    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3


def source() -> tuple[str, Callable[[], Counter]] | None:
    """Name of the package that tells the energy here, and what opens its counter."""
    if platform.system() == "Darwin":
        return "zeus-apple-silicon", apple_counter
    if mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu:
        return "nvidia-ml-py", nvidia_counter
    return None


@contextmanager
def meter(enabled: bool = True) -> Iterator[Meter]:
    """A meter that runs within the ``with`` block, where energy can be told."""
    available = source() if enabled else None
    if available is None:
        yield Meter("Energy: left out; this system does not tell it.")
        return
    name, opened = available
    try:
        counter = opened()
        counter()
    # Each package has errors of its own.
    except Exception as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        yield Meter(f"Energy: left out; {name} does not tell it ({reason}).")
        return
    meter = Meter(f"Energy: of the whole device, from {name}.", counter)
    stop = threading.Event()
    thread = threading.Thread(target=meter._watch, args=(counter, stop), daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        stop.set()
        thread.join(1)
