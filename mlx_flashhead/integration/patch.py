"""Teach mlx-lm about FlashHead: to open folders that have one, and to decode with it.

Every loader of mlx-lm goes through ``mlx_lm.utils.load_model``. Patched, it puts the
FlashHead in place before anything of the dense head is read from disk. All decoding of
mlx-lm goes through ``generate_step``, ``speculative_generate_step`` and
``GenerationBatch._step``. Patched, they draw tokens among a FlashHead's candidates;
models without one they leave to mlx-lm.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..compute.device import for_device
from ..folder import integrity
from ..folder.format import HEAD_FILE, load_head
from ..folder.section import FormatError, has_section, read_section
from ..head import FlashEmbedding, FlashHead
from . import decode, samplers
from .locate import HeadNotFound, attach, get_module, head_table

# Not "from mlx_lm import generate": that name is a function's.
_generate = importlib.import_module("mlx_lm.generate")

# Object, attribute and value before, of what was replaced: to load, and to decode.
_loading: list[tuple[Any, str, Any]] = []
_decoding: list[tuple[Any, str, Any]] = []
# Arguments of the patch that is on.
_options: dict[str, Any] | None = None
_HEADS = (FlashHead, FlashEmbedding)


class PatchError(RuntimeError):
    """The installed mlx-lm is not one that this package knows."""


def switched_off() -> bool:
    """Whether the environment says ``MLX_FLASHHEAD=0``."""
    return os.environ.get("MLX_FLASHHEAD", "1").lower() in ("0", "false", "off")


def install(model: nn.Module, folder: str | Path, n_probes: int | None) -> nn.Module:
    """Put the FlashHead of a folder into its freshly loaded, lazy model."""
    section = read_section(folder)
    assert section is not None  # has_section
    head = load_head(folder, section)
    path = section.head_path
    try:
        table = head_table(get_module(model, path))
    except (HeadNotFound, AttributeError) as e:
        raise FormatError(f"{folder}: {e}; convert the model again") from None
    dense = (*table.weight.shape[:-1], table.hidden_size)
    if dense != (head.vocab_size, head.hidden_size):
        raise FormatError(
            f"{folder}: the head is {list(dense)} and its FlashHead "
            f"{[head.vocab_size, head.hidden_size]}; convert the model again"
        )
    integrity.check_finite(folder, dict(tree_flatten(head.parameters())))
    integrity.check_unchanged(folder, section, table)
    if n_probes is not None:
        head.n_probes = n_probes
    for_device(model)
    return for_device(attach(model, path, head))


def patch(*, n_probes: int | None = None, dense: bool = False) -> None:
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
        dense: Keep the dense head; the rest is as with a FlashHead. So does
          ``MLX_FLASHHEAD=0`` in the environment, read at each load.

    Raises:
        PatchError: The installed mlx-lm is not as expected. mlx-lm is as it came then.
    """
    global _options
    unpatch()
    patch_decoding()
    _options = {"n_probes": n_probes, "dense": dense}
    stock = utils.load_model

    @functools.wraps(stock)
    def load_model(
        model_path: Path, lazy: bool = False, *args: Any, **kwargs: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        with _refusing(model_path):
            converted = has_section(model_path)
            flash = converted and not (dense or switched_off())
            guard: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if converted:
                n_tensors = integrity.check_sizes(model_path, head=flash)
                guard = integrity.bounded(model_path, n_tensors)
            with guard:
                model, config = stock(model_path, True, *args, **kwargs)
            if flash:
                install(model, model_path, n_probes)
            elif converted:
                for_device(model)
        if not lazy:
            mx.eval(model.parameters())
        _patch_scoring()
        return model, config

    _replace(_loading, utils, "load_model", load_model)
    load_tokenizer = utils.load_tokenizer

    @functools.wraps(load_tokenizer)
    def load_tokenizer_checked(
        model_path: Path, *args: Any, **kwargs: Any
    ) -> TokenizerWrapper:
        with _refusing(model_path):
            return load_tokenizer(model_path, *args, **kwargs)

    _replace(_loading, utils, "load_tokenizer", load_tokenizer_checked)
    # The file's name keeps it out of stock mlx-lm's sight, downloads included.
    patterns = [*utils.DEFAULT_ALLOW_PATTERNS, HEAD_FILE]
    _replace(_loading, utils, "DEFAULT_ALLOW_PATTERNS", patterns)
    load_adapters = utils.load_adapters

    @functools.wraps(load_adapters)
    def load_checked(model: nn.Module, adapter_path: str) -> nn.Module:
        check_adapter(model, Path(adapter_path))
        return load_adapters(model, adapter_path)

    _replace(_loading, utils, "load_adapters", load_checked)
    save_model = utils.save_model

    @functools.wraps(save_model)
    def save_checked(save_path: str | Path, model: nn.Module, **kwargs: Any) -> None:
        if decode.head_of(model) is not None:
            raise ValueError(
                "a model with a FlashHead cannot be saved as a plain one: load it with "
                "the dense head (dense=True, --dense)"
            )
        save_model(save_path, model, **kwargs)

    _replace(_loading, utils, "save_model", save_checked)


@contextlib.contextmanager
def _refusing(folder: str | Path) -> Iterator[None]:
    """Whatever a damaged converted folder makes mlx-lm or transformers raise, in one
    line."""
    try:
        yield
    except FormatError:
        raise
    except Exception as e:
        with contextlib.suppress(FormatError):
            if not has_section(folder):
                raise e from e.__cause__
        reason = " ".join(str(e).split()) or type(e).__name__
        raise FormatError(
            f"{folder}: mlx-lm cannot load this model: {reason[:400]}"
        ) from e


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
    ):
        _replace(_decoding, owner, name, wrap(getattr(owner, name)))


