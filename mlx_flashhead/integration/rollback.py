"""Roll mlx-lm's prompt caches back to an earlier step of a draft.

Whoever drafts tokens feeds them to the model before it knows which of them stand. Those
that do not must leave no trace in the caches, and mlx-lm can only trim caches that keep
every token: not a sliding window that is full, not a recurrent state. A ``Rollback``
watches the steps of a draft and undoes the last of them in any of mlx-lm's caches.

What a step does to a cache decides what has to be remembered of it:

- It appends (``KVCache``): the offsets before each step.
- It replaces arrays by new ones (``ArraysCache``): these arrays, before each step. All
  states of a draft are then alive at once, as long as the draft is.
- It overwrites the oldest tokens (a full ``RotatingKVCache``) or cuts them off (a full
  ``ChunkedKVCache``): the buffers as they were before the first such step. MLX shares
  the memory of an array until it is written to, so a draft costs one copy of these
  buffers, which the first write makes instead of writing in place, and nothing else
  unless something is undone.

Nothing here evaluates an array or waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import cache as mlx_lm_caches


class Rollback:
    """Undoes the last steps of a draft in a prompt cache.

    A step is one call of the model with one token of each sequence::

        rollback = Rollback(cache)
        rollback.mark()
        for _ in range(k):
            rollback.step()
            y = draft(model(y[:, None], cache=cache))
        rollback.to(n)

    leaves ``cache`` as if only the first ``n`` tokens had been fed. The cache objects
    stay the same; their attributes change. Slots of a buffer that hold no token yet may
    hold an undone one, as after mlx-lm's own ``trim``.

    Nothing but the model may change the caches between ``mark`` and ``to``: quantize
    KV caches, which puts other objects into the list, before a draft or after it.
    """

    def __init__(self, cache: Sequence[Any]) -> None:
        """Watch a prompt cache, as ``make_prompt_cache`` makes it.

        Raises:
            ValueError: A cache is of a class that is not known; see ``supported``.
        """
        for leaf in _leaves(cache):
            if type(leaf) not in _RECORDS:
                raise ValueError(
                    f"a prompt cache of class {type(leaf).__name__} cannot be rolled "
                    "back: decode without drafting"
                )
        self._cache = cache
        self._records: list[_Record] = []
        self._steps = 0

    @property
    def steps(self) -> int:
        """The number of steps since the mark."""
        return self._steps

    def mark(self) -> None:
        """Begin a draft: ``to(0)`` comes back to here."""
        self._records = [_RECORDS[type(leaf)](leaf) for leaf in _leaves(self._cache)]
        self._steps = 0

    def step(self) -> None:
        """Say that the model is about to be fed one token."""
        for record in self._records:
            record.step()
        self._steps += 1

    def to(self, n: int) -> None:
        """Undo all but the first ``n`` steps since the mark, and end the draft.

        A step that failed half-way is undone like any other.

        Raises:
            ValueError: There are not ``n`` steps, or the list holds other caches now.
        """
        if not 0 <= n <= self._steps:
            raise ValueError(f"cannot keep {n} of {self._steps} steps")
        records, steps = self._records, self._steps
        self._records, self._steps = [], 0
        if n == steps:
            return
        leaves = list(_leaves(self._cache))
        if [id(leaf) for leaf in leaves] != [id(record.cache) for record in records]:
            raise ValueError(
                "the prompt cache holds other caches than at the mark: quantize KV "
                "caches between drafts, not within one"
            )
        for record in records:
            record.to(n)


def supported(cache: Sequence[Any]) -> bool:
    """Whether a prompt cache can be rolled back: every cache of it is exactly of a
    class of mlx-lm's that is known here, for a subclass may keep more."""
    return all(type(leaf) in _RECORDS for leaf in _leaves(cache))


def _leaves(cache: Sequence[Any]) -> Iterator[Any]:
    for entry in cache:
        if type(entry) is mlx_lm_caches.CacheList:
            yield from _leaves(entry.caches)
        else:
            yield entry


def _handle(x: Any) -> Any:
    """Another handle of an array, or of each of a list: ``x[i] = y`` and ``x -= y``
    change the handle they are called on, and no other."""
    if isinstance(x, list):
        return [_handle(item) for item in x]
    return x[...] if isinstance(x, mx.array) else x


def _length(buffer: Any) -> int:
    """Slots of a buffer of keys, quantized ones too; 0 where there is none yet."""
    if buffer is None:
        return 0
    return int((buffer if isinstance(buffer, mx.array) else buffer[0]).shape[-2])


class _Record:
    """What one cache was before each step since the mark."""

    # The small attributes that say where the cache is.
    position: ClassVar[tuple[str, ...]] = ("offset",)

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.before: list[list[Any]] = []

    def step(self) -> None:
        cache = self.cache
        self.before.append([_handle(getattr(cache, name)) for name in self.position])

    def to(self, n: int) -> None:
        """Be as before step ``n``, which was made."""
        for name, value in zip(self.position, self.before[n], strict=True):
            setattr(self.cache, name, value)


