"""Decoding that measures itself: with clocks and times that are made, and with this
machine's own."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import weakref

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm import batch_generate
from mlx_lm.sample_utils import make_sampler

from mlx_flashhead import flash_heads, load, patch_decoding, unpatch, verification
from mlx_flashhead.compute.table import Table
from mlx_flashhead.folder.section import Draft
from mlx_flashhead.integration import batch, decode, tuner
from mlx_flashhead.integration.locate import slot_of
from mlx_flashhead.integration.slots import Origin
from mlx_flashhead.integration.tuner import Tuner, tuner_of
from mlx_flashhead.sampling import Settings
from mlx_flashhead.tune import main as tune
from mlx_flashhead.tuning import (
    Cell,
    Store,
    Watch,
    cheapest,
    cost,
    dense_wins,
    forget,
    in_turn,
    kept,
    kind_of,
)

PROMPT = "The quick brown fox jumps over the lazy dog"
DENSE, STOCK, APPROXIMATE = (
    Cell(what, 1) for what in ("dense", "stock", "approximate")
)
TOP_P = {"temp": 0.8, "top_p": 0.9}


def made(dense=100.0, drafts=None, verifications=None) -> dict[Cell, float]:
    """Times of exact decoding's steps, in milliseconds."""
    times = {STOCK: dense, DENSE: dense}
    times |= {Cell("draft", p): s for p, s in (drafts or {64: 50.0}).items()}
    sizes = verifications or {4: 110.0, 8: 120.0, 16: 150.0}
    times |= {Cell("verify", k): s for k, s in sizes.items()}
    return {cell: 1e-3 * s for cell, s in times.items()}


# ---- the clock ---------------------------------------------------------------------


class MadeClock:
    """A clock that runs only while steps do, of times that are given."""

    def __init__(self):
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self):
        return self.now

    def runs(self, times):
        """Runs of these times; of a list, one after another, the last from then on."""

        def run(name, each, n):
            self.ran.append(name)
            self.now += n * (each.pop(0) if len(each) > 1 else each[0])

        return {
            name: lambda n, name=name, each=list(each): run(name, each, n)
            for name, each in times.items()
        }


def test_all_take_turns_and_the_best_of_each_counts():
    clock = MadeClock()
    runs = clock.runs({"a": [0.03, 0.02, 0.05], "b": [0.04]})
    found = in_turn(runs, 1.0, rounds=3, clock=clock)
    assert found == pytest.approx({"a": 0.02, "b": 0.04})
    assert clock.ran == ["a", "b"] * 3


def test_fast_steps_are_timed_many_at_once():
    clock = MadeClock()
    in_turn(clock.runs({"a": [0.001]}), 1.0, rounds=2, clock=clock)
    assert clock.now == pytest.approx(0.001 + 16 * 0.001)


def test_what_is_compiled_does_not_count():
    clock = MadeClock()
    runs = clock.runs({"a": [0.2, 0.01], "b": [0.1, 0.02]})
    found = in_turn(runs, 1.0, compiles=True, clock=clock)
    assert found == pytest.approx({"a": 0.01, "b": 0.02})


@given(
    st.lists(st.floats(1e-5, 3.0), min_size=1, max_size=8),
    st.floats(0.1, 2.0),
    st.booleans(),
)
def test_the_budget_is_exceeded_by_one_step_at_most(times, budget, compiles):
    """By the last that was begun, whose time was not known."""
    clock = MadeClock()
    runs = clock.runs({i: [t] for i, t in enumerate(times)})
    found = in_turn(runs, budget, compiles=compiles, clock=clock)
    assert clock.now <= budget + (1 + compiles) * max(times)
    # The first come first, and nothing is made up.
    assert list(found) == list(range(len(found)))
    assert all(found[i] == pytest.approx(times[i]) for i in found)


# ---- the choice --------------------------------------------------------------------

times_of_all = st.builds(
    made,
    st.floats(1.0, 500.0),
    st.dictionaries(st.sampled_from([64, 128, 256]), st.floats(1.0, 500.0), min_size=1),
    st.dictionaries(
        st.sampled_from([2, 4, 8, 16, 32]), st.floats(1.0, 999.0), min_size=1
    ),
)


