"""Work in numbered chunks: the same results and random numbers on each number of ranks, errors of all, one bar."""

import pytest
import torch
from ranks import run_on_ranks
from stand_in_device import GPU, stand_in_device

from pyro_vae import parallel
from pyro_vae._utils.chunks import chunk_seed, in_chunks, rounds_of_chunks
from pyro_vae._utils.processes import default_processes, run_in_processes
from pyro_vae._utils.progress import progress_bar
from pyro_vae._utils.ranks import each_rank, ranks
from pyro_vae._utils.rng import seeded

CPU = torch.device("cpu")


def draws(count, seed=3, first=0):
    return in_chunks("draws", range(count), lambda number: (number, torch.randn(2)), CPU, seed, first)


def test_the_first_chunk_has_the_random_numbers_of_the_seed_and_no_two_have_the_same(random_states):
    before = random_states()
    found = draws(50)
    with seeded(3):
        assert torch.equal(found[0][1], torch.randn(2))
    assert len({float(drawn[0]) for _, drawn in found + draws(50, seed=4)}) == 100
    assert [float(drawn[0]) for _, drawn in draws(3, first=2)] == [float(drawn[0]) for _, drawn in found[2:5]]
    assert random_states() == before
    assert len({chunk_seed(seed, number) for seed in range(20) for number in range(200)}) == 4000


def everything():
    """Chunks of all kinds, on several ranks."""
    rank = parallel.rank()
    with progress_bar("a test", False, total=10) as bar:
        in_chunks("progress", range(10), lambda number: bar.advance(), CPU)
    taken = rounds_of_chunks("rounds", "abcd", str.upper, CPU)
    on_first = rounds_of_chunks("rounds", "abcd", str.upper, CPU, on_first=True)
    return {
        "draws": [drawn.tolist() for count in (0, 1, 4, 7) for _, drawn in draws(count)],
        "alone": in_chunks("alone", range(3), lambda number: parallel.num_ranks(), CPU),
        "own": sorted(in_chunks("own", [(rank, number) for number in range(rank + 1)], tuple, CPU, own=True)),
        "progress": bar.done,
        "rounds": list(taken),
        "rounds of the first": list(on_first),
        "processes": run_in_processes(lambda number: (number**2, parallel.num_ranks()), 4, 1, lambda: None),
    }


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_rank_has_all_results(size):
    expected = [drawn.tolist() for count in (0, 1, 4, 7) for _, drawn in draws(count)]
    pairs = [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")]
    for rank, found in enumerate(run_on_ranks(everything, size)):
        assert found["draws"] == expected
        assert found["alone"] == [1, 1, 1]
        assert found["own"] == [(owner, number) for owner in range(size) for number in range(owner + 1)]
        assert found["rounds"] == pairs
        assert found["rounds of the first"] == (pairs if rank == 0 else [])
        assert found["processes"] == [(0, 1), (1, 1), (4, 1), (9, 1)]
        assert found["progress"] == 10 or rank >= 10 % size


@each_rank("a test")
def fail_in_chunk(failing):
    def compute(number):
        if number == failing:
            raise FloatingPointError(f"chunk {number} is not finite")
        return number

    return in_chunks("a test", range(5), compute, CPU)


def errors():
    found = []
    for failing in range(5):
        with pytest.raises(FloatingPointError, match=f"chunk {failing} is not finite$") as caught:
            fail_in_chunk(failing)
        found.append(str(caught.value))
    return found, fail_in_chunk(None)


def test_an_error_of_a_chunk_is_raised_on_all_ranks():
    for found, others in run_on_ranks(errors, 3):
        assert len(found) == 5
        assert others == [0, 1, 2, 3, 4]


def bars():
    with progress_bar("a test", True, total=4) as bar:
        in_chunks("a test", range(4), lambda number: bar.advance(), CPU)
    return bar._bar is None or bar._bar.n


def test_the_first_rank_alone_shows_a_bar_which_reaches_its_end():
    assert run_on_ranks(bars, 2) == [4, True]


def processors():
    return default_processes(), ranks().size


def test_ranks_on_one_machine_share_its_processors():
    alone = default_processes()
    assert run_on_ranks(processors, 2) == [(max(1, alone // 2), 2)] * 2


def on_device():
    with stand_in_device():
        device = torch.device(GPU)
        found = in_chunks(
            "a test",
            range(3),
            lambda number: {"ours": torch.full((2,), float(number), device=device), "cpu": torch.ones(1, device="cpu")},
            device,
        )
        return [(str(each["ours"].device), each["ours"].tolist(), str(each["cpu"].device)) for each in found]


def test_tensors_of_other_ranks_come_to_the_device_of_this_one():
    assert run_on_ranks(on_device, 2) == [[(GPU, [float(number)] * 2, "cpu") for number in range(3)]] * 2
