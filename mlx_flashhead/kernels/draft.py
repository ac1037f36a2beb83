"""The token among what was retrieved, chosen or drawn in one launch.

Gumbel noise makes the draw (see :mod:`mlx_flashhead.sampling.coupled`, which has it in
plain MLX for whatever the kernel does not do): among the log-masses of clusters, exact
where probed and estimated elsewhere, then among the rows of the one that wins. The
token is the draft of exact decoding and what approximate decoding gives. Filters cut by
integers (fixed_point.py), but noise, the mass of all candidates and the masses of what
is not probed are floats, so back-ends may draw differently where two values are equal
up to rounding.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import mlx.core as mx

from . import backend, draft_functions, draft_source, filters
from ._prelude import LARGE_GROUP, SMALL_GROUP
from .blocks import reference as _summary
from .blocks import summarize
from .draw_cases import LAWS, Case, made
from .law import Draft, Draw, Law
from .noise import Noise
from .rows import INPUTS
from .shaping import float_bits

_greedy = backend.Kernel(
    "draft_greedy",
    ["summary", "settings"],
    ["tokens", "logprobs"],
    draft_source.GREEDY,
    draft_functions.HEADER,
)
_sampled = backend.Kernel(
    "draft_sampled",
    [
        *("logits", "probes", "token_ids", "settings", "keys", "summary", "special"),
        *("centroid_logits", "at_one", *INPUTS),
    ],
    ["tokens", "logprobs"],
    draft_source.SAMPLED,
    draft_functions.HEADER,
)


def draft(logits: mx.array, draw: Draw, summary: mx.array | None = None) -> Draft:
    """The token that the noise of a key draws, by what is known of the clusters; or,
    without a law, the probed token with the largest logit as the model rounds it, of
    equals the one of the lowest id.

    Args:
        logits: Exact logits of the head, float32 ``[B, p * m]``; ``-inf`` for padding.
        draw: What is drawn, and of what.
        summary: That of the logits, where :func:`probe_blocks` gave one.
    """
    if not len(logits):
        return Draft(mx.zeros((0,), dtype=mx.uint32), mx.zeros((0,)))
    rows = draw.tail.rows
    if draw.law is None or rows is not None:
        most = _most(draw)
        checked = partial(check, Case.of(draw, rows, most == LARGE_GROUP))
        threads = backend.largest_group(_variant(draw, most), most, checked)
        if threads and summary is None:
            summary = summarize(logits, draw)
        if threads and summary is not None:
            return _launch(logits, draw, summary, threads)
    return reference(logits, draw)


def _variant(draw: Draw, most: int) -> str:
    """What the code depends on."""
    if draw.law is None:
        return f"draft_greedy(up to {most} threads)"
    names = [str(draw), *(n.lower() for n, on in _options(draw).items() if on)]
    names += [f"m {draw.token_ids.shape[1]}", f"up to {most} threads"]
    if draw.options["TAIL"]:
        names.append(str(draw.tail.rows))
    return f"draft_sampled({', '.join(names)})"


def lowest(logits: mx.array, ids: mx.array) -> mx.array:
    """The lowest of the ids, ``[n]`` or ``[k, n]``, with the largest of ``logits [k,
    n]``, uint32 ``[k]``."""
    best = logits == logits.max(axis=-1, keepdims=True)
    none = mx.array(0xFFFFFFFF, mx.uint32)
    return mx.where(best, ids.astype(mx.uint32), none).min(axis=-1)


def reference(logits: mx.array, draw: Draw) -> Draft:
    """:func:`draft` in plain MLX."""
    probes, token_ids, shaping, tail, law, keys = draw
    ids = token_ids[probes].reshape(logits.shape)
    exact = shaping.transformed(logits)
    if law is None or keys is None:
        tokens = lowest(shaping(logits), ids)
        own = mx.where(ids == tokens[:, None], exact, -mx.inf).max(axis=-1)
        return Draft(tokens, own - mx.logsumexp(_masses(exact, draw), axis=-1))
    b, p = probes.shape
    n_clusters, m = token_ids.shape
    temperature = law.temperature
    noise = Noise.make(n_clusters, m, keys)
    values = shaping(logits)
    of_centroids = shaping.transformed(tail.centroid_logits.astype(mx.float32))
    every = of_centroids / temperature + tail.heated
    if law.rules is not None:
        at_one = mx.put_along_axis(
            of_centroids + tail.at_one, probes, mx.array(-mx.inf), axis=1
        )
        rest = mx.logsumexp(at_one, axis=-1)
        q = law.xtc_probability
        drops = noise.coins <= q if q > 0 else None
        exempt = None
        if law.special:
            exempt = (ids[..., None] == mx.array(law.special, mx.uint32)).any(axis=-1)
        values, tail_kept = filters.filtered(values, law.rules, rest, drops, exempt)
        every = mx.where(tail_kept[:, None], every, -mx.inf)
    draws_tail = draw.options["TAIL"]
    if not draws_tail:
        every = mx.full(every.shape, -mx.inf)
    heated = values.reshape(b, p, m) / temperature
    # A cluster may stand twice, but then its rows count once.
    every = mx.put_along_axis(every, probes, mx.array(-mx.inf), axis=1)
    every = every.at[mx.arange(b)[:, None], probes].maximum(
        mx.logsumexp(heated, axis=-1)
    )
    cluster = mx.argmax(every + noise.clusters, axis=-1)
    of_cluster = probes == cluster[:, None]
    rows = mx.where(of_cluster[..., None], heated, -mx.inf).max(axis=1)
    logits_of = mx.where(of_cluster[..., None], exact.reshape(b, p, m), -mx.inf)
    logits_of = logits_of.max(axis=1)
    masses = _masses(exact, draw)
    if draws_tail:
        # The winner may be a cluster that was not probed: its rows are scored as well,
        # and their mass takes the place of what was expected.
        scored = tail.score(cluster[:, None].astype(mx.uint32))[:, 0]
        scored = shaping.transformed(scored)
        probed = of_cluster.any(axis=-1, keepdims=True)
        rows = mx.where(probed, rows, scored / temperature)
        logits_of = mx.where(probed, logits_of, scored)
        at = p * m + cluster[:, None]
        mass = mx.logsumexp(scored, axis=-1, keepdims=True)
        mass = mx.where(probed, mx.take_along_axis(masses, at, axis=1), mass)
        masses = mx.put_along_axis(masses, at, mass, axis=1)
    row = mx.argmax(rows + noise.rows, axis=-1)
    own = mx.take_along_axis(logits_of, row[:, None], axis=1)[:, 0]
    return Draft(token_ids[cluster, row], own - mx.logsumexp(masses, axis=-1))


def _masses(exact: mx.array, draw: Draw) -> mx.array:
    """Logits of the candidates at temperature 1, and log-masses of clusters that are
    not probed, ``-inf`` for others: ``[B, p * m]``, or ``[B, p * m + C]``."""
    tail = draw.tail
    if tail.empty:
        return exact
    of_centroids = tail.centroid_logits.astype(mx.float32)
    rest = draw.shaping.transformed(of_centroids) + tail.at_one
    rest = mx.put_along_axis(rest, draw.probes, mx.array(-mx.inf), axis=1)
    return mx.concatenate([exact, rest], axis=1)


def _most(draw: Draw) -> int:
    """Threads of a group that takes so much."""
    p = draw.probes.shape[1]
    filtered = any(_options(draw).values())
    large = filtered and p * draw.token_ids.shape[1] > 2048
    return LARGE_GROUP if large or p + draw.n_stretches > 512 else SMALL_GROUP


def _options(draw: Draw) -> dict[str, bool]:
    """The filters that there are."""
    if draw.law is None:
        return {}
    law = draw.law
    rules = law.rules or filters.Rules()
    n_candidates = draw.probes.shape[1] * draw.token_ids.shape[1]
    return {
        "TOP_P": rules.top_p < 1,
        "MIN_P": rules.min_p > 0,
        "FEWEST": rules.min_p > 0 and rules.min_tokens_to_keep > 1,
        "XTC": law.xtc_probability > 0,
        "TOP_K": 0 < rules.top_k < n_candidates,
    }


def _launch(logits: mx.array, draw: Draw, summary: mx.array, threads: int) -> Draft:
    if draw.law is None:
        found = _launch_greedy(draw, summary, threads)
    else:
        found = _launch_sampled(logits, draw, draw.law, summary, threads)
    return Draft(*found)


def _outputs(b: int) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    return [((b,), mx.uint32), ((b,), mx.float32)]


def _launch_greedy(draw: Draw, summary: mx.array, threads: int) -> list[mx.array]:
    b, p = draw.probes.shape
    return _greedy(
        [summary, backend.words((p,))],
        template=[],
        groups=(1, b),
        threads=threads,
        outputs=_outputs(b),
    )


def _launch_sampled(
    logits: mx.array, draw: Draw, law: Law, summary: mx.array, threads: int
) -> list[mx.array]:
    rows = draw.tail.rows
    assert rows is not None and draw.keys is not None  # or there is no kernel
    rules = law.rules or filters.Rules()
    words = (
        *(float_bits(law.temperature), *draw.shaping.words),
        *(rules.limit, rules.share, rules.top_k, rows.n_rows),
        *(rules.min_tokens_to_keep, int(rules.xtc_threshold * 2**31)),
        *(float_bits(law.xtc_probability), len(law.special), float_bits(rules.top_p)),
    )
    return _sampled(
        [
            *(logits, draw.probes, draw.token_ids, backend.words(words)),
            *(draw.keys, summary, backend.words(law.special)),
            *(draw.tail.centroid_logits, draw.tail.at_one, *rows.inputs),
        ],
        template=[
            *(*rows.template, *draw.shaping.template, *_options(draw).items()),
            *((name, draw.options[name]) for name in ("EMPTY", "TAIL")),
        ],
        groups=(1, len(logits)),
        threads=threads,
        outputs=_outputs(len(logits)),
    )


_F16, _BF16, _F32 = mx.float16, mx.bfloat16, mx.float32
# What tests, the doctor and the check on a GPU run.
CASES = (
    Case(None, 16, 5, 9),
    Case(None, 16, 40, 50, rounding=_BF16),
    Case(None, 7, 33, 600, rounding=_F16, softcap=30.0),
    Case(None, 1, 600, 700, 32, 0, 32, rounding=_BF16, softcap=30.0),
    *(
        table._replace(law=law)
        for law in LAWS.values()
        for table in (
            Case(None, 16, 6, 25),
            Case(None, 16, 20, 140, 96, 8, 32, _BF16, _F16, spread=4.0),
            Case(None, 5, 12, 33, 640, 4, 64, _BF16, _BF16, _BF16, 30.0, _F32),
            Case(None, 16, 9, 9, 64, 6, 64, _F16, _F16, _F16),
            Case(None, 16, 130, 400, 64, 0, 32, _BF16, None, _BF16),
        )
    ),
    # More clusters than are listed, and rows that do not fit the lanes.
    Case(LAWS["top-p"], 3, 1100, 1300, 32, 8, 32, spread=0.2),
    Case(LAWS["XTC, all"], 40, 9, 30, 32, 8, 32, spread=3.0),
)


def largest(case: Case) -> int:
    """Threads per threadgroup, if so many fit."""
    return _most(made(case, 1)[1])


def check(case: Case, threads: int) -> None:
    """Raise unless the kernel matches its reference in this case: draws of some keys.
    Rounding may move one of them: noise that two clusters share to all digits does not
    happen, but the edge of a filter may lie on a token."""
    B = 32 if case.p * case.m < 1000 else 12
    _, draw, logits = made(case, B)
    got = _launch(logits, draw, _summary(logits, draw), threads)
    want = reference(logits, draw)
    same = got.tokens == want.tokens
    name = "draft_greedy" if case.law is None else "draft_sampled"
    if cast(int, same.sum().item()) < B - (case.law is not None):
        raise AssertionError(f"{name} differs from the plain reference")
    logprobs = mx.where(same, got.logprobs, want.logprobs)
    backend.expect_close(f"{name}'s logprobs", logprobs, want.logprobs, 1e-4)