def _replace(
    where: list[tuple[Any, str, Any]], owner: Any, name: str, value: Any
) -> None:
    where.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _patch_scoring() -> None:
    """mlx_lm.evaluate and mlx_lm.perplexity score given text: with the dense head. They
    are patched only once they are there: evaluate needs a package of its own."""
    for module, name in _SCORING:
        owner = sys.modules.get(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part, None)
        if not hasattr(owner, last) or any(e[:2] == (owner, last) for e in _loading):
            continue
        _replace(_loading, owner, last, decode.exact(getattr(owner, last)))


_SCORING = (
    ("mlx_lm.evaluate", "MLXLM._process_prompt"),
    ("mlx_lm.evaluate", "MLXLM._score_fn"),
    ("mlx_lm.perplexity", "eval_ppl"),
)


def check_adapter(model: nn.Module, adapter: Path) -> None:
    """Raise ValueError for an adapter of the head, where that is a FlashHead: its rows
    are clustered as they are."""
    file = adapter / "adapters.safetensors"
    heads = [name for name, m in model.named_modules() if isinstance(m, _HEADS)]
    for head in heads if file.exists() else ():
        tensors = cast(dict[str, mx.array], mx.load(str(file)))
        if any(name.startswith(f"{head}.") for name in tensors):
            raise ValueError(
                f"the adapter {adapter} changes the head {head}, whose clusters are "
                "fixed: fuse it with mlx_lm.fuse and convert the result, or load the "
                "model with the dense head (dense=True, --dense)"
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
        found = list(inspect.signature(function).parameters)
        code = getattr(function, "__code__", None)
        missing = names - set(code.co_names if code else ())
        if found[: len(parameters)] != parameters or missing:
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
def patched(*, n_probes: int | None = None, dense: bool = False) -> Iterator[None]:
    """:func:`patch` for the length of a ``with`` block; afterwards mlx-lm is patched as
    it was before.

    Args:
        n_probes, dense: As for :func:`patch`.

    Raises:
        PatchError: As for :func:`patch`.
    """
    options, decoding = _options, bool(_decoding)
    patch(n_probes=n_probes, dense=dense)
    try:
        yield
    finally:
        unpatch()
        if options is not None:
            patch(**options)
        elif decoding:
            patch_decoding()
