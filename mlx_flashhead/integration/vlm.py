"""Teach mlx-vlm about FlashHead: to open folders that have one, and to decode with it.

It need not be installed, and takes a second to import. So it is patched where it is
imported already, or else in the moment when it is.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from . import exact_batch, loading, vlm_decode

_NAME = "mlx_vlm"
# Object, attribute and value before, of what was replaced.
_replaced: list[tuple[Any, str, Any]] = []
# Arguments for the loader, while the patch is on.
_options: dict[str, Any] | None = None


def patch(options: dict[str, Any]) -> None:
    """Patch mlx-vlm, now or when it is imported; :func:`unpatch` undoes it.

    Args:
        options: For :func:`.loading.load_model`.
    """
    global _options
    unpatch()
    _options = options
    if _NAME in sys.modules:
        _patch()
    else:
        sys.meta_path.insert(0, _Import())


def unpatch() -> None:
    """Leave mlx-vlm as it came. What imported a replaced function by its name has it
    still, which then does what it did before."""
    global _options
    _options = None
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Import)]
    while _replaced:
        owner, name, before = _replaced.pop()
        setattr(owner, name, before)


class _Import(MetaPathFinder):
    """Waits for the import of mlx-vlm."""

    _asking = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != _NAME or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(_NAME)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if _options is not None and not _replaced:
                _patch()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _patch() -> None:
    utils = importlib.import_module(f"{_NAME}.utils")
    ar = importlib.import_module(f"{_NAME}.generate.ar")
    if change := _changed(utils, ar):
        version = importlib.import_module(f"{_NAME}.version").__version__
        warnings.warn(
            f"mlx-vlm {version} is not supported: {change}; it is left as it is. "
            "Install the version that mlx-flashhead[vlm] asks for",
            stacklevel=3,
        )
        return
    _replace(utils, "load_model", _load_model)
    for module in (ar, f"{_NAME}.generate.dispatch", f"{_NAME}.generate"):
        owner = importlib.import_module(module) if isinstance(module, str) else module
        _replace(owner, "generate_step", vlm_decode.generate_step)
    for name, wrap in (
        ("_step", vlm_decode.batch_step),
        ("extend", exact_batch.batch_extend),
        ("filter", exact_batch.batch_filter),
    ):
        _replace(ar.GenerationBatch, name, wrap)


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    before = getattr(owner, name)
    ours = wrap(before)

    @functools.wraps(before)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return (before if _options is None else ours)(*args, **kwargs)

    _replaced.append((owner, name, before))
    setattr(owner, name, replaced)


def _load_model(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``mlx_vlm.utils.load_model``, with the FlashHead of a folder that has one."""

    def load_plain(path: Path, lazy: bool, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        model = stock(path, lazy, **kwargs)
        config = getattr(model, "config", None)
        return model, {"eos_token_id": getattr(config, "eos_token_id", None)}

    def load_model(model_path: Path, lazy: bool = False, **kwargs: Any) -> Any:
        options = {**kwargs, **(_options or {})}
        return loading.load_model(load_plain, model_path, lazy, **options)[0]

    return load_model


# What is relied on: parameters that each function has to have, first and in this order,
# and names that its code has to mention.
_KNOWN: list[tuple[str, list[str], set[str]]] = [
    ("utils.load_model", ["model_path", "lazy"], set()),
    (
        "ar.generate_step",
        ["input_ids", "model", "pixel_values", "mask", "max_tokens", "temperature"],
        {"resolve_sampling_defaults", "clamp_temperature", "_PositionedTargetSampler"},
    ),
    ("ar.make_sampler", ["temp", "top_p", "min_p"], {"clamp_temperature"}),
    ("ar._PositionedTargetSampler.sample_target", ["self", "logprobs"], {"seed"}),
    (
        "ar.GenerationBatch._step",
        ["self"],
        {"_next_tokens", "_next_lps", "_next_top_idx", "_next_top_lp", "_rope_deltas"}
        | {"logits_processors", "token_context", "_language_model", "prompt_cache"}
        | {"sampler", "compute_logprobs", "top_logprobs_k", "_num_tokens", "uids"},
    ),
    ("ar.GenerationBatch.extend", ["self", "other"], {"uids", "_rope_deltas"}),
    ("ar.GenerationBatch.filter", ["self", "keep"], {"uids", "_rope_deltas"}),
    (
        "ar.GenerationBatch.next",
        ["self"],
        {"_step", "filter", "max_tokens", "thinking_budget_criteria"},
    ),
]


def _changed(utils: Any, ar: Any) -> str | None:
    """What is not as it is known here, of what is replaced or relied on."""
    for path, parameters, names in _KNOWN:
        first, *rest = path.split(".")
        function: Any = utils if first == "utils" else ar
        for name in rest:
            function = getattr(function, name, None)
        if function is None:
            return f"{path} is missing"
        found = list(inspect.signature(function).parameters)
        # A generator of another function's code has the names of that.
        code = getattr(inspect.unwrap(function), "__code__", None)
        mentioned = set(code.co_names) if code else set()
        if found[: len(parameters)] != parameters or names - mentioned:
            return f"{path} has changed"
    return None
