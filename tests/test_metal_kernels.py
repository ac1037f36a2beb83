"""The kernels' Metal text, run on the CPU and held against float64 NumPy.

Every launch here compiles the exact text that MLX generates twice, once with address
spaces enforced, and executes it under four thread schedules and the sanitizers, with
equal bits required (see ``metal/emulator.py``). The cases are those that each kernel
declares.
"""

import importlib

import mlx.core as mx
import numpy as np
import pytest
from metal import emulator, reference
from small_heads import expected, make_head, random_states
from versions import kernels_need_metal

from mlx_flashhead import kernels
from mlx_flashhead.kernels import backend, doctor

centroid_logits, select_probes, probe_logits, blocks, draft = KERNELS = [
    importlib.import_module(f"mlx_flashhead.kernels.{name}") for name in doctor.KERNELS
]

pytestmark = pytest.mark.skipif(
    kernels_need_metal(), reason="this MLX makes Metal kernels on Macs alone"
)


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    """The emulator takes the place of a Metal device, on which nothing is trusted."""
    monkeypatch.setattr(backend, "kind", lambda: "metal")
    monkeypatch.setattr(backend, "states", {})
    monkeypatch.setattr(backend.Kernel, "__call__", emulator.launch)


def cases(kernel, slow=lambda case: False):
    """A kernel's cases; those that take long only in the full suite."""
    return [
        pytest.param(
            case,
            id=doctor._described(case),
            marks=[pytest.mark.full] if slow(case) else [],
        )
        for case in kernel.CASES
    ]


# ---- select_probes -----------------------------------------------------------------


@pytest.mark.parametrize("case", cases(select_probes, lambda case: case.C > 10_000))
def test_select_probes(case):
    scores, spread = select_probes.inputs(case)
    threads = select_probes.largest(case)
    got = select_probes._launch(scores, case.p, spread, threads, case.kept)
    total = np.array(scores.astype(mx.float32))
    if spread is not None:
        total = total + np.array(spread.astype(mx.float32))
    np.testing.assert_array_equal(np.array(got), reference.select(total, case.p))
    plain = select_probes._reference(scores, case.p, spread)
    assert mx.array_equal(got, plain)


SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1.0, -2.0, 1e-40]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("p", [1, 150, 299])
def test_select_probes_breaks_ties_by_index(p, flush, kept, monkeypatch):
    """Also among subnormal numbers, where a device has none: scores are compared as
    integers."""
    device = emulator.device(flush_subnormals=flush)
    monkeypatch.setattr(backend.Kernel, "__call__", device)
    picked = np.random.default_rng(p).choice(SPECIAL, size=(2, 300))
    scores = mx.array(picked.astype(np.float32))
    got = select_probes._launch(scores, p, None, 256, kept)
    want = reference.select(picked.astype(np.float32), p)
    np.testing.assert_array_equal(np.array(got), want)


# ---- probe_logits, centroid_logits ---------------------------------------------------


def check_logits(found, case, rows, probes):
    want, bound = reference.logits(
        *rows[:4], probes, case.group_size, case.bits, rows.n_rows, rows.bias
    )
    got = np.array(found)
    assert got.dtype == np.float32
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    assert (np.abs(got[finite] - want[finite]) <= bound[finite]).all()
    return got


def check_probe(case):
    rows, probes = probe_logits.inputs(case), probe_logits.probed(case)
    return check_logits(probe_logits._launch(rows, probes, 64), case, rows, probes)


@pytest.mark.parametrize(
    "case",
    cases(
        probe_logits, lambda case: any(case is other for other in probe_logits._FORMATS)
    ),
)
def test_probe_logits(case):
    check_probe(case)


@pytest.mark.parametrize(
    "case", cases(centroid_logits, lambda case: case.D > 640 or case.scales)
)
def test_centroid_logits(case):
    rows = centroid_logits.inputs(case)
    every = mx.broadcast_to(mx.arange(case.C, dtype=mx.uint32), (case.B, case.C))
    check_logits(centroid_logits._launch(rows, 64), case, rows, every)


