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
from versions import kernels_need_metal

from mlx_flashhead.kernels import backend, doctor

select_probes, probe_logits, draft = KERNELS = [
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
    got = select_probes._launch(scores, case.p, spread, select_probes.largest(case))
    total = np.array(scores.astype(mx.float32))
    if spread is not None:
        total = total + np.array(spread.astype(mx.float32))
    np.testing.assert_array_equal(np.array(got), reference.select(total, case.p))
    plain = select_probes._reference(scores, case.p, spread)
    assert mx.array_equal(got, plain)


SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1.0, -2.0, 1e-40]


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("p", [1, 150, 299])
def test_select_probes_breaks_ties_by_index(p, flush, monkeypatch):
    """Also among subnormal numbers, where a device has none: scores are compared as
    integers."""
    device = emulator.device(flush_subnormals=flush)
    monkeypatch.setattr(backend.Kernel, "__call__", device)
    picked = np.random.default_rng(p).choice(SPECIAL, size=(2, 300))
    scores = mx.array(picked.astype(np.float32))
    got = select_probes._launch(scores, p, None, 256)
    want = reference.select(picked.astype(np.float32), p)
    np.testing.assert_array_equal(np.array(got), want)


# ---- probe_logits ------------------------------------------------------------------


def check_probe(case):
    arrays = probe_logits.inputs(case)
    probes, n_rows = probe_logits.probed(case)
    x, *rows = arrays
    bits = case.bits or 8 * case.dtype.size
    found = probe_logits._launch(*arrays, probes, case.group_size, bits, n_rows, 64)
    want, bound = reference.logits(x, *rows, probes, case.group_size, case.bits, n_rows)
    got = np.array(found)
    assert got.dtype == np.float32
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    assert (np.abs(got[finite] - want[finite]) <= bound[finite]).all()
    return got


@pytest.mark.parametrize(
    "case",
    cases(
        probe_logits, lambda case: any(case is other for other in probe_logits._FORMATS)
    ),
)
def test_probe_logits(case):
    check_probe(case)


def test_padding_is_minus_infinity():
    """Of a cluster that has some rows, and of one that has none."""
    weight = mx.ones((3, 4, 32))
    probes = mx.array([[0, 1, 2]], dtype=mx.uint32)
    got = probe_logits.probe_logits(
        -mx.ones((1, 32)), weight, None, None, probes, n_rows=5
    )
    assert got.tolist() == [[-32.0] * 5 + [-mx.inf] * 7]
    assert all(state.threads == 64 for state in backend.states.values())


# ---- trust, and other devices ------------------------------------------------------


def drafted(law):
    """A choice, or a draw, among so much that the kernel has its largest group."""
    m, p, c, d = 8, 520, 600, 32
    logits = mx.random.normal((2, p * m), key=mx.random.key(2))
    probes = mx.broadcast_to(mx.arange(p, dtype=mx.uint32), (2, p))
    ids = mx.arange(c * m, dtype=mx.uint32).reshape(c, m)
    args = (logits, probes, ids, draft.Shaping())
    if law is None:
        return draft.draft_greedy(*args)
    x, rows = mx.zeros((2, d)), mx.random.normal((c, m, d), key=mx.random.key(3))
    tail = draft.Tail(
        mx.zeros((2, c)),
        mx.zeros((c,)),
        mx.zeros((c,)),
        lambda clusters: mx.zeros((2, 1, m)),
        draft.Rows(x, rows, None, None, 32, 32, c * m),
    )
    keys = mx.random.split(mx.random.key(4), 2)
    return draft.draft_sampled(*args, keys, law, tail)


CALLS = {
    "select_probes": lambda: select_probes.select_probes(
        mx.random.normal((2, 2500), key=mx.random.key(1)), 99
    ),
    "draft_greedy": lambda: drafted(None),
    "draft_sampled": lambda: drafted(draft.Law(0.8, draft.filters.Rules(top_p=0.9))),
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
    ((variant, state),) = backend.states.items()
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
        got = CALLS["draft_greedy"]()
    (state,) = backend.states.values()
    assert state.threads == 0
    monkeypatch.setattr(backend, "kind", lambda: "plain")
    assert mx.array_equal(CALLS["draft_greedy"](), got)


ALL_RULES = draft.Law(0.9, draft.filters.Rules(top_p=0.97, min_p=0.01, top_k=60))


@pytest.mark.parametrize("threads", [512, 256])
@pytest.mark.parametrize(
    "kernel, case",
    [
        (select_probes, select_probes.Case(2049, 128, mx.bfloat16, mx.float32)),
        (draft, draft.Case(None, 13, 400, 500, rounding=mx.float16)),
        (draft, draft.Case(ALL_RULES, 16, 20, 40, 96, 8, 32, mx.bfloat16)),
    ],
)
def test_the_number_of_threads_does_not_matter(kernel, case, threads):
    kernel.check(case, threads)


@pytest.mark.parametrize(
    "kernel, case",
    [
        (select_probes, select_probes.Case(300, 20, mx.float16, mx.float32)),
        (draft, draft.Case(None, 3, 40, 50, rounding=mx.float16)),
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
    rows = mx.full((1, 4, 32), 2.0**-24).astype(mx.float16)
    probes = mx.array([[0]], dtype=mx.uint32)
    got = probe_logits._launch(x, rows, None, None, probes, 32, 16, 4, 64)
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
    x, weight, *_ = probe_logits.inputs(probe_logits.Case(mx.float32, 0, 32, 32, 4, B))
    probes = mx.zeros((B, p), dtype=mx.uint32)
    assert probe_logits.probe_logits(x, weight, None, None, probes).shape == (B, 4 * p)


def test_an_empty_batch():
    scores = mx.zeros((0, 40))
    assert select_probes.select_probes(scores, 3).shape == (0, 3)
    probes, ids = mx.zeros((0, 5), mx.uint32), mx.zeros((10, 8), mx.uint32)
    args = (scores, probes, ids, draft.Shaping())
    rows = draft.Rows(mx.zeros((0, 32)), mx.zeros((10, 8, 32)), None, None, 32, 32, 80)
    none = mx.zeros((10,))
    tail = draft.Tail(mx.zeros((0, 10)), none, none, lambda clusters: clusters, rows)
    keys = mx.zeros((0, 2), mx.uint32)
    drawn = draft.draft_sampled(*args, keys, draft.Law(0.8), tail)
    for got in (draft.draft_greedy(*args), drawn):
        assert got.shape == (0,) and got.dtype == mx.uint32
    assert not backend.states
