"""Settings read from mlx-lm's samplers and logits processors."""

from __future__ import annotations

import functools
import importlib
import types

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm import sample_utils, utils
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_flashhead import patch, patch_decoding, unpatch
from mlx_flashhead.integration.samplers import (
    Bias,
    Penalty,
    Settings,
    read_processors,
    read_sampler,
)

generate = importlib.import_module("mlx_lm.generate")
STOCK = {
    "generate_step": generate.generate_step,
    "speculative_generate_step": generate.speculative_generate_step,
}
STOCK_BATCH = {
    name: getattr(generate.GenerationBatch, name)
    for name in ("_step", "extend", "filter", "extract_cache")
}
STOCK_LOAD = utils.load_model


def is_stock() -> bool:
    return (
        all(getattr(generate, name) is value for name, value in STOCK.items())
        and all(
            getattr(generate.GenerationBatch, name) is value
            for name, value in STOCK_BATCH.items()
        )
        and utils.load_model is STOCK_LOAD
    )


# ---------------------------------------------------------------------------
# Samplers
# ---------------------------------------------------------------------------

ARGUMENTS = st.fixed_dictionaries(
    {
        "temp": st.sampled_from([0, 0.0, 0.3, 1, 1.7]),
        "top_p": st.sampled_from([0, 0.0, 0.1, 0.9, 1.0, 1]),
        "min_p": st.sampled_from([0.0, 0.05, 1.0]),
        "min_tokens_to_keep": st.sampled_from([1, 2, 7]),
        "top_k": st.sampled_from([0, 1, 40]),
        "xtc_probability": st.sampled_from([0.0, 0.4, 1.0]),
        "xtc_threshold": st.sampled_from([0.0, 0.1, 0.5]),
        "xtc_special_tokens": st.sampled_from([None, [], [3], [3, 257]]),
    }
)


@given(ARGUMENTS)
def test_every_argument_of_make_sampler_is_read(asked):
    found = read_sampler(make_sampler(**asked))
    if asked["temp"] == 0:
        assert found == Settings() and found.greedy
        return
    assert found.temp == asked["temp"] and not found.greedy
    # What does nothing need not be read.
    assert found.nucleus == (asked["top_p"] if 0 < asked["top_p"] < 1 else 1)
    assert found.min_p == asked["min_p"] and found.top_k == asked["top_k"]
    assert found.xtc_probability == asked["xtc_probability"]
    if asked["min_p"]:
        assert found.min_tokens_to_keep == asked["min_tokens_to_keep"]
    if asked["xtc_probability"]:
        assert found.xtc_threshold == asked["xtc_threshold"]
        assert found.xtc_special_tokens == tuple(asked["xtc_special_tokens"] or ())
    assert hash(found) == hash(read_sampler(make_sampler(**asked)))


def test_no_sampler_is_greedy():
    assert read_sampler(None) == read_sampler(make_sampler()) == Settings()


@pytest.mark.parametrize(
    "bad",
    [
        {"temp": -1.0},
        {"temp": float("nan")},
        {"temp": float("inf")},
        {"temp": 1e-6},
        {"min_p": 2.0},
        {"min_p": -0.1},
        {"min_p": 0.1, "min_tokens_to_keep": 0},
        {"top_k": 2.5},
        {"xtc_probability": 2.0},
        {"xtc_probability": 0.5, "xtc_threshold": 0.7},
        {"top_p": "0.5"},
    ],
)
def test_what_mlx_lm_refuses_or_cannot_mean_is_left_to_it(bad):
    try:
        sampler = make_sampler(**{"temp": 1.0} | bad)
    except TypeError:
        return
    assert read_sampler(sampler) is None


def altered(make, **cells):
    """A function that ``make`` made, with other values in its closure."""
    function = make()
    for name, cell in zip(function.__code__.co_freevars, function.__closure__):
        if name in cells:
            cell.cell_contents = cells[name]
    return function


def named(function, like):
    function.__module__, function.__qualname__ = like.__module__, like.__qualname__
    function.__name__ = like.__name__
    return function


