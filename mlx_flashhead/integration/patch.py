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
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import mlx_lm
from mlx_lm import utils

from . import batch, decode, exact_batch, loading, vlm
from .known import LOADING, decoding_changed

# Not "from mlx_lm import generate": that name is a function's.
_generate = importlib.import_module("mlx_lm.generate")

# Object, attribute and value before, of what was replaced: to load, and to decode.
_loading: list[tuple[Any, str, Any]] = []
_decoding: list[tuple[Any, str, Any]] = []
# Arguments of the patch that is on.
_options: dict[str, Any] | None = None


def patch(
    *,
    n_probes: int | None = None,
    dense: bool = False,
    exact: bool = True,
    verify_every: int | None = None,
    tune: bool = True,
    flashhead: str | None = None,
) -> None:
    """Make ``mlx_lm.load`` use the FlashHead of folders that have one, and mlx-lm's
    decoding (``generate``, ``stream_generate``, ``batch_generate``, the server, ...)
    draw among its candidates. Other models load and decode as before. The order of
    imports does not matter. mlx-vlm is taught the same where it is installed, in the
    version of the extra ``vlm``. On a CPU back-end models with a FlashHead compute in
    float32. A second call replaces the first.

    From then on, ``mlx_lm.load`` raises ``FormatError`` for a converted folder that is
    damaged or changed, and ``ValueError`` for an adapter of a head that is clustered;
    ``mlx_lm.utils.save_model`` raises ``ValueError`` for a model with a FlashHead.

    Of an mlx-lm that has changed since, only what is known is patched, and a warning of
    one line says so: models then get their FlashHead when they are loaded, and mlx-lm's
    own decoding the logits of the whole vocabulary.

    Args:
        n_probes: Clusters probed per decoded token, instead of the stored number.
        dense: Decode with the dense head; the rest is as with a FlashHead.
          ``MLX_FLASHHEAD=0`` in the environment, read at each load, leaves the model
          to mlx-lm.
        exact: Draft with the FlashHead and verify with the dense head: the tokens are
          the model's own. Otherwise they are drawn among FlashHead's candidates.
        verify_every: Tokens that are verified at once where it is exact, instead of
          the stored number.
        tune: Whether a head is measured when it is first used, and decodes as is
          fastest here; ``MLX_FLASHHEAD_TUNE=0`` turns it off, too.
        flashhead: The FlashHead of every model that is loaded, instead of their
          folders': a file, a folder that has one, or the Hugging Face id of either. A
          model that it was not made of is refused.

    Warns:
        UserWarning: The installed mlx-lm or mlx-vlm is not as known here.
    """
    global _options
    unpatch()
    patch_decoding()
    _options = {
        "n_probes": n_probes,
        "dense": dense,
        "exact": exact,
        "verify_every": verify_every,
        "tune": tune,
        "flashhead": flashhead,
    }

    def load_model(stock: Any, *args: Any, **kwargs: Any) -> Any:
        options: dict[str, Any] = {**kwargs, **(_options or {})}
        loaded = loading.load_model(stock, *args, **options)
        _patch_late()
        return loaded

    ours: dict[str, Callable[..., Any]] = {
        "load_model": load_model,
        "load_tokenizer": loading.load_tokenizer,
        "load_adapters": loading.load_adapters,
        "save_model": loading.save_model,
    }
    changed = {name: what for name in ours if (what := LOADING[name].changed())}
    if what := changed.get("load_model"):
        _warn(what, "models are loaded as mlx-lm does; use mlx_flashhead.attach")
    for name in ours.keys() - changed.keys():
        stock = getattr(utils, name)
        wrapped = functools.wraps(stock)(functools.partial(ours[name], stock))
        _replace(_loading, utils, name, wrapped)
    # The file's name keeps it out of stock mlx-lm's sight, downloads included.
    if hasattr(utils, "DEFAULT_ALLOW_PATTERNS"):
        patterns = loading.download_patterns()
        _replace(_loading, utils, "DEFAULT_ALLOW_PATTERNS", patterns)
    elif hasattr(utils, "_download"):  # before 0.32
        download = functools.partial(loading.download, utils._download)
        _replace(_loading, utils, "_download", download)
    vlm.patch(_options)


def stock_loader(name: str) -> Any:
    """A function of ``mlx_lm.utils`` as it is without the patch."""
    for owner, attribute, before in _loading:
        if (owner, attribute) == (utils, name):
            return before
    return getattr(utils, name)


def patch_decoding() -> None:
    """The part of :func:`patch` that concerns models which are loaded already: mlx-lm's
    decoding functions draw among a FlashHead's candidates. Where it is on, nothing
    happens; nor where mlx-lm has changed since, which a warning says.
    """
    if _decoding:
        return
    if what := decoding_changed():
        _warn(
            what,
            "it decodes by itself, on logits of the whole vocabulary, and where "
            "decoding is exact nothing is gained (exact=False, --approximate)",
        )
        return
    for owner, name, wrap in (
        (_generate, "generate_step", decode.generate_step),
        (_generate, "speculative_generate_step", decode.speculative_generate_step),
        (_generate.GenerationBatch, "_step", batch.batch_step),
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


def _warn(what: str, result: str) -> None:
    warnings.warn(
        f"mlx-flashhead does not know mlx-lm {mlx_lm.__version__} ({what}): {result}",
        stacklevel=3,
    )


def unpatch() -> None:
    """Undo :func:`patch` and :func:`patch_decoding`; mlx-lm is as it came.

    Models that are loaded keep their FlashHead. mlx-lm's own decoding gets logits over
    the whole vocabulary from it: exact where probed, estimated elsewhere.
    """
    global _options
    _options = None
    vlm.unpatch()
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