@given(times_of_all, st.floats(0.3, 1.0))
def test_the_choice_is_the_fastest_of_all(times, acceptance):
    plan = cheapest(times, lambda _: acceptance)
    drafts = {
        (p.n, k.n): ((k.n - 1) * times[p] + times[k])
        / sum(acceptance**i for i in range(k.n))
        for p, k in itertools.product(times, times)
        if (p.what, k.what) == ("draft", "verify")
    }
    best = min(drafts.values())
    if plan.dense:
        assert plan.seconds == times[DENSE] <= 1.021 * 1.03 * best
    else:
        assert drafts[plan.n_probes, plan.verify_every] == pytest.approx(plan.seconds)
        assert plan.seconds <= 1.03 * best * (1 + 1e-9)
        assert 1.02 * plan.seconds < times[DENSE]


def test_tokens_that_stand():
    assert kept(1.0, 16) == 16 and kept(0.0, 16) == 1
    assert kept(0.5, 3) == 1.75
    assert cost(made(), 64, 4, 1.0) == pytest.approx((3 * 0.05 + 0.11) / 4)


def test_from_which_batch_size_dense():
    both = {4: (90, 50), 8: (100, 95), 16: (110, 190)}
    times = {Cell("stock", n): 1e-3 * s for n, (s, _) in both.items()}
    times |= {Cell("approximate", n): 1e-3 * s for n, (_, s) in both.items()}
    wins = [dense_wins(times, n) for n in (4, 7, 8, 9, 12, 16)]
    assert wins == [False, False, False, True, True, True]
    assert dense_wins(times, 3) is dense_wins(times, 17) is dense_wins({}, 1) is None


def test_kinds_of_samplers():
    kinds = [Settings(), Settings(temp=0.7, min_p=0.1), Settings(**TOP_P)]
    assert [kind_of(s) for s in kinds] == ["greedy", "sampled", "sorted"]


# ---- the watch ---------------------------------------------------------------------


def write(watch, times, n, stands):
    """Decode n tokens, drafts of p probes standing with the chance ``stands(i, p)`` at
    token i: the plans, and the seconds that it takes by these times."""
    rng, seconds, i, plans = random.Random(0), 0.0, 0, []
    while i < n:
        plan = watch.next()
        plans.append((i, plan))
        if plan.verify_every <= 1:
            seconds += times[DENSE]
            i += 1
            continue
        p, k = plan.n_probes, plan.verify_every
        hits = list(
            itertools.takewhile(
                bool, (rng.random() < stands(i, p) for _ in range(k - 1))
            )
        )
        # Of sizes on the way to one that was measured: as long as the next of these.
        size = min(c.n for c in times if c.what == "verify" and c.n >= k)
        seconds += (k - 1) * times[Cell("draft", p)] + times[Cell("verify", size)]
        watch.saw(p, min(k - 1, len(hits) + 1), len(hits))
        i += len(hits) + 1
    return plans, seconds / i


def test_where_nothing_was_measured_chunks_grow_to_what_is_stored():
    watch = Watch(64, 12)
    plans = [watch.next() for _ in range(6)]
    watch.saw(64, 11, 0)
    plans.append(watch.next())
    assert [p.verify_every for p in plans] == [1, 2, 4, 8, 12, 12, 12]
    assert {p.n_probes for p in plans} == {64}


def test_good_texts_are_drafted_as_measured():
    times = made(verifications={4: 110.0, 8: 150.0, 16: 170.0})
    plans, each = write(Watch(64, 16, 0.99, times), times, 2000, lambda i, p: 0.999)
    assert each <= 1.03 * cost(times, 64, 16, 0.999)
    assert sum(p.verify_every == 16 for _, p in plans) > 0.8 * len(plans)


@pytest.mark.parametrize("expected", [0.9, 0.99])
def test_texts_whose_drafts_do_not_stand_are_no_slower_than_dense(expected):
    times = made()
    watch = Watch(64, 16, expected, times)
    plans, each = write(watch, times, 4000, lambda i, p: 0.2)
    assert each <= 1.02 * times[DENSE]
    # It is tried again, less and less often.
    trials = [i for i, p in plans if p.verify_every > 1]
    assert trials[-1] > 3000 and len(trials) < 60


def test_where_the_text_becomes_easy_drafts_come_back():
    times = made(verifications={4: 110.0, 8: 150.0, 16: 170.0})
    watch = Watch(64, 16, 0.98, times)
    plans, _ = write(watch, times, 3000, lambda i, p: 0.1 if i < 800 else 1.0)
    hard = [p.dense for i, p in plans if 100 < i < 800]
    easy = [p.verify_every for i, p in plans if i > 2000]
    assert sum(hard) > 0.9 * len(hard) and set(easy) == {16}


