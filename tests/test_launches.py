"""What a decode step launches, counted in its graph: see benchmarks/launches.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import mlx.core as mx
import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks/launches.py"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("launches", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def counted(script):
    return script.count()


@pytest.mark.parametrize("hidden_size", [64, 256])
def test_a_draw_is_four_launches_for_every_sampler(script, counted, hidden_size):
    """Stage 1, by a kernel or MLX's product; selection, scores and the draw. Sizes that
    MLX's fastest kernel takes may be left to it, but a bias is no launch more."""
    found = counted if hidden_size == 64 else script.count(hidden_size)
    assert set(found) == set(script.SAMPLERS)
    for name, each in found.items():
        for way in ("FlashHead", "with a bias"):
            assert set(each[way]) <= {"QuantizedMatmul", "kernel"}, name
            assert each[way]["kernel"] >= 3 and each[way].total() == 4, name
        assert dict(each["with a bias"]) == {"kernel": 4}, name


def test_no_filter_takes_more(script, monkeypatch):
    filters = {
        "XTC": {"xtc_probability": 0.5, "xtc_special_tokens": [1, 2]},
        "all": {"top_p": 0.9, "min_p": 0.1, "min_tokens_to_keep": 3, "top_k": 20},
    }
    filters = {name: {"temp": 0.8, **more} for name, more in filters.items()}
    monkeypatch.setattr(script, "SAMPLERS", filters)
    for name, each in script.count().items():
        assert each["FlashHead"].total() == 4, name


def test_a_verification_does_not_grow_with_its_positions(script, counted, monkeypatch):
    monkeypatch.setattr(script, "VERIFY_EVERY", 2 * script.VERIFY_EVERY)
    twice = script.count()
    for name, each in counted.items():
        assert twice[name]["verification"].total() == each["verification"].total(), name


def test_launches_are_counted(script):
    x = mx.random.normal((4, 8))
    mx.eval(x)
    y = (x.reshape(8, 4) @ x)[:2].T
    assert dict(script.launches(y)) == {"Matmul": 1}
    assert script.launches(mx.exp(x) + 1, y).total() == 3