class _Appending(_Record):
    """Each step fills the next free slot of a buffer that grows now and then."""

    tokens: ClassVar[str] = "offset"  # what counts the tokens

    def __init__(self, cache: Any) -> None:
        super().__init__(cache)
        self.length = _length(cache.keys)

    def filled(self) -> int:
        """The number of slots that hold a token."""
        return int(getattr(self.cache, self.tokens))

    def to(self, n: int) -> None:
        super().to(n)
        self.shrink(self.length)

    def shrink(self, length: int) -> None:
        """Undo a growth that only undone steps needed: the cache takes no more room
        than without them, and an empty one is empty again."""
        cache = self.cache
        if length == self.filled() == 0:
            cache.keys = cache.values = None
        elif self.filled() <= length < _length(cache.keys):
            cache.keys, cache.values = tree_map(
                lambda x: x[..., :length, :], (cache.keys, cache.values)
            )


class _BatchAppending(_Appending):
    position = ("offset", "_idx")
    tokens = "_idx"


class _Concatenating(_Appending):
    """Every slot counts, so unlike ``trim`` of ``ConcatenateKVCache``, which only
    changes its offset, this has to cut the buffers."""

    def to(self, n: int) -> None:
        _Record.to(self, n)
        self.shrink(self.filled())


class _Buffers(NamedTuple):
    """Buffers as they were before a step."""

    step: int
    keys: mx.array
    values: mx.array


class _Losing(_Appending):
    """Where a cache is full, each step loses its oldest token. The buffers before the
    first such step still have it and are saved; once the steps have lost everything in
    them that can be lost, the buffers of then are saved as well."""

    def __init__(self, cache: Any) -> None:
        super().__init__(cache)
        self.saved: list[_Buffers] = []

    def is_full(self) -> bool:
        """Whether the next step loses a token."""
        raise NotImplementedError

    def capacity(self) -> int:
        """The number of steps after which nothing that can be lost is left."""
        raise NotImplementedError

    def put_back(
        self, old: mx.array, new: mx.array, n: int, earlier: int, later: int
    ) -> mx.array:
        """A buffer as it was before step ``n``: of before step ``later``, with what the
        steps since ``n`` lost taken from that of before step ``earlier``."""
        raise NotImplementedError

    def step(self) -> None:
        step = len(self.before)
        if self.is_full() and (
            not self.saved or step - self.saved[-1].step == self.capacity()
        ):
            self.save(step)
        super().step()

    def save(self, step: int) -> None:
        cache = self.cache
        self.saved.append(_Buffers(step, _handle(cache.keys), _handle(cache.values)))

    def to(self, n: int) -> None:
        cache, now = self.cache, len(self.before)
        super().step()
        self.save(now)
        later = next(buffers for buffers in self.saved if buffers.step >= n)
        earlier = next((b for b in reversed(self.saved) if b.step < n), None)
        cache.keys, cache.values = later.keys, later.values
        if earlier is None:  # nothing is lost that step n still had
            super().to(n)
            return
        _Record.to(self, n)
        if later.step > n:
            steps = n, earlier.step, later.step
            cache.keys = self.put_back(earlier.keys, later.keys, *steps)
            cache.values = self.put_back(earlier.values, later.values, *steps)


class _Rotating(_Losing):
    """The newest token takes the oldest one's slot, after the first ``keep`` slots."""

    position: ClassVar[tuple[str, ...]] = ("offset", "_idx")

    def is_full(self) -> bool:
        return bool(getattr(self.cache, self.tokens) >= self.cache.max_size)

    def capacity(self) -> int:
        return int(self.cache.max_size - getattr(self.cache, "keep", 0))

    def put_back(
        self, old: mx.array, new: mx.array, n: int, earlier: int, later: int
    ) -> mx.array:
        size, slot = self.cache.max_size, self.cache._idx
        # After a prompt there are more slots than that, until the next step cuts them.
        excess = old.shape[2] - size
        left = later - n
        while left:
            if slot == size:
                slot -= self.capacity()
            stop = min(slot + left, size)
            new[..., slot:stop, :] = old[..., slot + excess : stop + excess, :]
            left -= stop - slot
            slot = stop
        return new


class _BatchRotating(_Rotating):
    position = ("offset", "left_padding", "_offset", "_idx", "rotated")
    tokens = "_offset"


class _Chunked(_Losing):
    """The model cuts tokens off at the front before each step."""

    position = ("offset", "start_position")

    def is_full(self) -> bool:
        return self.filled() > self.cache.chunk_size

    def filled(self) -> int:
        return int(self.cache.offset - self.cache.start_position)

    def capacity(self) -> int:
        return int(self.cache.chunk_size)

    def put_back(
        self, old: mx.array, new: mx.array, n: int, earlier: int, later: int
    ) -> mx.array:
        first, start, end = (self.before[i][1] for i in (earlier, n, later))
        # As many slots as without the undone steps, the free ones at the end included.
        length = max(new.shape[2], self.filled()) - (end - start)
        front = old[..., start - first : end - first, :]
        return mx.concatenate([front, new[..., :length, :]], axis=2)


class _Replacing(_Record):
    """Each step puts new arrays into the place of the old ones."""

    position = ("cache", "left_padding", "lengths")


_RECORDS: dict[type, type[_Record]] = {
    mlx_lm_caches.KVCache: _Appending,
    mlx_lm_caches.QuantizedKVCache: _Appending,
    mlx_lm_caches.BatchKVCache: _BatchAppending,
    mlx_lm_caches.ConcatenateKVCache: _Concatenating,
    mlx_lm_caches.RotatingKVCache: _Rotating,
    mlx_lm_caches.BatchRotatingKVCache: _BatchRotating,
    mlx_lm_caches.ChunkedKVCache: _Chunked,
    mlx_lm_caches.ArraysCache: _Replacing,
}
