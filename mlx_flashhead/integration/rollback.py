"""Roll prompt caches of mlx-lm and mlx-vlm back to an earlier step of a draft.

Whoever drafts tokens feeds them to the model before it knows which of them stand. Those
that do not must leave no trace in the caches, and mlx-lm can only trim caches that keep
every token: not a sliding window that is full, not a recurrent state. A ``Rollback``
watches the steps of a draft and undoes the last of them in any of mlx-lm's caches.

What a step does to a cache decides what has to be remembered of it:

- It appends (``KVCache``): the offsets before each step.
- It replaces arrays by new ones (``ArraysCache``): these arrays, before each step. All
  states of a draft are then alive at once, as long as the draft is.
- It overwrites the oldest token (a full ``RotatingKVCache``): copies of the slots that
  the next steps take. Holding the buffers themselves would be simpler, but MLX writes
  in place only what nobody else holds: the first write of a draft would copy each
  buffer, and all would take twice the memory until the draft ends.
- It cuts the oldest token off (a full ``ChunkedKVCache``): the buffers before the first
  such step, which the step replaces anyway.

Nothing here evaluates an array or waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any, ClassVar, NamedTuple, cast

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import cache as mlx_lm_caches

# The slots of a full RotatingKVCache that are copied at a time: about a draft's tokens.
_BLOCK = 16


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
    stay the same, unless the model put others into the list; their attributes change.
    Slots of a buffer that hold no token yet may hold an undone one, as after mlx-lm's
    own ``trim``.

    Nothing but the model may change the caches between ``mark`` and ``to``: quantize
    KV caches, which puts other objects into the list, before a draft or after it.
    """

    def __init__(self, cache: Sequence[Any]) -> None:
        """Watch a prompt cache, as ``make_prompt_cache`` makes it.

        Raises:
            ValueError: A cache is of a class that is not known; see ``supported``.
        """
        for leaf in _leaves(cache):
            if _record_of(leaf) is None:
                raise ValueError(
                    f"a prompt cache of class {type(leaf).__name__} cannot be rolled "
                    "back: decode without drafting"
                )
        self._cache = cache
        self._epochs: list[_Epoch] = []
        self._steps = 0

    @property
    def steps(self) -> int:
        """The number of steps since the mark."""
        return self._steps

    def mark(self) -> None:
        """Begin a draft: ``to(0)`` comes back to here."""
        self._epochs, self._steps = [_Epoch(self._cache, 0)], 0

    def step(self) -> None:
        """Say that the model is about to be fed one token."""
        epoch = self._epochs[-1]
        if not epoch.holds(self._cache):
            epoch = _Epoch(self._cache, self._steps)
            self._epochs.append(epoch)
        for record in epoch.records:
            record.step()
        self._steps += 1

    def to(self, n: int) -> None:
        """Undo all but the first ``n`` steps since the mark, and end the draft.

        A step that failed half-way is undone like any other.

        Raises:
            ValueError: There are not ``n`` steps, or the list holds caches of another
                kind now.
        """
        if not 0 <= n <= self._steps:
            raise ValueError(f"cannot keep {n} of {self._steps} steps")
        epochs, steps = self._epochs, self._steps
        self._epochs, self._steps = [], 0
        if n == steps:
            return
        now = [type(leaf) for leaf in _leaves(self._cache)]
        if now != [type(record.cache) for record in epochs[0].records]:
            raise ValueError(
                "the prompt cache holds other caches than at the mark: quantize KV "
                "caches between drafts, not within one"
            )
        epoch = next(epoch for epoch in reversed(epochs) if epoch.start <= n)
        if not epoch.holds(self._cache):
            cast(list[Any], self._cache)[:] = epoch.entries
        for record in epoch.records:
            record.to(n - epoch.start)


