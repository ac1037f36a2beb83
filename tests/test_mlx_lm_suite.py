"""What ``make test-mlx-lm`` makes of two runs of mlx-lm's own tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlx_lm_suite.__main__ import outcome, problems
from mlx_lm_suite.expected import CHANCE, OTHER_MODEL

PLAIN = "test_generate.TestGenerate.test_generate"
ALL = CHANCE | OTHER_MODEL | {PLAIN}


def runs(**changed):
    """Outcomes as expected, but for ``stock`` or ``patched`` of some test."""
    usual = {name: "said" if name in OTHER_MODEL else None for name in ALL}
    return {mode: usual | changed.get(mode, {}) for mode in ("stock", "patched")}


def test_what_is_expected_is_no_problem():
    assert not list(problems(**runs()))


@pytest.mark.parametrize("mode", ["stock", "patched"])
def test_chance_may_fail_either_way(mode):
    assert not list(problems(**runs(**{mode: dict.fromkeys(CHANCE, "said")})))


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"patched": {PLAIN: "why"}}, "fails patched and not in stock mlx-lm\nwhy"),
        ({"stock": {PLAIN: "why"}}, "fails in stock mlx-lm, so it says nothing here"),
        ({"stock": {min(OTHER_MODEL): None}}, "passes now; remove it"),
        ({"patched": {"test_a.B.test_c": None}}, "ran only patched"),
    ],
)
def test_anything_else_is(changed, wanted):
    (said,) = problems(**runs(**changed))
    assert wanted in said
    (test,) = next(iter(changed.values()))
    assert said.startswith(f"{test}: ")


def test_a_name_that_no_test_has_is_reported():
    found = runs()
    for tests in found.values():
        tests.pop(min(CHANCE))
    (said,) = problems(**found)
    assert said.startswith(f"{min(CHANCE)}: is no test of this mlx-lm")


def test_reports_of_pytest_are_read(tmp_path: Path):
    (tmp_path / "test_small.py").write_text(
        "import unittest\n"
        "class TestSmall(unittest.TestCase):\n"
        "    def test_good(self): pass\n"
        "    def test_bad(self): assert 1 == 2\n"
        "class TestBroken(unittest.TestCase):\n"
        "    @classmethod\n"
        "    def setUpClass(cls): raise OSError('no model')\n"
        "    def test_any(self): pass\n"
    )
    report = tmp_path / "report.xml"
    arguments = [str(tmp_path), "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    pytest.main(arguments)
    found = outcome(report)
    assert found["test_small.TestSmall.test_good"] is None
    assert "1 == 2" in found["test_small.TestSmall.test_bad"]
    assert "no model" in found["test_small.TestBroken.test_any"]
    assert len(found) == 3