def a_twin(sampling_methods, temp):
    """Same names, same variables, other code."""
    return lambda logprobs: (sampling_methods, mx.argmin(logprobs * temp, axis=-1))[1]


REAL = make_sampler(0.7, top_p=0.9)
OTHERS = {
    "lambda": lambda x: mx.argmax(x, axis=-1),
    "partial": functools.partial(sample_utils.categorical_sampling, temp=0.7),
    "partial of one": functools.partial(REAL),
    "object": types.SimpleNamespace(__call__=REAL),
    "builtin": mx.argmax,
    "wrapped": functools.wraps(REAL)(lambda x: REAL(x + 1)),
    "twin": named(a_twin([], 0.7), REAL),
    "elsewhere": types.FunctionType(
        REAL.__code__, {}, "sampler", None, REAL.__closure__
    ),
    "other module": named(
        a_twin([], 0.7),
        types.SimpleNamespace(
            __module__="my_samplers", __qualname__=REAL.__qualname__, __name__="sampler"
        ),
    ),
    "greedy's name": functools.wraps(make_sampler())(lambda x: x[:, 0]),
    "added method": altered(
        lambda: make_sampler(0.7), sampling_methods=[lambda x: x * 0]
    ),
    "a method twice": altered(
        lambda: make_sampler(0.7),
        sampling_methods=2
        * next(
            c.cell_contents for c in REAL.__closure__ if type(c.cell_contents) is list
        ),
    ),
    "temperature of an array": altered(lambda: make_sampler(0.7), temp=mx.array(0.7)),
    "no temperature": altered(lambda: make_sampler(0.7), temp=0.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_samplers_are_not_read(name):
    assert read_sampler(OTHERS[name]) is None


def test_methods_in_another_order_are_not_read():
    made = make_sampler(0.7, top_p=0.9, top_k=5)
    assert read_sampler(made) is not None
    cells = dict(zip(made.__code__.co_freevars, made.__closure__))
    cells["sampling_methods"].cell_contents.reverse()
    assert read_sampler(made) is None


# ---------------------------------------------------------------------------
# Logits processors
# ---------------------------------------------------------------------------


@given(
    bias=st.sampled_from([None, {}, {5: 1.5}, {5: -100.0, 0: 2}]),
    penalties=st.tuples(*[st.sampled_from([None, 0.0, 0.5, 1.3])] * 3),
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
)
def test_every_argument_of_make_logits_processors_is_read(bias, penalties, sizes):
    arguments = [x for pair in zip(penalties, sizes) for x in pair]
    made = make_logits_processors(bias, *arguments)
    read = read_processors(made, 5000)
    assert len(read) == len(made)
    if bias:
        first = read.pop(0)
        assert isinstance(first, Bias)
        assert dict(zip(first.ids.tolist(), first.values.tolist())) == bias
    wanted = [n for penalty, n in zip(penalties, sizes) if penalty]
    assert [p.context_size for p in read] == wanted
    assert all(isinstance(p, Penalty) for p in read)


def test_no_processors_are_read():
    assert (
        read_processors(None, 5000)
        == read_processors([], 5000)
        == read_processors((), 5000)
        == []
    )


def a_twin_penalty(penalty, context_size):
    return lambda tokens, logits: logits * (penalty + context_size)


PENALTY = sample_utils.make_repetition_penalty(1.1, 20)
BIAS = make_logits_processors({5: 1.0})[0]


@pytest.mark.parametrize(
    "other",
    [
        lambda tokens, logits: logits,
        functools.partial(PENALTY),
        functools.wraps(PENALTY)(lambda tokens, logits: PENALTY(tokens, logits)),
        named(a_twin_penalty(1.1, 20), PENALTY),
        altered(lambda: sample_utils.make_presence_penalty(1.0, 20), context_size=None),
        # mlx-lm takes 0 for the whole text.
        sample_utils.make_presence_penalty(1.0, 0),
        # Python's negative indices, which mlx-lm resolves.
        make_logits_processors({-1: 5.0})[0],
    ],
    ids=[
        "lambda",
        "partial",
        "wrapped",
        "twin",
        "no size",
        "whole text",
        "negative id",
    ],
)
def test_one_unknown_processor_leaves_all_to_mlx_lm(other):
    assert read_processors([PENALTY, BIAS], 5000) is not None
    assert read_processors([PENALTY, other], 5000) is None
    assert read_processors([other, BIAS], 5000) is None


# ---------------------------------------------------------------------------
# Another mlx-lm
# ---------------------------------------------------------------------------


def decodes_by_itself(reason: str) -> None:
    """mlx-lm's decoding is left as it is, and one line says why."""
    before = [getattr(generate, name, None) for name in STOCK]
    with pytest.warns(UserWarning) as warned:
        patch_decoding()
    (message,) = [str(w.message) for w in warned]
    assert mlx_lm.__version__ in message and "\n" not in message
    assert reason in message and "--approximate" in message
    assert [getattr(generate, name, None) for name in STOCK] == before
    with pytest.warns(UserWarning, match=reason):
        patch()
    # Models are loaded with their FlashHead all the same.
    assert utils.load_model is not STOCK_LOAD
    unpatch()


def test_this_mlx_lm_is_patched():
    patch()
    assert not is_stock()


@pytest.mark.parametrize("name", STOCK)
def test_other_parameters_are_left(monkeypatch, name):
    def other(prompt, model, max_tokens=3):
        yield from ()

    monkeypatch.setattr(generate, name, other)
    decodes_by_itself(other.__qualname__)
    assert getattr(generate, name) is other
    monkeypatch.undo()
    assert is_stock()


@pytest.mark.parametrize("name", [*STOCK_BATCH, "next"])
def test_a_batch_of_another_kind_is_left(monkeypatch, name):
    monkeypatch.setattr(generate.GenerationBatch, name, lambda self, *_: ([], []))
    decodes_by_itself("has changed")
    monkeypatch.undo()
    assert is_stock()


@pytest.mark.parametrize(
    "owner, name",
    [
        (generate, "generate_step"),
        (generate, "speculative_generate_step"),
        (generate, "GenerationBatch"),
        (generate.GenerationBatch, "_step"),
        (generate.GenerationBatch, "extend"),
        (generate.GenerationBatch, "filter"),
        (generate.GenerationBatch, "extract_cache"),
        (sample_utils, "make_sampler"),
        (sample_utils, "make_logits_processors"),
    ],
)
def test_missing_functions_are_left(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    decodes_by_itself(name)
    monkeypatch.undo()
    assert is_stock()


def test_other_closures_are_left(monkeypatch):
    def make_other(temp=0.0, **methods):
        chain, heat = list(methods), temp

        def sampler(logprobs):
            return mx.random.categorical(logprobs / heat + len(chain))

        return sampler

    monkeypatch.setattr(sample_utils, "make_sampler", make_other)
    decodes_by_itself("make_sampler")


def test_another_filter_is_left(monkeypatch):
    """One that make_sampler has learned, or one that has gone."""
    stock = make_sampler

    def make_more(temp=0.0, **given):
        sampler = stock(temp, **given)
        for cell in sampler.__closure__ or ():
            if isinstance(cell.cell_contents, list):
                cell.cell_contents.append(lambda x: x)
        return sampler

    monkeypatch.setattr(sample_utils, "make_sampler", make_more)
    decodes_by_itself("make_sampler")


def test_other_processors_are_left(monkeypatch):
    def make_others(bias=None, *penalties):
        return [lambda tokens, logits: logits]

    monkeypatch.setattr(sample_utils, "make_logits_processors", make_others)
    decodes_by_itself("make_logits_processors")


def test_a_read_penalty_is_mlx_lms_own():
    (read,) = read_processors(sample_utils.make_logits_processors(None, 1.5, 4), 5000)
    logits = read.apply(mx.array([0, 2]), mx.array([[3.0, 3.0, -3.0]]))
    assert np.allclose(logits, [[2, 3, -4.5]])


@pytest.mark.parametrize(
    "token, known", [(-1, False), (0, True), (9, True), (10, False)]
)
def test_a_bias_of_tokens_that_do_not_exist_is_not_ours(token, known):
    made = sample_utils.make_logits_processors({3: 1.0, token: 2.0})
    assert (read_processors(made, 10) is not None) == known
