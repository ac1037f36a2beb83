"""Teach mlx-lm about FlashHead: to open folders that have one, and to decode with it.

Every loader of mlx-lm goes through ``mlx_lm.utils.load_model``. Patched, it puts the
FlashHead in place before anything of the dense head is read from disk. All decoding of
mlx-lm goes through ``generate_step``, ``speculative_generate_step`` and
``GenerationBatch._step``. Patched, they draw tokens among a FlashHead's candidates;
models without one they leave to mlx-lm. What changes or reads a ``GenerationBatch``
between its steps first has its caches settled.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlx_lm
from mlx_lm import utils

from ..folder.format import HEAD_FILE
from . import decode, exact_batch, loading, samplers

# Not "from mlx_lm import generate": that name is a function's.
_generate = importlib.import_module("mlx_lm.generate")

# Object, attribute and value before, of what was replaced: to load, and to decode.
_loading: list[tuple[Any, str, Any]] = []
_decoding: list[tuple[Any, str, Any]] = []
# Arguments of the patch that is on.
_options: dict[str, Any] | None = None


class PatchError(RuntimeError):
    """The installed mlx-lm is not one that this package knows."""


def patch(
    *,
    n_probes: int | None = None,
    dense: bool = False,
    exact: bool = True,
    verify_every: int | None = None,
) -> None:
    """Make ``mlx_lm.load`` use the FlashHead of folders that have one, and mlx-lm's
    decoding (``generate``, ``stream_generate``, ``batch_generate``, the server, ...)
    draw among its candidates. Other models load and decode as before. The order of
    imports does not matter. On a CPU back-end models with a FlashHead compute in
    float32. A second call replaces the first.

    From then on, ``mlx_lm.load`` raises ``FormatError`` for a converted folder that is
    damaged or changed, and ``ValueError`` for an adapter of a head that is clustered;
    ``mlx_lm.utils.save_model`` raises ``ValueError`` for a model with a FlashHead.

    Args:
        n_probes: Clusters probed per decoded token, instead of the stored number.
        dense: Decode with the dense head; the rest is as with a FlashHead.
          ``MLX_FLASHHEAD=0`` in the environment, read at each load, leaves the model
          to mlx-lm.
        exact: Draft with the FlashHead and verify with the dense head: the tokens are
          the model's own. Otherwise they are drawn among FlashHead's candidates.
        verify_every: Tokens that are verified at once where it is exact, instead of
          the stored number.

    Raises:
        PatchError: The installed mlx-lm is not as expected. mlx-lm is as it came then.
    """
    global _options
    unpatch()
    patch_decoding()
    _options = {
        "n_probes": n_probes,
        "dense": dense,
        "exact": exact,
        "verify_every": verify_every,
    }

    def load_model(stock: Any, *args: Any, **kwargs: Any) -> Any:
        options: dict[str, Any] = {**kwargs, **(_options or {})}
        loaded = loading.load_model(stock, *args, **options)
        _patch_late()
        return loaded

    for name, ours in (
        ("load_model", load_model),
        ("load_tokenizer", loading.load_tokenizer),
        ("load_adapters", loading.load_adapters),
        ("save_model", loading.save_model),
    ):
        stock = getattr(utils, name)
        wrapped = functools.wraps(stock)(functools.partial(ours, stock))
        _replace(_loading, utils, name, wrapped)
    # The file's name keeps it out of stock mlx-lm's sight, downloads included.
    patterns = [*utils.DEFAULT_ALLOW_PATTERNS, HEAD_FILE]
    _replace(_loading, utils, "DEFAULT_ALLOW_PATTERNS", patterns)


def stock_loader(name: str) -> Any:
    """A function of ``mlx_lm.utils`` as it is without the patch."""
    for owner, attribute, before in _loading:
        if (owner, attribute) == (utils, name):
            return before
    return getattr(utils, name)


def patch_decoding() -> None:
    """The part of :func:`patch` that concerns models which are loaded already: mlx-lm's
    decoding functions draw among a FlashHead's candidates. Where it is on, nothing
    happens.

    Raises:
        PatchError: The installed mlx-lm is not as expected. Nothing is changed then.
    """
    if _decoding:
        return
    check()
    for owner, name, wrap in (
        (_generate, "generate_step", decode.generate_step),
        (_generate, "speculative_generate_step", decode.speculative_generate_step),
        (_generate.GenerationBatch, "_step", decode.batch_step),
        (_generate.GenerationBatch, "extend", exact_batch.batch_extend),
        (_generate.GenerationBatch, "filter", exact_batch.batch_filter),
        (_generate.GenerationBatch, "extract_cache", exact_batch.batch_extract_cache),
    ):
        _replace(_decoding, owner, name, wrap(getattr(owner, name)))


def _replace(
    where: list[tuple[Any, str, Any]], owner: Any, name: str, value: Any
) -> None:
    where.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _patch_late() -> None:
    """mlx_lm.evaluate and mlx_lm.perplexity score given text: with the dense head. The
    server asks log-probabilities for the likeliest. They are patched only once they are
    there: evaluate needs a package of its own."""
    for module, name, wrap in _LATE:
        owner = sys.modules.get(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part, None)
        if not hasattr(owner, last) or any(e[:2] == (owner, last) for e in _loading):
            continue
        _replace(_loading, owner, last, wrap(getattr(owner, last)))


_LATE: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("mlx_lm.evaluate", "MLXLM._process_prompt", decode.exact),
    ("mlx_lm.evaluate", "MLXLM._score_fn", decode.exact),
    ("mlx_lm.perplexity", "eval_ppl", decode.exact),
    ("mlx_lm.server", "_format_top_logprobs", decode.top_logprobs),
)


# The functions that are replaced, and what is relied on: parameters that each has to
# have, first and in this order, and names that its code has to mention.
_KNOWN: list[tuple[Callable[[], Any], list[str], set[str]]] = [
    (
        lambda: utils.load_model,
        ["model_path", "lazy", "strict", "model_config"],
        set(),
    ),
    (lambda: utils.load_tokenizer, ["model_path"], set()),
    (lambda: utils.load_adapters, ["model", "adapter_path"], set()),
    (lambda: utils.save_model, ["save_path", "model"], set()),
    (
        lambda: _generate.generate_step,
        ["prompt", "model", "stream", "max_tokens", "sampler", "logits_processors"],
        set(),
    ),
    (
        lambda: _generate.speculative_generate_step,
        [
            *["prompt", "model", "draft_model", "stream", "num_draft_tokens"],
            *["max_tokens", "sampler", "logits_processors"],
        ],
        set(),
    ),
    (
        lambda: _generate.GenerationBatch._step,
        ["self"],
        {"_current_tokens", "_next_tokens", "_current_logprobs", "_next_logprobs"}
        | {"_token_context", "update_and_fetch", "fallback_sampler", "samplers"}
        | {"logits_processors", "prompt_cache", "tokens", "uids", "model"},
    ),
    (
        lambda: _generate.GenerationBatch.extend,
        ["self", "batch"],
        {"uids", "prompt_cache", "_next_tokens", "_next_logprobs", "_token_context"},
    ),
    (
        lambda: _generate.GenerationBatch.filter,
        ["self", "keep"],
        {"uids", "prompt_cache", "_next_tokens", "_next_logprobs", "_token_context"},
    ),
    (
        lambda: _generate.GenerationBatch.extract_cache,
        ["self", "idx"],
        {"prompt_cache"},
    ),
    (
        lambda: _generate.GenerationBatch.next,
        ["self"],
        {"_step", "_num_tokens", "max_tokens", "extract_cache", "filter"},
    ),
]


def check() -> None:
    """Raise PatchError unless the installed mlx-lm has the functions that are replaced,
    as they are known here."""

    def refuse(what: str) -> PatchError:
        return PatchError(
            f"mlx-lm {mlx_lm.__version__} is not supported: {what}; "
            "install a version that mlx-flashhead names in its requirements"
        )

    for find, parameters, names in _KNOWN:
        try:
            function = find()
        except AttributeError as e:
            raise refuse(str(e)) from None
        signature = list(inspect.signature(function).parameters)
        code = getattr(function, "__code__", None)
        missing = names - set(code.co_names if code else ())
        if signature[: len(parameters)] != parameters or missing:
            raise refuse(f"{function.__qualname__} has changed")
    try:
        samplers.check()
    except (ValueError, TypeError, AttributeError) as e:
        raise refuse(str(e)) from None


def unpatch() -> None:
    """Undo :func:`patch` and :func:`patch_decoding`; mlx-lm is as it came.

    Models that are loaded keep their FlashHead. mlx-lm's own decoding gets logits over
    the whole vocabulary from it: exact where probed, estimated elsewhere.
    """
    global _options
    _options = None
    for where in (_loading, _decoding):
        while where:
            owner, name, before = where.pop()
            setattr(owner, name, before)


@contextlib.contextmanager
def patched(**options: Any) -> Iterator[None]:
    """:func:`patch` for the length of a ``with`` block; afterwards mlx-lm is patched as
    it was before.

    Args:
        options: As for :func:`patch`.

    Raises:
        PatchError: As for :func:`patch`.
    """
    before, decoding = _options, bool(_decoding)
    patch(**options)
    try:
        yield
    finally:
        unpatch()
        if before is not None:
            patch(**before)
        elif decoding:
            patch_decoding()