class _Epoch:
    """Steps during which a prompt cache holds the same caches. Some models of mlx-vlm
    put others in their places at each step, and leave the old ones as they were.

    Attributes:
        start: Steps since the mark before it.
        entries: What the prompt cache holds.
        records: Of each cache.
    """

    def __init__(self, cache: Sequence[Any], start: int) -> None:
        self.start = start
        self.entries = list(cache)
        kinds = [(_record_of(leaf), leaf) for leaf in _leaves(cache)]
        self.records = [record(leaf) for record, leaf in kinds if record]

    def holds(self, cache: Sequence[Any]) -> bool:
        """Whether a prompt cache still holds the same."""
        return all(map(is_, cache, self.entries))


def supported(cache: Sequence[Any]) -> bool:
    """Whether a prompt cache can be rolled back: every cache of it is exactly of a
    class of mlx-lm's or mlx-vlm's that is known here, for a subclass may keep more."""
    return all(_record_of(leaf) is not None for leaf in _leaves(cache))


def _leaves(cache: Sequence[Any]) -> Iterator[Any]:
    for entry in cache:
        if _name_of(entry) in _LISTS:
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
    """What is remembered of a cache's buffers as they were before a step."""

    step: int
    keys: mx.array
    values: mx.array


class _Rotating(_Appending):
    """Once the cache is full, the newest token takes the oldest one's slot, after the
    first ``keep`` slots. The slots that the next steps take are copied first."""

    # The place of the next token comes last.
    position: ClassVar[tuple[str, ...]] = ("offset", "_idx")

    def __init__(self, cache: Any) -> None:
        super().__init__(cache)
        self.size: int = cache.max_size
        self.turning: int = self.size - getattr(cache, "keep", 0)
        self.block = min(_BLOCK, self.turning)
        self.saved: list[_Buffers] = []
        # After a prompt there are more slots than ``size``: the first step makes new
        # buffers without the oldest.
        self.whole = (cache.keys, cache.values) if self.length > self.size else None

    def step(self) -> None:
        step = len(self.before)
        if self.filled() >= self.size and (
            not self.saved or step - self.saved[-1].step == self.block
        ):
            self.save(step)
        super().step()

    def save(self, step: int) -> None:
        """Copy the slots that the next steps take. The buffers depend on the copies, so
        that these are made before the next write, which may then be in place."""
        cache = self.cache
        excess = max(0, cache.keys.shape[2] - self.size)
        runs = list(self.runs(cache._idx, self.block))
        saved = []
        for name in ("keys", "values"):
            buffer = getattr(cache, name)
            parts = [buffer[..., a + excess : b + excess, :] for a, b in runs]
            slots = mx.contiguous(mx.concatenate(parts, axis=2))
            setattr(cache, name, mx.depends(buffer, slots))
            saved.append(slots)
        self.saved.append(_Buffers(step, *saved))

    def runs(self, slot: int, steps: int) -> Iterator[tuple[int, int]]:
        """The slots of some steps, the first of which takes ``slot``: from, to."""
        slot = min(slot, self.size)
        while steps:
            if slot == self.size:
                slot -= self.turning
            stop = min(slot + steps, self.size)
            yield slot, stop
            steps -= stop - slot
            slot = stop

    def to(self, n: int) -> None:
        cache, end = self.cache, len(self.before)
        if n == 0 and self.whole:
            cache.keys, cache.values = self.whole
        else:
            # The latest first: a slot that was taken twice gets what it held at first.
            for buffers in reversed(self.saved):
                first = max(n, buffers.step)
                last = min(end, buffers.step + self.block)
                done = first - buffers.step
                for a, b in self.runs(self.before[first][-1], max(0, last - first)):
                    old = slice(done, done + b - a)
                    cache.keys[..., a:b, :] = buffers.keys[..., old, :]
                    cache.values[..., a:b, :] = buffers.values[..., old, :]
                    done += b - a
        super().to(n)


class _BatchRotating(_Rotating):
    position = ("offset", "left_padding", "_offset", "rotated", "_idx")
    tokens = "_offset"


