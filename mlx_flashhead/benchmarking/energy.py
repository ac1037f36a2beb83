"""Power of the whole device while it decodes, where the system tells it.

macOS tells it through ``powermetrics``, to root only: it is asked by ``sudo -n``, which
never waits for a password. NVIDIA GPUs tell theirs through ``nvidia-smi``.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import mlx.core as mx

# Between samples, in milliseconds.
INTERVAL = 100

# A line of such a tool, and when it came, by ``time.perf_counter``.
Line = tuple[float, str]

_ELAPSED = re.compile(r"Sampled system activity .*\(([\d.]+)ms elapsed\)")
_POWER = re.compile(r"^Combined Power \(.*\): ([\d.]+) (m?W)\s*$")
_PRESSURE = re.compile(r"^Current pressure level: (\w+)")
_PART = re.compile(r"^(CPU|GPU|ANE) Power: ([\d.]+) (m?W)\s*$")


@dataclass(frozen=True)
class Sample:
    """Mean power over an interval: its begin and end in seconds, and watts."""

    begin: float
    end: float
    watts: float


Parse = Callable[[Iterable[Line]], Iterator[Sample]]


def read_powermetrics(lines: Iterable[Line]) -> Iterator[Sample]:
    """Samples of ``powermetrics --samplers cpu_power``, from lines and when they came.

    The line "Combined Power" has all of the chip. Versions without it have CPU, GPU
    and ANE apart; of a part that is named twice in a sample the last line counts.
    """
    elapsed, came, combined = None, 0.0, None
    parts: dict[str, float] = {}

    def sample() -> Iterator[Sample]:
        watts = combined if combined is not None else sum(parts.values())
        if elapsed is not None and (combined is not None or parts):
            yield Sample(came - elapsed, came, watts)

    for now, line in lines:
        if header := _ELAPSED.search(line):
            yield from sample()
            # The header is printed when its interval is over.
            elapsed, came, combined = float(header[1]) / 1e3, now, None
            parts = {}
        elif power := _POWER.match(line):
            combined = _watts(power[1], power[2])
        elif part := _PART.match(line):
            parts[part[1]] = _watts(part[2], part[3])
    yield from sample()


def read_nvidia(lines: Iterable[Line]) -> Iterator[Sample]:
    """Samples of ``nvidia-smi --query-gpu=power.draw --format=csv,noheader,nounits``;
    each stands for the time since the one before it."""
    before = None
    for now, line in lines:
        try:
            watts = float(line)
        except ValueError:
            continue
        if before is not None:
            yield Sample(before, now, watts)
        before = now


def _watts(number: str, unit: str) -> float:
    return float(number) / (1e3 if unit == "mW" else 1)


def joules(samples: Iterable[Sample], begin: float, end: float) -> float | None:
    """Energy in joules from ``begin`` to ``end``: the mean power of the samples in
    between, times the time. ``None`` where they cover less than half of it."""
    covered = energy = 0.0
    for s in samples:
        shared = min(s.end, end) - max(s.begin, begin)
        if shared > 0:
            covered += shared
            energy += shared * s.watts
    if covered <= 0 or covered < 0.5 * (end - begin):
        return None
    return energy / covered * (end - begin)


class Meter:
    """Collects samples while it is open.

    Args:
        source: Where they come from; ``None`` if nothing tells.
        note: What to say of it.
        parse: Makes samples of the source's lines; ``None`` if there are none.
    """

    def __init__(self, source: str | None, note: str, parse: Parse | None = None):
        self.source, self.note = source, note
        self._parse = parse
        self._lines: list[Line] = []

    def samples(self) -> list[Sample]:
        """What was sampled until now."""
        if self._parse is None:
            return []
        time.sleep(2e-3 * INTERVAL)  # for the sample that now is in
        return list(self._parse(list(self._lines)))

    def warnings(self) -> list[str]:
        """What powermetrics says of heat."""
        levels = (_PRESSURE.match(line) for _, line in list(self._lines))
        worse = dict.fromkeys(m[1] for m in levels if m and m[1] != "Nominal")
        return [f"thermal pressure: {level}" for level in worse]

    def _collect(self, stream: Iterable[str]) -> None:
        with suppress(ValueError):  # closed
            for line in stream:
                self._lines.append((time.perf_counter(), line))


def command() -> tuple[str, list[str], Parse] | None:
    """Name, command line and parser of what tells the power here."""
    if platform.system() == "Darwin":
        words = ["powermetrics", "--samplers", "cpu_power,thermal", "-i", str(INTERVAL)]
        words += ["--buffer-size", "1"]
        sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
        return "powermetrics", [*sudo, *words], read_powermetrics
    if mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu:
        words = ["nvidia-smi", "--query-gpu=power.draw", "-i", "0", "-lms"]
        words += [str(INTERVAL), "--format=csv,noheader,nounits"]
        return "nvidia-smi", words, read_nvidia
    return None


@contextmanager
def meter(wanted: bool = True) -> Iterator[Meter]:
    """A meter that runs within the ``with`` block, where power can be told."""
    found = command() if wanted else None
    if found is None:
        yield Meter(None, "Energy: left out; this system does not tell it.")
        return
    name, words, parse = found
    meter = Meter(name, f"Energy: of the whole device, from {name}.", parse)
    try:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        yield Meter(None, f"Energy: left out; {name} is not there.")
        return
    lines = process.stdout
    assert lines is not None  # a pipe was asked for
    thread = threading.Thread(target=meter._collect, args=(lines,), daemon=True)
    thread.start()
    try:
        time.sleep(10e-3 * INTERVAL)
        if process.poll() is not None or not meter._lines:
            hint = "; allow it by sudo -v first" if name == "powermetrics" else ""
            yield Meter(None, f"Energy: left out; {name} gives none here{hint}.")
        else:
            yield meter
    finally:
        # A process of root's cannot be ended by us, but by a closed pipe.
        with suppress(PermissionError):
            process.terminate()
        thread.join(1)
        with suppress(ValueError, OSError):
            lines.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
