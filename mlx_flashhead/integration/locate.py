"""Find the classification head of an mlx-lm model, watch it, and replace it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ..compute.table import Table
from ..head import FlashHead
from ..head.transform import Transform
from .slots import FlashEmbedding, FlashLinear, Rows, intercepted

_LINEAR = (nn.Linear, nn.QuantizedLinear)
_EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
# What models of text and images name their text model.
_TEXT_MODEL = "language_model"


class HeadNotFound(ValueError):
    """No module of the model makes its logits in a way that can be replaced."""


Record = Callable[[mx.array, mx.array], mx.array]


@contextmanager
def _watched(module: nn.Module, record: Record) -> Iterator[None]:
    """Context in which what a linear or embedding layer makes of hidden states passes
    through ``record(x, y)``, which may replace it. The layer changes its class, not its
    place: models may read and write its attributes."""
    kind: Any = type(module)

    class Watched(kind):  # type: ignore[misc]  # of what the model has
        def __call__(self, x: mx.array) -> mx.array:
            y = super().__call__(x)
            return y if isinstance(self, _EMBEDDING) else record(x, y)

        def as_linear(self, x: mx.array) -> mx.array:
            y = super().as_linear(x)
            return y if isinstance(self, nn.Embedding) else record(x, y)

        @property
        def weight(self) -> mx.array:
            # What an embedding's as_linear multiplies with, and models without it.
            rows: mx.array = self["weight"]
            if isinstance(self, nn.QuantizedEmbedding):
                return Rows(rows, self.as_linear)
            if isinstance(self, nn.Embedding):
                return Rows(rows, lambda x: record(x, x @ rows.T))
            return rows

    module.__class__ = Watched
    try:
        yield
    finally:
        module.__class__ = kind


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
    widths: list[tuple[str, int]] = []
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (*_LINEAR, *_EMBEDDING))
    }
    with ExitStack() as stack:
        for path, module in layers.items():

            def note(x: mx.array, y: mx.array, path: str = path) -> mx.array:
                widths.append((path, y.shape[-1]))
                return y

            stack.enter_context(_watched(module, note))
        vocab_size = _run(model, tokens).shape[-1]
    tried = [path for path, width in reversed(widths) if width == vocab_size]
    for path in dict.fromkeys(tried):
        if _is_head(model, layers[path], vocab_size):
            return path
    wide = sorted({p for p, width in widths}, key=len)[:8] or sorted(layers)[:8]
    looked = ", ".join(tried) if tried else f"{', '.join(wide)} and others"
    raise HeadNotFound(
        f"no linear or embedding layer makes the {vocab_size} logits; "
        f"looked at {looked}; use a model whose logits come from one, each by itself"
    )


def _is_head(model: nn.Module, module: nn.Module, vocab_size: int) -> bool:
    """Whether the model's logits rise with what one of its layers is made to give."""
    # Small values, so that soft-capping does not flatten the ramp.
    ramp = mx.linspace(0.0, 1.0, vocab_size)

    def replace(x: mx.array, y: mx.array) -> mx.array:
        return mx.broadcast_to(ramp, (*y.shape[:-1], vocab_size))

    with _watched(module, replace):
        logits = _run(model, mx.array([[0, 1]]))[0, -1].astype(mx.float32)
    if len(logits) != vocab_size:
        return False
    rises = (logits[1:] >= logits[:-1]).all() & (logits[-1] > logits[0])
    return bool(rises.item())


def resolve_path(model: nn.Module, path: str) -> str:
    """Path of the head in a model of another package, such as mlx-vlm's, that stands at
    ``path`` in mlx-lm's model of the same weights: with or without the text model's
    name before it, or in a layer of its own where mlx-lm has a tied one.

    Raises:
        HeadNotFound: The model has no head that can be found.
    """
    bare = path.removeprefix(f"{_TEXT_MODEL}.")
    modules = dict(model.named_modules())
    for name in (path, bare, f"{_TEXT_MODEL}.{bare}"):
        module = modules.get(name)
        if isinstance(module, (*_LINEAR, *_EMBEDDING)) and _is_head(
            model, module, module.weight.shape[0]
        ):
            return name
    return find_head(model)


