"""One head, used by several threads and after interruptions."""

from __future__ import annotations

import contextvars
import gc
import subprocess
import sys
import threading
import weakref

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from small_heads import make_head, random_states

from mlx_flashhead import kernels, load, patched
from mlx_flashhead.compute import device
from mlx_flashhead.compute.functional import Snapshot
from mlx_flashhead.integration.slots import FlashLinear, intercepted
from mlx_flashhead.kernels import backend
from mlx_flashhead.sampling import Settings, draw, steps


def in_a_thread(function):
    """What a function gives in another thread; its exception is raised here."""
    outcome = []

    def run():
        try:
            outcome.append((function(), None))
        except BaseException as e:
            outcome.append((None, e))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (result, error) = outcome[0]
    if error is not None:
        raise error
    return result


@pytest.fixture
def compiling(monkeypatch):
    """Steps are compiled as on a GPU."""
    monkeypatch.setattr(steps, "on_gpu", lambda: True)


# ---- threads -----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_made_in_one_thread_works_in_another(bias):
    x = random_states(2)

    def make():
        head = make_head(bias=bias).head
        mx.eval(head.parameters())  # as loading does
        return head

    head = in_a_thread(make)
    got = np.array(head(mx.array(x)))
    again = make()
    assert np.array_equal(got, np.array(again(mx.array(x))))
    tokens = in_a_thread(
        lambda: np.array(
            draw(again, Settings(temp=1.0), mx.array(x), mx.random.key(1)).tokens
        )
    )
    assert tokens.shape == (2,)


def test_a_model_loaded_in_one_thread_decodes_in_another(untied_folder, tied_folder):
    """As applications do: stock mlx-lm can."""
    for folder in (untied_folder, tied_folder):
        with patched():
            model, tokenizer = mlx_lm.load(str(folder))
            text = in_a_thread(
                lambda m=model, t=tokenizer: mlx_lm.generate(m, t, "ab", max_tokens=4)
            )
            assert text == mlx_lm.generate(model, tokenizer, "ab", max_tokens=4)
        model, tokenizer = in_a_thread(lambda f=folder: load(f))
        assert mlx_lm.generate(model, tokenizer, "ab", max_tokens=4) == text


def test_an_interception_is_the_own_threads(untied_folder):
    """Two threads that enter and leave in turn, the first one first: with one shared
    answer the first would restore what the second has set."""
    head = make_head().head
    slot, x = FlashLinear(head), mx.array(random_states(1))
    plain = np.array(slot(x))
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def other():
        with intercepted(head, lambda x: x + 1):
            seen.append(np.array(slot(x)))
            inside.set()
            leave.wait(30)
            seen.append(np.array(slot(x)))
        seen.append(np.array(slot(x)))

    thread = threading.Thread(target=other)
    with intercepted(head, lambda x: x - 1):
        thread.start()
        inside.wait(30)
        assert np.array_equal(np.array(slot(x)), np.array(x - 1))
    assert np.array_equal(np.array(slot(x)), plain)
    leave.set()
    thread.join()
    for got in seen[:2]:
        assert np.array_equal(got, np.array(x + 1))
    assert np.array_equal(seen[2], plain)


def test_an_interception_is_of_one_head():
    one, two = (FlashLinear(make_head(seed=i).head) for i in (1, 2))
    x = mx.array(random_states(1))
    with intercepted(one.head, lambda x: x):
        with intercepted(two.head, lambda x: 2 * x):
            assert mx.array_equal(one(x), x) and mx.array_equal(two(x), 2 * x)
        assert mx.array_equal(two(x), two.head(x))


def test_plain_kernels_are_the_own_threads(monkeypatch):
    monkeypatch.setattr(
        backend, "_disabled", contextvars.ContextVar("off", default=False)
    )
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert kernels.kind() == "metal"
    with kernels.plain():
        assert kernels.kind() == "plain"
        assert in_a_thread(kernels.kind) == "metal"
    assert kernels.kind() == "metal"


# ---- compiled steps ----------------------------------------------------------------


