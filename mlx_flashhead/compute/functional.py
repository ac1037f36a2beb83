"""Modules as values: their arrays as arguments of a pure function.

``mx.compile(f, inputs=module)`` puts tracers into the module while it traces. An
interruption then leaves them there, and another thread that uses the module meanwhile
sees them. A copy that is given the arrays as arguments has neither problem.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

Module = TypeVar("Module", bound=nn.Module)


def arrays(module: nn.Module) -> dict[str, Any]:
    """All arrays of a module, derived ones included, nested as its modules are."""
    return {
        name: arrays(value) if isinstance(value, nn.Module) else value
        for name, value in module.items()
        if isinstance(value, (mx.array, nn.Module))
    }


def with_arrays(module: Module, values: dict[str, Any]) -> Module:
    """A copy of a module that has these arrays, nested as :func:`arrays` gives them;
    the module itself is not touched."""
    twin = copy.copy(module)
    for name, value in values.items():
        if isinstance(value, dict):
            value = with_arrays(module[name], value)
        dict.__setitem__(twin, name, value)
    return twin