def test_stage_1_adds_a_bias(monkeypatch):
    """In the kernel, but where there are many states: there MLX does."""
    monkeypatch.setattr(kernels, "kind", lambda: "metal")
    head = make_head(bias=True).head
    x = random_states(8)
    want = expected(head, x).centroid_logits
    for n, used in ((2, ["centroid_logits"]), (8, [])):
        backend.states.clear()
        got = head.centroid_logits(mx.array(x[:n]))
        np.testing.assert_allclose(np.array(got), want[:n], atol=1e-4)
        assert [variant.split("(")[0] for variant in backend.states] == used


def test_stage_1_is_left_to_mlx():
    """Where MLX's kernels share what they read, or its fastest takes the size."""
    for case in (
        probe_logits.Case(mx.bfloat16, 4, 64, 640, 1, B=8),
        probe_logits.Case(mx.bfloat16, 4, 64, 640, 1, B=0),
        probe_logits.Case(mx.bfloat16, 4, 64, 1024, 1, B=1),
        probe_logits.Case(mx.bfloat16, 0, 32, 640, 1, B=1),
    ):
        assert centroid_logits.centroid_logits(centroid_logits.inputs(case)) is None
    assert not backend.states


def test_padding_is_minus_infinity():
    """Of a cluster that has some rows, and of one that has none."""
    weight = mx.ones((3, 4, 32))
    probes = mx.array([[0, 1, 2]], dtype=mx.uint32)
    rows = probe_logits.Rows(-mx.ones((1, 32)), weight, None, None, 32, 32, 5)
    got = probe_logits.probe_logits(rows, probes)
    assert got.tolist() == [[-32.0] * 5 + [-mx.inf] * 7]
    assert all(state.threads == 64 for state in backend.states.values())


# ---- trust, and other devices ------------------------------------------------------


def drafted(law):
    """A choice, or a draw, among so much that a filter has its largest group."""
    _, draw, logits = draft.made(draft.Case(law, 8, 520, 600, 32, 0, 32))
    return draft.draft(logits, draw, draft._summary(logits, draw)).tokens


def probed_blocks():
    rows, draw, _ = draft.made(draft.Case(kernels.Law(0.8), 8, 9, 150, 32, 0, 32))
    return blocks.probe_blocks(rows, draw)[1]


CALLS = {
    "select_probes": lambda: select_probes.select_probes(
        mx.random.normal((2, 2500), key=mx.random.key(1)), 99
    ),
    "draft_sampled": lambda: drafted(kernels.Law(0.8, draft.filters.Rules(top_p=0.9))),
}


@pytest.mark.parametrize("name", CALLS)
def test_fewer_threads_where_registers_are_few(name, monkeypatch, recwarn):
    """A device with registers for 512 threads of a kernel: it runs with those, gives
    the same, and the doctor tells."""
    with_all = CALLS[name]()
    (state,) = backend.states.values()
    assert state == (1024, "ok, 1024 threads")
    monkeypatch.setattr(backend, "states", {})
    monkeypatch.setattr(backend.Kernel, "__call__", emulator.device(max_threads=512))
    assert mx.array_equal(CALLS[name](), with_all)
    # Of select_probes first the kernel that keeps more in registers was tried.
    *refused, (variant, state) = backend.states.items()
    assert all(other.threads == 0 for _, other in refused)
    assert variant.startswith(name) and state.threads == 512
    assert "1024) is greater than" in state.words
    assert doctor.report(run=False)["kernels"][variant] == state.words
    assert state.words.startswith("ok, 512 threads")
    assert not recwarn.list


def test_plain_mlx_where_no_group_fits(monkeypatch):
    monkeypatch.setattr(backend.Kernel, "__call__", emulator.device(max_threads=128))
    with pytest.warns(
        RuntimeWarning, match="plain MLX replaces the kernel draft_greedy"
    ):
        got = drafted(None)
    (state,) = backend.states.values()
    assert state.threads == 0
    monkeypatch.setattr(backend, "kind", lambda: "plain")
    assert mx.array_equal(drafted(None), got)


ALL_RULES = draft.LAWS["XTC, all"]


