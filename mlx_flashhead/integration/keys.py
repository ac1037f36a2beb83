"""Random keys of a generation's draws."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..sampling import Settings


class Keys:
    """Random keys, one after another, from a place that MLX's own generator chose: as
    reproducible as that is by ``mx.random.seed``.

    Args:
        model: What draws. The processes that share a model (``model.shard``) have to
            draw the same tokens: all take the place that the first one's generator
            chose.
        seed: Chooses the place instead.
    """

    def __init__(self, model: Any = None, seed: int | None = None) -> None:
        self._model, self._seed = model, seed
        self._none = mx.array([0, 0], dtype=mx.uint32)
        self._start: list[int] | None = None
        self._n = 0

    def next(self, settings: Settings) -> mx.array:
        """A key, uint32 ``[2]``, for one draw."""
        self._n += 1
        return self.at(self._n, settings)

    def at(self, n: int, settings: Settings) -> mx.array:
        """The key of draw n; a greedy choice takes nothing from the generator."""
        if settings.greedy:
            return self._none
        return mx.array(self._words(n, settings), dtype=mx.uint32)

    def several(self, n: int, k: int, settings: Settings) -> mx.array:
        """The keys of draws n to n + k - 1, uint32 ``[k, 2]``."""
        keys = [self._words(n + i, settings) for i in range(k)]
        return mx.array(keys, dtype=mx.uint32)

    def _words(self, n: int, settings: Settings) -> list[int]:
        """What the key of draw n is of."""
        if settings.greedy:
            return [0, 0]
        if self._start is None:
            key = None if self._seed is None else mx.random.key(self._seed)
            words = mx.random.randint(0, 0xFFFFFFFF, (2,), dtype=mx.uint32, key=key)
            group = group_of(self._model)
            if group is not None:
                words = words if group.rank() == 0 else mx.zeros_like(words)
                words = mx.distributed.all_sum(words, group=group, stream=mx.cpu)
            self._start = cast(list[int], words.tolist())
        high, low = self._start
        return [high, (low + n) & 0xFFFFFFFF]


def group_of(model: nn.Module | None) -> mx.distributed.Group | None:
    """The processes that share a model's layers, where several do."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        group = getattr(module, "group", None)
        if isinstance(group, mx.distributed.Group) and group.size() > 1:
            return group
    return None
