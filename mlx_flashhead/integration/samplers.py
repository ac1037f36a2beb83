"""Read mlx-lm's samplers and logits processors: what they were made with.

``mlx_lm.sample_utils`` makes functions. To decode among candidates, their settings are
needed, and these are in the functions' closures: read from there, they are known no
matter who imported what before the patch. What is not recognized to the letter is the
user's own, and gets logits over the whole vocabulary.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import fields
from types import FunctionType, ModuleType
from typing import Any

from mlx_lm import sample_utils

from ..sampling.settings import Bias, Penalty, Processor, Settings

# Not "from mlx_lm import generate": that name is a function's.
_generate = importlib.import_module("mlx_lm.generate")
_PENALTIES = ("repetition", "presence", "frequency")
_METHODS = {
    ("top_p",): "apply_top_p",
    ("min_p", "min_tokens_to_keep"): "apply_min_p",
    ("xtc_probability", "xtc_special_tokens", "xtc_threshold"): "apply_xtc",
    ("top_k",): "apply_top_k",
}


def _modules() -> tuple[ModuleType, ModuleType]:
    """Where samplers are made: mlx-vlm has a copy of mlx-lm's module."""
    return sample_utils, sys.modules.get("mlx_vlm.sample_utils", sample_utils)


def _closure(function: Any, name: str) -> dict[str, Any] | None:
    """Variables that a function of ``mlx_lm.sample_utils`` with this qualified name
    has closed over; ``None`` if it is another function, be it one with borrowed names
    (``functools.wraps``)."""
    if not isinstance(function, FunctionType) or function.__qualname__ != name:
        return None
    if all(function.__globals__ is not vars(module) for module in _modules()):
        return None
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return dict(zip(function.__code__.co_freevars, cells))


def read_sampler(sampler: Any) -> Settings | None:
    """Settings of a sampler that ``make_sampler`` made, or of ``None``, which is
    greedy; ``None`` for any other function."""
    if sampler is None or _is_greedy(sampler):
        return Settings()
    variables = _closure(sampler, "make_sampler.<locals>.sampler")
    if variables is None or set(variables) != {"sampling_methods", "temp"}:
        return None
    settings: dict[str, Any] = {"temp": variables["temp"]}
    order = []
    for method in variables["sampling_methods"]:
        arguments = _closure(method, "make_sampler.<locals>.<lambda>")
        called = _METHODS.get(tuple(sorted(arguments or ())))
        if not arguments or called not in method.__code__.co_names:
            return None
        order.append(called)
        settings.update(arguments)
    if order != [m for m in _METHODS.values() if m in order]:
        return None
    settings["xtc_special_tokens"] = tuple(settings.get("xtc_special_tokens") or ())
    return _checked(Settings(**settings))


def _is_greedy(sampler: Any) -> bool:
    """Whether a function is mlx-lm's own that takes the likeliest token: it has a name,
    or was written where it was needed (before 0.32)."""
    if sampler is getattr(sample_utils, "greedy_sampler", None):
        return True
    return (
        isinstance(sampler, FunctionType)
        and sampler.__name__ == "<lambda>"
        and any(sampler.__globals__ is vars(m) for m in (*_modules(), _generate))
        and sampler.__closure__ is None
        and sampler.__code__.co_names == ("mx", "argmax")
        and -1 in sampler.__code__.co_consts
    )


def _checked(settings: Settings) -> Settings | None:
    """Settings that candidates are drawn with; others are left to mlx-lm, with what it
    says of them."""
    numbers = [getattr(settings, f.name) for f in fields(Settings)][:-1]
    if not all(isinstance(n, (int, float)) for n in numbers):
        return None
    sane = (
        1e-3 <= settings.temp <= 1e3
        and 0 <= settings.min_p <= 1
        and settings.min_tokens_to_keep >= 1
        and isinstance(settings.min_tokens_to_keep, int)
        and isinstance(settings.top_k, int)
        and 0 <= settings.xtc_probability <= 1
        and 0 <= settings.xtc_threshold <= 0.5
    )
    return settings if sane else None


def read_processors(
    processors: Sequence[Any] | None, vocab_size: int
) -> list[Processor] | None:
    """The processors that ``make_logits_processors`` made, readable.

    Args:
        processors: Functions of tokens and logits; ``None`` for none.
        vocab_size: Number of tokens; a bias is for ids below it.

    Returns:
        In the same order; ``None`` if one is not of those, or is for tokens that do not
        exist.
    """
    read: list[Processor] = []
    for processor in processors or ():
        one = _read_processor(processor, vocab_size)
        if one is None:
            return None
        read.append(one)
    return read


def _read_processor(processor: Any, vocab_size: int) -> Processor | None:
    name = "make_logits_processors.<locals>.logit_bias_processor"
    variables = _closure(processor, name)
    if variables is not None:
        if set(variables) != {"indices", "values"}:
            return None
        if not all(0 <= token < vocab_size for token in variables["indices"].tolist()):
            return None
        return Bias(variables["indices"], variables["values"])
    for kind in _PENALTIES:
        name = f"make_{kind}_penalty.<locals>.{kind}_penalty_processor"
        variables = _closure(processor, name)
        if variables is not None:
            size = variables.get("context_size")
            names = {"penalty", "context_size"}
            if set(variables) != names or not isinstance(size, int):
                return None
            return Penalty(size, processor) if size > 0 else None
    return None


def check() -> None:
    """Raise ValueError unless the installed mlx-lm's samplers can be read."""
    settings = Settings(0.7, 0.9, 0.05, 2, 40, 0.3, 0.2, (1, 2))
    arguments = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    arguments["xtc_special_tokens"] = [1, 2]
    if read_sampler(sample_utils.make_sampler(**arguments)) != settings:
        raise ValueError("make_sampler has changed")
    if read_sampler(sample_utils.make_sampler()) != Settings():
        raise ValueError("make_sampler has changed")
    processors = sample_utils.make_logits_processors({1: 2.0}, 1.1, 5, 0.1, 6, 0.2, 7)
    read = read_processors(processors, 2) or []
    sizes = [p.context_size for p in read if isinstance(p, Penalty)]
    if sizes != [5, 6, 7] or not isinstance(read[0], Bias):
        raise ValueError("make_logits_processors has changed")
