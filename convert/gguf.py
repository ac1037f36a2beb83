"""Turn a GGUF file into a model folder that mlx-lm loads.

``read_gguf(path).write(folder)`` reads a GGUF file of architecture llama,
gemma3, qwen2 or qwen3 and writes Hugging Face weights, configuration,
tokenizer and chat template, so that ``mlx_lm.load(folder)`` works. Every
quantization that the ``gguf`` package dequantizes is accepted.

The file is memory-mapped and nothing in it is trusted: counts, lengths and
offsets are checked against the size of the file before anything is allocated,
and whatever is wrong becomes a one-line :class:`GGUFError` that names the file
and the way out.

Conventions of the format that matter here:

* dimensions are stored innermost first, so shapes are reversed on reading;
* the llama architecture stores the rows of the q and k projections interleaved
  for its rotary embedding, which is undone; the other architectures do not;
* gemma3 stores ``1 + weight`` for its norms, and mlx-lm adds the 1 itself;
* a SentencePiece tokenizer comes as pieces and scores without merges, which
  are derived again.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

__all__ = ["GGUFError", "GGUFModel", "read_gguf"]

ARCHITECTURES = ("llama", "gemma3", "qwen2", "qwen3")

_CONVERT = "convert it again from the original model with a current llama.cpp"
_DOWNLOAD = "download or copy the file again"


class GGUFError(ValueError):
    """A GGUF file that cannot be converted: one line, with the way out."""


def _error(path: Path, problem: str, fix: str) -> GGUFError:
    """A GGUFError of one line; text from the file may contain line breaks."""
    return GGUFError(" ".join(f"{path}: {problem}; {fix}".split()))


def _quote(text: Any) -> str:
    """``text`` short enough, and escaped, for an error message."""
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:76] + "...'"


# ---------------------------------------------------------------------------
# The header: metadata and tensor directory
# ---------------------------------------------------------------------------

# Far above any real model, far below what would hurt.
_MAX_COUNT = 1 << 22
_MAX_NAME = 1 << 16
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20

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


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies in the file. ``shape`` is outermost first."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


class _Cursor:
    """Reads little-endian values one after the other, never past the end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def need(self, size: int, what: str) -> None:
        if size > self.left:
            raise _error(self.path, f"the file ends inside its {what}", _DOWNLOAD)

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
            raise _error(self.path, f"it claims {count} items of {what}", _DOWNLOAD)
        self.need(count * smallest, what)
        return count

    def string(self, what: str, longest: int | None = None) -> str:
        size = self.uint(8, what)
        if longest is not None and size > longest:
            raise _error(self.path, f"a name in its {what} is too long", _DOWNLOAD)
        return self.decode(self.take(size, what), what)

    def decode(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            problem = f"its {what} has text that is not UTF-8"
            raise _error(self.path, problem, _CONVERT) from None

    def scalar(self, kind: int, what: str) -> Any:
        dtype = np.dtype(_SCALARS[kind])
        value = np.frombuffer(self.take(dtype.itemsize, what), dtype)[0]
        return bool(value) if kind == _BOOL else value.item()

    def array(self, what: str) -> list[str] | np.ndarray:
        kind = self.uint(4, what)
        if kind == _STRING:
            return self.strings(self.count(8, what), what)
        if kind not in _SCALARS:
            problem = f"its {what} has arrays of type {kind}"
            raise _error(self.path, problem, _CONVERT)
        dtype = np.dtype(_SCALARS[kind])
        raw = self.take(self.count(dtype.itemsize, what) * dtype.itemsize, what)
        values = np.frombuffer(raw, dtype)
        return values.astype(bool) if kind == _BOOL else values

    def strings(self, count: int, what: str) -> list[str]:
        """Like ``string`` many times; half a million of them have to be quick."""
        size_at, data, at, end = struct.Struct("<Q").unpack_from, self.data, self.at, 0
        out = []
        for _ in range(count):
            if at + 8 > len(data):
                end = len(data) + 1
                break
            at += 8
            end = at + size_at(data, at - 8)[0]
            if end > len(data):
                break
            out.append(data[at:end])
            at = end
        if end > len(data):
            self.need(end, what)
        self.at = at
        return [self.decode(raw, what) for raw in out]

    def value(self, what: str) -> Any:
        kind = self.uint(4, what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind in _SCALARS:
            return self.scalar(kind, what)
        raise _error(self.path, f"its {what} has values of type {kind}", _CONVERT)


def _read_header(
    path: Path, data: mmap.mmap
) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Metadata and tensor directory of a GGUF file of version 2 or 3."""
    cursor = _Cursor(path, data)
    if cursor.take(4, "header") != b"GGUF":
        raise _error(path, "it is not a GGUF file", "give a file that ends in .gguf")
    version = cursor.uint(4, "header")
    if version not in (2, 3):
        big_endian = version and version & 0xFFFF == 0
        problem = "it is big-endian" if big_endian else f"it has version {version}"
        raise _error(path, f"{problem}, and only versions 2 and 3 are read", _CONVERT)
    tensor_count = cursor.count(24, "tensor list")
    metadata = _read_metadata(cursor)
    return metadata, _read_tensors(cursor, tensor_count, _alignment(path, metadata))


def _read_metadata(cursor: _Cursor) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(13, "metadata")):
        key = cursor.string("metadata", _MAX_NAME)
        if key in metadata:
            problem = f"its metadata has {_quote(key)} twice"
            raise _error(cursor.path, problem, _CONVERT)
        metadata[key] = cursor.value("metadata")
    return metadata


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise _error(path, f"general.alignment is {_quote(value)}", _CONVERT)
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, _Tensor]:
    """The tensor directory, each entry checked to lie inside the file."""
    found = []
    for _ in range(count):
        name = cursor.string("tensor list", _MAX_NAME)
        dimensions = cursor.uint(4, "tensor list")
        if not 0 < dimensions <= _MAX_DIMENSIONS:
            problem = f"tensor {_quote(name)} has {dimensions} dimensions"
            raise _error(cursor.path, problem, _CONVERT)
        shape = [cursor.uint(8, "tensor list") for _ in range(dimensions)]
        kind = cursor.uint(4, "tensor list")
        found.append((name, tuple(shape[::-1]), kind, cursor.uint(8, "tensor list")))
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, _Tensor] = {}
    for name, shape, kind, offset in found:
        if name in tensors:
            raise _error(cursor.path, f"it has {_quote(name)} twice", _CONVERT)
        if offset % alignment:
            problem = f"tensor {_quote(name)} is not aligned"
            raise _error(cursor.path, problem, _CONVERT)
        tensors[name] = _tensor(cursor, name, shape, kind, start + offset)
    return tensors


def _tensor(
    cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> _Tensor:
    requantize = "quantize it again to a type such as Q8_0, Q4_K_M or F16"
    try:
        quantization = GGMLQuantizationType(kind)
    except ValueError:
        problem = f"tensor {_quote(name)} has the unknown type {kind}"
        raise _error(cursor.path, problem, requantize) from None
    if not _dequantizes(quantization):
        problem = f"tensor {_quote(name)} is {quantization.name}, which is not read"
        raise _error(cursor.path, problem, requantize)
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    if min(shape) < 1 or shape[-1] % block:
        problem = f"tensor {_quote(name)} has shape {shape} as {quantization.name}"
        raise _error(cursor.path, problem, _CONVERT)
    tensor = _Tensor(shape, quantization, offset, shape[-1] // block * block_bytes)
    if offset + tensor.rows * tensor.row_bytes > len(cursor.data):
        raise _error(cursor.path, f"it ends inside tensor {_quote(name)}", _DOWNLOAD)
    return tensor


@cache
def _dequantizes(kind: GGMLQuantizationType) -> bool:
    block = np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        with np.errstate(all="ignore"):
            dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


class _Metadata:
    """Typed access to the metadata, with an error that names the key."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path = path
        self.values = values

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def bad(self, key: str) -> GGUFError:
        value = self.values.get(key)
        problem = f"{key} is {_quote(value)}" if key in self else f"it lacks {key}"
        return _error(self.path, problem, _CONVERT)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.bad(key)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number of 0 or more, as short as float32 needs it."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(key)
        with np.errstate(over="ignore"):
            single = np.float32(value)
        if not np.isfinite(single) or single < 0:
            raise self.bad(key)
        return float(str(single))

    def integer(self, key: str, default: int | None = None, smallest: int = 1) -> int:
        """An integer; of an array with a value for each layer, the one value."""
        value = self.values.get(key, default)
        if isinstance(value, np.ndarray) and value.size:
            if (value != value[0]).any():
                problem = f"{key} differs between layers, which mlx-lm does not allow"
                raise _error(self.path, problem, "use a model of one layer shape")
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(key)
        if not smallest <= value < 1 << 31:
            raise self.bad(key)
        return value

    def strings(self, key: str) -> list[str]:
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.bad(key)
        return value

    def numbers(self, key: str, count: int) -> np.ndarray:
        value = self.values.get(key)
        if not isinstance(value, np.ndarray) or value.size != count:
            raise self.bad(key)
        return value


# ---------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------

_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}


def _config(meta: _Metadata, arch: str, tensors: dict[str, _Tensor]) -> dict[str, Any]:
    """The config.json without the rotary scaling and the special token ids."""
    hidden = meta.integer(f"{arch}.embedding_length")
    heads = meta.integer(f"{arch}.attention.head_count")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise _error(meta.path, "it lacks tensor 'token_embd.weight'", _CONVERT)
    layers = meta.integer(f"{arch}.block_count")
    if layers > len(tensors):
        problem = f"it lacks most of the tensors of its {layers} layers"
        raise _error(meta.path, problem, _CONVERT)
    model_type, class_name = _CLASSES[arch]
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": meta.integer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer(f"{arch}.attention.head_count_kv", heads),
        "head_dim": _head_dim(meta, arch, hidden, heads),
        "rms_norm_eps": meta.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "vocab_size": meta.integer(f"{arch}.vocab_size", embedding.shape[0]),
        "max_position_embeddings": meta.integer(f"{arch}.context_length"),
        "rope_theta": meta.number(f"{arch}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "bfloat16",
    }
    if heads % config["num_key_value_heads"]:
        raise meta.bad(f"{arch}.attention.head_count_kv")
    if config["rope_theta"] <= 1:
        raise meta.bad(f"{arch}.rope.freq_base")
    _refuse_unsupported(meta, arch, config["head_dim"])
    if arch == "gemma3":
        config |= _gemma3_config(meta, config)
    else:
        config["hidden_act"] = "silu"
    if arch == "llama":
        config["attention_bias"] = _any_bias(tensors, "attn_")
        config["mlp_bias"] = _any_bias(tensors, "ffn_")
    if arch == "qwen2" and config["head_dim"] * heads != hidden:
        raise meta.bad("qwen2.attention.key_length")
    return config


def _head_dim(meta: _Metadata, arch: str, hidden: int, heads: int) -> int:
    key = f"{arch}.attention.key_length"
    if key not in meta and hidden % heads:
        raise meta.bad(f"{arch}.attention.head_count")
    head_dim = meta.integer(key, hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if meta.integer(f"{arch}.{name}", head_dim) != head_dim:
            problem = f"{arch}.{name} is not the head size {head_dim}"
            fix = "use a model whose heads have one size and rotate whole"
            raise _error(meta.path, problem, fix)
    if head_dim % 2:
        raise meta.bad(key)
    return head_dim


def _refuse_unsupported(meta: _Metadata, arch: str, head_dim: int) -> None:
    """Features that change the result and that the mlx-lm model lacks."""
    neutral = {
        "expert_count": 0,
        "attn_logit_softcapping": 0,
        "final_logit_softcapping": 0,
        "logit_scale": 1,
        "residual_scale": 1,
        "embedding_scale": 1,
        "attention.scale": head_dim**-0.5,
    }
    for name, value in neutral.items():
        key = f"{arch}.{name}"
        found = meta.number(key, 0)
        if found and not math.isclose(found, value, rel_tol=1e-5):
            problem = f"{key} is {found:g}, which mlx-lm's {arch} does not have"
            raise _error(meta.path, problem, f"use a plain {arch} model")


def _any_bias(tensors: dict[str, _Tensor], part: str) -> bool:
    return any(f".{part}" in name and name.endswith(".bias") for name in tensors)


def _gemma3_config(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    window = meta.integer("gemma3.attention.sliding_window", 0, smallest=0)
    pattern = _window_pattern(meta, layers) if window else 1
    # Of the published sizes only 27B (62 layers) does not scale by its head size.
    scalar = config["head_dim"]
    if layers == 62:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": window or config["max_position_embeddings"],
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": meta.number("gemma3.rope.freq_base_swa", 10000.0),
        "layer_types": [
            "full_attention" if i % pattern == pattern - 1 else "sliding_attention"
            for i in range(layers)
        ],
    }


def _window_pattern(meta: _Metadata, layers: int) -> int:
    """Every how many layers one attends to everything."""
    key = "gemma3.attention.sliding_window_pattern"
    if isinstance(meta.values.get(key), np.ndarray):
        slides = meta.numbers(key, layers).astype(bool)
        full = np.flatnonzero(~slides)
        pattern = int(full[0]) + 1 if full.size else layers + 1
        if (slides != ((np.arange(layers) + 1) % pattern != 0)).any():
            problem = f"{key} does not repeat, and mlx-lm knows only one that does"
            raise _error(meta.path, problem, "use a plain gemma3 model")
    else:
        pattern = meta.integer(key, 6)
    if pattern > layers:
        problem = f"none of its {layers} layers attends to everything"
        raise _error(meta.path, problem, "use a plain gemma3 model")
    return pattern


def _rope_scaling(
    meta: _Metadata, arch: str, config: dict[str, Any], factors: np.ndarray | None
) -> dict[str, Any] | None:
    """The ``rope_scaling`` of config.json, None where positions are not scaled."""
    prefix = f"{arch}.rope.scaling"
    kind = meta.text(f"{prefix}.type", "linear")
    factor = meta.number(
        f"{prefix}.factor", meta.number(f"{arch}.rope.scale_linear", 0)
    )
    scaled = kind != "none" and factor not in (0, 1)
    original = meta.integer(f"{prefix}.original_context_length", 0, smallest=0)
    if factors is not None:
        scaling = _llama3_scaling(meta.path, factors, config, original)
        if scaling is None or not scaled:
            return scaling
        problem = "it scales its rotary embedding in two ways"
        raise _error(meta.path, problem, _CONVERT)
    if kind not in ("none", "linear", "yarn"):
        problem = f"{prefix}.type is {_quote(kind)}"
        raise _error(meta.path, problem, "use a model with none, linear or yarn")
    if not scaled:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return _yarn_scaling(
        meta, prefix, factor, original or config["max_position_embeddings"]
    )


def _yarn_scaling(
    meta: _Metadata, prefix: str, factor: float, original: int
) -> dict[str, Any]:
    neutral = {
        "attn_factor": 1,
        "yarn_attn_factor": 1,
        "yarn_ext_factor": 1,
        "yarn_log_multiplier": 0,
    }
    for name, value in neutral.items():
        if meta.number(f"{prefix}.{name}", value) != value:
            problem = f"{prefix}.{name} is not {value}, which mlx-lm does not have"
            raise _error(meta.path, problem, "use a model with plain yarn scaling")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": meta.number(f"{prefix}.yarn_beta_fast", 32),
        "beta_slow": meta.number(f"{prefix}.yarn_beta_slow", 1),
    }


def _llama3_scaling(
    path: Path, factors: np.ndarray, config: dict[str, Any], original: int
) -> dict[str, Any] | None:
    """The llama3 parameters behind a ``rope_freqs`` tensor, checked against it.

    Only the ratios of the two bounds to the original length show in the
    factors, so that length is taken from the metadata, else Llama 3's 8192.
    Bounds other than Llama 3's need two factors between them to be found.
    """
    factors = factors.astype(np.float64)
    if np.allclose(factors, 1, rtol=1e-5):
        return None
    factor = float(factors.max())
    if abs(factor - round(factor)) < 1e-4 * factor:
        factor = float(round(factor))
    original = original or 8192
    frequencies = config["rope_theta"] ** -(
        np.arange(factors.size, dtype=np.float64) / factors.size
    )
    turns = frequencies / (2 * math.pi)
    candidates = [(1.0, 4.0, original), (1.0, 4.0, 8192)]
    candidates += _fit_llama3(factors, factor, turns, original)
    for low, high, length in candidates:
        smooth = np.clip((length * turns - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    problem = "its rope_freqs tensor is not a Llama 3 scaling"
    raise _error(path, problem, "use a model with llama3, linear or no rope scaling")


def _fit_llama3(
    factors: np.ndarray, factor: float, turns: np.ndarray, original: int
) -> list[tuple[float, float, int]]:
    """Bounds from the factors between them, where the blend is linear in turns."""
    between = np.flatnonzero((factors > 1 + 1e-4) & (factors < factor * (1 - 1e-4)))
    if between.size < 2:
        return []
    first, last = between[[0, -1]]
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    slope = (smooth[first] - smooth[last]) / (turns[first] - turns[last])
    if not slope > 0:
        return []
    low = original * (turns[first] - smooth[first] / slope)
    high = low + original / slope
    rounded = (round(low, 3), round(high, 3), original)
    return [rounded, (float(low), float(high), original)]


# ---------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# Elements dequantized at a time: large enough to be quick, small in memory.
_CHUNK = 1 << 20
_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class _Weight:
    """One tensor of the model folder and where it comes from.

    ``source`` None stands for zeros, ``heads`` undoes the rotary interleaving
    of that many heads, ``shift`` is added.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    heads: int = 0
    shift: float = 0.0


def _weights(
    arch: str, config: dict[str, Any], tensors: dict[str, _Tensor]
) -> Iterator[_Weight]:
    """Every tensor the mlx-lm model has, in its order."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shift = -1.0 if arch == "gemma3" else 0.0
    yield _Weight("model.embed_tokens.weight", "token_embd.weight", (vocab, hidden))
    for i in range(config["num_hidden_layers"]):
        yield from _layer_weights(arch, config, tensors, i, shift)
    yield _Weight("model.norm.weight", "output_norm.weight", (hidden,), shift=shift)
    if not config["tie_word_embeddings"]:
        yield _Weight("lm_head.weight", "output.weight", (vocab, hidden))


def _layer_weights(
    arch: str,
    config: dict[str, Any],
    tensors: dict[str, _Tensor],
    layer: int,
    shift: float,
) -> Iterator[_Weight]:
    names = dict(_LAYER)
    if arch in ("gemma3", "qwen3"):
        names |= _QK_NORMS
    if arch == "gemma3":
        names |= _GEMMA_NORMS
    shapes, heads = _layer_shapes(config), _rotated_heads(arch, config)
    for part, target in names.items():
        name, source = f"model.layers.{layer}.{target}", f"blk.{layer}.{part}"
        shape, norm = shapes[part], part.endswith("norm")
        yield _Weight(
            f"{name}.weight",
            f"{source}.weight",
            shape,
            heads.get(part, 0),
            shift if norm else 0.0,
        )
        if not norm and _has_bias(arch, config, part):
            bias: str | None = f"{source}.bias"
            # mlx-lm's llama has all biases of a block or none.
            if arch == "llama" and bias not in tensors:
                bias = None
            yield _Weight(f"{name}.bias", bias, shape[:1], heads.get(part, 0))


def _layer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    return {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "attn_q_norm": (head_dim,),
        "attn_k_norm": (head_dim,),
        "post_attention_norm": (hidden,),
        "post_ffw_norm": (hidden,),
    }


def _rotated_heads(arch: str, config: dict[str, Any]) -> dict[str, int]:
    if arch != "llama":
        return {}
    return {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }


def _has_bias(arch: str, config: dict[str, Any], part: str) -> bool:
    if arch == "llama":
        kind = "attention_bias" if part.startswith("attn") else "mlp_bias"
        return config[kind]
    return arch == "qwen2" and part in ("attn_q", "attn_k", "attn_v")


def _plan(
    path: Path, arch: str, config: dict[str, Any], tensors: dict[str, _Tensor]
) -> list[_Weight]:
    """The weights to write, each present in the file with the right shape."""
    plan, used = [], {"rope_freqs.weight"} if arch != "gemma3" else set()
    for weight in _weights(arch, config, tensors):
        plan.append(weight)
        if weight.source is None:
            continue
        tensor = tensors.get(weight.source)
        if tensor is None:
            raise _error(path, f"it lacks tensor {weight.source!r}", _CONVERT)
        if tensor.shape != weight.shape:
            problem = (
                f"tensor {weight.source!r} has shape {tensor.shape}, "
                f"and the metadata asks for {weight.shape}"
            )
            raise _error(path, problem, _CONVERT)
        stem = weight.source.removesuffix(".weight")
        used |= {weight.source, f"{stem}.scale", f"{stem}.input_scale"}
    for name in tensors:
        if name not in used:
            problem = f"tensor {_quote(name)} has no place in mlx-lm's {arch}"
            raise _error(path, problem, f"use a plain {arch} model")
    return plan


def _unrotated(rows: int, heads: int) -> np.ndarray:
    """For each row of q or k as Hugging Face has it, its row in the file."""
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2)
    return order.swapaxes(1, 2).ravel()


def _dtype(path: Path, dtype: str | mx.Dtype) -> mx.Dtype:
    known = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    if isinstance(dtype, mx.Dtype) and dtype in known.values():
        return dtype
    if isinstance(dtype, str) and dtype in known:
        return known[dtype]
    fix = f"use one of {', '.join(known)}"
    raise _error(path, f"it cannot be written as {_quote(dtype)}", fix)


# ---------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Split:
    """How a byte-level tokenizer cuts text into words before it merges."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    compose: bool = False


_DEFAULT = _Split((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"))
_GPT2 = _Split((_WORDS,))
_DIGITS = _Split((r"\p{N}", _WORDS))
_LLAMA3 = _Split((_CASELESS_WORDS % "{1,3}",), whole_words=True, add_bos=True)
_QWEN2 = _Split((_CASELESS_WORDS % "",), compose=True)
_TEKKEN = _Split((_CASED_WORDS,), whole_words=True, add_bos=True)

_SPLITS = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "exaone4": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "tekken": _TEKKEN,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
}

# Control tokens that end an answer, whether or not the metadata names them.
_ENDS = {
    "<eos>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<EOT>",
    "_<EOT>",
}


@dataclass(frozen=True)
class _Vocabulary:
    """The tokenizer's part of the metadata, checked."""

    model: str
    split: _Split
    tokens: list[str]
    types: np.ndarray
    scores: np.ndarray | None
    merges: list[str] | None
    ids: dict[str, int]
    ends: list[int]
    add_bos: bool
    add_eos: bool
    add_space: bool
    chat_template: str | None

    def special(self, name: str) -> str | None:
        return self.tokens[self.ids[name]] if name in self.ids else None


def _vocabulary(meta: _Metadata) -> _Vocabulary:
    model = meta.text("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        problem = f"its tokenizer is of kind {_quote(model)}"
        raise _error(meta.path, problem, "use a file with a gpt2 or llama tokenizer")
    byte_level = model == "gpt2"
    pre = meta.text("tokenizer.ggml.pre", "default")
    if byte_level and pre not in _SPLITS:
        problem = f"its tokenizer splits words as {_quote(pre)}"
        raise _error(meta.path, problem, f"use one of {', '.join(_SPLITS)}")
    split = _SPLITS[pre] if byte_level else _Split((), add_bos=True)
    tokens = _token_texts(meta)
    types = _token_types(meta, len(tokens))
    scores = None
    if not byte_level:
        scores = meta.numbers("tokenizer.ggml.scores", len(tokens))
    ids = _special_ids(meta, types, byte_level)
    vocabulary = _Vocabulary(
        model=model,
        split=split,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=meta.strings("tokenizer.ggml.merges") if byte_level else None,
        ids=ids,
        ends=_end_ids(meta, tokens, types, ids),
        add_bos=meta.flag("tokenizer.ggml.add_bos_token", split.add_bos),
        add_eos=meta.flag("tokenizer.ggml.add_eos_token", False),
        add_space=meta.flag("tokenizer.ggml.add_space_prefix", not byte_level),
        chat_template=_chat_template(meta),
    )
    for name, wanted in (("bos", vocabulary.add_bos), ("eos", vocabulary.add_eos)):
        if wanted and name not in ids:
            raise meta.bad(f"tokenizer.ggml.{name}_token_id")
    return vocabulary


def _token_texts(meta: _Metadata) -> list[str]:
    key = "tokenizer.ggml.tokens"
    # A token without text can never be met, but keeps its place.
    tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(meta.strings(key))]
    if not tokens:
        raise meta.bad(key)
    if len(set(tokens)) != len(tokens):
        raise _error(meta.path, f"{key} has a token twice", _CONVERT)
    return tokens


def _token_types(meta: _Metadata, count: int) -> np.ndarray:
    key = "tokenizer.ggml.token_type"
    return meta.numbers(key, count) if key in meta else np.full(count, _NORMAL)


def _chat_template(meta: _Metadata) -> str | None:
    key = "tokenizer.chat_template"
    return meta.text(key) if key in meta else None


def _special_ids(
    meta: _Metadata, types: np.ndarray, byte_level: bool
) -> dict[str, int]:
    """Ids of bos, eos, unk and pad, as far as the file has them."""
    # What SentencePiece gives them unless told otherwise.
    defaults = {} if byte_level else {"unk": 0, "bos": 1, "eos": 2}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {}
    for name, stem in keys.items():
        key = f"tokenizer.ggml.{stem}_token_id"
        token = _token_id(meta, key, types.size)
        default = defaults.get(name, types.size)
        fits = default < types.size and types[default] in (_CONTROL, _UNKNOWN)
        if token is None and fits:
            token = default
        if token is not None:
            ids[name] = token
    return ids


def _token_id(meta: _Metadata, key: str, count: int) -> int | None:
    if key not in meta:
        return None
    token = meta.integer(key, smallest=0)
    if token >= count:
        raise meta.bad(key)
    return token


def _end_ids(
    meta: _Metadata, tokens: list[str], types: np.ndarray, ids: dict[str, int]
) -> list[int]:
    """Every token that ends an answer, the tokenizer's own first."""
    ends = [ids["eos"]] if "eos" in ids else []
    for stem in ("eot", "eom"):
        token = _token_id(meta, f"tokenizer.ggml.{stem}_token_id", len(tokens))
        ends += [] if token is None else [token]
    ends += [int(i) for i in np.flatnonzero(types == _CONTROL) if tokens[i] in _ENDS]
    return list(dict.fromkeys(ends))


def _build_tokenizer(path: Path, vocabulary: _Vocabulary) -> Tokenizer:
    try:
        if vocabulary.model == "gpt2":
            tokenizer = _byte_level_tokenizer(vocabulary)
        else:
            tokenizer = _sentencepiece_tokenizer(vocabulary)
        _add_fixed_tokens(tokenizer, vocabulary)
        tokenizer.post_processor = _post_processor(vocabulary)
    except Exception as cause:  # the tokenizers package raises bare Exceptions
        problem = f"its tokenizer is not consistent ({cause})"
        raise _error(path, problem, _CONVERT) from cause
    return tokenizer


def _ids_of(vocabulary: _Vocabulary) -> dict[str, int]:
    return {token: i for i, token in enumerate(vocabulary.tokens)}


def _byte_level_tokenizer(vocabulary: _Vocabulary) -> Tokenizer:
    split = vocabulary.split
    # The first character of a merge is never the separator.
    cuts = ((m, m.index(" ", 1)) for m in vocabulary.merges or [])
    tokenizer = Tokenizer(
        models.BPE(
            vocab=_ids_of(vocabulary),
            merges=[(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts],
            ignore_merges=split.whole_words,
        )
    )
    if split.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(p), "isolated") for p in split.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_tokenizer(vocabulary: _Vocabulary) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(
            vocab=_ids_of(vocabulary),
            merges=_derive_merges(vocabulary),
            unk_token=vocabulary.special("unk"),
            fuse_unk=True,
            byte_fallback=bool((vocabulary.types == _BYTE).any()),
        )
    )
    escape = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space:
        prepend = normalizers.Prepend(_SPACE)
        tokenizer.normalizer = normalizers.Sequence([prepend, escape])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = escape
    # mlx-lm knows its quick streaming detokenizer by exactly these steps.
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _derive_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The merges SentencePiece would make, best first.

    SentencePiece joins the two neighbours whose union scores highest, so a
    piece's score ranks every way to cut it in two. Its pieces are joined from
    normal ones only: the others are never met in the text it merges.
    """
    assert vocabulary.scores is not None
    normal = np.flatnonzero(vocabulary.types == _NORMAL)
    best_first = normal[np.argsort(-vocabulary.scores[normal], kind="stable")]
    tokens = vocabulary.tokens
    ids = {tokens[i]: i for i in normal.tolist()}
    merges = []
    for i in best_first.tolist():
        token = tokens[i]
        cuts = [(token[:c], token[c:]) for c in range(1, len(token))]
        pairs = [(a, b) for a, b in cuts if a in ids and b in ids]
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += pairs
    return merges


def _add_fixed_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Tokens cut out of the text before anything else: special and user-defined."""
    special, plain = [], []
    for i in np.flatnonzero(
        np.isin(vocabulary.types, (_UNKNOWN, _CONTROL, _USER_DEFINED))
    ):
        is_plain = vocabulary.types[i] == _USER_DEFINED
        token = AddedToken(vocabulary.tokens[i], normalized=False, special=not is_plain)
        (plain if is_plain else special).append(token)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _post_processor(vocabulary: _Vocabulary) -> processors.PostProcessor:
    """Puts bos before and eos after a text, where the file asks for it."""
    bos = vocabulary.special("bos") if vocabulary.add_bos else None
    eos = vocabulary.special("eos") if vocabulary.add_eos else None
    ends = {vocabulary.tokens[i]: i for i in vocabulary.ids.values()}

    def around(text: str, number: int) -> list[str]:
        first = [f"{bos}:{number}"] if bos is not None else []
        return first + [text] + ([f"{eos}:{number}"] if eos is not None else [])

    return processors.TemplateProcessing(
        single=around("$A:0", 0),
        pair=around("$A:0", 0) + around("$B:1", 1),
        special_tokens=[(t, ends[t]) for t in {bos, eos} - {None}],
    )


def _tokenizer_config(vocabulary: _Vocabulary, context: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    for name in ("bos", "eos", "unk", "pad"):
        token = vocabulary.special(name)
        if token is not None:
            config[f"{name}_token"] = token
    return config


# ---------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------

Progress = Callable[[int, int, str], None]


@dataclass
class GGUFModel:
    """An open, checked GGUF file.

    Attributes:
        path: the file.
        config: the config.json of the model folder, as mlx-lm reads it.
    """

    path: Path
    config: dict[str, Any]
    _data: mmap.mmap = field(repr=False)
    _tensors: dict[str, _Tensor] = field(repr=False)
    _plan: list[_Weight] = field(repr=False)
    _vocabulary: _Vocabulary = field(repr=False)

    def tensors(self, dtype: str | mx.Dtype) -> Iterator[tuple[str, mx.array]]:
        """Hugging Face names and dequantized weights, one at a time.

        Args:
            dtype: "float32", "float16" or "bfloat16", of every array. Values
                are computed in float32 and cast.

        Yields:
            (name, array): a projection has shape (out, in), the embedding
            (vocab_size, hidden_size), a norm or bias one dimension.

        Raises:
            GGUFError: a weight is not finite, or too large for ``dtype``.
        """
        kind = _dtype(self.path, dtype)
        for weight in self._plan:
            yield weight.name, self._read(weight, kind)

    def write(
        self,
        folder: str | Path,
        dtype: str | mx.Dtype = "bfloat16",
        progress: Progress | None = None,
    ) -> None:
        """Write the model folder; it is made if needed.

        Weights go to model.safetensors, or to numbered files with an index
        where they take more than 4 GiB, so that no more than that is held.

        Args:
            folder: where to write. Other weights there are refused, because
                mlx-lm would load them too.
            dtype: of the weights, as in ``tensors``.
            progress: called as ``progress(done, total, name)`` after each
                tensor, with the number of tensors.

        Raises:
            GGUFError: as ``tensors``, or the folder cannot be written.
        """
        folder = Path(folder)
        kind = _dtype(self.path, dtype)
        shards = self._shards(kind)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_other_weights(folder, [name for name, _ in shards])
            self._write_tokenizer(folder)
            self._write_weights(folder, kind, shards, progress)
            self._write_configs(folder, kind)
        except GGUFError:
            raise
        except (OSError, RuntimeError) as cause:
            problem = f"{folder} cannot be written ({cause})"
            fix = "choose another folder or make room"
            raise _error(self.path, problem, fix) from cause

    def _read(self, weight: _Weight, dtype: mx.Dtype) -> mx.array:
        if weight.source is None:
            return mx.zeros(weight.shape, dtype)
        scale = self._scale(weight.source)
        parts = []
        for values in self._chunks(weight):
            values = values * scale + weight.shift
            self._check(weight, values, dtype)
            parts.append(mx.array(values).astype(dtype))
            mx.eval(parts[-1])
        whole = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        whole = whole.reshape(weight.shape)
        mx.eval(whole)
        return whole

    def _chunks(self, weight: _Weight) -> Iterator[np.ndarray]:
        """A few dequantized rows at a time, in Hugging Face's order."""
        tensor = self._tensors[weight.source]
        raw = np.frombuffer(
            self._data, np.uint8, tensor.rows * tensor.row_bytes, tensor.offset
        ).reshape(tensor.rows, tensor.row_bytes)
        if weight.heads:
            order = _unrotated(weight.shape[0], weight.heads)
            if len(weight.shape) == 1:
                yield _floats(raw, tensor.kind)[:, order]
                return
        else:
            order = None
        step = max(1, _CHUNK // tensor.shape[-1])
        for start in range(0, tensor.rows, step):
            rows = slice(start, start + step)
            yield _floats(raw[rows if order is None else order[rows]], tensor.kind)

    def _scale(self, source: str) -> np.float32:
        """The factor some quantizations keep in a tensor of its own."""
        name = source.removesuffix(".weight") + ".scale"
        if name == source or name not in self._tensors:
            return np.float32(1)
        tensor = self._tensors[name]
        if tensor.shape != (1,):
            raise _error(self.path, f"tensor {name!r} is not one number", _CONVERT)
        raw = np.frombuffer(self._data, np.uint8, tensor.row_bytes, tensor.offset)
        return np.float32(_floats(raw, tensor.kind)[0])

    def _check(self, weight: _Weight, values: np.ndarray, dtype: mx.Dtype) -> None:
        largest = np.abs(values).max()
        if largest <= mx.finfo(dtype).max:
            return
        if np.isfinite(largest):
            problem = f"tensor {weight.source!r} has values too large for {dtype}"
            raise _error(self.path, problem, "write it as bfloat16 or float32")
        problem = f"tensor {weight.source!r} has values that are not finite"
        raise _error(self.path, problem, _DOWNLOAD)

    def _shards(self, dtype: mx.Dtype) -> list[tuple[str, list[_Weight]]]:
        groups: list[list[_Weight]] = [[]]
        size = 0
        for weight in self._plan:
            more = math.prod(weight.shape) * dtype.size
            if groups[-1] and size + more > _SHARD_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(weight)
            size += more
        if len(groups) == 1:
            return [("model.safetensors", groups[0])]
        count = len(groups)
        return [
            (f"model-{i:05d}-of-{count:05d}.safetensors", group)
            for i, group in enumerate(groups, 1)
        ]

    def _write_weights(
        self,
        folder: Path,
        dtype: mx.Dtype,
        shards: list[tuple[str, list[_Weight]]],
        progress: Progress | None,
    ) -> None:
        done, placed = 0, {}
        for file, group in shards:
            arrays = {}
            for weight in group:
                arrays[weight.name] = self._read(weight, dtype)
                placed[weight.name] = file
                # What a chunk used is not wanted again.
                mx.clear_cache()
                done += 1
                if progress is not None:
                    progress(done, len(self._plan), weight.name)
            mx.save_safetensors(str(folder / file), arrays, metadata={"format": "mlx"})
        if len(shards) > 1:
            size = sum(math.prod(w.shape) for w in self._plan) * dtype.size
            index = {"metadata": {"total_size": size}, "weight_map": placed}
            _write_json(folder / "model.safetensors.index.json", index)

    def _write_tokenizer(self, folder: Path) -> None:
        vocabulary = self._vocabulary
        tokenizer = _build_tokenizer(self.path, vocabulary)
        text = tokenizer.to_str(pretty=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        context = self.config["max_position_embeddings"]
        _write_json(
            folder / "tokenizer_config.json", _tokenizer_config(vocabulary, context)
        )
        template = folder / "chat_template.jinja"
        if vocabulary.chat_template is not None:
            template.write_text(vocabulary.chat_template, encoding="utf-8")
        else:
            template.unlink(missing_ok=True)

    def _write_configs(self, folder: Path, dtype: mx.Dtype) -> None:
        name = str(dtype).removeprefix("mlx.core.")
        _write_json(folder / "config.json", self.config | {"torch_dtype": name})
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {k: self.config[k] for k in names if k in self.config}
        _write_json(folder / "generation_config.json", generation)


def _floats(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows of quantized bytes (..., row_bytes) as float32 rows."""
    # Blocks do not depend on each other, and one long row is much quicker.
    with np.errstate(all="ignore"):
        flat = dequantize(np.ascontiguousarray(raw).reshape(1, -1), kind)
    return flat.reshape(*raw.shape[:-1], -1)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _refuse_other_weights(folder: Path, names: list[str]) -> None:
    for file in sorted(folder.glob("model*.safetensors")):
        if file.name not in names:
            problem = "mlx-lm would load it together with the new weights"
            raise _error(file, problem, "remove it or choose another folder")


def read_gguf(path: str | Path) -> GGUFModel:
    """Open a GGUF file and check everything but the values of its weights.

    Args:
        path: a GGUF file of architecture llama, gemma3, qwen2 or qwen3.

    Returns:
        The model; its file stays memory-mapped.

    Raises:
        GGUFError: the file cannot be read or converted. One line, which names
            the file and what to do.
    """
    path = Path(path)
    data = _map(path)
    values, tensors = _read_header(path, data)
    meta = _Metadata(path, values)
    _refuse_split(path, meta.integer("split.count", 0, smallest=0))
    arch = meta.text("general.architecture")
    if arch not in ARCHITECTURES:
        problem = f"its architecture is {_quote(arch)}"
        raise _error(path, problem, f"use one of {', '.join(ARCHITECTURES)}")
    config = _config(meta, arch, tensors)
    plan = _plan(path, arch, config, tensors)
    factors = _rope_factors(path, data, tensors, config["head_dim"])
    scaling = _rope_scaling(meta, arch, config, factors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    vocabulary = _vocabulary(meta)
    if len(vocabulary.tokens) > config["vocab_size"]:
        problem = "its tokenizer has more tokens than its embedding has rows"
        raise _error(path, problem, _CONVERT)
    config |= _config_ids(vocabulary)
    return GGUFModel(path, config, data, tensors, plan, vocabulary)


def _config_ids(vocabulary: _Vocabulary) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "pad_token_id": "pad"}
    ids: dict[str, Any] = {
        key: vocabulary.ids[name]
        for key, name in names.items()
        if name in vocabulary.ids
    }
    if vocabulary.ends:
        ends = vocabulary.ends
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return ids


def _rope_factors(
    path: Path, data: mmap.mmap, tensors: dict[str, _Tensor], head_dim: int
) -> np.ndarray | None:
    tensor = tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    raw = np.frombuffer(data, np.uint8, tensor.rows * tensor.row_bytes, tensor.offset)
    factors = _floats(raw, tensor.kind)
    if tensor.shape != (head_dim // 2,) or not (factors > 0).all():
        problem = "tensor 'rope_freqs.weight' does not fit the head size"
        raise _error(path, problem, _CONVERT)
    return factors


def _map(path: Path) -> mmap.mmap:
    _refuse_split(path, 0)
    if path.is_dir():
        raise _error(path, "it is a folder", "give the .gguf file inside it")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise _error(path, "there is no such file", "check the path") from None
    except ValueError:
        raise _error(path, "it is empty", _DOWNLOAD) from None
    except OSError as cause:
        problem = f"it cannot be opened ({cause.strerror})"
        raise _error(path, problem, "check the path and its permissions") from cause


def _refuse_split(path: Path, count: int) -> None:
    if count > 1 or re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", path.name):
        fix = "join the parts with llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        raise _error(path, "it is one part of a split model", fix)
