"""What this package relies on in mlx-lm's functions that it replaces.

Versions are not compared: a function that still looks like the one that is known is
taken to be that one, whatever the version.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

from mlx_lm import utils

from . import samplers

# Not "from mlx_lm import generate": that name is a function's.
_generate = importlib.import_module("mlx_lm.generate")


@dataclass(frozen=True)
class Known:
    """A function of mlx-lm's, and what is relied on.

    Attributes:
        find: Gives it.
        first: Its first parameters, in this order.
        others: Parameters that it has to have besides.
        names: Names that its code has to mention.
    """

    find: Callable[[], Any]
    first: tuple[str, ...]
    others: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    def changed(self) -> str | None:
        """What is not as expected, in a few words; ``None`` where all is."""
        try:
            function = self.find()
        except AttributeError as e:
            return str(e)
        parameters = list(inspect.signature(function).parameters)
        if (
            tuple(parameters[: len(self.first)]) != self.first
            or self.others - set(parameters)
            or self.names - _names(getattr(function, "__code__", None))
        ):
            return f"{function.__qualname__} has changed"
        return None


def _names(code: CodeType | None) -> set[str]:
    """Names that code mentions, that of comprehensions in it, too."""
    if code is None:
        return set()
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


# By the names that they have in ``mlx_lm.utils``.
LOADING = {
    "load_model": Known(
        lambda: utils.load_model,
        ("model_path", "lazy", "strict", "model_config"),
    ),
    "load_tokenizer": Known(lambda: utils.load_tokenizer, ("model_path",)),
    "load_adapters": Known(lambda: utils.load_adapters, ("model", "adapter_path")),
    "save_model": Known(lambda: utils.save_model, ("save_path", "model")),
}
_MOVED = frozenset(
    {"uids", "prompt_cache", "_next_tokens", "_next_logprobs", "_token_context"}
)
DECODING = (
    Known(
        lambda: _generate.generate_step,
        ("prompt", "model"),
        frozenset({"max_tokens", "sampler", "logits_processors", "input_embeddings"})
        | {"kv_bits", "quantized_kv_start"},
    ),
    Known(
        lambda: _generate.speculative_generate_step,
        ("prompt", "model", "draft_model"),
        frozenset({"num_draft_tokens", "max_tokens", "sampler", "logits_processors"}),
    ),
    Known(
        lambda: _generate.GenerationBatch._step,
        ("self",),
        names=_MOVED
        | {"_current_tokens", "_current_logprobs", "update_and_fetch", "samplers"}
        | {"fallback_sampler", "logits_processors", "tokens", "model"},
    ),
    Known(
        lambda: _generate.GenerationBatch.extend,
        ("self", "batch"),
        names=_MOVED,
    ),
    Known(
        lambda: _generate.GenerationBatch.filter,
        ("self", "keep"),
        names=_MOVED,
    ),
    Known(
        lambda: _generate.GenerationBatch.extract_cache,
        ("self", "idx"),
        names=frozenset({"prompt_cache"}),
    ),
    Known(
        lambda: _generate.GenerationBatch.next,
        ("self",),
        names=frozenset(
            {"_step", "_num_tokens", "max_tokens", "extract_cache", "filter"}
        ),
    ),
)


def decoding_changed() -> str | None:
    """What of mlx-lm's decoding is not as it is known here, in a few words; ``None``
    where all is."""
    for known in DECODING:
        if what := known.changed():
            return what
    try:
        samplers.check()
    except (ValueError, TypeError, AttributeError) as e:
        return str(e)
    return None
