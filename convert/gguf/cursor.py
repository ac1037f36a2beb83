"""Read the values of a GGUF header one after the other."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DOWNLOAD_AGAIN, error

# Far above any real model, far below what would hurt.
_MAX_COUNT = 1 << 22

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class Cursor:
    """Reads little-endian values, never past the end.

    ``what`` names the part of the file for the error message.
    """

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.at = 0

    def need(self, size: int, what: str) -> None:
        if size > len(self.data) - self.at:
            problem = f"the file ends inside its {what}"
            raise error(self.path, problem, DOWNLOAD_AGAIN)

    def take(self, size: int, what: str) -> bytes:
        self.need(size, what)
        self.at += size
        return self.data[self.at - size : self.at]

    def uint(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def count(self, smallest: int, what: str) -> int:
        """A 64-bit count of items that take ``smallest`` bytes or more each."""
        count = self.uint(8, what)
        if count > _MAX_COUNT:
            problem = f"it claims {count} items of {what}"
            raise error(self.path, problem, DOWNLOAD_AGAIN)
        self.need(count * smallest, what)
        return count

    def string(self, what: str, longest: int | None = None) -> str:
        size = self.uint(8, what)
        if longest is not None and size > longest:
            problem = f"a name in its {what} is too long"
            raise error(self.path, problem, DOWNLOAD_AGAIN)
        return self._decode(self.take(size, what), what)

    def value(self, what: str) -> Any:
        """A value after its type: a scalar, a string or an array."""
        kind = self.uint(4, what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(what)
        if kind in _SCALARS:
            return self._scalar(kind, what)
        raise error(self.path, f"its {what} has values of type {kind}")

    def _scalar(self, kind: int, what: str) -> bool | int | float:
        dtype = np.dtype(_SCALARS[kind])
        value = np.frombuffer(self.take(dtype.itemsize, what), dtype)[0]
        return bool(value) if kind == _BOOL else value.item()

    def _array(self, what: str) -> list[str] | np.ndarray:
        kind = self.uint(4, what)
        if kind == _STRING:
            return self._strings(self.count(8, what), what)
        if kind not in _SCALARS:
            raise error(self.path, f"its {what} has arrays of type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        raw = self.take(self.count(dtype.itemsize, what) * dtype.itemsize, what)
        values = np.frombuffer(raw, dtype)
        return values.astype(bool) if kind == _BOOL else values

    def _strings(self, count: int, what: str) -> list[str]:
        """Like ``string`` many times; half a million of them have to be quick."""
        size_at = struct.Struct("<Q").unpack_from
        data, size, end = self.data, len(self.data), self.at
        raw = []
        for _ in range(count):
            start = end + 8
            end = start + size_at(data, end)[0] if start <= size else start
            if end > size:
                self.need(end, what)
            raw.append(data[start:end])
        self.at = end
        return [self._decode(text, what) for text in raw]

    def _decode(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            problem = f"its {what} has text that is not UTF-8"
            raise error(self.path, problem) from None
