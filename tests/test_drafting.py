"""How exact decoding drafts: what is chosen when a model is converted."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_flashhead.convert import convert, drafting
from mlx_flashhead.convert.drafting import Found
from small_heads import make_head, random_states

from mlx_flashhead import flash_heads, load
from mlx_flashhead.compute.device import on_gpu
from mlx_flashhead.evaluation import drafts
from mlx_flashhead.evaluation.fidelity import measure
from mlx_flashhead.folder.section import FormatError, Section, read_section
from mlx_flashhead.integration.locate import slot_of


@pytest.fixture(scope="module")
def case():
    made = make_head(230, 32, 8, 6)
    weight = np.array(made.head.dense(mx.eye(32)).T)
    return made.head, weight, random_states(60, 32)


def test_what_each_number_of_probes_finds(case):
    head, weight, states = case
    logits = states @ weight.T
    p = np.exp(logits / drafting.TEMPERATURE)
    p /= p.sum(axis=1, keepdims=True)
    search = drafting.Search(head)
    search.read(weight, states)
    for found in search.found():
        x = mx.array(states)
        probes = head.select(head.centroid_logits(x), found.n_probes)
        ids = np.array(head.token_ids[probes]).reshape(len(states), -1)
        best = (ids == logits.argmax(axis=1)[:, None]).any(axis=1)
        mass = [p[i, row[row < 230]].sum() for i, row in enumerate(ids)]
        assert found.best == pytest.approx((best.sum() + 1) / 62)
        assert found.mass == pytest.approx((np.sum(mass) + 1) / 62, rel=1e-3)


def test_text_and_answers_count_alike(case):
    head, weight, states = case
    each = []
    for part in (states[:40], states[40:]):
        search = drafting.Search(head)
        search.read(weight, part)
        each.append([(f.best, f.mass) for f in search.found()])
    both = drafting.Search(head)
    measure(head, weight, states[:40], watch=both.look)
    both.read(weight, states[40:])
    # Each of n has (n x + 1) / (n + 2).
    text, answers = (
        (np.array(x) * (n + 2) - 1) / n for x, n in zip(each, (40, 20), strict=True)
    )
    wanted = ((text + answers) / 2 * 60 + 1) / 62
    found = [(f.best, f.mass) for f in both.found()]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_steps_that_stand():
    """Simulated: each draft stands with probability 0.9."""
    rng, k, a = np.random.default_rng(0), 8, 0.9
    stands = rng.random((20_000, k - 1)) < a
    first_miss = np.where(stands.all(axis=1), k, stands.argmin(axis=1) + 1)
    assert drafts.kept(a, k) == pytest.approx(first_miss.mean(), rel=0.02)
    assert drafts.kept(1.0, k) == k


def test_the_fewest_bytes_are_chosen(case):
    head, _, _ = case
    poor, good, all_of = Found(2, 0.5, 0.4), Found(8, 0.99, 0.98), Found(29, 1.0, 1.0)
    found = [poor, good, all_of]
    # A large head and a small body: drafts may miss. A large body: they must not.
    chosen = drafting.choose(head, found, 1_000_000, 1_000_000)
    assert chosen.n_probes == 8 and chosen.acceptance == 0.99
    chosen = drafting.choose(head, found, 1_000, 1_000_000_000)
    assert chosen.n_probes == 29
    # Longer chunks only where they pay: the dense product is all there is to save.
    everything = [Found(1, 1.0, 1.0)]
    assert drafting.choose(head, everything, 10**9, 0).verify_every == 32
    assert drafting.choose(head, everything, 10**6, 10**9).verify_every == 16


def test_the_folder_says_how_to_draft(untied_source, tmp_path):
    report = convert(str(untied_source), tmp_path / "made", verbose=False)
    section = read_section(tmp_path / "made")
    draft = section.draft
    assert draft.rows == "model" and 0 < draft.acceptance <= 1
    assert (report.draft_probes, report.verify_every) == (
        draft.n_probes,
        draft.verify_every,
    )
    assert report.acceptance == draft.acceptance
    assert f"{draft.verify_every} verified at once" in str(report)
    model, _ = load(tmp_path / "made")
    (head,), slot = flash_heads(model), slot_of(model)
    assert head.n_probes == draft.n_probes and slot.verify_every == draft.verify_every
    assert slot.exact and head.rows.bits == 32
    expected = drafts.bytes_per_token(head, head.rows.nbytes, draft)
    assert report.exact_bytes == pytest.approx(expected, rel=0.01)
    model, _ = load(tmp_path / "made", exact=False)
    (head,) = flash_heads(model)
    assert head.n_probes == section.n_probes and head.rows.bits == 8


@pytest.mark.parametrize(
    "options, rows, bits",
    [
        ({"head_bits": 4}, "stored", 4),
        ({"quantize": True}, "model", 8),
        ({"head_bits": 16, "dtype": "bfloat16"}, "model", 16),
    ],
)
def test_whose_rows_decide(untied_source, tmp_path, options, rows, bits):
    """The user's own choice of bits, or the model's rows."""
    convert(str(untied_source), tmp_path / "made", verbose=False, **options)
    assert read_section(tmp_path / "made").draft.rows == rows
    tokens = mx.array([[1, 2, 3]])
    exact, _ = load(tmp_path / "made")
    (head,) = flash_heads(exact)
    # On a CPU the user's own are unpacked.
    unpacked = rows == "stored" and not on_gpu()
    assert head.rows.bits == (32 if unpacked else bits)
    assert read_section(tmp_path / "made").rows.bits == bits
    # --dense is the dense head over the rows that decide.
    dense, _ = load(tmp_path / "made", dense=True)
    assert bool(list(flash_heads(dense))) == (rows == "stored")
    assert mx.allclose(exact(tokens), dense(tokens), atol=1e-4)
    assert mx.array_equal(
        exact(tokens)[:, -1].argmax(-1), dense(tokens)[:, -1].argmax(-1)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"n_probes": 0},
        {"n_probes": 10**9},
        {"verify_every": "16"},
        {"acceptance": float("nan")},
        {"rows": "mine"},
    ],
)
def test_impossible_drafts_are_refused(untied_folder, change):
    section = read_section(untied_folder)
    broken = replace(section, draft=replace(section.draft, **change)).to_json()
    with pytest.raises(FormatError, match="draft is"):
        Section.from_json(broken)
    del broken["draft"]
    assert Section.from_json(broken).draft is None
