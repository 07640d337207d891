"""Runs in several processes: the same results in the same order, errors of the runs, and no trace."""

import os

import pytest
import torch

from pyro_vae._utils import processes
from pyro_vae._utils.processes import can_fork, default_processes, run_in_processes
from pyro_vae._utils.progress import progress_bar
from pyro_vae._utils.rng import seeded

forks = pytest.mark.skipif(not can_fork(), reason="this machine cannot fork")


def draw(number):
    with seeded(number):
        return torch.randn(1000).numpy().tobytes()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_results_are_in_order_and_the_same_for_each_number_of_processes(count):
    torch.mm(torch.ones(300, 300), torch.ones(300, 300))  # threads of torch must not hinder the copies
    threads, reports = torch.get_num_threads(), []
    for count_of_processes in (1, 2, 5):
        found = run_in_processes(draw, count, count_of_processes, lambda: reports.append(1))
        assert found == [draw(number) for number in range(count)]
    assert len(reports) == 3 * count
    assert torch.get_num_threads() == threads


@forks
def test_runs_are_in_other_processes_on_one_thread_and_gradients_work_there():
    def run(number):
        x = torch.ones(100, requires_grad=True)
        x.exp().sum().backward()
        return os.getpid(), torch.get_num_threads(), float(x.grad[0])

    torch.ones(3, requires_grad=True).sum().backward()
    found = run_in_processes(run, 4, 2, lambda: None)
    assert len({pid for pid, *_ in found}) == 2
    assert os.getpid() not in {pid for pid, *_ in found}
    assert [rest for _, *rest in found] == [[1, pytest.approx(2.71828, abs=1e-4)]] * 4


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_a_run_is_raised_and_the_others_end(count):
    def run(number):
        if number == 3:
            raise FloatingPointError(f"number {number}")
        return number

    with pytest.raises(FloatingPointError, match="number 3"):
        run_in_processes(run, 6, count, lambda: None)


@forks
def test_an_error_that_cannot_be_pickled_keeps_its_words_and_a_killed_process_is_an_error():
    class Local(Exception):
        pass

    def run(number):
        raise Local("the reason")

    with pytest.raises(RuntimeError, match="Local: the reason"):
        run_in_processes(run, 2, 2, lambda: None)
    with pytest.raises(RuntimeError, match="a process ended before its results"):
        run_in_processes(lambda number: os._exit(1), 2, 2, lambda: None)


def test_without_forks_there_is_one_process(monkeypatch):
    monkeypatch.setattr(processes, "can_fork", lambda: False)
    assert default_processes() == 1
    assert run_in_processes(lambda number: os.getpid(), 3, 2, lambda: None) == [os.getpid()] * 3


@forks
def test_a_run_inside_of_a_run_has_no_processes_of_its_own():
    def run(number):
        return run_in_processes(lambda inner: (number, inner, os.getpid()), 2, 2, lambda: None)

    found = run_in_processes(run, 2, 2, lambda: None)
    assert [[pair[:2] for pair in each] for each in found] == [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]
    assert all(len({pid for *_, pid in each}) == 1 for each in found)


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_does_not_move_the_bar_of_the_caller(count):
    def run(number):
        with progress_bar("inner", False, total=1) as inner:
            inner.advance()
        return number

    with progress_bar("outer", False, stages=("one", "two")) as bar:
        run_in_processes(run, 3, count, lambda: None)
        assert bar.done == 0