def twins(model: nn.Module, path: str) -> list[str]:
    """Paths of the embeddings that hold the very array of the head at ``path``: as such
    mlx-vlm ties some, where mlx-lm has one layer for both."""
    rows = get_module(model, path).weight
    return [
        name
        for name, module in model.named_modules()
        if name != path and isinstance(module, _EMBEDDING) and module.weight is rows
    ]


def _run(model: nn.Module, tokens: mx.array) -> mx.array:
    """The model's logits.

    Raises:
        HeadNotFound: The model's code does not run on tokens alone, or gives no array.
    """
    try:
        try:
            logits = model(tokens)
        except TypeError:  # some models ask for an image, too
            if _TEXT_MODEL not in model:
                raise
            logits = model[_TEXT_MODEL](tokens)
        return logits if isinstance(logits, mx.array) else logits.logits
    # Whatever the code of a model raises.
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        raise HeadNotFound(
            f"the model {type(model).__module__} does not run on two tokens: "
            f"{type(e).__name__}: {reason}; use a model that mlx_lm.generate runs"
        ) from e


@contextmanager
def watching(model: nn.Module, path: str) -> Iterator[list[mx.array]]:
    """Context that gathers what goes into the head at ``path``, ``[B, L, D]`` each."""
    states: list[mx.array] = []

    def record(x: mx.array, y: mx.array) -> mx.array:
        states.append(x)
        return y

    with _watched(get_module(model, path), record):
        yield states


@contextmanager
def answering(
    model: nn.Module, path: str, answer: Callable[[mx.array], mx.array]
) -> Iterator[None]:
    """Context in which the head at ``path`` gives ``answer(x)`` for hidden states x."""
    module = get_module(model, path)
    if isinstance(module, FlashLinear):
        with intercepted(module.head, answer):
            yield
    else:
        with _watched(module, lambda x, y: answer(x)):
            yield


def find_transform(model: nn.Module, path: str) -> Transform | None:
    """What the model does to the logits of its head at ``path``, found by giving it
    known ones; ``None`` if it is nothing that :class:`Transform` can say."""
    ramp = np.concatenate([np.linspace(1e-2, 80, 255), [1e6]])
    values = mx.array(ramp, mx.float32)

    def answer(x: mx.array) -> mx.array:
        return mx.broadcast_to(values, (*x.shape[:-1], ramp.size))

    with answering(model, path, answer):
        logits = _run(model, mx.array([[0, 1]]))
    if logits.ndim != 3 or logits.shape[-1] != ramp.size:
        return None
    return Transform.fit(ramp, np.array(logits[0, -1].astype(mx.float32), np.float64))


def place(model: nn.Module, path: str, head: FlashHead) -> nn.Module:
    """Put a FlashHead in place of the model's head at ``path``; returns the model."""
    inner = get_module(model, path)
    kind = FlashEmbedding if is_tied(model, path) else FlashLinear
    if isinstance(inner, FlashLinear):
        module = kind(head, inner._dtype, inner._unpack)
    else:
        table = head_table(inner)
        # Where mlx-lm has packed rows, embeddings are to be as it makes them.
        module = kind(head, table.dtype, None if table.quantized else mx.float32)
    set_module(model, path, module)
    return model


def flash_slots(model: nn.Module) -> Iterator[FlashLinear]:
    """What stands in a model in the place of heads that are FlashHeads."""
    for _, module in model.named_modules():
        if isinstance(module, FlashLinear):
            yield module


def slot_of(model: Any) -> FlashLinear | None:
    """What stands in the place of a model's head, where that is a FlashHead."""
    slots = flash_slots(model) if isinstance(model, nn.Module) else ()
    of_heads = {id(slot.head): slot for slot in slots}  # one may stand at two places
    return next(iter(of_heads.values())) if len(of_heads) == 1 else None


def head_of(model: Any) -> FlashHead | None:
    """The FlashHead of a model that has one."""
    slot = slot_of(model)
    return None if slot is None else slot.head


def flash_heads(model: nn.Module) -> Iterator[FlashHead]:
    """The FlashHeads in a model, also within the embedding of a tied one; none in a
    model with a dense head. Set their ``n_probes`` to trade speed for fidelity."""
    for _, module in model.named_modules():
        if isinstance(module, FlashHead):
            yield module
