"""Tokens drawn among candidates, against naive float64 references."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
import small_models
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from metal import reference
from mlx_lm.sample_utils import make_logits_processors
from small_heads import expected, implied, make_head, random_states

from mlx_flashhead.head.transform import Transform
from mlx_flashhead.integration.locate import find_head, find_transform
from mlx_flashhead.integration.samplers import read_processors
from mlx_flashhead.sampling import Settings
from mlx_flashhead.sampling.draw import draw, fits, full_logits, logprobs

D = 32


def head_of(vocab_size=230, n_probes=6, transform=None, **options):
    """V = 230 in clusters of 8: 29 of them, the last with 6 tokens and 2 paddings."""
    head = make_head(vocab_size, D, 8, n_probes, **options).head
    if transform is not None:
        head.transform = transform
    return head


def state(seed=100, scale=0.35):
    """With logits about as far apart as a model's likely ones."""
    return scale * random_states(1, D, seed)


def draws(head, settings, x, n=40_000, seed=0):
    """Tokens drawn for one hidden state, as a batch of copies of it."""
    batch = min(n, 10_000)
    h = mx.array(np.repeat(x, batch, axis=0))
    made = []
    for i in range(n // batch):
        drawn = draw(head, settings, h, mx.array([seed, i + 1], dtype=mx.uint32))
        made.append(np.array(drawn.tokens))
    return np.concatenate(made)


def p_value(tokens, probabilities) -> float:
    """Of a chi-square test; tokens that are expected fewer than 5 times count as one.
    By Wilson and Hilferty's approximation."""
    assert tokens.max() < len(probabilities)
    counts = np.bincount(tokens, minlength=len(probabilities)).astype(float)
    wanted = probabilities / probabilities.sum() * len(tokens)
    assert counts[wanted == 0].sum() == 0
    rare = wanted < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    k = len(counts) - 1
    if k == 0:
        return 1.0
    chi2 = ((counts - wanted) ** 2 / wanted).sum()
    z = ((chi2 / k) ** (1 / 3) - 1 + 2 / (9 * k)) / math.sqrt(2 / (9 * k))
    return math.erfc(z / math.sqrt(2)) / 2


def probed_tokens(head, x) -> np.ndarray:
    ids = np.array(head.token_ids)[sorted(expected(head, x).probes[0])].ravel()
    return ids[ids < head.vocab_size]


def filtered(head, x, settings: Settings) -> np.ndarray:
    """What sampling is to follow: the filters' definition on the probed tokens and the
    tail; XTC's coin falls on dropping."""
    probed = probed_tokens(head, x)
    at_one, heated = (implied(head, x, t)[0] for t in (1.0, settings.temp))
    own = head.transform(expected(head, x).dense[0])[probed]
    at_temp, at_one = (
        np.logaddexp.reduce(own / t) + np.log(max(1 / q[probed].sum() - 1, 1e-300))
        for q, t in ((heated, settings.temp), (at_one, 1.0))
    )
    if settings.top_k > 0:
        at_temp = -np.inf
    chances = reference.chances(
        own,
        temperature=settings.temp,
        top_p=settings.nucleus,
        min_p=settings.min_p,
        min_tokens_to_keep=settings.min_tokens_to_keep,
        top_k=settings.top_k,
        xtc_threshold=settings.xtc_threshold if settings.xtc_probability else None,
        xtc_exempt=np.isin(probed, settings.xtc_special_tokens),
        tail=(at_temp, at_one),
    )
    wanted = np.where(np.isin(np.arange(head.vocab_size), probed), 0, heated)
    wanted *= chances[-1] / max(wanted.sum(), 1e-300)
    wanted[probed] = chances[:-1]
    return wanted


# ---------------------------------------------------------------------------
# Draws
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "temperature, seed", [(0.3, 1), (0.7, 2), (1.0, 1), (2.0, 2), (30.0, 1)]
)
def test_draws_follow_the_implied_distribution(temperature, seed):
    head, x = head_of(seed=seed), state(seed)
    wanted = implied(head, x, temperature)[0]
    tokens = draws(head, Settings(temp=temperature), x)
    assert p_value(tokens, wanted) > 1e-4
    outside = ~np.isin(tokens, probed_tokens(head, x))
    assert outside.sum() > 100  # so that the test says something of the tail


