"""Arguments of mlx-lm's ``make_sampler`` that the benchmarks use, by name."""

from __future__ import annotations

from typing import Any

SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temp": 0.0},
    "temperature": {"temp": 0.8},
    "top-p": {"temp": 0.8, "top_p": 0.95},
    "min-p": {"temp": 0.8, "min_p": 0.05},
    "top-k": {"temp": 0.8, "top_k": 40},
}
