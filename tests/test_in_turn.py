"""Turns, in which decoding is timed, and the host's part of a step."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_flashhead.integration.patch import unpatch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Imports a script of the benchmarks, which import each other by their names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_ways_take_turns(scripts):
    """A host that gets slower is as slow for each: the ratio stays what it is."""
    turns = scripts("in_turn")
    now, load, order = 0.0, 1.0, []

    def stream(seconds):
        nonlocal now
        while True:
            now += seconds * load
            yield

    def prepare(way):
        nonlocal load
        order.append(way)
        if way == order[0]:
            load *= 1.5

    streams = {"dense": stream(2.0), "exact": stream(1.0), "other": stream(4.0)}
    found = turns.in_turn(streams, prepare, rounds=5, turn=4, clock=lambda: now)
    assert [order[3 * i : 3 * i + 3] for i in range(3)] == [
        ["dense", "exact", "other"],
        ["exact", "other", "dense"],
        ["other", "dense", "exact"],
    ]
    # The first turn of each does not count.
    assert {len(each) for each in found.values()} == {5} and len(order) == 18
    assert min(found["exact"]) > 1.0 and max(found["exact"]) > 3 * min(found["exact"])
    of_rounds = [a / b for a, b in zip(found["dense"], found["exact"], strict=True)]
    assert turns.quartiles(of_rounds)[1] == pytest.approx(2.0)
    assert turns.mean(found["other"]) > 3 * turns.mean(found["exact"])


def test_quartiles_are_of_what_was_found(scripts):
    turns = scripts("in_turn")
    assert turns.quartiles([5, 1, 4, 2, 3]) == [2, 3, 4]
    assert turns.quartiles([7]) == [7, 7, 7]
    assert turns.ratio([2.0, 4.0], [1.0, 1.0]) == "3.00 (2.00 to 4.00)"


def test_host_time_is_told_of_each_way(scripts):
    host = scripts("host")
    words = ["--layers", "1", "--rounds", "1", "--samplers", "greedy,top-p"]
    result = CliRunner().invoke(host.main, words)
    unpatch()
    assert result.exit_code == 0, result.output
    header, _, *rows = result.output.strip().splitlines()
    assert [cell.strip() for cell in header.split("|")[2:5]] == [
        *("dense", "approximate", "exact")
    ]
    assert [row.split("|")[1].strip() for row in rows] == ["greedy", "top-p"]
    for row in rows:
        dense, approximate, exact = (float(c) for c in row.split("|")[2:5])
        assert min(dense, approximate, exact) > 0
