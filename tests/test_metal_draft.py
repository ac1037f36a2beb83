"""The kernels of drafts: their Metal text, run on the CPU, against plain MLX."""

from __future__ import annotations

import importlib

import mlx.core as mx
import numpy as np
import pytest
from metal import emulator, reference

from mlx_flashhead import kernels
from mlx_flashhead.kernels import backend, doctor, draft_functions

blocks, draft = (
    importlib.import_module(f"mlx_flashhead.kernels.{name}")
    for name in ("blocks", "draft")
)


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    """The emulator takes the place of a Metal device that is trusted."""
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    monkeypatch.setattr(backend, "largest_group", lambda variant, most, check: most)
    monkeypatch.setattr(backend.Kernel, "__call__", emulator.launch)


def cases(module, only=lambda case: True, every=1):
    """A module's cases, those of a kind; in the quick suite only some of them."""
    chosen = [case for case in module.CASES if only(case)]
    return [
        pytest.param(
            case,
            id=doctor._described(case),
            marks=[pytest.mark.full] if i % every else [],
        )
        for i, case in enumerate(chosen)
    ]


@pytest.mark.parametrize("case", cases(draft, lambda case: case.law is None))
def test_greedy(case):
    """Ties, which rounding makes, go to the lowest id."""
    _, draw, logits = draft.made(case, 3)
    logits = logits * 0.01 + 4 if case.rounding == mx.bfloat16 else logits
    logits[1, ::3] = -mx.inf
    logits[2] = -mx.inf
    got = kernels.draft(logits, draw)
    values = np.array(draw.shaping(logits))
    tokens = np.array(draw.token_ids[draw.probes]).reshape(3, -1)
    want = [tokens[i][v == v.max()].min() for i, v in enumerate(values)]
    assert got.tokens.tolist() == [int(t) for t in want]
    if case.rounding == mx.bfloat16:
        assert (values[0] == values[0].max()).sum() > 1
    plain = draft.reference(logits, draw)
    np.testing.assert_allclose(got.logprobs[:2], plain.logprobs[:2], atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 33, 64, 97])
def test_noise_is_mlx(size):
    """One number of each cluster, from the same key as MLX's, odd counts included."""
    kernel = backend.Kernel(
        "gumbel_numbers",
        ["key", "size"],
        ["numbers"],
        """
    uint i = thread_position_in_threadgroup.x;
    if (i < size[0]) {
        numbers[i] = gumbel(key[0], key[1], i, size[0]);
    }
""",
        draft_functions.HEADER,
    )
    key = mx.random.key(7)
    padded = mx.concatenate([key, mx.zeros(6, mx.uint32)])
    (got,) = kernel(
        [padded, mx.array([size] * 8, mx.uint32)],
        template=[],
        groups=(1, 1),
        threads=128,
        outputs=[((size,), mx.float32)],
    )
    want = mx.random.gumbel((size,), key=key)
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-5, atol=1e-6)


def exact_blocks(logits, draw):
    """Of each probed cluster the mass of its tokens, and of each stretch the mass of
    those that are not probed, in float64, and the clusters of the stretches."""
    shaping, (b, p) = draw.shaping, draw.probes.shape

    def transformed(x):
        x = np.array(x.astype(mx.float32)).astype(np.float64)
        cap = shaping.softcap
        return x if cap is None else cap * np.tanh(x / cap)

    own = np.logaddexp.reduce(transformed(logits).reshape(b, p, -1), axis=-1)
    rest = transformed(draw.tail.centroid_logits) + np.array(draw.tail.at_one)
    np.put_along_axis(rest, np.array(draw.probes), -np.inf, axis=1)
    starts = range(0, 0 if draw.tail.empty else rest.shape[1], blocks.STRETCH)
    with np.errstate(divide="ignore"):
        masses = [
            np.log(np.exp(rest[:, i : i + blocks.STRETCH]).sum(1)) for i in starts
        ]
    return own, np.array(masses).T.reshape(b, len(starts))


@pytest.mark.parametrize("case", cases(blocks, every=3))
@pytest.mark.parametrize("scored", [True, False], ids=["scored", "read"])
def test_blocks(case, scored):
    """The masses also against float64; the rest is held against plain MLX."""
    rows, draw, logits = blocks.made(case, 3)
    if scored:
        logits, summary = kernels.probe_blocks(rows, draw)
    else:
        summary = blocks.summarize(logits, draw)
    blocks._expect_close("blocks", summary, logits, draw)
    first, second = (np.array(summary[:, i].view(mx.float32)) for i in (0, 1))
    own, rest = exact_blocks(logits, draw)
    p = draw.probes.shape[1]
    np.testing.assert_allclose(first[:, :p] + np.log(second[:, :p]), own, rtol=1e-5)
    np.testing.assert_allclose(second[:, p:], rest, rtol=1e-5)
    assert np.isneginf(first[:, p:]).all() or draw.options["TAIL"]


