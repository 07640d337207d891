"""Ranks: exchanges of numbers and errors between processes, none of which waits for ever."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ranks import run_on_ranks

from pyro_vae import parallel
from pyro_vae._utils.ranks import Ranks, _of_this_start, each_rank, ranks
from pyro_vae.exact.quadrature import QuadratureError


def number_and_sum():
    group = ranks()
    return parallel.rank(), parallel.num_ranks(), group.exchange("sum", [group.rank, 1.0])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_rank_has_its_number_and_the_sum_of_all(size):
    found = run_on_ranks(number_and_sum, size)
    assert found == [(rank, size, [size * (size - 1) / 2, float(size)]) for rank in range(size)]


def alone_in_a_block():
    with parallel.one_process():
        return parallel.rank(), ranks().size, torch.distributed.get_world_size()


def test_one_process_hides_the_others():
    assert run_on_ranks(alone_in_a_block, 2) == [(0, 1, 2)] * 2


def in_a_thread():
    with parallel.one_process(), ThreadPoolExecutor(1) as threads:
        inside = threads.submit(parallel.num_ranks).result()
    return inside, parallel.num_ranks()


def test_one_process_is_that_of_all_threads():
    assert run_on_ranks(in_a_thread, 2) == [(1, 2)] * 2


def of_a_copy(answers):
    answers.send((parallel.num_ranks(), fail_on(-1)))


def in_a_copy():
    if not parallel.rank():
        receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=of_a_copy, args=(sender,))
        process.start()
        assert receiver.poll(20)
        assert receiver.recv() == (1, [1.0])
        process.kill()
        process.join()
    return parallel.num_ranks(), fail_on(-1)


def test_a_forked_copy_of_a_rank_is_alone_and_the_group_goes_on():
    assert run_on_ranks(in_a_copy, 2) == [(2, [2.0])] * 2


def copies_of_first():
    group, rank = ranks(), parallel.rank()
    tensors = [torch.full((2, 3), float(rank)), torch.full((2,), float(rank))]
    group.copy_from_first("a test", tensors)
    with pytest.raises(ValueError, match="tensor 1 of a test") as caught:
        group.copy_from_first("a test", [torch.zeros(3), torch.zeros(2 + rank)])
    with pytest.raises(ValueError, match="tensor 1 of a test") as fewer:
        group.copy_from_first("a test", [torch.zeros(3)] * (1 + rank))
    return [tensor.tolist() for tensor in tensors], str(caught.value), str(fewer.value), fail_on(-1)


def test_tensors_are_copied_from_the_first_rank_and_others_than_its_own_are_an_error_of_all():
    expected = "must be the same on every rank, got"
    for tensors, other, fewer, sums in run_on_ranks(copies_of_first, 2):
        assert tensors == [[[0.0] * 3] * 2, [0.0] * 2]
        assert other == f'`tensor 1 of a test` {expected} "(2,) float32" on rank 0 and "(3,) float32" on rank 1'
        assert fewer == f'`tensor 1 of a test` {expected} nothing on rank 0 and "(3,) float32" on rank 1'
        assert sums == [2.0]


def sketches():
    torch.manual_seed(0)
    tensor, rank = torch.randn(1000), parallel.rank()
    given = [tensor * (1 + 1e-7 * rank), tensor * (1 + 1e-3 * rank), tensor.roll(rank), (tensor > 0).int().roll(rank)]
    found = []
    for value in given:
        try:
            ranks().check_same("a test", {"same": 1, "value": value})
        except ValueError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


def test_floats_may_differ_by_rounding_and_nothing_else():
    ours, theirs = run_on_ranks(sketches, 2)
    assert ours == theirs
    assert ours[0] == ""
    assert all(text.startswith("`value` must be the same on every rank, got (1000,)") for text in ours[1:])


@each_rank("a test")
def fail_on(failing):
    if ranks().rank == failing:
        raise ValueError("the reason")
    return ranks().exchange("work", [1.0])


class OwnKind(ValueError):
    def __init__(self, who, message):
        super().__init__(f"{who}: {message}")


KINDS = {
    "builtin": (FloatingPointError("the reason"), FloatingPointError, "the reason"),
    "of the package": (QuadratureError("datum {} is bad", 3), QuadratureError, "datum 3 is bad"),
    "not to be pickled": (OwnKind("we", "the reason"), ValueError, "we: the reason"),
    "an interruption": (KeyboardInterrupt("the reason"), RuntimeError, "the reason"),
}


def kinds_of_errors():
    found = {}
    for name, (error, _, _) in KINDS.items():
        try:
            with ranks().together("a test"):
                if ranks().rank == 1:
                    raise error
        except BaseException as caught:
            found[name] = type(caught), str(caught)
    return found


def test_errors_of_other_ranks_are_of_their_kind_or_of_the_nearest_of_pythons_own():
    ours, theirs = run_on_ranks(kinds_of_errors, 2)
    for name, (error, kind, text) in KINDS.items():
        assert theirs[name] == (type(error), str(error))
        assert ours[name][0] is kind
        assert ours[name][1].startswith("rank 1")
        assert ours[name][1].endswith(text)


def error_of_a_rank(failing):
    try:
        fail_on(failing)
    except ValueError as error:
        message = str(error)
    return message, fail_on(-1)  # the group goes on


def test_an_error_of_one_rank_is_raised_on_all_and_the_group_goes_on():
    found = run_on_ranks(error_of_a_rank, 3, 1)
    assert [message for message, _ in found] == ["rank 1: the reason", "the reason", "rank 1: the reason"]
    assert [sums for _, sums in found] == [[3.0]] * 3


def wait_or_fail():
    print("printed by", ranks().rank)
    if ranks().rank == 1:
        raise ValueError("the reason")
    if ranks().rank == 2:
        time.sleep(60)
    return os.getpid()


def test_an_error_and_a_late_rank_end_the_run_with_the_texts_of_all():
    started = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        run_on_ranks(wait_or_fail, 3, timeout=12)
    assert time.monotonic() - started < 40
    text = str(caught.value)
    assert all(f"printed by {rank}" in text for rank in range(3))
    assert "ValueError: the reason" in text
    assert "rank 2 of 3 did not end" in text


def tensors_of_first():
    whole = torch.arange(6.0)
    first = {
        "counts": torch.arange(6).view(2, 3),
        "flags": torch.tensor([True, False]),
        "number": torch.tensor(2.5, dtype=torch.bfloat16),
        "none": torch.zeros(0, 3),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "one": whole,
        "the same": whole,
    }
    found = ranks().tensors_from_first("a test", first if ranks().is_first else {})
    described = {name: (str(tensor.dtype), tuple(tensor.shape), tensor.tolist()) for name, tensor in found.items()}
    return described, found["one"].data_ptr() == found["the same"].data_ptr()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_of_a_batch_are_all_rows_and_no_single_one_of_several(size):
    for count in range(1, 30):
        shares = [range(count)[Ranks(rank, size).share(count)] for rank in range(size)]
        lengths = [len(share) for share in shares]
        assert [row for share in shares for row in share] == list(range(count))
        assert 1 not in lengths or count == 1
        assert lengths == sorted(lengths, reverse=True)
        assert Ranks(size - 1, size).largest_share(count) == lengths[0]
        if count >= 2 * size:
            assert lengths[0] - lengths[-1] <= 1


def test_all_ranks_get_the_tensors_of_the_first_of_any_type_and_those_that_names_share():
    (expected, shares), *others = run_on_ranks(tensors_of_first, 3)
    assert shares
    assert expected["turned"] == ("torch.float32", (3, 2), [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])
    assert others == [(expected, True)] * 2


def test_a_start_does_not_read_what_the_processes_before_a_restart_have_written():
    """The first rank of each start is early, and finds the names of all ranks of the start before."""
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(3) as threads:
        for start in range(3):
            early = threads.submit(_of_this_start, store, 0, 3)
            time.sleep(0.1)
            assert not early.done()
            late = [threads.submit(_of_this_start, store, rank, 3) for rank in (1, 2)]
            parts = [one.result(timeout=10) for one in (early, *late)]
            assert not parts[0].check(["address"])
            parts[start].set("address", f"{start}")
            assert all(part.get("address") == f"{start}".encode() for part in parts)


def end_at_once():
    if parallel.rank():
        os.kill(os.getpid(), signal.SIGTERM)
    return fail_on(-1)


def test_a_rank_that_is_ended_is_an_error_with_what_ended_it():
    with pytest.raises(RuntimeError) as caught:
        run_on_ranks(end_at_once, 2, timeout=20)
    assert f"rank 1 of 2 ended with code {-signal.SIGTERM}" in str(caught.value)
    assert "another rank has ended, or has not answered in time" in str(caught.value)
