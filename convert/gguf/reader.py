"""Open a GGUF file and check its header against its size.

Dimensions are stored innermost first, so shapes are reversed here.

``gguf.GGUFReader`` is not used: it makes an object of every element of an array, which
takes long for a vocabulary, and believes counts and lengths: a file of 49 bytes that
claims an array of 2**62 numbers keeps it busy, and taking memory, without end.
"""

from __future__ import annotations

import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from .cursor import Cursor
from .errors import DOWNLOAD_AGAIN, error, quote
from .metadata import Metadata
from .quantization import can_dequantize, floats

# Far above any real model, far below what would hurt.
_MAX_NAME = 1 << 16
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file. ``shape`` is outermost first."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GGUFFile:
    """A memory-mapped file whose metadata and tensors all lie inside it."""

    path: Path
    data: mmap.mmap
    metadata: Metadata
    tensors: dict[str, Tensor]

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor: uint8 of shape (rows, row_bytes)."""
        tensor = self.tensors[name]
        size = tensor.rows * tensor.row_bytes
        raw = np.frombuffer(self.data, np.uint8, size, tensor.offset)
        return raw.reshape(tensor.rows, tensor.row_bytes)

    def floats(self, name: str) -> np.ndarray:
        """A whole tensor as float32, in its shape; for small ones."""
        tensor = self.tensors[name]
        return floats(self.raw(name), tensor.kind).reshape(tensor.shape)


def read_file(path: Path) -> GGUFFile:
    """Map a GGUF file of version 2 or 3 and read its header.

    Raises:
        GGUFError: it cannot be opened, is not whole, or is part of a split model.
    """
    _refuse_split(path, 0)
    cursor = Cursor(path, _map(path))
    _read_version(cursor)
    tensor_count = cursor.count(24, "tensor list")
    metadata = Metadata(path, _read_metadata(cursor))
    tensors = _read_tensors(cursor, tensor_count, _alignment(metadata))
    _refuse_split(path, metadata.integer("split.count", 0, smallest=0))
    return GGUFFile(path, cursor.data, metadata, tensors)


def _refuse_split(path: Path, count: int) -> None:
    if count > 1 or re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", path.name):
        fix = "join the parts with llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        raise error(path, "it is one part of a split model", fix)


def _map(path: Path) -> mmap.mmap:
    if path.is_dir():
        raise error(path, "it is a folder", "give the .gguf file inside it")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise error(path, "there is no such file", "check the path") from None
    except ValueError:
        raise error(path, "it is empty", DOWNLOAD_AGAIN) from None
    except OSError as cause:
        problem = f"it cannot be opened ({cause.strerror})"
        raise error(path, problem, "check the path and its permissions") from cause


def _read_version(cursor: Cursor) -> None:
    if cursor.take(4, "header") != b"GGUF":
        fix = "give a file that ends in .gguf"
        raise error(cursor.path, "it is not a GGUF file", fix)
    version = cursor.uint(4, "header")
    if version not in (2, 3):
        big_endian = version and version & 0xFFFF == 0
        problem = "it is big-endian" if big_endian else f"it has version {version}"
        raise error(cursor.path, f"{problem}, and only versions 2 and 3 are read")


def _read_metadata(cursor: Cursor) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(cursor.count(13, "metadata")):
        key = cursor.string("metadata", _MAX_NAME)
        if key in values:
            raise error(cursor.path, f"its metadata has {quote(key)} twice")
        values[key] = cursor.value("metadata")
    return values


def _alignment(metadata: Metadata) -> int:
    key = "general.alignment"
    value = metadata.values.get(key, 32)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise metadata.bad(key)
    return value


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, Tensor]:
    """The tensor directory, each entry checked to lie inside the file."""
    infos = []
    for _ in range(count):
        name = cursor.string("tensor list", _MAX_NAME)
        dimensions = cursor.uint(4, "tensor list")
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            problem = f"tensor {quote(name)} has {dimensions} dimensions"
            raise error(cursor.path, problem)
        shape = tuple(cursor.uint(8, "tensor list") for _ in range(dimensions))
        kind = cursor.uint(4, "tensor list")
        infos.append((name, shape[::-1], kind, cursor.uint(8, "tensor list")))
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise error(cursor.path, f"it has {quote(name)} twice")
        if offset % alignment:
            raise error(cursor.path, f"tensor {quote(name)} is not aligned")
        tensors[name] = _tensor(cursor, name, shape, kind, start + offset)
    return tensors


def _tensor(
    cursor: Cursor, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> Tensor:
    requantize = "quantize it again to a type such as Q8_0, Q4_K_M or F16"
    try:
        quantization = GGMLQuantizationType(kind)
    except ValueError:
        problem = f"tensor {quote(name)} has the unknown type {kind}"
        raise error(cursor.path, problem, requantize) from None
    if not can_dequantize(quantization):
        problem = f"tensor {quote(name)} is {quantization.name}, which is not read"
        raise error(cursor.path, problem, requantize)
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    if min(shape) < 1 or shape[-1] % block:
        problem = f"tensor {quote(name)} has shape {shape} as {quantization.name}"
        raise error(cursor.path, problem)
    tensor = Tensor(shape, quantization, offset, shape[-1] // block * block_bytes)
    if offset + tensor.rows * tensor.row_bytes > len(cursor.data):
        raise error(cursor.path, f"it ends inside tensor {quote(name)}", DOWNLOAD_AGAIN)
    return tensor
