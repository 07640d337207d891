"""Checkpoints of several ranks: the same bits on the same number of ranks, the same state on another number."""

import pytest
from killed_ranks import trained
from ranks import run_on_ranks
from test_checkpoints import same


def in_parts(folder, epochs, options):
    """Train for each of some numbers of epochs; return what the ranks must have alike."""
    return [trained(folder, count, **options) for count in epochs][-1]


OPTIONS = {
    "replayed": {},
    "eager, with a baseline": {"variant": "discrete", "compile": False},
    "patience": {"patience": 2},
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_on_the_same_number_of_ranks_a_run_resumes_to_the_bit(name, size, tmp_path):
    whole = run_on_ranks(in_parts, size, tmp_path / "whole", [7], OPTIONS[name])
    parts = run_on_ranks(in_parts, size, tmp_path / "parts", [1, 4], OPTIONS[name])
    parts = run_on_ranks(in_parts, size, tmp_path / "parts", [7], OPTIONS[name])
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert all(one == whole[0] for one in [*whole, *parts])