def test_middling_texts_get_shorter_chunks():
    times = made(verifications={4: 80.0, 8: 100.0, 16: 150.0, 32: 250.0})
    chances = {0.99: 16, 0.9: 8, 0.75: 4}
    for stands, most in chances.items():
        watch = Watch(64, 16, 0.99, times)
        plans, each = write(watch, times, 3000, lambda i, p, s=stands: s)
        sizes = [p.verify_every for i, p in plans if i > 500]
        assert sorted(sizes)[len(sizes) // 2] <= most
        best = min(cost(times, 64, k, stands) for k in (4, 8, 16, 32))
        assert each <= 1.06 * min(best, times[DENSE])


def test_more_probes_are_tried_where_too_few_drafts_stand():
    times = made(drafts={64: 50.0, 128: 55.0})
    watch = Watch(64, 16, 0.99, times)
    stands = {64: 0.8, 128: 0.98}
    plans, each = write(watch, times, 2000, lambda i, p: stands[p])
    assert sum(p.n_probes == 128 for _, p in plans) > 0.8 * len(plans)
    assert each < 0.9 * min(cost(times, 64, k, 0.8) for k in (4, 8, 16))
    # Nowhere else: without need they cost more.
    watch = Watch(64, 16, 0.99, times)
    plans, _ = write(watch, times, 500, lambda i, p: 0.99)
    assert sum(p.n_probes == 64 for _, p in plans) > 0.9 * len(plans)


def test_fewer_probes_are_drafted_where_that_is_faster_and_stands():
    times = made(drafts={32: 35.0, 64: 50.0})
    plans, each = write(Watch(64, 16, 0.99, times), times, 2000, lambda i, p: 0.98)
    assert sum(p.n_probes == 32 for _, p in plans) > 0.9 * len(plans)
    assert each < 0.9 * cost(times, 64, 16, 0.99)
    # Not where too few of them stand, and then it is seen soon.
    stands = {32: 0.7, 64: 0.99}
    watch = Watch(64, 16, 0.99, times)
    plans, each = write(watch, times, 2000, lambda i, p: stands[p])
    assert sum(p.n_probes == 64 for _, p in plans) > 0.7 * len(plans)
    assert each < 1.06 * cost(times, 64, 16, 0.99)


@given(times_of_all, st.floats(0.5, 1.0), st.floats(0.0, 1.0))
def test_a_plan_is_always_of_what_was_measured(times, expected, stands):
    sizes = [c.n for c in times if c.what == "verify"]
    stored = min(c.n for c in times if c.what == "draft"), sizes[0]
    rng, watch = random.Random(1), Watch(*stored, expected, times)
    for _ in range(100):
        plan = watch.next()
        assert Cell("draft", plan.n_probes) in times or plan.dense
        assert plan.dense or 1 <= plan.verify_every <= max(sizes)
        n = max(0, plan.verify_every - 1)
        watch.saw(plan.n_probes, n, sum(rng.random() < stands for _ in range(n)))
        assert 0 <= watch.acceptance(stored[0]) <= 1


# ---- the cache ---------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_measured_is_kept(cache):
    store = Store("a" * 64, "exact")
    assert store.read() == {}
    store.add("greedy", made())
    assert Store("a" * 64, "exact").add("sorted", {DENSE: 0.5}) == {
        "greedy": made(),
        "sorted": {DENSE: 0.5},
    }
    assert Store("b" * 64, "exact").read() == Store("a" * 64, "dense").read() == {}
    assert [f.suffix for f in (cache / "measured").iterdir()] == [".json"]
    assert forget("b" * 64) == 0 and store.read()
    assert forget("a" * 64) == 1 and store.read() == {}


@pytest.mark.parametrize(
    "what", ["device_name", "mlx_version", "_own_version", "blas_hint"]
)
def test_another_device_or_version_measures_anew(cache, monkeypatch, what):
    Store("a" * 64, "exact").add("greedy", made())
    monkeypatch.setattr(f"mlx_flashhead.tuning.store.{what}", lambda: "another")
    other = Store("a" * 64, "exact")
    other.add("greedy", {DENSE: 0.5})
    monkeypatch.undo()
    monkeypatch.setenv("MLX_FLASHHEAD_CACHE", str(cache))
    # A machine whose BLAS is slow already is no other one.
    if what != "blas_hint" or Store("a" * 64, "exact").file != other.file:
        assert Store("a" * 64, "exact").read() == {"greedy": made()}


def test_a_damaged_or_unwritable_cache_is_done_without(cache):
    store = Store("a" * 64, "exact")
    store.add("greedy", made())
    whole = store.file.read_text()
    known = json.loads(whole)
    for times in ({"greedy": {"dense 1": "x"}}, {"greedy": {"speed 1": 0.1}}, [], 3):
        store.file.write_text(json.dumps({**known, "seconds": times}))
        assert store.read() == {}
    for text in ("", "{", "[]", "null", whole.replace("section", "other"), "\0"):
        store.file.write_text(text)
        assert store.read() == {}
    assert store.add("greedy", {DENSE: 0.5}) == {"greedy": {DENSE: 0.5}}
    forget("a" * 64)
    (cache / "measured").rmdir()
    (cache / "measured").write_text("a file where a folder should be")
    assert store.add("greedy", made()) == {"greedy": made()}
    assert store.read() == {}


# ---- measuring ---------------------------------------------------------------------


@pytest.fixture
def tuned(cache, monkeypatch):
    """As users have it."""
    monkeypatch.delenv("MLX_FLASHHEAD_TUNE")
    return cache


def text(model, tokenizer, n=40, seed=3, **options):
    mx.random.seed(seed)
    return [
        r.token
        for r in mlx_lm.stream_generate(
            model, tokenizer, PROMPT, max_tokens=n, **options
        )
    ]


def test_the_first_text_measures_and_the_next_process_knows(
    untied_folder, tuned, capsys
):
    model, tokenizer = load(untied_folder)
    wanted = text(*load(untied_folder, tune=False))
    assert capsys.readouterr().err == ""
    assert text(model, tokenizer) == wanted
    err = capsys.readouterr().err
    assert err.count("mlx-flashhead: measured greedy decoding on this device") == 1
    times = tuner_of(slot_of(model)).times["greedy"]
    draft = slot_of(model).origin.draft
    first = {DENSE, Cell("draft", draft.n_probes), Cell("verify", draft.verify_every)}
    assert first <= times.keys() and all(0 < s < 1 for s in times.values())
    (file,) = (tuned / "measured").iterdir()
    assert json.loads(file.read_text())["seconds"]["greedy"].keys() == {
        f"{cell.what} {cell.n}" for cell in times
    }
    before = file.read_bytes()
    again = load(untied_folder)
    assert (
        text(*again) == wanted and tuner_of(slot_of(again[0])).times["greedy"] == times
    )
    assert "measured" not in capsys.readouterr().err and file.read_bytes() == before
    # Another sampler is another measurement.
    text(*again, sampler=make_sampler(**TOP_P))
    assert "measured sorted decoding" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["variable", "argument"])
