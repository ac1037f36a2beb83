"""A few of the faults that ``python tests/faults.py`` makes by the thousand."""

from __future__ import annotations

import faults
import pytest

pytestmark = pytest.mark.full


def test_mutated_folders():
    counts = faults.mutate(3 * len(faults.MUTATIONS))
    assert counts["refused"] > 20 and counts["right"] > 1


def test_killed_conversions():
    assert faults.kill(2)["retried"] == 1


def test_full_disks():
    counts = faults.fill_disk(2)
    assert counts["full, disk"] + counts["full, limit"] > 0


def test_two_conversions_to_one_target():
    assert faults.race(1) == {"one of two": 1}


@pytest.mark.parametrize("sampler", [None, True])
def test_long_decoding_keeps_its_memory(sampler):
    assert faults.decode_long(1000, sampler)["tokens"] == 1000


def test_a_server_with_32_clients():
    counts = faults.serve(32, 1)
    assert (counts["right"], counts["cut off"]) == (22, 10)


def test_fuzzed_readers():
    counts = faults.fuzz(4)
    assert all(
        counts[f"{kind} refused"] for kind in ("GGUF", "folder", "sidecar", "values")
    )
