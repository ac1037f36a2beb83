"""What stands in a model where its head stood.

A slot passes hidden states to its FlashHead, or to whoever intercepts them: decoding
needs the hidden state itself, and scoring of given text the dense product. An
interception holds for one thread or task only, so that several can use one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from ..folder.section import Draft
from ..head import FlashHead

Decoding = Literal["approximate", "exact", "dense"]
Answer = Callable[[mx.array], mx.array]


@dataclass(frozen=True, eq=False)
class Origin:
    """What a head's folder says of it.

    Attributes:
        sha256: Digest of the folder's section.
        draft: How exact decoding is to draft.
        what: What its steps depend on besides: whose model it stands in, and the form
          of its rows.
    """

    sha256: str
    draft: Draft
    what: str = ""


# Heads and what answers for them, the latest last.
_interceptions: ContextVar[tuple[tuple[FlashHead, Answer], ...]] = ContextVar(
    "mlx_flashhead_interceptions", default=()
)


@contextmanager
def intercepted(head: FlashHead, answer: Answer) -> Iterator[None]:
    """Context in which the slots of a head give ``answer(x)`` for hidden states
    ``x [..., D]``."""
    token = _interceptions.set((*_interceptions.get(), (head, answer)))
    try:
        yield
    finally:
        _interceptions.reset(token)


def answered(
    head: FlashHead,
    answer: Answer,
    model: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The model's call, :func:`intercepted`: to enter a context takes longer, at each
    step."""
    token = _interceptions.set((*_interceptions.get(), (head, answer)))
    try:
        return model(*args, **kwargs)
    finally:
        _interceptions.reset(token)


def densely(head: FlashHead) -> AbstractContextManager[None]:
    """Context in which the slots of a head give exact logits, in the dtype of the
    hidden states."""
    return intercepted(head, dense_answer(head))


def dense_answer(head: FlashHead) -> Answer:
    """What :func:`densely` answers with."""
    return lambda x: head.dense(x).astype(x.dtype)


def hidden_state(
    head: FlashHead, model: Callable[..., Any], *args: Any, **kwargs: Any
) -> mx.array:
    """What the model's call gives its head, ``[B, L, D]``."""
    states: list[mx.array] = []

    def answer(x: mx.array) -> mx.array:
        states.append(x)
        return x[..., :1]  # what is made of it is looked at by nobody

    answered(head, answer, model, *args, **kwargs)
    return states[-1]


class _Probing:
    """A head with other numbers of probes: always the same copy of it for each, whose
    compiled steps are found again."""

    def __init__(self, head: FlashHead):
        self._head = head
        self._twins: dict[int, FlashHead] = {}

    def __call__(self, n_probes: int) -> FlashHead:
        head = self._head
        if n_probes == head.n_probes:
            return head
        twin = self._twins.get(n_probes)
        if twin is None or twin.rows is not head.rows:
            twin = self._twins[n_probes] = head.probing(n_probes)
        return twin


@dataclass(frozen=True)
class Before:
    """What a model was before a FlashHead was attached to it.

    Attributes:
        module: What stood where the slot stands now, without its rows.
        dtypes: Those of the parameters, by their names: on a CPU, they are cast.
    """

    module: nn.Module
    dtypes: dict[str, mx.Dtype]


class Rows(mx.array):
    """Rows ``[V, D]`` of a head, an array as any other, but where a model makes its
    logits with ``x @ weight.T``, they are what ``answer(x)`` gives."""

    def __init__(self, rows: mx.array, answer: Answer):
        super().__init__(rows)
        self._answer = answer

    @property
    def T(self) -> mx.array:
        return _Columns(super().T, self._answer)


class _Columns(mx.array):
    """The same, transposed: ``[D, V]``."""

    def __init__(self, columns: mx.array, answer: Answer):
        super().__init__(columns)
        self._answer = answer

    def __rmatmul__(self, x: mx.array) -> mx.array:
        return self._answer(x)


class FlashLinear(nn.Module):
    """Stands in for the ``nn.Linear`` of a model whose embedding is another table.

    Args:
        head (FlashHead): The head.
        dtype (mx.Dtype, optional): That of the weight; by default the rows'.
        unpack (mx.Dtype, optional): The dtype that packed rows are unpacked in before:
          float32 is exact, and without any it is that of their scales, as in mlx-lm.

    Attributes:
        decoding (str): ``"approximate"``, ``"exact"`` or ``"dense"``; but for the
          first, the slot answers every call with the dense product.
        verify_every (int): Positions that exact decoding verifies at once.
        stop_tokens (frozenset[int]): Tokens that end a text.
        origin (Origin, optional): The folder that it came from, whose head may be
          measured; ``None`` decodes as it is set to.
      before (Before, optional): What to detach it to, where it was attached.
    """

    def __init__(
        self,
        head: FlashHead,
        dtype: mx.Dtype | None = None,
        unpack: mx.Dtype | None = None,
    ):
        super().__init__()
        self.head = head
        self._dtype, self._unpack = dtype or head.rows.dtype, unpack
        self.decoding: Decoding = "approximate"
        self.verify_every = 1
        self.stop_tokens: frozenset[int] = frozenset()
        self.origin: Origin | None = None
        # Of a number of probes, the head that probes so many.
        self.probing = _Probing(head)
        self.before: Before | None = None

    @property
    def exact(self) -> bool:
        """Whether decoding is exact."""
        return self.decoding == "exact"

    @property
    def weight(self) -> mx.array:
        """Rows ``[V, D]`` in vocabulary order, lazy, for models that read the weight of
        their head, or multiply with it themselves."""
        rows = self._rows(mx.arange(self.head.vocab_size))
        return Rows(rows, self._logits)

    def _rows(self, ids: mx.array) -> mx.array:
        return self.head.embed(ids, self._unpack).astype(self._dtype)

    def _logits(self, x: mx.array) -> mx.array:
        for head, answer in reversed(_interceptions.get()):
            if head is self.head:
                return answer(x)
        if self.decoding != "approximate":
            return self.head.dense(x)
        step = x.ndim < 3 or x.shape[-2] == 1  # a prompt is dense anyway
        choice = self.head.choice
        if step and choice is not None and choice(self.head, x, None):
            return self.head.dense(x).astype(x.dtype)
        return self.head(x)

    def __call__(self, x: mx.array) -> mx.array:
        """Logits ``[..., V]`` of hidden states ``x [..., D]``, in the dtype of x; where
        decoding is dense or exact as MLX's product gives them, for exact decoding
        chooses by these."""
        return self._logits(x)


class FlashEmbedding(FlashLinear):
    """Stands in for the ``nn.Embedding`` of a tied model: one table serves both as
    the embedding and, through ``as_linear``, as the classification head."""

    def _extra_repr(self) -> str:
        return f"{self.head.vocab_size}, {self.head.hidden_size}"

    def __call__(self, ids: mx.array) -> mx.array:
        """Embeddings ``[*ids.shape, D]`` of tokens."""
        return self._rows(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits ``[..., V]`` of hidden states ``x [..., D]``, as :class:`FlashLinear`
        gives them."""
        return self._logits(x)