def test_it_can_be_turned_off(untied_folder, tuned, monkeypatch, how, capsys):
    if how == "variable":
        monkeypatch.setenv("MLX_FLASHHEAD_TUNE", "off")
    text(*load(untied_folder, tune=how == "variable"))
    assert capsys.readouterr().err == "" and not (tuned / "measured").exists()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("options", [TOP_P, {"temp": 0.7}], ids=str)
def test_measuring_changes_no_random_number(untied_folder, tuned, exact, options):
    """A sampled text of a seed is the same, measured before or not."""
    sampler, fixed = (
        make_sampler(**options),
        load(untied_folder, exact=exact, tune=False),
    )
    wanted = text(*fixed, sampler=sampler)
    model, tokenizer = load(untied_folder, exact=exact)
    got = [text(model, tokenizer, sampler=sampler) for _ in range(2)]
    assert got[0] == got[1]
    group = next(iter(tuner_of(slot_of(model)).times.values()))
    dense = Watch(64, 16, 1.0, group).stock if exact else dense_wins(group, 1)
    if not dense:
        assert got[0] == wanted


class Slow:
    """A model's measurements on a made machine, in the place of its own steps."""

    def __init__(self, monkeypatch, times):
        self.clock, self.lines = MadeClock(), []
        self.times = times

        def runs(slot, model, settings, sampler, cells):
            return self.clock.runs({c: [times[c]] for c in cells if c in times})

        monkeypatch.setattr(tuner, "_exact_runs", runs)

    def tuner(self):
        origin = Origin("c" * 64, Draft(64, 16, 0.98))
        return Tuner(origin, "exact", 1.0, self.clock, self.lines.append)