@pytest.mark.parametrize("threads", [512, 256])
@pytest.mark.parametrize(
    "kernel, case",
    [
        (select_probes, select_probes.Case(2049, 128, mx.bfloat16, mx.float32)),
        (select_probes, select_probes.Case(2049, 128, mx.bfloat16, kept=True)),
        (blocks, blocks.Case(kernels.Law(0.8), 16, 20, 300)),
        (draft, draft.Case(ALL_RULES, 16, 20, 40, 96, 8, 32, mx.bfloat16)),
    ],
)
def test_the_number_of_threads_does_not_matter(kernel, case, threads):
    kernel.check(case, threads)


@pytest.mark.parametrize(
    "kernel, case",
    [
        (select_probes, select_probes.Case(300, 20, mx.float16, mx.float32)),
        (blocks, blocks.Case(None, 3, 40, 50, rounding=mx.float16)),
        (draft, draft.Case(ALL_RULES, 5, 12, 33, 32, 4, 32, mx.float16)),
    ],
)
def test_devices_without_subnormal_numbers(kernel, case, monkeypatch):
    device = emulator.device(flush_subnormals=True)
    monkeypatch.setattr(backend.Kernel, "__call__", device)
    kernel.check(case, 256)


def test_logits_where_subnormal_numbers_are_zero(monkeypatch):
    """What is lost of float16's subnormal numbers is below float32's."""
    case = probe_logits.Case(mx.float16, 0, 32, 96, 5)
    usual = check_probe(case)
    device = emulator.device(flush_subnormals=True)
    monkeypatch.setattr(backend.Kernel, "__call__", device)
    np.testing.assert_array_equal(check_probe(case), usual)
    x = mx.full((1, 32), 2.0**-20).astype(mx.float16)
    weight = mx.full((1, 4, 32), 2.0**-24).astype(mx.float16)
    probes = mx.array([[0]], dtype=mx.uint32)
    rows = probe_logits.Rows(x, weight, None, None, 16, 32, 4)
    got = probe_logits._launch(rows, probes, 64)
    assert got.tolist() == [[2.0**-39] * 4]


def test_the_doctor_runs_every_case(monkeypatch):
    monkeypatch.setattr(backend.Kernel, "__call__", emulator.device(max_threads=512))
    monkeypatch.setattr(doctor, "KERNELS", ("select_probes",))
    cases = [case for case in select_probes.CASES if case.C < 10_000]
    monkeypatch.setattr(select_probes, "CASES", cases)
    found = list(doctor.self_test().values())
    assert len(found) == len(cases)
    for case, words in zip(cases, found, strict=True):
        assert words.startswith(f"ok, {min(select_probes.largest(case), 512)} threads")


@pytest.mark.parametrize("kernel", KERNELS)
def test_cases_have_names_of_their_own(kernel):
    assert len({doctor._described(case) for case in kernel.CASES}) == len(kernel.CASES)


@pytest.mark.parametrize("B, p", [(0, 3), (2, 0)])
def test_nothing_to_probe(B, p):
    rows = probe_logits.inputs(probe_logits.Case(mx.float32, 0, 32, 32, 4, B))
    probes = mx.zeros((B, p), dtype=mx.uint32)
    assert probe_logits.probe_logits(rows, probes).shape == (B, 4 * p)


@pytest.mark.parametrize("law", [None, kernels.Law(0.8)])
def test_an_empty_batch(law):
    scores = mx.zeros((0, 40))
    assert select_probes.select_probes(scores, 3).shape == (0, 3)
    rows, draw, _ = draft.made(draft.Case(law, 8, 5, 10, 32, 0, 32), 1)
    rows = rows._replace(x=rows.x[:0])
    draw = draw._replace(probes=draw.probes[:0])
    logits, summary = blocks.probe_blocks(rows, draw)
    assert logits.shape == (0, 40) and summary is None
    got = draft.draft(logits, draw)
    assert got.tokens.shape == (0,) and got.tokens.dtype == mx.uint32
    assert got.logprobs.shape == (0,)
    assert not backend.states