def test_a_snapshot_tells_what_was_replaced():
    head = make_head(bias=True).head
    before = Snapshot(head)
    assert before.of(head) and before.of(head.probing(head.n_probes))
    assert any(a is head.rows.weight for a in before.arrays)
    assert any(a is head.positions for a in before.arrays)
    for module, name, value in (
        (head, "spread", head.spread + 1),
        (head.rows, "weight", head.rows.weight * 2),
        (head, "rows", head.rows.map(lambda a: a)),
    ):
        kept, module[name] = module[name], value
        assert not before.of(head)
        module[name] = kept
        assert before.of(head)
    bias = head.pop("bias")
    assert not before.of(head)
    head.bias = bias
    assert Snapshot(head).of(head)


def interrupted(head, x):
    """A step whose tracing, after its first run, is interrupted from the keyboard."""
    runs = []

    def step(head, x):
        runs.append(head)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return head.centroid_logits(x)

    first = steps.run(head, step, (), x)
    with pytest.raises(KeyboardInterrupt):
        steps.run(head, step, (), x)
    return step, first, runs


def test_an_interrupted_step_leaves_a_head_that_works(compiling):
    head, x = make_head(bits=32, centroid_bits=32).head, mx.array(random_states(1))
    step, first, runs = interrupted(head, x)
    assert np.array_equal(np.array(head.centroid_logits(x)), np.array(first))
    assert all(
        np.isfinite(np.array(a)).all() for a in (head.spread, head.excess, head(x))
    )
    assert len(runs) == 2
    assert mx.allclose(steps.run(head, step, (), x), first, atol=1e-5)


def test_no_thread_sees_what_another_traces(compiling):
    head, x = make_head(bits=32, centroid_bits=32).head, mx.array(random_states(1))
    seen = []

    def step(head, x):
        seen.append(in_a_thread(lambda: np.array(whole.centroid_logits(x_whole))))
        return head.centroid_logits(x)

    whole, x_whole = head, x
    for _ in range(2):
        steps.run(head, step, (), x)
    assert len(seen) == 2 and np.array_equal(*seen)


def test_kernels_are_checked_before_anything_is_traced(compiling, monkeypatch):
    """A check evaluates arrays, which fails while a step is traced."""
    checked = []
    monkeypatch.setattr(backend, "states", {})
    monkeypatch.setattr(backend, "kind", lambda: "metal")

    def check(threads):
        checked.append(mx.array([1.0]).sum().item())

    def step(head, x):
        assert backend.largest_group("a variant", 64, check) == 64
        return x + 1

    head, x = make_head().head, mx.array(random_states(1))
    for _ in range(3):
        steps.run(head, step, (), x)
    assert checked == [1.0]
    assert backend.states == {"a variant": (64, "ok, 64 threads")}


def test_a_head_that_goes_takes_its_steps_along(compiling):
    gc.collect()
    before = len(steps._steps)
    head, x = make_head().head, mx.array(random_states(1))
    for _ in range(2):
        steps.run(head, lambda head, x: x + 1, (), x)
    assert len(steps._steps) == before + 1
    del head
    gc.collect()
    assert len(steps._steps) == before


def test_what_a_head_is_set_to_counts_at_once(compiling):
    """Also what was fitted: a step that was compiled before must not know the old."""
    head, x = make_head(bits=32, centroid_bits=32).head, mx.array(random_states(1))

    def step(head, x):
        return head.centroid_logits(x).sum() * 0 + head.n_probes + head.excess.sum()

    for _ in range(2):
        before = steps.run(head, step, (), x).item()
    head.excess = head.excess + 1
    after = steps.run(head, step, (), x).item()
    assert after == pytest.approx(before + head.n_clusters, rel=1e-4)
    head.n_probes += 1
    assert steps.run(head, step, (), x).item() == pytest.approx(after + 1, rel=1e-4)
    # A compiled step knows it as well as one that is run as it is, and so do others.
    assert steps.run(head, step, (), x).item() == pytest.approx(after + 1, rel=1e-4)
    twin = head.probing(head.n_probes + 3)
    for _ in range(2):
        got = steps.run(twin, step, (), x).item()
        assert got == pytest.approx(after + 4, rel=1e-4)


def test_a_compiled_step_has_the_heads_arrays_as_they_are_now(compiling):
    head, x = make_head(bits=32, centroid_bits=32).head, mx.array(random_states(1))

    def step(head, x):
        return head.clustered(x)

    before = [np.array(steps.run(head, step, (), x)) for _ in range(2)]
    np.testing.assert_allclose(*before, rtol=1e-5)
    # As loading, casting and quantizing do.
    head.update({"rows": {"weight": head.rows.weight * 2}})
    for _ in range(2):
        after = np.array(steps.run(head, step, (), x))
        np.testing.assert_allclose(after, 2 * before[0], rtol=1e-5)


