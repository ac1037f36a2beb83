"""Find the classification head of an mlx-lm model, watch it, and replace it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..compute.table import Table
from ..head import FlashEmbedding, FlashHead
from ..head.transform import Transform

_LINEAR = (nn.Linear, nn.QuantizedLinear)
_EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


class HeadNotFound(ValueError):
    """No module of the model makes its logits in a way that can be replaced."""


class _Watched(nn.Module):
    """Stands in for a linear or embedding layer and passes what it makes of hidden
    states through ``record``, which may replace it."""

    def __init__(
        self, inner: nn.Module, record: Callable[[mx.array, mx.array], mx.array]
    ):
        super().__init__()
        self.inner = inner
        self._record = record

    def __call__(self, x: mx.array) -> mx.array:
        y = self.inner(x)
        return y if isinstance(self.inner, _EMBEDDING) else self._record(x, y)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._record(x, self.inner.as_linear(x))


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        HeadNotFound: The model has no such module.
    """
    modules = dict(model.named_modules())
    if path not in modules:
        raise HeadNotFound(f"the model has no module {path!r}")
    return modules[path]


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path of the model."""
    model.update_modules(tree_unflatten([(path, module)]))


def is_tied(model: nn.Module, path: str) -> bool:
    """Whether the head at ``path`` is also the embedding."""
    return isinstance(get_module(model, path), (*_EMBEDDING, FlashEmbedding))


def head_table(module: nn.Module) -> Table:
    """The rows ``[V, D]`` of a linear or embedding layer, in vocabulary order."""
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        return Table(
            module.weight,
            module.scales,
            module.get("biases"),
            bits=module.bits,
            group_size=module.group_size,
            mode=module.mode,
        )
    return Table(module.weight, bits=8 * module.weight.dtype.size)


def find_head(model: nn.Module) -> str:
    """Path of the module that makes the model's logits.

    Each linear or embedding layer whose output has the logits' shape is made to
    return a known ramp over the vocabulary. It is the head if the model's logits then
    rise with the ramp: what the model does after its head (soft-capping, scaling) is
    allowed, anything that mixes tokens is not. Nothing of the model's weights is
    read: MLX evaluates only what the logits depend on.

    Raises:
        HeadNotFound: None does; the message names the modules that were tried.
    """
    tokens = mx.array([[0, 1]])
    made: list[tuple[str, int]] = []

    def watch(path: str, record: Callable[[mx.array, mx.array], mx.array]) -> nn.Module:
        inner = get_module(model, path)
        set_module(model, path, _Watched(inner, record))
        return inner

    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (*_LINEAR, *_EMBEDDING))
    }
    for path in layers:

        def note(x: mx.array, y: mx.array, path: str = path) -> mx.array:
            made.append((path, y.shape[-1]))
            return y

        watch(path, note)
    try:
        vocab_size = model(tokens).shape[-1]
    finally:
        for path, module in layers.items():
            set_module(model, path, module)
    tried = [path for path, width in reversed(made) if width == vocab_size]
    for path in dict.fromkeys(tried):
        # Small values, so that soft-capping does not flatten the ramp.
        ramp = mx.linspace(0.0, 1.0, vocab_size)

        def replace(x: mx.array, y: mx.array, ramp: mx.array = ramp) -> mx.array:
            return mx.broadcast_to(ramp, (*y.shape[:-1], vocab_size))

        inner = watch(path, replace)
        try:
            logits = model(tokens)[0, -1].astype(mx.float32)
        finally:
            set_module(model, path, inner)
        rises = (logits[1:] >= logits[:-1]).all() & (logits[-1] > logits[0])
        if rises.item():
            return path
    wide = sorted({p for p, width in made}, key=len)[:8] or sorted(layers)[:8]
    looked = ", ".join(tried) if tried else f"{', '.join(wide)} and others"
    raise HeadNotFound(
        f"no linear or embedding layer makes the {vocab_size} logits; "
        f"looked at {looked}"
    )


class watching:
    """Context in which ``states`` gathers what goes into the head at ``path``."""

    def __init__(self, model: nn.Module, path: str):
        self.model, self.path = model, path
        self.states: list[mx.array] = []

    def __enter__(self) -> watching:
        self._inner = get_module(self.model, self.path)

        def record(x: mx.array, y: mx.array) -> mx.array:
            self.states.append(x)
            return y

        set_module(self.model, self.path, _Watched(self._inner, record))
        return self

    def __exit__(self, *exc: object) -> None:
        set_module(self.model, self.path, self._inner)


@contextmanager
def answering(
    model: nn.Module, path: str, answer: Callable[[mx.array], mx.array]
) -> Iterator[None]:
    """Context in which the head at ``path`` gives ``answer(x)`` for hidden states x."""
    inner = get_module(model, path)
    head = getattr(inner, "head", inner)
    if isinstance(head, FlashHead):
        with head.answering(answer):
            yield
        return
    set_module(model, path, _Watched(inner, lambda x, y: answer(x)))
    try:
        yield
    finally:
        set_module(model, path, inner)


def find_transform(model: nn.Module, path: str) -> Transform | None:
    """What the model does to the logits of its head at ``path``, found by giving it
    known ones; ``None`` if it is nothing that :class:`Transform` can say."""
    known = np.concatenate([np.linspace(1e-2, 80, 255), [1e6]])
    values = mx.array(known, mx.float32)

    def answer(x: mx.array) -> mx.array:
        return mx.broadcast_to(values, (*x.shape[:-1], known.size))

    with answering(model, path, answer):
        made = model(mx.array([[0, 1]]))
    if made.ndim != 3 or made.shape[-1] != known.size:
        return None
    return Transform.fit(known, np.array(made[0, -1].astype(mx.float32), np.float64))


def attach(model: nn.Module, path: str, head: FlashHead) -> nn.Module:
    """Put a FlashHead in place of the model's head at ``path``; returns the model."""
    inner = get_module(model, path)
    module: nn.Module = head
    if isinstance(inner, FlashEmbedding):
        module = FlashEmbedding(head, inner._dtype)
    elif isinstance(inner, _EMBEDDING):
        module = FlashEmbedding(head, head_table(inner).dtype)
    set_module(model, path, module)
    head.transform = find_transform(model, path)
    return model


def flash_heads(model: nn.Module) -> Iterator[FlashHead]:
    """The FlashHeads in a model, also within the embedding of a tied one; none in a
    model with a dense head. Set their ``n_probes`` to trade speed for fidelity."""
    for _, module in model.named_modules():
        if isinstance(module, FlashHead):
            yield module
