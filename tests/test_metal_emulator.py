"""The emulator catches what it is there to catch."""

import importlib

import mlx.core as mx
import numpy as np
import pytest
from metal import emulator

from mlx_flashhead import kernels
from mlx_flashhead.kernels import backend

select_probes, blocks, draft = (
    importlib.import_module(f"mlx_flashhead.kernels.{name}")
    for name in ("select_probes", "blocks", "draft")
)
X = mx.arange(64, dtype=mx.float32)


def launch(source, inputs=(X,), names=("x",), header="", size=64, threads=64, **device):
    kernel = backend.Kernel("trial", names, ["out"], source, header)
    return emulator.device(**device)(
        kernel,
        list(inputs),
        template=[("T", mx.float32), ("N", 64)],
        groups=(1, 1),
        threads=threads,
        outputs=[((size,), mx.float32)],
    )[0]


REVERSE = """
    threadgroup float turned[N];
    uint i = thread_position_in_threadgroup.x;
    turned[N - 1 - i] = x[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[i] = turned[i];
"""


def test_a_right_kernel_runs():
    assert mx.array_equal(launch(REVERSE), X[::-1])


def test_simd_functions():
    got = launch("""
        uint i = thread_position_in_threadgroup.x;
        uint lane = thread_index_in_simdgroup;
        float a = simd_sum(x[i]);
        float b = simd_prefix_exclusive_sum(x[i]);
        float c = simd_shuffle_xor(x[i], ushort(5));
        float d = simd_max(x[i]) - simd_min(x[i]);
        out[i] = a + 1000 * b + c / 64 + d / 4096;
    """)
    x = np.arange(64.0).reshape(2, 32)
    want = (
        x.sum(-1, keepdims=True)
        + 1000 * (np.cumsum(x, -1) - x)
        + x[:, np.arange(32) ^ 5] / 64
        + 31 / 4096
    )
    np.testing.assert_allclose(np.array(got), want.reshape(-1), rtol=1e-6)


def test_small_and_scalar_inputs_are_constant():
    got = launch(
        "out[thread_position_in_grid.x] = x[thread_position_in_grid.x] * a[1] + b"
        " + x_shape[0];",
        [X, mx.array([2.0, 3.0]), mx.array(5.0)],
        ["x", "a", "b"],
    )
    assert mx.array_equal(got, X * 3 + 69)


def test_a_device_may_have_no_subnormal_numbers():
    source = "uint i = thread_position_in_grid.x; out[i] = x[i] * 0.5f;"
    x = mx.array([2.0**-125, 2.0**-126, 2.0**-127, 1.0] * 16)
    assert launch(source, [x])[:4].tolist() == [2.0**-126, 2.0**-127, 2.0**-128, 0.5]
    got = launch(source, [x], flush_subnormals=True)
    assert got[:4].tolist() == [2.0**-126, 0.0, 0.0, 0.5]


@pytest.mark.parametrize("flush", [False, True])
def test_values_of_16_bits_are_exact(flush):
    """All that there are, subnormal ones of float16 among them."""
    bits = mx.arange(1 << 16, dtype=mx.uint32).astype(mx.uint16)
    for dtype in (mx.float16, mx.bfloat16):
        x = bits.view(dtype)
        # As integers, so that what is subnormal in 32 bits is left alone.
        source = "uint i = thread_position_in_grid.x; out[i] = load(x, i);"
        kernel = backend.Kernel("convert", ["x"], ["out"], source)
        got = emulator.device(flush_subnormals=flush, schedules=["in-order"] * 2)(
            *(kernel, [x]),
            template=[],
            groups=(1 << 10, 1),
            threads=64,
            outputs=[((1 << 16,), mx.float32)],
        )[0]
        want = np.array(x.astype(mx.float32))
        np.testing.assert_array_equal(np.array(got), want)


def test_more_threads_than_there_are_registers_for():
    source = "uint i = thread_position_in_grid.x; out[i] = x[i % 64];"
    for threads, most in ((512, 512), (1024, 1024)):
        launch(source, size=threads, threads=threads, max_threads=most)
    with pytest.raises(ValueError, match="1024.*maximum allowed threads.*512"):
        launch(source, size=1024, threads=1024, max_threads=512)


def test_the_compiler_is_told_of_the_threads():
    kernel = backend.Kernel("trial", ["x"], ["out"], "out[0] = x[0];")
    outputs = [((64,), mx.float32)]
    text = emulator.capture(kernel, [X], [("N", 3)], (1, 1), 512, outputs)
    assert "[[max_total_threads_per_threadgroup(512)]]\n[[kernel]] void" in text
    assert "constexpr constant int N = 3;" in text