def test_settings_that_alternate_keep_their_steps(compiling, monkeypatch):
    head, x = make_head(bits=32, centroid_bits=32).head, mx.array(random_states(1))
    compiled = []
    compile_ = mx.compile
    monkeypatch.setattr(mx, "compile", lambda f: compiled.append(f) or compile_(f))

    def step(head, x):
        return head.centroid_logits(x).sum() * 0 + head.n_probes

    for _ in range(3):
        for p in (5, 9):
            head.n_probes = p
            assert steps.run(head, step, (), x).item() == p
    assert len(compiled) == 2


def test_a_head_that_goes_takes_its_arrays_along(compiling):
    """At once: nobody has to collect cycles."""
    head, x = make_head(bits=32, centroid_bits=32).head, mx.array(random_states(1))
    for _ in range(2):
        mx.eval(steps.run(head, lambda head, x: head.clustered(x), (), x))
    rows = weakref.ref(head.rows)
    gc.collect()
    gc.disable()
    try:
        del head
        assert rows() is None
    finally:
        gc.enable()


def test_graphs_that_were_never_evaluated_are_no_other_threads():
    """Whatever one thread left lazy, another can use the head."""
    x = mx.array(random_states(1))
    head = make_head().head

    def left_lazy():
        head.embed(mx.array([0])), head.dense(x), FlashLinear(head).weight

    in_a_thread(left_lazy)
    got = np.array(head.dense(x))
    left_lazy()
    assert np.array_equal(in_a_thread(lambda: np.array(head.dense(x))), got)
    head.rows.scales = head.rows.scales * 2
    head.rows.biases = head.rows.biases * 2
    np.testing.assert_allclose(np.array(head.dense(x)), 2 * got, rtol=1e-5, atol=1e-5)


def test_what_a_step_reads_is_evaluated_once(compiling, tmp_path):
    """Arrays that are left lazy would be part of each step's graph."""
    head, x = make_head(bits=32, centroid_bits=32).head, mx.array(random_states(1))
    head.spread = mx.sin(head.spread)

    def step(head, x):
        return mx.cos(head.spread) + x.sum()

    for _ in range(2):
        got = steps.run(head, step, (), x)
    file = tmp_path / "graph.dot"
    mx.export_to_dot(str(file), got)
    assert "Cos" in file.read_text() and "Sin" not in file.read_text()


def test_masses_follow_what_is_fitted():
    from mlx_flashhead.head.masses import log_weights

    head = make_head().head
    before = np.array(log_weights(head, 0.7))
    head.excess = head.excess + 0.5
    head.tail_offset = (head.tail_offset[0] + 0.25,)
    change = np.array(log_weights(head, 0.7)) - before
    np.testing.assert_allclose(change, 0.75 / 0.7, rtol=1e-4)


def test_every_number_of_gpu_is_one(monkeypatch):
    for kind, index in ((mx.gpu, 0), (mx.gpu, 1), (mx.cpu, 0)):
        chosen = mx.Device(kind, index)
        monkeypatch.setattr(mx, "default_device", lambda d=chosen: d)
        assert device.on_gpu() is (kind == mx.gpu)


def test_modules_say_what_they_are(untied_folder):
    model, _ = load(untied_folder, exact=False)
    text = str(model.lm_head)
    assert "FlashHead(vocab_size=1003, hidden_size=64, n_clusters=126" in text
    assert "(rows): Table([126, 8, 64], bits=8, group_size=64, mode=affine)" in text


def test_importing_changes_no_class_of_another_package():
    program = """
import http.server, sys
import mlx.nn as nn
before = {
    (owner, name): value
    for owner in (http.server.ThreadingHTTPServer, nn.Module)
    for name in dir(owner)
    if isinstance(value := getattr(owner, name), (int, str, type(lambda: 0)))
}
for name in ("server", "generate", "chat", "run", "evaluate", "benchmark", "convert"):
    __import__(f"mlx_flashhead.{name}")
for (owner, name), value in before.items():
    assert getattr(owner, name) == value, (owner, name)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
