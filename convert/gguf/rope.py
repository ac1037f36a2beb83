"""The rotary scaling of a model, from its metadata and its rope_freqs tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .errors import error, quote
from .metadata import Metadata
from .reader import GGUFFile


def rope_scaling(
    file: GGUFFile, arch: str, config: dict[str, Any]
) -> dict[str, Any] | None:
    """The ``rope_scaling`` of config.json, None where positions are not scaled."""
    meta, prefix = file.metadata, f"{arch}.rope.scaling"
    factors = _rope_factors(file, config["head_dim"])
    kind = meta.text(f"{prefix}.type", "linear")
    factor = meta.number(
        f"{prefix}.factor", meta.number(f"{arch}.rope.scale_linear", 0)
    )
    scaled = kind != "none" and factor not in (0, 1)
    original = meta.integer(f"{prefix}.original_context_length", 0, smallest=0)
    if factors is not None:
        scaling = _llama3_scaling(file.path, factors, config, original)
        if scaling is None or not scaled:
            return scaling
        raise error(file.path, "it scales its rotary embedding in two ways")
    if kind not in ("none", "linear", "yarn"):
        problem = f"{prefix}.type is {quote(kind)}"
        raise error(file.path, problem, "use a model with none, linear or yarn")
    if not scaled:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = original or config["max_position_embeddings"]
    return _yarn_scaling(meta, prefix, factor, original)


def _rope_factors(file: GGUFFile, head_dim: int) -> np.ndarray | None:
    """What each rotary frequency is divided by: float32 of shape (head_dim / 2,)."""
    name = "rope_freqs.weight"
    if name not in file.tensors:
        return None
    fits = file.tensors[name].shape == (head_dim // 2,)
    factors = file.floats(name) if fits else None
    if factors is None or not (np.isfinite(factors) & (factors > 0)).all():
        raise error(file.path, f"tensor {name!r} does not fit the head size")
    return factors


def _yarn_scaling(
    meta: Metadata, prefix: str, factor: float, original: int
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
            raise error(meta.path, problem, "use a model with plain yarn scaling")
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
    raise error(path, problem, "use a model with llama3, linear or no rope scaling")


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
