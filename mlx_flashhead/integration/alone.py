"""Whether a head by itself is faster dense, where nobody here runs the model.

Programs with a loop of their own ask a slot for logits, or
:func:`mlx_flashhead.sample` for tokens, and all that is at hand is hidden states. So
the head alone is timed, by the dense product and by retrieval.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..folder.section import Section
from ..head import FlashHead
from ..sampling import Settings, draw, fits, split
from ..sampling.draw import known_transform
from ..tuning import Cell, kind_of
from ..tuning.measure import Run
from .exact import certainly
from .locate import flash_slots
from .slots import FlashLinear, Origin
from .tuner import switched_off, tuner_of

# About as far as logits of a model reach: filters take their time by that.
_LARGEST_LOGIT = 20.0


def let_measure(model: nn.Module, section: Section) -> None:
    """Let the FlashHead in a model be measured when it is first used.

    Args:
        model: The model; what is measured depends on its code.
        section: That of the FlashHead.
    """
    slots = list(flash_slots(model))
    rows, whose = slots[0].head.rows, type(model).__module__
    what = f"{whose}, rows {rows.bits} {rows.group_size} {rows.mode}"
    origin = Origin(section.to_json()["sha256"], section.drafting, what)
    for slot in slots:
        slot.origin = origin
        slot.head.choice = partial(_dense_is_faster, slot)


def _dense_is_faster(
    slot: FlashLinear, head: FlashHead, h: mx.array, settings: Settings | None
) -> bool:
    """Whether the dense product of hidden states ``h [..., D]`` takes no longer than
    retrieval, for logits or for tokens; no where that was not measured."""
    if slot.origin is None or switched_off():
        return False
    if settings is not None and not fits(head, settings):
        return False
    n = max(1, h.size // h.shape[-1])
    what = "logits" if settings is None else kind_of(settings)
    make = partial(_runs, head, settings, h.dtype)
    return tuner_of(slot).alone(head, n, what, make) is True


def _runs(
    head: FlashHead, settings: Settings | None, dtype: mx.Dtype, size: int
) -> dict[Cell, Run]:
    """Logits of so many hidden states, or tokens, both ways."""
    h, key = _states(head, size).astype(dtype), mx.zeros((2,), mx.uint32)
    mx.eval(h)

    def stock() -> mx.array:
        if settings is None:
            return head.dense(h).astype(dtype)
        logits = known_transform(head)(head.clustered(h))
        return certainly(head, settings, logits, split(key, size))

    def approximate() -> mx.array:
        return head(h) if settings is None else draw(head, settings, h, key).tokens

    def run(one: Callable[[], mx.array], n: int) -> None:
        for _ in range(n):
            made = one()
            mx.async_eval(made)
        mx.eval(made)

    # Weights that were never used may still be on the disk.
    run(stock, 1)
    return {
        Cell("stock", size): partial(run, stock),
        Cell("approximate", size): partial(run, approximate),
    }


def _states(head: FlashHead, n: int) -> mx.array:
    """Hidden states, float32 ``[n, D]``, each of which points at a token."""
    rows = head.embed(mx.arange(n) % head.vocab_size, mx.float32).astype(mx.float32)
    squares = mx.maximum((rows * rows).sum(axis=-1, keepdims=True), 1e-6)
    return rows * (_LARGEST_LOGIT / squares)