@pytest.mark.parametrize(
    "case", cases(draft, lambda case: case.law is not None, every=6)
)
def test_sampled(case):
    """Where rounding moves no edge, the token is the one of the plain reference."""
    n = 3 if case.p * case.m > 1000 else 24 if case.law.rules is None else 8
    _, draw, logits = draft.made(case, n)
    got, want = kernels.draft(logits, draw), draft.reference(logits, draw)
    same = np.array(got.tokens == want.tokens)
    assert same.sum() >= n - 1
    np.testing.assert_allclose(
        np.array(got.logprobs)[same], np.array(want.logprobs)[same], atol=1e-5
    )
    # Where logits are not far apart the draw falls on a cluster that was not probed.
    probed = np.array(draw.token_ids[draw.probes]).reshape(n, -1)
    outside = ~(probed == np.array(want.tokens)[:, None]).any(axis=1)
    flat = case.spread < 2 and 2 * case.p < case.C and n > 3
    assert outside.any() or case.law.rules is not None or not flat


@pytest.mark.parametrize("name", ["XTC", "fewest", "XTC, all"])
def test_filters(name):
    """What is drawn is among what mlx-lm's filters leave, by float64, whether XTC's
    coin falls on dropping or not; where not, it may be what XTC would drop."""
    law = draft.LAWS[name]
    case = draft.Case(law, 8, 12, 12, spread=2.0)
    n = 16
    _, draw, logits = draft.made(case, n)
    # All rows are the same state's, with noise of their own.
    logits = mx.repeat(logits[:1], n, axis=0)
    draw = draw._replace(probes=mx.repeat(draw.probes[:1], n, axis=0))
    coins = np.array(kernels.Noise.make(12, 8, draw.keys).coins)
    tokens = np.array(kernels.draft(logits, draw).tokens)
    ids = np.array(draw.token_ids[draw.probes[0]]).reshape(-1)
    rules = law.rules
    left = [
        reference.kept(
            np.array(logits[0]).astype(np.float64),
            top_p=rules.top_p,
            min_p=rules.min_p,
            min_tokens_to_keep=rules.min_tokens_to_keep,
            top_k=rules.top_k,
            xtc_threshold=rules.xtc_threshold if drops else None,
            xtc_exempt=np.isin(ids, law.special),
        )[0]
        for drops in (False, True)
    ]
    drops = coins <= law.xtc_probability if law.xtc_probability else coins < 0
    for row, (token, drop) in enumerate(zip(tokens, drops)):
        assert left[int(drop)][ids == token].all(), row
    assert left[0].sum() < len(ids) or name == "XTC"
    if law.xtc_probability:
        assert 0 < drops.sum() < n and left[1].sum() < left[0].sum()
        assert not left[1][np.isin(ids, tokens[~drops])].all()


PLANTED = {
    "special tokens are dropped": (
        "XTC, all",
        "kept = is_one_of(",
        "kept = !is_one_of(",
    ),
    "too few clusters are listed": ("top-k", "least -= 1e-3f", "least += 1e-1f"),
    "top-p looks too near": (
        "top-p",
        "precise::log(2.0f * float(P * M) / more)",
        "0.01f",
    ),
    "top-k looks too near": ("top-k", "min(within, edge)", "min(within, edge / 2)"),
    "a mass counts twice": (
        "temperature",
        "whole -= precise::exp(expected - high);",
        "",
    ),
    "other noise": ("min-p", "gumbel(words[2], words[3]", "gumbel(words[3], words[2]"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_caught(name, monkeypatch):
    law, right, wrong = PLANTED[name]
    kernel = draft._sampled
    assert right in kernel.source
    source = kernel.source.replace(right, wrong)
    planted = backend.Kernel(
        kernel.name, kernel.inputs, kernel.outputs, source, kernel.header
    )
    # Of few more than are probed, the tail does not have what top-p keeps.
    C = 24 if law == "top-p" else 140
    case = draft.Case(draft.LAWS[law], 16, 20, C, 32, 8, 32)
    draft.check(case, 256)
    monkeypatch.setattr(draft, "_sampled", planted)
    with pytest.raises(AssertionError, match="differs from the plain reference"):
        draft.check(case, 256)