@pytest.fixture
def slot(untied_folder):
    slot = slot_of(load(untied_folder)[0])
    slot.head.n_probes, slot.verify_every = 64, 16
    return slot


@pytest.mark.filterwarnings("ignore:.*are probed at every step")
def test_a_slow_machine_measures_over_several_texts(slot, cache, monkeypatch):
    times = made(dense=450.0, drafts={64: 350.0}, verifications={16: 700.0, 8: 600.0})
    slow = Slow(monkeypatch, times)
    tuner = slow.tuner()
    assert tuner.exact(slot, None, Settings()) is None
    # It stops at its budget, and what it found is kept.
    assert slow.clock.now <= 1.0
    assert tuner.times["greedy"].keys() == {STOCK, DENSE}
    found = slow.tuner().exact(slot, None, Settings())
    assert found == pytest.approx({c: times[c] for c in found}) and len(found) == 4
    assert slow.clock.now <= 2.0 and len(slow.lines) == 2
    # From then on nothing is measured.
    assert slow.tuner().exact(slot, None, Settings()) == found
    assert slow.clock.now <= 2.0 and len(slow.lines) == 2


@pytest.mark.filterwarnings("ignore:.*are probed at every step")
def test_where_dense_wins_one_line_says_so(slot, cache, monkeypatch):
    slow = Slow(monkeypatch, made(dense=40.0))
    tuner = slow.tuner()
    for _ in range(3):
        times = tuner.exact(slot, None, Settings())
        assert cheapest(times, lambda _: 0.98).dense
    assert [line.startswith("mlx-flashhead: greedy") for line in slow.lines] == [
        False,
        True,
    ]
    assert "nothing is drafted" in slow.lines[1]


@pytest.mark.filterwarnings("ignore:.*are probed at every step")
def test_numbers_of_the_users_own_stay(slot, cache, monkeypatch):
    every = made(
        drafts=dict.fromkeys((20, 40, 64, 128), 50.0),
        verifications=dict.fromkeys((2, 3, 4, 6, 8, 16, 32), 100.0),
    )
    slow = Slow(monkeypatch, every)
    stored = slow.tuner().exact(slot, None, Settings(), complete=True)
    assert {c.n for c in stored if c.what == "verify"} == {4, 8, 16, 32}
    assert {c.n for c in stored if c.what == "draft"} == {64}  # no more than a quarter
    slot.head.n_probes, slot.verify_every = 20, 6
    own = slow.tuner().exact(slot, None, Settings(), complete=True)
    assert own.keys() == {STOCK, DENSE, Cell("draft", 20), Cell("verify", 6)}


@pytest.mark.filterwarnings("ignore:.*are probed at every step")
def test_a_failure_leaves_decoding_as_it_is_set_to(
    untied_folder, tuned, monkeypatch, capsys
):
    def fails(*args):
        raise RuntimeError("[malloc] not\nenough memory")

    wanted = text(*load(untied_folder, tune=False))
    monkeypatch.setattr(tuner, "_exact_runs", fails)
    loaded = load(untied_folder)
    assert [text(*loaded) for _ in range(2)] == [wanted] * 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "mlx-flashhead: this head cannot be measured: [malloc] not enough memory"
    ]


# ---- what comes out ----------------------------------------------------------------


def with_times(folder, monkeypatch, times, group="greedy", **options):
    """A model on a machine of made times."""
    monkeypatch.setattr(Tuner, "_measure", lambda *_: None)
    model, tokenizer = load(folder, **options)
    tuner_of(slot_of(model)).times[group] = times
    return model, tokenizer


