"""A head's decode steps, compiled where that pays.

On a GPU the kernels of a step take less time than building its graph anew would, so a
step is compiled, once for each function, its options and what the head is set to. On a
CPU MLX would call a C++ compiler for that, and the step runs as it is.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

from .. import kernels
from ..compute.device import on_gpu
from ..compute.functional import arrays, with_arrays
from ..head import FlashHead

T = TypeVar("T")
# Compiled steps that are kept for a head, those used last.
_REMEMBERED = 32


class Steps:
    """The compiled steps of one head, which it does not keep alive."""

    def __init__(self, head: FlashHead):
        self._head = weakref.ref(head)
        self._compiled: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self._constants: OrderedDict[Any, tuple[Any, mx.array]] = OrderedDict()

    def run(
        self, function: Callable[..., T], options: tuple[Any, ...], *inputs: mx.array
    ) -> T:
        """``function(head, *options, *inputs)``.

        The first time for inputs of these shapes it runs as it is: kernels are checked
        against plain MLX at their first use, which needs arrays that can be evaluated.
        """
        head = self._head()
        assert head is not None  # whoever calls this holds it
        if not on_gpu():
            return function(head, *options, *inputs)
        setting = (
            *(function, options, kernels.kind(), head.n_probes, head.transform),
            *(head.temperatures, head.tail_offset),
            *((x.shape, x.dtype) for x in inputs),
        )
        step = self._compiled.get(setting)
        if step is None:
            result = function(head, *options, *inputs)
            self._compiled[setting] = self._compile(function, options)
            if len(self._compiled) > _REMEMBERED:
                self._compiled.popitem(last=False)
            return result
        self._compiled.move_to_end(setting)
        return step(arrays(head), *inputs)

    def _compile(
        self, function: Callable[..., T], options: tuple[Any, ...]
    ) -> Callable[..., T]:
        def pure(values: dict[str, Any], *inputs: mx.array) -> T:
            head = self._head()
            assert head is not None
            return function(with_arrays(head, values), *options, *inputs)

        return mx.compile(pure)

    def constant(self, function: Callable[..., mx.array], *options: Any) -> mx.array:
        """``function(head, *options)`` of the head's masses, evaluated; anew where
        these have changed."""
        head = self._head()
        assert head is not None
        now = head.excess, head.temperatures, head.tail_offset
        kept = self._constants.get((function, options))
        if kept is None or kept[0][0] is not now[0] or kept[0][1:] != now[1:]:
            value = function(head, *options)
            mx.eval(value)
            if len(self._constants) >= _REMEMBERED:
                self._constants.popitem(last=False)
            kept = self._constants[function, options] = (now, value)
        return kept[1]


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
        function: A pure function of arrays and of what the head is set to.
        options: Its further arguments, hashable.
        inputs: Arrays.
    """
    return _of(head).run(function, options, *inputs)


def constant(
    head: FlashHead, function: Callable[..., mx.array], *options: Any
) -> mx.array:
    """``function(head, *options)``, evaluated and kept with the head.

    Args:
        head: The head.
        function: A function of the head's masses alone.
        options: Its further arguments, hashable.
    """
    return _of(head).constant(function, *options)


def _of(head: FlashHead) -> Steps:
    steps = _steps.get(id(head))
    if steps is None:
        steps = _steps.setdefault(id(head), Steps(head))
        weakref.finalize(head, _steps.pop, id(head), None)
    return steps
