"""Results that people share: what a benchmark measured, without what is private.

``mlx_flashhead.benchmark --markdown`` ends with a block to paste into an issue;
``benchmarks/community/`` in the repository keeps such records, one file each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from .matrix import Row
from .report import Machine

FORMAT = 1
# The first line of the block.
FENCE = "```json mlx-flashhead"


def record(
    model: str, rows: Sequence[Row], machine: Machine, warnings: Sequence[str]
) -> dict[str, Any]:
    """What is shared of a benchmark, as ``benchmarks/community/schema.json`` has it. Of
    paths only the last part is in it."""
    memory = machine["memory_bytes"]
    return {
        "format": FORMAT,
        "date": date.today().isoformat(),
        # A hub id whole, of a folder its name.
        "model": Path(model).resolve().name if Path(model).exists() else model,
        "device": machine["device"],
        "cpu": machine["cpu"],
        "memory_gb": None if memory is None else round(memory / 2**30),
        "backend": machine["backend"],
        "os": machine["os"],
        "versions": machine["versions"],
        "warnings": list(warnings),
        "rows": [_shared(row) for row in rows],
    }


def _shared(row: Row) -> dict[str, Any]:
    speed = row["tokens_per_second"]
    rates = {"acceptance": row["acceptance"], "waste": row["waste"]}
    return {
        "head": row["head"],
        "kind": row["kind"],
        "sampler": row["sampler"],
        "batch_size": row["batch_size"],
        "prompt_tokens": row["prompt_tokens"],
        "max_tokens": row["max_tokens"],
        "tokens_per_second": [
            round(s, 2) for s in (speed["median"], speed["min"], speed["max"])
        ],
        "first_token_ms": round(1e3 * row["first_token_seconds"]["median"], 1),
        **{name: None if r is None else round(r, 4) for name, r in rates.items()},
    }


def block(shared: dict[str, Any]) -> str:
    """A record as it is pasted: a fence of markdown, a row a line."""
    head = json.dumps({name: v for name, v in shared.items() if name != "rows"})
    rows = ",\n".join(f"  {json.dumps(row)}" for row in shared["rows"])
    return f'{FENCE}\n{head[:-1]}, "rows": [\n{rows}\n]}}\n```'