WRONG = {
    "a missing barrier": (
        REVERSE.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
        "data race|before it is written",
    ),
    "a barrier for the wrong memory": (
        REVERSE.replace("mem_flags::mem_threadgroup", "mem_flags::mem_device"),
        "data race",
    ),
    "a read out of range": (
        "uint i = thread_position_in_grid.x; out[i] = x[i + 1];",
        "out of range|heap-buffer-overflow",
    ),
    "a read before the buffer": (
        "uint i = thread_position_in_grid.x; out[i] = x[int(i) - 1];",
        "out of range|heap-buffer-overflow",
    ),
    "a write out of range": (
        "uint i = thread_position_in_grid.x; out[2 * i] = x[i];",
        "out of range|heap-buffer-overflow",
    ),
    "threadgroup memory out of range": (
        REVERSE.replace("turned[N - 1 - i] = x", "turned[N - i] = x"),
        "out of range|heap-buffer-overflow|index 64",
    ),
    "a threadgroup pointer passed for a thread pointer": (
        "threadgroup float turned[N]; turned[0] = 1; fill(turned); out[0] = x[0];",
        "no matching function|address space",
    ),
    "a device pointer without device": (
        "const float* p = x; out[thread_position_in_grid.x] = p[0];",
        "cannot initialize",
    ),
    "a constant input taken for a device one": (
        "const device float* p = a; out[thread_position_in_grid.x] = p[0];",
        "cannot initialize",
    ),
    "a divergent simd function": (
        "uint i = thread_position_in_grid.x; float v = 0;"
        "if (i % 2) {\n v = simd_sum(x[i]);\n } out[i] = v;",
        "divergent",
    ),
    "simd functions on both sides of a branch": (
        "uint i = thread_position_in_grid.x; float v;"
        "if (i % 2) {\n v = simd_sum(x[i]);\n } else {\n v = simd_sum(-x[i]);\n }"
        "out[i] = v;",
        "divergent",
    ),
    "a divergent barrier": (
        "uint i = thread_position_in_grid.x;"
        "if (i < 32) threadgroup_barrier(mem_flags::mem_threadgroup); out[i] = x[i];",
        "divergent",
    ),
    "two threads writing one output": (
        "out[thread_position_in_grid.x / 2] = x[0];",
        "data race",
    ),
    "an output that is not written": (
        "uint i = thread_position_in_grid.x; if (i) out[i] = x[i];",
        "never written",
    ),
    "threadgroup memory read before it is written": (
        "threadgroup float t[N]; out[thread_position_in_grid.x] = t[3];",
        "before it is written",
    ),
    "a Metal keyword used as a name": (
        "uint thread = thread_position_in_grid.x; out[thread] = x[thread];",
        "error",
    ),
    "C++17 where Metal has C++14": (
        "if constexpr (N > 3 && sizeof(T)) { auto [a, b] = two(); } out[0] = x[0];",
        "error",
    ),
    "an exponential that may be an approximation": (
        "uint i = thread_position_in_grid.x; out[i] = exp(x[i]);",
        "deleted",
    ),
    "an undefined shift": (
        "uint i = thread_position_in_grid.x; out[i] = float(1u << (i + 1));",
        "shift exponent",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_is_caught(what):
    source, message = WRONG[what]
    if "shift" in what and "undefined" not in emulator.find_compiler().sanitizers:
        pytest.skip("this compiler has no undefined-behaviour sanitizer")
    header = "inline void fill(thread float* p) { p[0] = 1; }\n"
    inputs, names = [X], ["x"]
    if "constant" in what:
        inputs, names = [X, X[:2]], ["x", "a"]
    with pytest.raises(emulator.MetalError, match=message):
        launch(source, inputs, names, header)


EVERY_FILTER = draft.LAWS["XTC, all"]


# Barriers that could go would be found out here, too.
@pytest.mark.parametrize(
    "module, name, case",
    [
        (select_probes, "_kept", select_probes.Case(70, 5, kept=True)),
        (blocks, "_scored", blocks.Case(kernels.Law(0.8), 5, 12, 33, 32, 0, 32)),
        (draft, "_sampled", draft.Case(EVERY_FILTER, 5, 40, 60, 32, 0, 32)),
    ],
    ids=["select_probes", "blocks", "draft_sampled"],
)
def test_every_barrier_of_the_kernels_matters(module, name, case, monkeypatch):
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    monkeypatch.setattr(backend.Kernel, "__call__", emulator.launch)
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    right = getattr(module, name)
    whole = right.header + "//split\n" + right.source
    pieces = whole.split(barrier)
    assert len(pieces) > 1
    for i in range(1, len(pieces)):
        text = (
            barrier.join(pieces[:i]) + barrier.join(["", *pieces[i:]])[len(barrier) :]
        )
        header, source = text.split("//split\n")
        wrong = backend.Kernel(right.name, right.inputs, right.outputs, source, header)
        monkeypatch.setattr(module, name, wrong)
        with pytest.raises(emulator.MetalError, match="data race|before it is written"):
            module.check(case, 256)


def best_of_three():
    """The best of one row's three tokens, the second."""
    _, draw, _ = draft.made(draft.Case(None, 3, 1, 1, 32, 0, 32), 1)
    draw = draw._replace(token_ids=mx.array([[5, 6, 7]], mx.uint32))
    values = mx.array([[1.0, 3.0, 2.0]])
    return draft.draft(values, draw, draft._summary(values, draw)).tokens.tolist()


def test_a_kernel_that_does_not_compile_gives_way_to_plain_mlx(monkeypatch):
    """As on a device: one warning, then plain MLX, and the state for the doctor."""
    right = draft._greedy
    broken = backend.Kernel(
        right.name, right.inputs, right.outputs, "this is not Metal;"
    )
    monkeypatch.setattr(draft, "_greedy", broken)
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    monkeypatch.setattr(backend, "states", {})
    monkeypatch.setattr(backend.Kernel, "__call__", emulator.launch)
    message = "plain MLX replaces the kernel draft_greedy"
    with pytest.warns(RuntimeWarning, match=message):
        assert best_of_three() == [6]
    assert best_of_three() == [6]
    (state,) = backend.states.values()
    assert "error" in state.words


def test_a_kernel_that_differs_gives_way_to_plain_mlx(monkeypatch):
    right = draft._greedy
    source = right.source.replace("tokens[row] = ", "tokens[row] = 1 + ")
    wrong = backend.Kernel(
        right.name, right.inputs, right.outputs, source, right.header
    )
    monkeypatch.setattr(draft, "_greedy", wrong)
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    monkeypatch.setattr(backend, "states", {})
    monkeypatch.setattr(backend.Kernel, "__call__", emulator.launch)
    with pytest.warns(RuntimeWarning, match="differs from the plain reference"):
        assert best_of_three() == [6]