def machines(slot):
    """Times of exact decoding of several made machines."""
    p = slot.origin.draft.n_probes
    k = slot.origin.draft.verify_every
    sizes = {k: 160.0, k // 2: 120.0, k // 4: 110.0}
    return {
        "drafts": made(drafts={p: 20.0}, verifications=sizes),
        "short": made(
            drafts={p: 20.0}, verifications={**sizes, k: 999.0, k // 2: 900.0}
        ),
        "dense": made(drafts={p: 99.0}, verifications=sizes),
        "between": made(drafts={p: 99.0}, verifications=sizes) | {STOCK: 1.0},
        "close": made(drafts={p: 90.0}, verifications={**sizes, k: 120.0}),
    }


@pytest.mark.parametrize(
    ("folder", "options"),
    [("untied_folder", {}), ("untied_folder", TOP_P), ("tied_folder", {"temp": 0.8})],
    ids=str,
)
def test_exact_texts_do_not_depend_on_times(
    folder, options, tuned, monkeypatch, request
):
    """Nor on how often drafts stand: with few that do, dense decoding takes over. Where
    no draft can pay, decoding is mlx-lm's own, random numbers included."""
    folder, n = request.getfixturevalue(folder), 64
    sampler, group = make_sampler(**options), kind_of(Settings(**options))
    wanted = text(*load(folder, tune=False), n=n, sampler=sampler)
    stock = load(folder, dense=True)
    unpatch()
    own = text(*stock, n=n, sampler=sampler)
    patch_decoding()
    assert bool(options) or own == wanted
    seen = {}
    model, tokenizer = with_times(folder, monkeypatch, {}, group)
    slot, head = slot_of(model), next(flash_heads(model))
    for spoiled in (False, True):
        if spoiled:
            # Centroids that point away, so that few drafts stand.
            away = -head.centroids.dequantize(mx.float32)
            head.centroids = Table.from_dense(away, 4, 64)
        for name, times in machines(slot).items():
            tuner_of(slot).times[group] = times
            with verification() as count:
                got = text(model, tokenizer, n=n, sampler=sampler)
            assert got == (own if name == "dense" else wanted)
            seen[name, spoiled] = count
    assert seen["dense", False].drafted == seen["between", False].drafted == 0
    assert seen["between", False].steps == seen["between", False].verifications == n + 1
    assert seen["drafts", False].verifications < seen["short", False].verifications
    assert seen["short", False].verifications < n
    assert seen["drafts", True].acceptance < seen["drafts", False].acceptance
    # Where little stands and little would be saved, most tokens are decoded densely.
    assert seen["close", True].drafted < 0.5 * seen["close", False].drafted


def test_more_probes_share_the_rows(untied_folder):
    head = next(flash_heads(load(untied_folder)[0]))
    twin = head.probing(head.n_probes + 7)
    assert twin.n_probes == head.n_probes + 7 and twin.rows is head.rows
    h = mx.random.normal((1, head.hidden_size))
    assert head.select(head.centroid_logits(h)).shape == (1, head.n_probes)
    assert twin.select(twin.centroid_logits(h)).shape == (1, twin.n_probes)


def test_more_probes_draft_the_same_text(untied_folder, tuned, monkeypatch):
    wanted = text(*load(untied_folder, tune=False), n=60)
    model, tokenizer = load(untied_folder)
    slot = slot_of(model)
    p, most = slot.head.n_probes, slot.head.n_clusters // 4
    assert 2 * p > most  # so it is widened here
    monkeypatch.setattr(Tuner, "_probes", lambda *_: [p, p + 10])
    times = made(drafts={p: 60.0, p + 10: 20.0}, verifications={16: 120.0})
    slot.verify_every = 16
    tuner_of(slot).times["greedy"] = times
    asked = []
    probing = type(slot.probing).__call__
    monkeypatch.setattr(
        type(slot.probing),
        "__call__",
        lambda self, n: asked.append(n) or probing(self, n),
    )
    assert text(model, tokenizer, n=60) == wanted and p + 10 in asked
    assert slot.probing(p + 10) is slot.probing(p + 10)


@pytest.mark.parametrize("options", [{}, TOP_P], ids=str)
@pytest.mark.parametrize("wins", [True, False])
def test_approximate_decoding_goes_dense_where_that_is_faster(
    untied_folder, tuned, monkeypatch, wins, options, capsys
):
    sampler = make_sampler(**options)
    stock = load(untied_folder, exact=False)
    slot_of(stock[0]).decoding = "dense"
    densely = text(*stock, sampler=sampler)
    group = f"{'sorted' if options else 'greedy'}, p 90"
    times = {STOCK: 0.1, APPROXIMATE: 0.11 if wins else 0.05}
    loaded = with_times(untied_folder, monkeypatch, times, group, exact=False)
    drawn = []
    draw = decode.draw_allowed
    monkeypatch.setattr(
        "mlx_flashhead.integration.decode.draw_allowed",
        lambda *args, **kw: drawn.append(1) or draw(*args, **kw),
    )
    got = text(*loaded, sampler=sampler)
    assert bool(drawn) != wins
    if wins:
        assert got == densely
    assert ("faster dense on this device" in capsys.readouterr().err) == wins


def test_batches_go_dense_from_the_size_that_was_measured(
    untied_folder, tuned, monkeypatch
):
    both = {1: (0.10, 0.05), 2: (0.10, 0.08), 4: (0.10, 0.16)}
    times = {Cell("stock", n): s for n, (s, _) in both.items()}
    times |= {Cell("approximate", n): s for n, (_, s) in both.items()}
    model, tokenizer = with_times(
        untied_folder, monkeypatch, times, "greedy, p 90", exact=False
    )
    sizes = []
    draw = batch.draw_allowed
    monkeypatch.setattr(
        "mlx_flashhead.integration.batch.draw_allowed",
        lambda slot, settings, h, *rest: (
            sizes.append(len(h)) or draw(slot, settings, h, *rest)
        ),
    )
    prompts = [tokenizer.encode(PROMPT)] * 4
    made_by_four = batch_generate(model, tokenizer, prompts, max_tokens=8).texts
    assert not sizes
    batch_generate(model, tokenizer, prompts[:2], max_tokens=8)
    assert set(sizes) == {2}
    stock = load(untied_folder, exact=False)
    slot_of(stock[0]).decoding = "dense"
    assert batch_generate(*stock, prompts, max_tokens=8).texts == made_by_four


def test_batches_measure_themselves_once(untied_folder, tuned, capsys):
    model, tokenizer = load(untied_folder, exact=False)
    for n in (3, 3, 4):
        batch_generate(model, tokenizer, [tokenizer.encode(PROMPT)] * n, max_tokens=4)
    times = tuner_of(slot_of(model)).times["greedy, p 90"]
    # Those around three, and one as sequences end at different times.
    assert {Cell("stock", n) for n in (2, 4)} <= times.keys()
    err = capsys.readouterr().err
    assert err.count("of 4 sequences on this device, which is done once") == 1


def test_a_single_sequence_of_a_batch_is_measured_too(untied_folder, tuned):
    model, tokenizer = load(untied_folder)
    batch_generate(model, tokenizer, [tokenizer.encode(PROMPT)], max_tokens=8)
    assert DENSE in tuner_of(slot_of(model)).times["greedy"]


def test_models_that_are_gone_are_forgotten(untied_folder, tuned):
    model, tokenizer = load(untied_folder)
    text(model, tokenizer, n=4)
    tuned = weakref.ref(tuner_of(slot_of(model)))
    assert tuned() is not None
    del model, tokenizer
    gc.collect()
    assert tuned() is None


# ---- the command -------------------------------------------------------------------


def test_the_command_shows_measures_and_forgets(untied_folder, cache):
    runner = CliRunner()
    arguments = ["--model", str(untied_folder), "--seconds", "3"]
    shown = runner.invoke(tune, arguments)
    assert shown.exit_code == 0, shown.output
    for part in ("dense step", "verification of 16", "| greedy", "top-p", "Fastest:"):
        assert part in shown.output
    again = runner.invoke(tune, [*arguments, "--json"])
    seconds = json.loads(again.stdout)["seconds"]
    assert seconds.keys() == {"greedy", "temperature", "top-p"}
    assert runner.invoke(tune, [*arguments, "--json"]).stdout == again.stdout
    batches = runner.invoke(tune, [*arguments, "--approximate"])
    assert batches.exit_code == 0 and "| 16 " in batches.output
    assert len(os.listdir(cache / "measured")) == 2
    reset = runner.invoke(tune, [*arguments, "--reset"])
    assert reset.stdout == "Forgot 2 measurements.\n"
    assert not os.listdir(cache / "measured")
    assert "Nothing was measured" in runner.invoke(tune, [*arguments, "--reset"]).output


def test_the_command_refuses_in_one_line(untied_source, untied_folder, tmp_path):
    runner = CliRunner()
    for arguments, message in (
        (["--model", str(tmp_path / "none")], "no such folder"),
        (["--model", str(untied_source)], "has no FlashHead"),
    ):
        done = runner.invoke(tune, arguments)
        assert done.exit_code == 1 and message in done.output
        assert done.output.count("Error:") == 1
    short = runner.invoke(tune, ["--model", str(untied_folder), "--seconds", "0"])
    assert short.exit_code == 2