def test_the_test_would_notice():
    """A tail one fifth too heavy, and one cluster's tokens equally likely."""
    head, x = head_of(), state()
    tokens = draws(head, Settings(temp=1.0), x)
    wanted = implied(head, x, 1.0)[0]
    outside = ~np.isin(np.arange(230), probed_tokens(head, x))
    assert p_value(tokens, np.where(outside, 1.2 * wanted, wanted)) < 1e-4
    members = np.array(head.token_ids)[2]
    flat = wanted.copy()
    flat[members] = wanted[members].mean()
    assert p_value(tokens, flat) < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"bias": True, "vocab_size": 225},  # the last cluster has one token
        {"n_probes": 29},
        {"n_probes": 1},
        {"vocab_size": 8, "n_probes": 1},  # one cluster
        {"vocab_size": 5, "n_probes": 1},  # and not a full one
        {"vocab_size": 9, "n_probes": 1},
        {"transform": Transform(0.5, 3.0)},
        {"transform": Transform(0.0625 * 8)},
        {"bits": 16, "dtype": mx.bfloat16, "centroid_bits": 16},
    ],
    ids=str,
)
def test_draws_of_other_heads(options):
    head, x = head_of(**options), state()
    for temperature in (0.8, 5.0):
        tokens = draws(head, Settings(temp=temperature), x, n=20_000)
        assert tokens.max() < head.vocab_size  # never padding
        if "dtype" in options:
            continue  # 16 bits are not the reference's
        assert p_value(tokens, implied(head, x, temperature)[0]) > 1e-4


FILTERS = [
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.1},
    {"min_p": 0.7, "min_tokens_to_keep": 5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100},
    {"xtc_probability": 1.0, "xtc_threshold": 0.002},
    {"xtc_probability": 1.0, "xtc_threshold": 0.002, "xtc_special_tokens": (0, 5, 77)},
    {"xtc_probability": 1.0, "xtc_threshold": 0.5},
    {"top_p": 0.6, "top_k": 20},
    {"top_p": 0.8, "min_p": 0.02},
    {"top_p": 0.8, "min_p": 0.02, "top_k": 4},
    {"top_p": 0.7, "xtc_probability": 1.0, "xtc_threshold": 0.005},
    {"top_p": 0.9, "min_p": 0.01, "top_k": 9, "xtc_probability": 1.0},
    {"top_k": 9, "xtc_probability": 1.0, "xtc_threshold": 0.005},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters(filters):
    head, x = head_of(), state()
    temp = (0.6, 1.5)[FILTERS.index(filters) % 2]
    settings = Settings(temp=temp, **filters)
    wanted = filtered(head, x, settings)
    tokens = draws(head, settings, x, n=20_000)
    assert set(tokens) <= set(np.nonzero(wanted)[0])
    assert p_value(tokens, wanted) > 1e-4


def test_special_tokens_are_not_excluded():
    """The best token is, unless it is special."""
    head, x = head_of(), state()
    best = probed_best(head, x)
    given = {"temp": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.001}
    assert best not in draws(head, Settings(**given), x, n=10_000)
    special = Settings(**given, xtc_special_tokens=(best,))
    assert best in draws(head, special, x, n=10_000)


def test_xtc_tosses_its_coin():
    head, x = head_of(), state()
    plain, dropped = (
        filtered(head, x, Settings(temp=1.0, xtc_probability=p, xtc_threshold=0.005))
        for p in (0.0, 1.0)
    )
    half = Settings(temp=1.0, xtc_probability=0.3, xtc_threshold=0.005)
    assert p_value(draws(head, half, x), 0.7 * plain + 0.3 * dropped) > 1e-4


@given(
    st.builds(
        Settings,
        temp=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
        top_p=st.sampled_from([0.0, 1e-9, 0.3, 0.95, 1.0]),
        min_p=st.sampled_from([0.0, 0.05, 1.0]),
        min_tokens_to_keep=st.sampled_from([1, 3]),
        top_k=st.sampled_from([0, 1, 5, 47, 48, 200]),
        xtc_probability=st.sampled_from([0.0, 1.0]),
        xtc_threshold=st.sampled_from([0.0, 0.03]),
    )
)
@hypothesis_settings(max_examples=40)
def test_no_setting_lets_a_token_through_that_it_should_not(settings):
    head, x = head_of(), state()
    tokens = draws(head, settings, x, n=300)
    if settings.greedy:
        assert set(tokens) == {probed_best(head, x)}
    else:
        assert set(tokens) <= set(np.nonzero(filtered(head, x, settings))[0])