class _Chunked(_Appending):
    """Once the cache is full, the model cuts its oldest token off before each step and
    makes new buffers. Those before the first such step still have it and are kept;
    once the steps have cut off all their tokens, the buffers of then as well."""

    position = ("offset", "start_position")

    def __init__(self, cache: Any) -> None:
        super().__init__(cache)
        self.saved: list[_Buffers] = []

    def filled(self) -> int:
        return self.cache.offset - self.cache.start_position

    def step(self) -> None:
        step, size = len(self.before), self.cache.chunk_size
        if self.filled() > size and (
            not self.saved or step - self.saved[-1].step == size
        ):
            self.save(step)
        super().step()

    def save(self, step: int) -> None:
        keys, values = self.cache.keys, self.cache.values
        self.saved.append(_Buffers(step, _handle(keys), _handle(values)))

    def to(self, n: int) -> None:
        """Take the first buffers of step ``n`` or later, and put before them what was
        cut off in between."""
        cache, now = self.cache, len(self.before)
        super().step()
        self.save(now)
        later = next(buffers for buffers in self.saved if buffers.step >= n)
        earlier = next((b for b in reversed(self.saved) if b.step < n), None)
        cache.keys, cache.values = later.keys, later.values
        if earlier is None:
            super().to(n)
            return
        _Record.to(self, n)
        first, start, end = (self.before[i][1] for i in (earlier.step, n, later.step))
        # As many slots as without the undone steps, the free ones at the end included.
        length = max(_length(cache.keys), self.filled()) - (end - start)
        cache.keys, cache.values = (
            mx.concatenate(
                [old[..., start - first : end - first, :], new[..., :length, :]], axis=2
            )
            for old, new in zip(earlier[1:], later[1:], strict=True)
        )


class _Replacing(_Record):
    """Each step puts new arrays into the place of the old ones."""

    position: ClassVar[tuple[str, ...]] = ("cache", "left_padding", "lengths")


class _Counting(_Replacing):
    """mlx-vlm's counts the steps, instead of changing arrays, and counts its changes of
    another kind, by which models know whether what they derived still holds."""

    position = (
        *("cache", "_left_padding", "_left_padding_advance"),
        *("_lengths", "_lengths_advance"),
    )

    def to(self, n: int) -> None:
        super().to(n)
        self.cache.metadata_revision += 1


def _name_of(cache: Any) -> str:
    """A cache's class, by its full name."""
    return f"{type(cache).__module__}.{type(cache).__qualname__}"


def _record_of(cache: Any) -> type[_Record] | None:
    return _RECORDS.get(_name_of(cache))


# By name: mlx-vlm, which has copies of mlx-lm's, need not be installed.
_MLX_LM, _MLX_VLM = "mlx_lm.models.cache", "mlx_vlm.models.cache"
_LISTS = {f"{_MLX_LM}.CacheList", f"{_MLX_VLM}.CacheList"}
_RECORDS: dict[str, type[_Record]] = {
    f"{_MLX_LM}.KVCache": _Appending,
    f"{_MLX_LM}.QuantizedKVCache": _Appending,
    f"{_MLX_LM}.BatchKVCache": _BatchAppending,
    f"{_MLX_LM}.ConcatenateKVCache": _Concatenating,
    f"{_MLX_LM}.RotatingKVCache": _Rotating,
    f"{_MLX_LM}.BatchRotatingKVCache": _BatchRotating,
    f"{_MLX_LM}.ChunkedKVCache": _Chunked,
    f"{_MLX_LM}.ArraysCache": _Replacing,
    f"{_MLX_VLM}.KVCache": _Appending,
    f"{_MLX_VLM}.BatchKVCache": _BatchAppending,
    f"{_MLX_VLM}.RotatingKVCache": _Rotating,
    f"{_MLX_VLM}.BatchRotatingKVCache": _BatchRotating,
    f"{_MLX_VLM}.ArraysCache": _Counting,
}
if not hasattr(mlx_lm_caches.ChunkedKVCache, "keys_and_values"):
    # Before mlx-lm 0.32 it takes free slots of its buffer for tokens, and cuts wrongly.
    del _RECORDS[f"{_MLX_LM}.ChunkedKVCache"]
