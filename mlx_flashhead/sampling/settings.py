"""What a token is drawn with: the settings of a sampler, and logits processors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import mlx.core as mx


@dataclass(frozen=True)
class Settings:
    """Arguments of :func:`mlx_lm.sample_utils.make_sampler`, by its names.

    Attributes:
        temp: Temperature; 0 is greedy, and nothing else counts then.
        top_p: Probability of the nucleus; 0 and 1 keep everything.
        min_p: Least probability, relative to the likeliest token's; 0 keeps everything.
        min_tokens_to_keep: Tokens that ``min_p`` leaves in any case.
        top_k: Likeliest tokens that are kept; 0 keeps everything.
        xtc_probability: How often XTC drops the likeliest tokens.
        xtc_threshold: Probability from which on it does, at most 0.5.
        xtc_special_tokens: Ids that it never drops.
    """

    temp: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the token with the largest logit is taken."""
        return self.temp == 0

    @property
    def sorts(self) -> bool:
        """Whether mlx-lm would sort the vocabulary for it."""
        return not self.greedy and (self.nucleus < 1 or self.top_k > 0)

    @property
    def cuts(self) -> bool:
        """Whether a filter drops the least likely tokens."""
        return self.nucleus < 1 or self.min_p > 0 or self.top_k > 0

    def xtc_exempt(self, ids: mx.array) -> mx.array | None:
        """Which of the tokens ``ids [..., n]`` XTC never drops, bool of their shape;
        ``None`` for none."""
        if self.xtc_probability == 0 or not self.xtc_special_tokens:
            return None
        special = mx.array(self.xtc_special_tokens, mx.uint32)
        return (ids[..., None] == special).any(axis=-1)

    @property
    def nucleus(self) -> float:
        """top_p, where it is one; else 1."""
        return self.top_p if 0 < self.top_p < 1 else 1.0


class Tempered(Settings):
    """The same, but filters look at the distribution of the temperature, not of
    temperature 1, as mlx-vlm's samplers with a seed do. Only the dense head draws so;
    a draft takes them for mlx-lm's, which is nearly the same."""

    def on(self, logits: mx.array) -> tuple[Settings, mx.array]:
        """Settings of temperature 1, and the logits that mean the same with them."""
        values = {f.name: getattr(self, f.name) for f in fields(Settings)}
        return Settings(**values | {"temp": 1.0}), logits / self.temp


@dataclass(frozen=True, eq=False)
class Bias:
    """``logit_bias``: ``values [n]`` are added to the logits of ``ids [n]``, int32."""

    ids: mx.array
    values: mx.array


@dataclass(frozen=True, eq=False)
class Penalty:
    """A penalty on the last ``context_size`` tokens; ``apply(tokens, logits)`` is
    mlx-lm's processor, to which any numbering of the tokens is as good as another."""

    context_size: int
    apply: Callable[[mx.array, mx.array], mx.array]


Processor = Bias | Penalty