def probed_best(head, x) -> int:
    probed = probed_tokens(head, x)
    return int(probed[np.argmax(expected(head, x).dense[0][probed])])


@pytest.mark.parametrize("bias", [False, True])
def test_greedy_is_the_best_candidate_of_each_row(bias):
    head = head_of(bias=bias)
    x = random_states(40, D)
    tokens = draw(head, Settings(), mx.array(x), mx.array([0, 0], mx.uint32)).tokens
    assert tokens.tolist() == [probed_best(head, row[None]) for row in x]


def test_one_seed_gives_the_same_tokens():
    head, x = head_of(), state()
    for settings in (Settings(temp=1.0), Settings(temp=1.0, top_p=0.9)):
        once, again = (draws(head, settings, x, 100, seed=3) for _ in range(2))
        assert (once == again).all()
        assert (once != draws(head, settings, x, 100, seed=4)).any()


def test_rows_of_a_batch_are_drawn_independently():
    """Pairs of neighbours: no token is preferred next to itself."""
    head, x = head_of(), state()
    wanted = implied(head, x, 1.0)[0]
    tokens = draws(head, Settings(temp=1.0), x)
    equal = (tokens[:-1] == tokens[1:]).mean()
    assert abs(equal - (wanted**2).sum()) < 5 * math.sqrt(equal / len(tokens))


def test_a_top_k_of_the_whole_vocabulary_is_left_to_mlx_lm():
    head = head_of()
    assert fits(head, Settings(temp=1.0, top_k=229))
    assert not fits(head, Settings(temp=1.0, top_k=230))
    head.transform = None
    assert not fits(head, Settings())


