"""A head's decode steps, compiled where that pays.

On a GPU the kernels of a step take less time than building its graph anew would, so a
step is compiled, once for each function and its options. What the head is set to and
its arrays are constants of it: only what differs from step to step is handed over, for
host time is what small models wait for. Where any of them was replaced, all steps are
compiled anew. On a CPU MLX would call a C++ compiler for that, and the step runs as it
is.
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
# Compiled steps that are kept for a head, those used last.
_REMEMBERED = 32


class Steps:
    """The compiled steps of one head as it is now, which they do not keep alive."""

    def __init__(self, head: FlashHead):
        self._head = weakref.ref(head)
        self._setting = _setting_of(head)
        self._snapshot = Snapshot(head)
        self._compiled: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self._constants: OrderedDict[Any, mx.array] = OrderedDict()

    @property
    def kind(self) -> str:
        """The kernels' back-end."""
        return self._setting[0]

    def of(self, head: FlashHead) -> bool:
        """Whether the head is still as it was."""
        return self._setting == _setting_of(head) and self._snapshot.of(head)

    def run(
        self, function: Callable[..., T], options: tuple[Any, ...], *inputs: mx.array
    ) -> T:
        """``function(head, *options, *inputs)``.

        The first time for inputs of these shapes it runs as it is: kernels are checked
        against plain MLX at their first use, which needs arrays that can be evaluated.
        """
        key = (function, options, *((x.shape, x.dtype) for x in inputs))
        step = self._compiled.get(key)
        if step is not None:
            self._compiled.move_to_end(key)
            return step(*inputs)
        head = self._head()
        assert head is not None  # whoever calls this holds it
        # What is not evaluated would be made in each step.
        mx.eval(self._snapshot.arrays)
        result = function(head, *options, *inputs)
        self._compiled[key] = self._compile(function, options)
        if len(self._compiled) > _REMEMBERED:
            self._compiled.popitem(last=False)
        return result

    def _compile(
        self, function: Callable[..., T], options: tuple[Any, ...]
    ) -> Callable[..., T]:
        def pure(*inputs: mx.array) -> T:
            head = self._head()
            assert head is not None
            return function(head, *options, *inputs)

        return mx.compile(pure)

    def constant(self, function: Callable[..., mx.array], *options: Any) -> mx.array:
        """``function(head, *options)`` of the head alone, evaluated."""
        value = self._constants.get((function, options))
        if value is None:
            value = function(self._head(), *options)
            mx.eval(value)
            if len(self._constants) >= _REMEMBERED:
                self._constants.popitem(last=False)
            self._constants[function, options] = value
        return value


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
    steps = _of(head)
    if steps.kind == "plain" and not on_gpu():
        return function(head, *options, *inputs)
    return steps.run(function, options, *inputs)


def constant(
    head: FlashHead, function: Callable[..., mx.array], *options: Any
) -> mx.array:
    """``function(head, *options)``, evaluated and kept with the head.

    Args:
        head: The head.
        function: A function of the head alone.
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


def _setting_of(head: FlashHead) -> tuple[str, int, Any]:
    """What a step may depend on beyond what the module holds."""
    return kernels.kind(), head.n_probes, head.transform
