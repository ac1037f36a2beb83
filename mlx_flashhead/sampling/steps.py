"""A head's decode steps, compiled where that pays.

On a GPU the kernels of a step take less time than building its graph anew would, so a
step is compiled, once for each function, its options and what the head is set to. The
head's arrays are constants of it: only what differs from step to step is handed over,
for host time is what small models wait for. Where one of them was replaced, all steps
are compiled anew. On a CPU MLX would call a C++ compiler for that, and the step runs as
it is.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

from .. import kernels
from ..compute.device import on_gpu
from ..compute.functional import Snapshot
from ..head import FlashHead

T = TypeVar("T")
# Of a head, the compiled steps that are kept for each setting, and the settings, those
# used last.
_REMEMBERED = 32
_SETTINGS = 8

_Compiled = OrderedDict[Any, Callable[..., Any]]


class Steps:
    """The compiled steps of one head, with the arrays that it has now."""

    def __init__(self, head: FlashHead):
        self._head = weakref.ref(head)
        self._snapshot = Snapshot(head)
        # What is no array, and that a step may depend on, with the steps for it: those
        # used last at hand, for to hash a setting takes its time.
        self._latest: tuple[Any, _Compiled] = (None, OrderedDict())
        self._compiled: OrderedDict[Any, _Compiled] = OrderedDict()
        self._constants: OrderedDict[Any, mx.array] = OrderedDict()

    def of(self, head: FlashHead) -> bool:
        """Whether the head still has the same arrays."""
        return self._snapshot.of(head)

    def run(
        self,
        kind: str,
        function: Callable[..., T],
        options: tuple[Any, ...],
        *inputs: mx.array,
    ) -> T:
        """``function(head, *options, *inputs)``, with kernels of this back-end.

        The first time for inputs of these shapes it runs as it is: kernels are checked
        against plain MLX at their first use, which needs arrays that can be evaluated.
        """
        head = self._head()
        assert head is not None  # whoever calls this holds it
        compiled = self._at((kind, head.n_probes, head.transform))
        key = (function, options, *((x.shape, x.dtype) for x in inputs))
        step = compiled.get(key)
        if step is not None:
            compiled.move_to_end(key)
            return step(*inputs)
        # What is not evaluated would be made in each step.
        mx.eval(self._snapshot.arrays)
        result = function(head, *options, *inputs)
        compiled[key] = _compile(self._head, function, options)
        if len(compiled) > _REMEMBERED:
            compiled.popitem(last=False)
        return result

    def _at(self, setting: tuple[Any, ...]) -> _Compiled:
        latest = self._latest
        if latest[0] != setting:
            compiled = self._compiled.setdefault(setting, OrderedDict())
            self._compiled.move_to_end(setting)
            if len(self._compiled) > _SETTINGS:
                self._compiled.popitem(last=False)
            self._latest = latest = setting, compiled
        return latest[1]

    def constant(self, function: Callable[..., mx.array], *options: Any) -> mx.array:
        """``function(head, *options)`` of the head's arrays alone, evaluated."""
        value = self._constants.get((function, options))
        if value is None:
            value = function(self._head(), *options)
            mx.eval(value)
            if len(self._constants) >= _REMEMBERED:
                self._constants.popitem(last=False)
            self._constants[function, options] = value
        return value


def _compile(
    head: weakref.ref[FlashHead], function: Callable[..., T], options: tuple[Any, ...]
) -> Callable[..., T]:
    def pure(*inputs: mx.array) -> T:
        held = head()
        assert held is not None
        return function(held, *options, *inputs)

    return mx.compile(pure)


_steps: dict[int, Steps] = {}


def run(
    head: FlashHead,
    function: Callable[..., T],
    options: tuple[Any, ...],
    *inputs: mx.array,
) -> T:
    """``function(head, *options, *inputs)``, compiled where that pays.

    Args:
        head: The head.
        function: A pure function of arrays and of what the head is and is set to.
        options: Its further arguments, hashable.
        inputs: Arrays.
    """
    kind = kernels.kind()
    if kind == "plain" and not on_gpu():
        return function(head, *options, *inputs)
    return _of(head).run(kind, function, options, *inputs)


def constant(
    head: FlashHead, function: Callable[..., mx.array], *options: Any
) -> mx.array:
    """``function(head, *options)``, evaluated and kept with the head.

    Args:
        head: The head.
        function: A function of the head's arrays, and of its temperatures and offsets,
            alone.
        options: Its further arguments, hashable.
    """
    return _of(head).constant(function, *options)


def _of(head: FlashHead) -> Steps:
    steps = _steps.get(id(head))
    if steps is None:
        steps = _steps.setdefault(id(head), Steps(head))
        weakref.finalize(head, _steps.pop, id(head), None)
    elif not steps.of(head):
        steps = _steps[id(head)] = Steps(head)
    return steps
