"""What was measured, in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import kernels
from ..compute.device import blas_hint
from ..folder.cache import cache_folder, write
from ..kernels.backend import device_name, mlx_version
from .times import WHATS, Cell, Times


class Store:
    """Times of one head, as it decodes, on the present device.

    They are kept by what they depend on: device, back-end, BLAS, versions of MLX and of
    this package, the head's folder and how it decodes. A cache that cannot be read or
    written is done without.

    Args:
        sha256: Digest of the head's section.
        decoding: How it decodes.
        what: What times depend on besides.
    """

    def __init__(self, sha256: str, decoding: str, what: str = ""):
        self._about = {
            "device": device_name(),
            "kernels": kernels.kind(),
            "slow_blas": blas_hint() is not None,
            "mlx": mlx_version(),
            "mlx_flashhead": _own_version(),
            "section": sha256,
            "decoding": decoding,
            "what": what,
        }
        text = json.dumps(self._about, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()
        self.file = _folder() / f"{sha256[:16]}-{name[:16]}.json"

    def read(self) -> dict[str, dict[Cell, float]]:
        """Times by the name of a group of samplers."""
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            if stored["about"] != self._about:
                return {}
            return {
                group: {_cell(name): _seconds(s) for name, s in times.items()}
                for group, times in stored["seconds"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def add(self, group: str, times: Times) -> dict[str, dict[Cell, float]]:
        """Keep times; what other processes have kept meanwhile stays. Returns all."""
        found = self.read()
        found.setdefault(group, {}).update(times)
        seconds = {
            name: {f"{cell.what} {cell.n}": s for cell, s in sorted(some.items())}
            for name, some in found.items()
        }
        with contextlib.suppress(OSError):
            write(self.file, json.dumps({"about": self._about, "seconds": seconds}))
        return found


def forget(sha256: str) -> int:
    """Forget what was measured of a head, on whatever device; how many files had it."""
    files = list(_folder().glob(f"{sha256[:16]}-*.json"))
    for file in files:
        file.unlink(missing_ok=True)
    return len(files)


def _folder() -> Path:
    return cache_folder() / "measured"


def _cell(name: str) -> Cell:
    what, n = name.split(" ")
    for known in WHATS:
        if what == known:
            return Cell(known, int(n))
    raise ValueError(f"{what!r} is not known")


def _seconds(value: object) -> float:
    if not isinstance(value, float) or not 0 < value < 1e6:
        raise ValueError(f"{value!r} is no time")
    return value


def _own_version() -> str:
    try:
        return version("mlx-flashhead")
    except PackageNotFoundError:
        return ""