# ---------------------------------------------------------------------------
# Log-probabilities
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [Transform(), Transform(0.5, 4.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_logprobs_are_exact_where_scored_and_estimated_elsewhere(transform, bias):
    head, x = head_of(transform=transform, bias=bias), random_states(5, D) * 0.35
    drawn = draw(head, Settings(), mx.array(x), mx.array([0, 0], mx.uint32))
    found = np.array(logprobs(head, drawn))
    assert found.shape == (5, 230)
    assert np.abs(np.logaddexp.reduce(found, axis=1)).max() < 1e-5
    want = expected(head, x)
    cluster = np.argmax(
        (np.array(head.token_ids)[None] == np.arange(230)[:, None, None]).any(-1), -1
    )
    logits = transform(want.dense)
    cap = transform.softcap or np.inf
    lacking = (
        transform(want.centroid_logits) + np.array(head.excess)[0] + head.tail_offset[0]
    )
    for b, probes in enumerate(want.probes):
        away = ~np.isin(cluster, list(probes))
        logits[b, away] = np.clip(lacking[b], -cap, cap)[cluster[away]]
    logits -= np.logaddexp.reduce(logits, axis=1)[:, None]
    np.testing.assert_allclose(found, logits, atol=1e-4)
    np.testing.assert_allclose(
        np.array(full_logits(head, mx.array(x)))
        - np.array(
            mx.logsumexp(full_logits(head, mx.array(x)), axis=-1, keepdims=True)
        ),
        found,
        atol=1e-5,
    )


# ---------------------------------------------------------------------------
# Logits processors
# ---------------------------------------------------------------------------

CONTEXT = [3, 3, 7, 200, 3, 41, 7, 7, 225, 60, 61, 62]
PROCESSORS = [
    {"logit_bias": {5: 2.0, 100: -3.0, 229: 40.0}},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5, "repetition_context_size": 4},
    {"presence_penalty": 2.5},
    {"frequency_penalty": 0.9},
    {"frequency_penalty": -0.9, "frequency_context_size": 7},
    {
        "logit_bias": {3: 4.0, 7: 4.0},
        "repetition_penalty": 1.3,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "presence_context_size": 3,
    },
]


def processed(head, x, stock, context) -> tuple[np.ndarray, np.ndarray]:
    """Logits of all tokens, and which of them a greedy choice is among: mlx-lm's own
    processors, on exact logits in clusters that are probed or have a token that is
    touched, else on estimated ones."""
    want = expected(head, x)
    touched = candidates_of(stock, list(context))
    rows = np.array(head.token_ids)
    rows = rows[np.isin(rows, touched).any(axis=1)].ravel()
    rows = rows[rows < head.vocab_size]
    candidates = np.union1d(probed_tokens(head, x), rows).astype(int)
    logits = want.logits.copy()
    logits[0, candidates] = want.dense[0, candidates]
    logits = mx.array(logits.astype(np.float32))
    for processor in stock:
        logits = processor(mx.array(context, dtype=mx.uint32), logits)
    return np.array(logits)[0].astype(np.float64), candidates


@pytest.mark.parametrize("given", PROCESSORS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_processors_are_mlx_lms_on_full_logits(given, bias):
    head = head_of(bias=bias)
    stock = make_logits_processors(**given)
    context = mx.array(CONTEXT, dtype=mx.uint32)
    for seed in range(8):
        x = state(seed)
        logits, candidates = processed(head, x, stock, CONTEXT)
        drawn = draw(
            head,
            Settings(),
            mx.array(x),
            mx.array([0, 0], mx.uint32),
            read_processors(stock, 5000),
            context,
        )
        assert drawn.tokens.item() == candidates[np.argmax(logits[candidates])]
        found = np.array(logprobs(head, drawn))[0]
        difference = (found - logits)[candidates]
        np.testing.assert_allclose(difference, difference[0], atol=1e-4)
        assert abs(np.logaddexp.reduce(found)) < 1e-5


def candidates_of(stock, context) -> list[int]:
    ids: list[int] = []
    for one in read_processors(stock, 5000):
        ids += one.ids.tolist() if hasattr(one, "ids") else context[-one.context_size :]
    return ids


def draws_with(head, settings, x, stock, context=(), n=400):
    read = read_processors(stock, 5000)
    context = mx.array(list(context), dtype=mx.uint32) if context else None
    tokens = [
        draw(head, settings, mx.array(x), mx.array([9, i], mx.uint32), read, context)
        for i in range(n)
    ]
    return np.array(mx.concatenate([t.tokens for t in tokens]))


@pytest.mark.parametrize("temp", [0.0, 1.0, 3.0])
def test_a_bias_of_a_hundred_chooses_any_token(temp):
    head, x = head_of(), state()
    for token in (0, 57, 129, 229):
        stock = make_logits_processors({token: 100.0})
        assert set(draws_with(head, Settings(temp=temp), x, stock, n=5)) == {token}


@pytest.mark.parametrize("ban", [-100.0, -math.inf])
@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_banned_tokens_do_not_come(temp, ban):
    head, x = head_of(), state()
    likeliest = np.argsort(-implied(head, x, 1.0)[0])[:70]
    stock = make_logits_processors({int(t): ban for t in likeliest})
    tokens = draws_with(head, Settings(temp=temp), x, stock)
    assert not set(tokens) & set(likeliest)
    drawn = draw(
        head,
        Settings(temp=temp),
        mx.array(x),
        mx.array([0, 0], mx.uint32),
        read_processors(stock, 5000),
    )
    found = np.array(logprobs(head, drawn))[0]
    assert found[likeliest].max() < -80 and abs(np.logaddexp.reduce(found)) < 1e-5


@pytest.mark.parametrize("vocab_size", [225, 230])
def test_a_cluster_of_banned_tokens_does_not_come(vocab_size):
    """Nor does the padding beside them."""
    head, x = head_of(vocab_size, n_probes=1), state()
    banned = np.array(head.token_ids)[1:].ravel()
    banned = banned[banned < vocab_size]
    banned = banned[~np.isin(banned, probed_tokens(head, x))][5:]
    stock = make_logits_processors({int(t): -math.inf for t in banned})
    tokens = draws_with(head, Settings(temp=20.0), x, stock)
    assert tokens.max() < vocab_size
    assert not set(tokens) & set(banned)


def test_draws_with_processors_follow_their_distribution():
    head, x = head_of(), state()
    bias = {5: 2.0, 100: 1.0, 33: -1.0, int(np.argmax(implied(head, x, 1)[0])): -2.0}
    stock = make_logits_processors(bias, presence_penalty=1.0)
    tokens = draws_with(head, Settings(temp=1.3), x, stock, CONTEXT, n=1000)
    logits, candidates = processed(head, x, stock, CONTEXT)
    # Clusters with a token that is touched are exact, the others have their masses.
    weights = implied(head, x, 1.3)[0]
    dense = expected(head, x).dense[0]
    sure = probed_tokens(head, x)
    unit = weights[sure[0]] / np.exp(dense[sure[0]] / 1.3)
    weights[candidates] = unit * np.exp(logits[candidates] / 1.3)
    assert p_value(tokens, weights) > 1e-4


def test_a_penalty_without_context_does_nothing():
    head, x = head_of(), state()
    stock = make_logits_processors(repetition_penalty=2.0)
    key = mx.array([0, 0], mx.uint32)
    plain = draw(head, Settings(), mx.array(x), key).tokens.item()
    best = mx.array([plain], mx.uint32)
    read = read_processors(stock, 5000)
    other = draw(head, Settings(), mx.array(x), key, read, best).tokens.item()
    want = expected(head, x).dense[0]
    if want[plain] > 0 and np.sort(want)[-2] > want[plain] / 2:
        assert other != plain


# ---------------------------------------------------------------------------
# What models do after their heads
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("llama", Transform()),
        ("llama-tied", Transform()),
        ("gemma2", Transform(1.0, 5.0)),
        ("gemma3", Transform()),
        ("cohere", Transform(0.0625)),
        ("granite", Transform(0.25)),
        ("granite-tied", Transform(0.25)),
        ("gpt2", Transform()),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_transform_of_a_model_is_found(name, wanted, dtype):
    model, _ = small_models.build(name, dtype=dtype)
    assert find_transform(model, find_head(model)) == wanted


KNOWN = np.concatenate([np.linspace(1e-2, 80, 255), [1e6]])


@pytest.mark.parametrize("scale", [1.0, 0.0625, 1 / 3, 13.0])
@pytest.mark.parametrize("cap", [None, 5.0, 30.0, 50.0])
def test_fit(scale, cap):
    fitted = Transform.fit(KNOWN, Transform(scale, cap)(KNOWN))
    assert fitted.scale == pytest.approx(scale, rel=1e-3)
    assert fitted.softcap == (cap if cap is None else pytest.approx(cap, rel=1e-3))
    x = np.linspace(-20, 20, 50) / scale * (1 if cap is None else cap / 30)
    back = np.array(fitted.inverse(mx.array(fitted(x))))
    np.testing.assert_allclose(back, x, rtol=2e-3, atol=1e-3 / scale)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1,
        lambda x: -x,
        lambda x: 0 * x,
        lambda x: np.minimum(x, 30),
        lambda x: x**2,
        lambda x: x - np.log(np.exp(x - x.max()).sum()) - x.max(),
        lambda x: x * np.nan,
        lambda x: x / (1 + x / 30),
    ],
    ids=[
        "shift",
        "negated",
        "zero",
        "clipped",
        "square",
        "log-softmax",
        "nan",
        "ratio",
    ],
)
def test_fit_refuses_what_it_cannot_say(function):
    assert Transform.fit(KNOWN, function(KNOWN)) is None


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(temp=3.0),
        Settings(temp=1.0, top_p=0.9),
        Settings(temp=1.0, xtc_probability=1.0, xtc_threshold=0.01),
    ],
    ids=["greedy", "temperature", "top-p", "XTC"],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"transform": Transform(0.5, 30.0)}, {"n_probes": 29}],
    ids=str,
)
def test_the_log_probability_of_the_drawn_token(settings, options):
    """Is the one among those of the whole vocabulary."""
    head = head_of(**options)
    h = mx.array(np.concatenate([state(seed) for seed in range(40)]))
    drawn = draw(head, settings, h, mx.array([3, 4], mx.uint32))
    want = mx.take_along_axis(logprobs(head, drawn), drawn.tokens[:, None], axis=1)
    np.testing.assert_allclose(drawn.logprob, want[:, 0], atol=1e-5)


def test_the_log_probability_after_processors():
    head, x = head_of(), state()
    processors = make_logits_processors({3: 2.0, 17: -1.0}, 1.3, 4)
    read, context = read_processors(processors, 230), mx.array([5, 3, 9])
    for seed in range(20):
        key = mx.array([5, seed], mx.uint32)
        drawn = draw(head, Settings(temp=2.0), mx.array(x), key, read, context)
        want = logprobs(head, drawn)[0, drawn.tokens.item()].item()
        assert drawn.logprob.item() == pytest.approx(want, abs=1e-5)
