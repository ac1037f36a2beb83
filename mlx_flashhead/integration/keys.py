"""Random keys of a generation's draws."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from ..sampling import Settings


class Keys:
    """Random keys, one after another, from a place that MLX's own generator chose: as
    reproducible as that is by ``mx.random.seed``.

    Args:
        seed: Chooses the place instead.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        self._start: list[int] | None = None
        self._n = 0

    def next(self, settings: Settings) -> mx.array:
        """A key, uint32 ``[2]``, for one draw."""
        self._n += 1
        return self.at(self._n, settings)

    def at(self, n: int, settings: Settings) -> mx.array:
        """The key of draw n; a greedy choice takes nothing from the generator."""
        return self.several(n, 1, settings)[0]

    def several(self, n: int, k: int, settings: Settings) -> mx.array:
        """The keys of draws n to n + k - 1, uint32 ``[k, 2]``."""
        if settings.greedy:
            return mx.zeros((k, 2), dtype=mx.uint32)
        if self._start is None:
            key = None if self._seed is None else mx.random.key(self._seed)
            words = mx.random.randint(0, 0xFFFFFFFF, (2,), dtype=mx.uint32, key=key)
            self._start = cast(list[int], words.tolist())
        high, low = self._start
        keys = [[high, (low + n + i) & 0xFFFFFFFF] for i in range(k)]
        return mx.array(keys, dtype=mx.uint32)
