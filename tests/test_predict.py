"""Published speeds of Macs, the law fitted to them, and what it predicts."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = str(ROOT / "benchmarks")
sys.path.insert(0, SCRIPTS)
try:
    import predict
    import published
finally:
    sys.path.remove(SCRIPTS)

ROWS = published.load()


def test_published_measurements_are_possible_and_cited():
    assert len({row.chip for row in ROWS}) >= 5
    keys = [(r.chip, r.model, r.bits, r.group_size, r.context, r.engine) for r in ROWS]
    assert len(set(keys)) == len(keys)
    for row in ROWS:
        assert row.model in published.MODELS and row.bits in (4, 5, 6, 8, 16)
        assert row.source.startswith("https://") and row.where
        # Nobody reads faster than the memory.
        reading = row.bytes / (published.BANDWIDTH[row.chip] * 1e3)
        assert 0.02 * row.microseconds < reading < row.microseconds, row


def test_models_have_the_sizes_that_their_names_say():
    for name, size in (
        *(("SmolLM-135M", 134.5e6), ("Qwen2.5-0.5B", 494e6), ("Qwen3-0.6B", 596e6)),
        *(("Gemma-3-270M", 268e6), ("Gemma-3-1B", 1000e6), ("Llama-3.2-1B", 1236e6)),
        *(("Qwen3-4B", 4022e6), ("Llama-3.2-3B", 3213e6)),
    ):
        model = published.MODELS[name]
        assert model.tied
        assert model.head + model.body == pytest.approx(size, rel=0.002)


def test_the_fit_finds_the_constants_of_made_measurements():
    law = published.Law(efficiency=0.7, slow=6.0, fast=1.5)
    made = [
        replace(
            row,
            tokens_per_second=1e6 / law.microseconds(row.bytes, row.launches, row.chip),
        )
        for row in ROWS
    ]
    found = published.fit(made)
    assert found.efficiency == pytest.approx(0.7)
    assert (found.slow, found.fast) == pytest.approx((6.0, 1.5))
    assert max(abs(found.error(row)) for row in made) < 1e-9


def test_chips_kept_out_do_not_change_the_fit():
    kept_out = [r for r in ROWS if r.chip in published.KEPT_OUT]
    assert len({r.chip for r in kept_out}) == len(published.KEPT_OUT)
    law = published.fit(published.fitted_on(ROWS))
    changed = [
        replace(r, tokens_per_second=r.tokens_per_second / 2) if r in kept_out else r
        for r in ROWS
    ]
    assert published.fit(published.fitted_on(changed)) == law
    assert published.fit(changed) != law
    without = published.leave_one_out(ROWS)
    assert not without.keys() & set(published.KEPT_OUT)
    assert len(set(without.values()) | {law}) == len(without) + 1


@pytest.fixture(scope="module")
def laws():
    law = published.fit(published.fitted_on(ROWS))
    return [law, *published.leave_one_out(ROWS).values()]


@pytest.mark.parametrize("sampler", predict.LAUNCHES)
def test_predictions_lie_in_their_intervals(laws, sampler):
    for chip in published.BANDWIDTH:
        for name in predict.SHOWN:
            found = predict.predict(laws, published.MODELS[name], chip, sampler, 8)
            dense, *others = found.steps
            for t, (least, most) in zip(
                others, (found.approximate, found.exact), strict=True
            ):
                assert least <= dense / t <= most


def test_a_verification_shares_its_cost_among_the_tokens_that_are_kept():
    law, model = published.Law(0.8, 5.0, 2.0), published.MODELS["Gemma-3-270M"]
    sure = predict.Assumed(law, acceptance=1.0).steps(model, "M4", "greedy", 8)
    unsure = predict.Assumed(law, acceptance=0.5).steps(model, "M4", "greedy", 8)
    assert sure[:2] == unsure[:2]
    # Of k drafts that stand with one half each, two are kept.
    assert unsure[2] / sure[2] == pytest.approx(predict.VERIFY_EVERY / 2, rel=1e-3)


def test_the_documents_say_what_is_predicted(laws):
    results = (ROOT / "benchmarks/RESULTS.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for sampler in predict.LAUNCHES:
        for chip in published.BANDWIDTH:
            for name in predict.SHOWN:
                model = published.MODELS[name]
                said = predict.predict(laws, model, chip, sampler, 8)
                assert f" {said} |" in results, (chip, name, sampler)
                if f"| {chip}, {sampler} |" in readme and name == "Gemma-3-270M":
                    cells = [f"{1e6 / said.steps[0]:,.0f}"]
                    for t, gain in zip(
                        said.steps[1:], (said.approximate, said.exact), strict=True
                    ):
                        least, most = (f"{g:.1f}" for g in gain)
                        cells.append(f"{1e6 / t:,.0f} ({least} to {most})")
                    row = f"| {chip}, {sampler} | {' | '.join(cells)} |"
                    assert row in readme
    assert len(re.findall(r"^\| M\d.*, (?:greedy|top-p) \|", readme, re.M)) == 6
    chips = {row.chip for row in ROWS}
    assert f"has {len(ROWS)} measurements" in results and len(chips) == 8
    assert f"{len({row.model for row in ROWS})} models" in results
