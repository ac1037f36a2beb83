"""Ways to do one thing in a kernel, timed in turn: what ``benchmarks/kernels.py
--stage-1``, ``--selection`` and ``--conversion`` show."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import mlx.core as mx

from mlx_flashhead.benchmarking.latency import Spread, Step, chained, spread
from mlx_flashhead.compute.table import Table
from mlx_flashhead.head import FlashHead, masses
from mlx_flashhead.kernels import Rows, backend, rows
from mlx_flashhead.sampling import Settings
from mlx_flashhead.sampling.draw import _draw

# Not the functions of these names.
centroid_logits, probe_logits, select_probes = (
    importlib.import_module(f"mlx_flashhead.kernels.{name}")
    for name in ("centroid_logits", "probe_logits", "select_probes")
)

REPEATS = 20
# Of the kernel for stage 1: centroids of a lane, and lanes that share one.
FORMS = [(each, lanes) for lanes in (4, 8, 16, 32) for each in (2, 4)]

# Other ways to make floats of weights of 8 or 4 bits than :mod:`rows` has.
_SHIFTED = """
template <>
METAL_FUNC constexpr int lift<{bits}>(int i) {{
    return 0;
}}
"""
_CONVERTED = """
template <>
METAL_FUNC float unpack<8>(thread const uint* words, int i) {
    return float((unsigned char)(words[i / 4] >> (8 * (i % 4))));
}
"""
CONVERSIONS = {
    (8, "2^23, in place"): "",
    (8, "2^23, shifted"): _SHIFTED.format(bits=8),
    (8, "uchar4"): _SHIFTED.format(bits=8) + _CONVERTED,
    (4, "2^23, in place"): "",
    (4, "2^23, shifted"): _SHIFTED.format(bits=4),
}


def in_turn(runs: dict[str, Callable[[], float]]) -> dict[str, Spread]:
    """Microseconds per step of each chain, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            times[name].append(1e6 * run())
    return {name: spread(each) for name, each in times.items()}


def nothing(h: mx.array, key: mx.array) -> mx.array:
    """What a chain takes without a step."""
    return h[:, 0].astype(mx.uint32)


def greedy_head(V: int, D: int, m: int) -> tuple[FlashHead, mx.array, Step]:
    """A head of made rows of 8 bits, a hidden state, and its greedy step."""
    C = V // m
    random = mx.random.normal((V, D), scale=D**-0.5).astype(mx.bfloat16)
    head = FlashHead(
        Table.from_dense(random.reshape(C, m, D), 8, 64),
        Table.from_dense(random[:C], 4, 64),
        mx.arange(V, dtype=mx.uint32).reshape(C, m),
        V,
        spread=mx.random.uniform(shape=(C,)),
        excess=mx.zeros((1, C)),
        n_probes=C // 16,
    )
    h = mx.random.normal((1, D)).astype(mx.bfloat16)
    at_one = masses.log_weights(head, 1.0)
    mx.eval(head.parameters(), h, at_one)

    def greedy(h: mx.array, key: mx.array) -> mx.array:
        return _draw(head, Settings(), h, key, at_one, at_one)[0]

    return head, h, greedy


def stage_1(V: int, D: int, m: int, steps: int) -> dict[str, Spread]:
    """Stage 1 and the whole greedy step, by MLX's product and by the kernel."""
    head, h, greedy = greedy_head(V, D, m)

    def alone(h: mx.array, key: mx.array) -> mx.array:
        return head.centroid_logits(h)[:, 0].astype(mx.uint32)

    case = probe_logits.Case(mx.bfloat16, 4, 64, D, 1, C=67)
    steps_of: dict[str, Step] = {"stage 1": alone, "greedy step": greedy}
    runs = {"nothing": chained(nothing, h, steps)}
    for part, step in steps_of.items():
        with patch.object(centroid_logits, "preferred", lambda rows: False):
            runs[f"{part}: MLX's product"] = chained(step, h, steps)
        for each, lanes in FORMS:
            form = {"preferred": lambda rows: True, "ROWS": each, "LANES": lanes}
            with patch.multiple(centroid_logits, **form):
                centroid_logits.check(case, probe_logits.THREADS)
                name = f"{part}: kernel, {lanes} lanes a row, {each} rows a lane"
                runs[name] = chained(step, h, steps)
    return in_turn(runs)


def selection(V: int, D: int, m: int, steps: int) -> dict[str, Spread]:
    """Stage 1 with the selection, and the whole greedy step: keys kept in registers,
    and made again in each pass."""
    head, h, greedy = greedy_head(V, D, m)

    def alone(h: mx.array, key: mx.array) -> mx.array:
        return head.select(head.centroid_logits(h))[:, 0]

    steps_of: dict[str, Step] = {"up to selection": alone, "greedy step": greedy}
    ways = {"in registers": select_probes.IN_REGISTERS, "made again": 0}
    runs = {"nothing": chained(nothing, h, steps)}
    for part, step in steps_of.items():
        for way, most in ways.items():
            with patch.object(select_probes, "IN_REGISTERS", most):
                runs[f"{part}: keys {way}"] = chained(step, h, steps)
    return in_turn(runs)


def conversion(V: int, D: int, m: int, steps: int) -> dict[str, Spread]:
    """The kernel that scores rows, with ways to make floats of quantized weights; for a
    sixteenth of the clusters, and for half of them, where launches count less."""
    C = V // m
    random = mx.random.normal((C, m, D), scale=D**-0.5).astype(mx.bfloat16)
    packed = {bits: mx.quantize(random, group_size=64, bits=bits) for bits in (8, 4)}
    h = mx.random.normal((1, D)).astype(mx.bfloat16)
    every = mx.random.permutation(C).astype(mx.uint32)
    probes = {share: mx.sort(every[: C // share])[None] for share in (16, 2)}
    mx.eval(packed, h, probes)

    def step(share: int, bits: int, h: mx.array, key: mx.array) -> mx.array:
        table = Rows(h, *packed[bits], bits, 64, V)
        logits = probe_logits._launch(table, probes[share], probe_logits.THREADS)
        return logits[:, 0].astype(mx.uint32)

    stock = probe_logits._kernel
    runs = {"nothing": chained(nothing, h, steps)}
    for i, ((bits, way), text) in enumerate(CONVERSIONS.items()):
        given = stock.inputs, stock.outputs, stock.source, rows.METAL + text
        kernel = backend.Kernel(f"probe_logits_{i}", *given)
        with patch.object(probe_logits, "_kernel", kernel):
            case = probe_logits.Case(mx.bfloat16, bits, 64, D, m)
            probe_logits.check(case, probe_logits.THREADS)
            for share in probes:
                name = f"{bits} bits, 1 / {share} of the rows: {way}"
                runs[name] = chained(partial(step, share, bits), h, steps)
    return in_turn(runs)


def show(result: dict[str, Spread]) -> None:
    for name, us in result.items():
        print(f"  {name:52}{us['median']:9.1f} us (least {us['min']:.1f})", flush=True)
