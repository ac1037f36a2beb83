"""What a draw has to know of each cluster, found where its logits are.

A draw ends in one threadgroup, which had to read all candidates several times. So each
simdgroup that scores a cluster also says in four numbers what its logits amount to, and
more simdgroups do the same for stretches of clusters that are not probed. The draw
reads those, and logits only of the few clusters that can matter.

``summary [B, 4, p + s]``, uint32, has the bits of float32 numbers unless said
otherwise. Of each of the p probed clusters, in the order of ``probes``:

0. its largest logit as the model rounds it, its ``best``;
1. the sum of ``exp(logit - best)``, logits not rounded;
2. the log of its mass at the temperature, plus its noise; the lowest id (an integer) of
   the tokens with the largest logit where the best is asked for;
3. the sum of ``exp(logit - best)``, logits rounded, for filters that look at masses;
   the logit of the token of 2, not rounded, where the best is asked for.

Of each of s stretches of 128 clusters, those that are probed left out: the largest of
their log-masses at the temperature plus noise; the log of their mass at temperature 1;
the cluster (an integer) that has the largest; nothing. There are none where all
clusters are probed.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from . import backend, noise, probe_logits, rows, shaping
from .draw_cases import LAWS, Case, made
from .law import STRETCH, Draw
from .noise import Noise
from .rows import Rows
from .shaping import float_bits

METAL = f"""
constexpr constant uint STRETCH = {STRETCH};
"""

# A threadgroup has one cluster for each simdgroup, or as many stretches.
_SUMMARIZE = """
    constexpr uint SPAN = SIMDGROUPS * STRETCH;
    uint lid = thread_position_in_threadgroup.x;
    uint group = threadgroup_position_in_grid.x;
    uint n_clusters = token_ids_shape[0];
    uint n_stretches = EMPTY ? 0 : (n_clusters + STRETCH - 1) / STRETCH;
    uint n_entries = n_probes + n_stretches;
    uint groups = (n_probes + SIMDGROUPS - 1) / SIMDGROUPS;
    size_t entries = size_t(batch) * 4 * n_entries;
    float temperature = as_type<float>(settings[0]);
    float scale = as_type<float>(settings[1]);
    float cap = as_type<float>(settings[2]);
    threadgroup atomic_uint probed[SPAN / 32];

    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint word0 = 0;
    uint word1 = 0;
    if (DRAWN) {
        word0 = split_word(keys[2 * batch], keys[2 * batch + 1], 0);
        word1 = split_word(keys[2 * batch], keys[2 * batch + 1], 1);
    }
    if (group < groups) {
        if (probe < n_probes) {
            uint cluster = probes[size_t(batch) * n_probes + probe];
            float best = -INFINITY;
            uint token = ~0u;
            for (uint r = simd_lid; r < M; r += 32) {
                float value = shaped<DROPPED, CAPPED>(
                    found[simd_gid * M + r], scale, cap);
                if (value >= best) {
                    uint other = token_ids[size_t(cluster) * M + r];
                    token = value > best || other < token ? other : token;
                    best = value;
                }
            }
            float top = simd_max(best);
            token = simd_min(best == top ? token : ~0u);
            float whole = 0.0f;
            float heated_mass = 0.0f;
            float mass = 0.0f;
            float logit = -INFINITY;
            for (uint r = simd_lid; r < M && top > -INFINITY; r += 32) {
                float raw = found[simd_gid * M + r];
                float exact = transformed<CAPPED>(raw, scale, cap);
                float value = shaped<DROPPED, CAPPED>(raw, scale, cap);
                whole += precise::exp(exact - top);
                if (DRAWN) {
                    heated_mass += precise::exp((value - top) / temperature);
                }
                if (TOTALS) {
                    mass += precise::exp(value - top);
                }
                if (!DRAWN && token_ids[size_t(cluster) * M + r] == token) {
                    logit = exact;
                }
            }
            whole = simd_sum(whole);
            uint third = token;
            float fourth = simd_max(logit);
            if (DRAWN) {
                heated_mass = simd_sum(heated_mass);
                float chance = top / temperature + precise::log(heated_mass)
                    + gumbel(word0, word1, cluster, n_clusters);
                third = as_type<uint>(chance);
                fourth = simd_sum(mass);
            }
            if (simd_lid == 0) {
                summary[entries + probe] = as_type<uint>(top);
                summary[entries + n_entries + probe] = as_type<uint>(whole);
                summary[entries + 2 * n_entries + probe] = third;
                summary[entries + 3 * n_entries + probe] = as_type<uint>(fourth);
            }
        }
    } else {
        uint from = (group - groups) * SPAN;
        for (uint i = lid; i < SPAN / 32; i += THREADS) {
            atomic_store_explicit(&probed[i], 0u, memory_order_relaxed);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint q = lid; q < n_probes; q += THREADS) {
            uint at = probes[size_t(batch) * n_probes + q] - from;
            if (at < SPAN) {
                atomic_fetch_or_explicit(
                    &probed[at / 32], 1u << (at % 32), memory_order_relaxed);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float best = -INFINITY;
        uint cluster = ~0u;
        float high = -INFINITY;
        float masses[STRETCH / 32];
#pragma unroll
        for (uint j = 0; j < STRETCH / 32; j++) {
            uint word = simd_gid * (STRETCH / 32) + j;
            uint c = from + 32 * word + simd_lid;
            uint bits = atomic_load_explicit(&probed[word], memory_order_relaxed);
            masses[j] = -INFINITY;
            if (c < n_clusters && !(bits >> simd_lid & 1)) {
                float logit = transformed<CAPPED>(
                    load(centroid_logits, size_t(batch) * n_clusters + c), scale, cap);
                masses[j] = logit + load(at_one, c);
                if (TAIL) {
                    float value = logit / temperature + load(heated, c)
                        + gumbel(word0, word1, c, n_clusters);
                    cluster = value > best ? c : cluster;
                    best = value > best ? value : best;
                }
            }
            high = masses[j] > high ? masses[j] : high;
        }
        high = simd_max(high);
        float mass = 0.0f;
#pragma unroll
        for (uint j = 0; j < STRETCH / 32; j++) {
            mass += high > -INFINITY ? precise::exp(masses[j] - high) : 0.0f;
        }
        mass = high + precise::log(simd_sum(mass));
        float top = simd_max(best);
        cluster = simd_min(best == top ? cluster : ~0u);
        uint at = n_probes + (group - groups) * SIMDGROUPS + simd_gid;
        if (simd_lid == 0 && at < n_entries) {
            summary[entries + at] = as_type<uint>(top);
            summary[entries + n_entries + at] = as_type<uint>(mass);
            summary[entries + 2 * n_entries + at] = cluster;
            summary[entries + 3 * n_entries + at] = 0;
        }
    }
"""

# Logits that there are, in the place of those that are scored.
_READ = """
    if (probe < n_probes) {
        for (uint r = simd_lid; r < M; r += 32) {
            found[simd_gid * M + r] =
                load(logits, (size_t(batch) * n_probes + probe) * M + r);
        }
    }
"""

_INPUTS = ["probes", "token_ids", "settings", "keys"]
_INPUTS += ["centroid_logits", "heated", "at_one"]
_HEADER = METAL + shaping.METAL + noise.METAL

_scored = backend.Kernel(
    "probe_blocks",
    [*rows.INPUTS, "sizes", *_INPUTS],
    ["logits", "summary"],
    probe_logits.BEGIN + probe_logits.SCORE + _SUMMARIZE,
    rows.METAL + _HEADER,
)
_read = backend.Kernel(
    "summarize_blocks",
    ["logits", *_INPUTS],
    ["summary"],
    probe_logits.BEGIN + _READ + _SUMMARIZE,
    _HEADER,
)


def probe_blocks(rows: Rows, draw: Draw) -> tuple[mx.array, mx.array | None]:
    """Logits as :func:`mlx_flashhead.kernels.probe_logits` gives them, and the summary
    of them; ``None`` where no kernel makes one."""
    probe_logits.validate(rows, draw.probes)
    threads = 0
    if draw.probes.size:
        check = partial(_check_scored, Case.of(draw, rows))
        threads = probe_logits.threads_for(f"probe_blocks({draw})", rows, check)
    if not threads:
        return probe_logits.probe_logits(rows, draw.probes), None
    logits, summary = _launch(rows, draw, threads)
    return logits, summary


def summarize(logits: mx.array, draw: Draw) -> mx.array | None:
    """The summary of logits ``[B, p * m]``; ``None`` where no kernel makes one."""
    check = partial(_check_read, Case.of(draw, draw.tail.rows))
    variant = f"summarize_blocks({draw}, m {draw.token_ids.shape[1]})"
    threads = backend.largest_group(variant, probe_logits.THREADS, check)
    return _launch_read(logits, draw, threads) if threads else None


def reference(logits: mx.array, draw: Draw) -> mx.array:
    """The summary in plain MLX."""
    tail, law, shaping = draw.tail, draw.law, draw.shaping
    b, p = draw.probes.shape
    n_clusters, m = draw.token_ids.shape
    logits = logits.reshape(b, p, m)
    exact, values = shaping.transformed(logits), shaping(logits)
    ids = draw.token_ids[draw.probes]
    best = values.max(axis=-1)

    def mass(x: mx.array, temperature: float = 1.0) -> mx.array:
        x = mx.exp((x - best[..., None]) / temperature).sum(axis=-1)
        return mx.where(best > -mx.inf, x, 0)

    every = shaping.transformed(tail.centroid_logits.astype(mx.float32))
    outside = mx.ones((b, n_clusters), mx.bool_)
    outside = mx.put_along_axis(outside, draw.probes, mx.array(False), axis=1)
    n = draw.n_stretches

    def stretches(x: mx.array) -> mx.array:
        x = mx.where(outside, x, -mx.inf)
        padding = mx.full((b, n * STRETCH - n_clusters), -mx.inf)
        return mx.concatenate([x, padding], axis=1).reshape(b, n, STRETCH)

    chances = mx.full((b, n), -mx.inf)
    clusters = mx.full((b, n), 0xFFFFFFFF, mx.uint32)
    if law is None:
        tied = values == best[..., None]
        token = mx.where(tied, ids, mx.array(0xFFFFFFFF, mx.uint32)).min(axis=-1)
        chosen = mx.where((ids == token[..., None]) & tied, exact, -mx.inf)
        third, fourth = token, chosen.max(axis=-1)
    else:
        assert draw.keys is not None
        numbers = Noise.make(n_clusters, m, draw.keys).clusters
        third = best / law.temperature + mx.log(mass(values, law.temperature))
        third = third + mx.take_along_axis(numbers, draw.probes, axis=1)
        third = third.view(mx.uint32)
        totals = draw.options["TOTALS"]
        fourth = mass(values) if totals else mx.zeros((b, p))
        if draw.options["TAIL"]:
            heated = stretches(every / law.temperature + tail.heated + numbers)
            chances = heated.max(axis=-1)
            at = heated.argmax(axis=-1) + STRETCH * mx.arange(n)
            clusters = mx.where(chances > -mx.inf, at.astype(mx.uint32), clusters)
    planes = [x.view(mx.uint32) for x in (best, mass(exact), third, fourth)]
    if n:
        masses = mx.logsumexp(stretches(every + tail.at_one), axis=-1)
        more = (chances, masses, clusters, mx.zeros((b, n), mx.uint32))
        planes = [
            mx.concatenate([plane, x.view(mx.uint32)], axis=1)
            for plane, x in zip(planes, more)
        ]
    return mx.stack(planes, axis=1)


def _numbers_of(summary: mx.array, draw: Draw) -> mx.array:
    """A summary as float32, the integers, too."""
    p = draw.probes.shape[1]
    first, second, third, fourth = (summary[:, i].view(mx.float32) for i in range(4))
    integers = summary[:, 2].astype(mx.float32)
    if draw.law is not None:
        integers = mx.concatenate([third[:, :p], integers[:, p:]], axis=1)
    return mx.stack([first, second, integers, fourth], axis=1)


_F16, _BF16, _F32 = mx.float16, mx.bfloat16, mx.float32
# What tests, the doctor and the check on a GPU run.
CASES = (
    Case(None, 16, 5, 9),
    Case(None, 5, 7, 300, 96, 8, 32, _BF16, _F16, _BF16, 30.0),
    Case(None, 40, 3, 3, 64, 4, 64, _F16),
    Case(LAWS["temperature"], 16, 6, 25, bias=_F32),
    Case(LAWS["temperature"], 7, 9, 150, 640, 5, 64, _BF16, _BF16, _BF16, 30.0),
    Case(LAWS["temperature"], 1, 20, 400, 32, 0, 32, _F16),
    Case(LAWS["top-p"], 16, 20, 257, 96, 8, 32, _BF16, _F16, _F16),
    Case(LAWS["top-p"], 33, 4, 4, 64, 6, 64),
    Case(LAWS["min-p"], 16, 7, 129, 1152, 4, 128, _BF16, bias=_BF16),
    Case(LAWS["all"], 3, 40, 90, 32, 0, 32, _BF16, None, _BF16),
)


def largest(case: Case) -> int:
    """Threads of a threadgroup: the same in all cases."""
    return probe_logits.THREADS


def check(case: Case, threads: int) -> None:
    """Raise unless the kernels match their reference in this case."""
    _check_scored(case, threads)
    _check_read(case, threads)


def _check_scored(case: Case, threads: int) -> None:
    rows, draw, want = made(case)
    logits, summary = _launch(rows, draw, threads)
    backend.expect_close("probe_blocks", logits, want, 1e-4)
    _expect_close("probe_blocks", summary, logits, draw)


def _check_read(case: Case, threads: int) -> None:
    _, draw, logits = made(case)
    summary = _launch_read(logits, draw, threads)
    _expect_close("summarize_blocks", summary, logits, draw)


def _expect_close(name: str, summary: mx.array, logits: mx.array, draw: Draw) -> None:
    """Each of the four numbers by itself, against those of the same logits."""
    got = _numbers_of(summary, draw)
    want = _numbers_of(reference(logits, draw), draw)
    for i in range(4):
        backend.expect_close(name, got[:, i], want[:, i], 1e-4)


def _launch(rows: Rows, draw: Draw, threads: int) -> list[mx.array]:
    b, p = draw.probes.shape
    m = draw.token_ids.shape[1]
    return _scored(
        [*rows.inputs, backend.words((rows.n_rows,)), *_inputs(draw)],
        template=[*rows.template, *_template(draw)],
        groups=_groups(draw, threads),
        threads=threads,
        outputs=[((b, p * m), mx.float32), _summary(draw)],
    )


def _launch_read(logits: mx.array, draw: Draw, threads: int) -> mx.array:
    return _read(
        [logits, *_inputs(draw)],
        template=[("M", draw.token_ids.shape[1]), *_template(draw)],
        groups=_groups(draw, threads),
        threads=threads,
        outputs=[_summary(draw)],
    )[0]


def _inputs(draw: Draw) -> list[mx.array]:
    temperature = 1.0 if draw.law is None else draw.law.temperature
    settings = backend.words((float_bits(temperature), *draw.shaping.words))
    return [
        *(draw.probes, draw.token_ids, settings),
        settings if draw.keys is None else draw.keys,
        *(draw.tail.centroid_logits, draw.tail.heated, draw.tail.at_one),
    ]


def _template(draw: Draw) -> backend.Template:
    return [*draw.shaping.template, *draw.options.items(), ("FINDS", True)]


def _groups(draw: Draw, threads: int) -> tuple[int, int]:
    b, p = draw.probes.shape
    of_stretches = probe_logits.groups(draw.n_stretches, threads)
    return probe_logits.groups(p, threads) + of_stretches, b


def _summary(draw: Draw) -> tuple[tuple[int, ...], mx.Dtype]:
    b, p = draw.probes.shape
    return (b, 4, p + draw.n_stretches), mx.uint32
