"""Checkpoints of several ranks: the same bits on the same number of ranks, the same state on another number."""

import copy
import dataclasses
import itertools
import math
import os
import re
import shutil
import signal
import warnings
from unittest.mock import Mock

import killed_ranks
import pytest
import torch
from killed_ranks import HELD_OUT, X, checksum, trained
from ranks import run_on_ranks
from test_checkpoints import FullDisk, changed, damage, same, steps_in
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

import pyro_vae as pv
from pyro_vae._utils.ranks import ranks
from pyro_vae.compilation.graph import Graph
from pyro_vae.saving.files import FileFormatError
from pyro_vae.saving.tensor_file import read
from pyro_vae.training import loop as training_loop
from pyro_vae.training import replayed_step
from pyro_vae.training.state import check_run_state, model_state, optimizer_state

# To the bit


def distributed():
    data = TensorDataset(X)
    return DataLoader(data, batch_size=7, sampler=DistributedSampler(data, shuffle=True, seed=2))


def random_order():
    generator = torch.Generator().manual_seed(4)
    return DataLoader(TensorDataset(X), batch_size=20, sampler=RandomSampler(X, generator=generator))


OPTIONS = {
    "replayed": {},
    "eager, with a baseline": {"variant": "discrete", "compile": False},
    "patience": {"patience": 2},
    "distributed sampler": {"data": distributed, "batch_size": None},
    "random sampler": {"data": random_order, "batch_size": None},
}


def runs(folder, epochs, names):
    """Train each pair for each number of epochs, one after the other; return the last results, by name."""
    found = {}
    for name in names:
        options = dict(OPTIONS[name])
        if "data" in options:
            options["data"] = options["data"]()
        for count in epochs:
            found[name] = trained(folder / name, count, **options)
    return found


NAMES = [
    (2, ["replayed", "random sampler"]),
    pytest.param(2, ["eager, with a baseline", "patience", "distributed sampler"], marks=pytest.mark.slow),
    pytest.param(3, ["replayed", "distributed sampler"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "names"), NAMES)
def test_on_the_same_number_of_ranks_a_run_resumes_to_the_bit(size, names, tmp_path):
    whole = run_on_ranks(runs, size, tmp_path / "whole", [6], names, timeout=300)
    run_on_ranks(runs, size, tmp_path / "parts", [1, 4], names, timeout=300)
    parts = run_on_ranks(runs, size, tmp_path / "parts", [6], names, timeout=300)
    for name in names:
        assert same(tmp_path / "whole" / name, tmp_path / "parts" / name)
        assert all(one[name] == whole[0][name] for one in [*whole, *parts])


# On another number of ranks


def interrupted(folder, at):
    """Train until all ranks are interrupted after a step."""

    class Interrupted(training_loop.Loop):
        def _wishes(self, steps):
            return dataclasses.replace(super()._wishes(steps), interrupted=steps == at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_vae.training.fit.Loop", Interrupted)
        with pytest.warns(UserWarning, match=f"interrupted after {at} steps"):
            trained(folder, 6)


def resumed(folder):
    """Resume; return the state after that, the rows of this rank in each further step, and the result."""
    noted, rows = {}, []

    class Noted(training_loop.Batches):
        def remaining(self, *args):
            for inputs in super().remaining(*args):
                rows.append(inputs[0].tolist() if inputs else [])
                yield inputs

    class NotedLoop(training_loop.Loop):
        def resume(self):
            super().resume()
            noted["state"] = copy.deepcopy(dataclasses.replace(self.state, best_parameters={}))
            noted["model"], noted["optimizer"] = (
                {name: tensor.tolist() for name, tensor in found(self.step).items()}
                for found in (model_state, optimizer_state)
            )
            noted["steps"], noted["random"] = self.step.count, torch.get_rng_state().tolist()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_vae.training.fit.Batches", Noted)
        patch.setattr("pyro_vae.training.fit.Loop", NotedLoop)
        history = trained(folder, 6)[0]
    return noted, rows, history


SIZES = [(2, 3), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(2, 1), (1, 2)])]


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_on_another_number_of_ranks_a_run_resumes_at_the_same_state(before, after, tmp_path):
    """It is stopped after 7 of 18 steps, in the middle of an epoch."""
    run_on_ranks(interrupted, before, tmp_path / "one", 7)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    ((expected, _, _), *_) = (found := run_on_ranks(resumed, before, tmp_path / "one"))
    others = run_on_ranks(resumed, after, tmp_path / "other")
    assert expected["steps"] == 7
    assert (expected["state"].epoch, expected["state"].batch) == (2, 1)
    random = expected.pop("random")
    states = [noted.pop("random") for noted, *_ in others]
    assert states[0] == random
    assert all(one != other for one, other in itertools.combinations(states, 2))
    for noted, *_ in others:
        assert noted == expected
    whole, parts = (
        [sorted(itertools.chain(*step)) for step in zip(*(rows for _, rows, _ in one), strict=True)]
        for one in (found, others)
    )
    assert whole == parts
    assert [len(step) for step in parts] == [20, 10, *[20, 20, 10] * 3]
    for _, _, history in others:
        assert {len(values) for values in history.values()} == {6}
        assert all(map(math.isfinite, history["elbo"]))


def adam_state(step):
    """The state of Adam as torch has it, of eager and of captured steps, and the learning rates."""
    optimizer = step.optimizer
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    held = [
        optimizer.torch_state(one, group) if hasattr(optimizer, "torch_state") else optimizer.state[one]
        for group in optimizer.param_groups
        for one in group["params"]
    ]
    return rates, [{name: torch.as_tensor(value).flatten().tolist() for name, value in state.items()} for state in held]


def captured_run(folder, epochs, resumes):
    """Train with captured steps, of which nothing is compiled; return the state of Adam at the end or the beginning."""
    Graph.compile = lambda self, *inputs: None
    replayed_step._Gradients.compile_in_background = lambda *args: Mock()
    replayed_step._Gradients.run_compiled = lambda self: None
    noted = []

    class NotedLoop(training_loop.Loop):
        def resume(self):
            super().resume()
            if resumes:
                noted.append(adam_state(self.step))

        def _save(self):
            super()._save()
            if not resumes:
                noted.append(adam_state(self.step))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_vae.training.fit.Loop", NotedLoop)
        trained(folder, epochs, every_steps=100, compile=True)
    return noted[-1]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_captured_steps_of_one_process_and_those_of_ranks_have_one_state_of_adam(before, after, tmp_path):
    (saved, *_) = run_on_ranks(captured_run, before, tmp_path, 2, False)
    for rates, states in run_on_ranks(captured_run, after, tmp_path, 3, True):
        assert rates == pytest.approx(saved[0])
        for ours, theirs in zip(states, saved[1], strict=True):
            assert ours == {name: pytest.approx(value, rel=1e-6) for name, value in theirs.items()}
            assert ours["step"] == [6]


def replicates(folder, seeds):
    """The last validation ELBO of runs that resume with other random states than those of the checkpoint."""
    found = []
    for seed in seeds:
        shutil.copytree(folder, folder.with_name(f"replicate {seed}"))
        state = torch.Generator().manual_seed(seed).get_state()
        path = folder.with_name(f"replicate {seed}") / "last.safetensors"
        changed(path, lambda header, tensors, state=state: tensors.update({"random/torch": state}))
        found.append(trained(path.parent, 6)[0]["validation_elbo"][-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_elbo_after_a_change_of_the_number_of_ranks_is_that_of_one_process_within_its_error(size, tmp_path):
    """The error is that of a run with other random numbers: 20 replicates, and a limit of six standard deviations."""
    run_on_ranks(interrupted, 1, tmp_path / "one", 7)
    alone = torch.tensor(*run_on_ranks(replicates, 1, tmp_path / "one", range(20), timeout=300))
    ((_, _, history), *_) = run_on_ranks(resumed, size, tmp_path / "one")
    assert abs(history["validation_elbo"][-1] - alone.mean()) < 6 * alone.std()


# What cannot be done is an error of all ranks, with one text


def refused(folder, **options):
    """The text of the error of a run."""
    try:
        trained(folder, 2, **options)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("the run came to its end")


def all_refused(folder, options):
    return [refused(folder / name, **values) for name, values in options]


def test_a_folder_that_cannot_be_used_is_an_error_of_all_ranks(tmp_path):
    run_on_ranks(trained, 2, tmp_path / "good", 2)
    for name in ("damaged", "wrong"):
        shutil.copytree(tmp_path / "good", tmp_path / name)
    for name in ("last", "previous"):
        damage(tmp_path / "damaged" / f"{name}.safetensors", "a bit")
    (tmp_path / "wrong" / "previous.safetensors").unlink()
    changed(tmp_path / "wrong" / "last.safetensors", lambda header, tensors: header.pop("ranks"))
    (tmp_path / "file").write_text("")
    cases = {
        "good": ({"seed": 4}, "ValueError: `seed` must be 3, as in the run of '.*good', got 4; use another folder"),
        "good/.": ({"variant": "discrete"}, "ValueError: `schedules` must be .*, got .*; use another folder"),
        "damaged": (
            {},
            "FileFormatError: (rank 0: )?`checkpoints` must be an empty folder.*last.safetensors' is damaged",
        ),
        "wrong": ({}, "FileFormatError: (rank 0: )?`checkpoints` must .*last.safetensors' cannot be used: "),
        "file/folder": (
            {},
            "NotADirectoryError: (rank 0: )?`checkpoints` must be a folder in which files can be written",
        ),
    }
    with pv.Checkpoints.opened(tmp_path / "locked"):
        cases["locked"] = {}, "BlockingIOError: .*`checkpoints` must be a folder of its own for each run"
        options = [(name, values) for name, (values, _) in cases.items()]
        found = run_on_ranks(all_refused, 2, tmp_path, options)
    for (_, message), *texts in zip(cases.values(), *found, strict=True):
        for text in texts:
            assert re.search(message, text), text


def given_on(rank, folder):
    return refused(folder if ranks().rank == rank else None)


def test_checkpoints_are_given_on_rank_0(tmp_path):
    message = (
        "ValueError: `checkpoints` must be given on rank 0, which writes them, got None there and others on rank 1"
    )
    assert all(message in text for text in run_on_ranks(given_on, 2, 1, tmp_path))
    assert not list(tmp_path.iterdir())


def with_a_full_disk(folder):
    """Train where rank 0 cannot write, in a folder that the other ranks do not know of."""
    expected = trained(None, 3)
    os.fsync = FullDisk({1, 2, 5})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = trained(folder if ranks().is_first else None, 3)
    return expected, found, [str(one.message) for one in caught if "could not be written" in str(one.message)]


def test_a_checkpoint_that_cannot_be_written_is_a_warning_of_rank_0_and_the_run_goes_on(tmp_path):
    for rank, (expected, found, texts) in enumerate(run_on_ranks(with_a_full_disk, 3, tmp_path)):
        assert found == expected
        assert len(texts) == (3 if rank == 0 else 0)
    assert steps_in(tmp_path) == 9


def test_a_checkpoint_that_lacks_anything_of_a_rank_is_no_checkpoint(tmp_path):
    run_on_ranks(trained, 3, tmp_path, 1)
    path, whole = tmp_path / "last.safetensors", (tmp_path / "last.safetensors").read_bytes()
    (tmp_path / "previous.safetensors").unlink(missing_ok=True)
    header, tensors = read(path, "checkpoint")
    assert len(header["ranks"]) == 2
    changes = [lambda h, t, name=name: t.pop(name) for name in tensors if name.startswith("ranks/")]
    changes += [lambda h, t, name=name: t.update({name: torch.zeros(7)}) for name in tensors if name[:5] == "ranks"]
    changes += [lambda h, t, value=value: h.update(ranks=value) for value in (None, "3", [[]], [], header["ranks"] * 2)]
    changes += [lambda h, t, name=name: h["ranks"][1].pop(name) for name in ("random",)]
    changes += [lambda h, t: h["ranks"][1].update(engine=3), lambda h, t: t.update({"ranks/x/torch": torch.zeros(1)})]
    for change in changes:
        path.write_bytes(whole)
        changed(path, change)
        with pytest.raises(FileFormatError, match=r"`checkpoints` must .*last.safetensors' cannot be used"):
            pv.Checkpoints(tmp_path).load(check_run_state)


# The best epoch, callbacks


def best_of_all(folder):
    """Train with patience and a callback; read the best parameters, of all ranks and in a callback of rank 0."""
    numbers = []
    checkpoints = pv.Checkpoints(folder, every_steps=1)
    vae = killed_ranks.small_vae()

    def read_best(epoch):
        other = killed_ranks.small_vae()
        numbers.append((epoch.number, epoch.number > 1 and checkpoints.load_best(other)))

    fitted = pv.fit(
        vae.model, vae.guide, X, epochs=30, batch_size=20, lr=0.3, seed=1, validation=HELD_OUT, patience=3,
        checkpoints=checkpoints, callbacks=[read_best],
    )  # fmt: skip
    again = killed_ranks.small_vae()
    best = checkpoints.load_best(again)
    return fitted.stopped, fitted.steps, best, checksum(vae.parameters()), checksum(again.parameters()), numbers


def test_the_best_parameters_are_those_of_all_ranks(tmp_path):
    (stopped, steps, best, own, again, numbers), *others = run_on_ranks(best_of_all, 2, tmp_path)
    assert (stopped, own) == ("patience", again)
    assert steps == 3 * (best + 3)
    assert [number for number, _ in numbers] == list(range(1, best + 4))
    assert all(0 < read < number for number, read in numbers[1:])
    assert all(one == (stopped, steps, best, own, again, []) for one in others)


# Ranks that end


def ends_at(folder, rank, step, end):
    """Train until a rank calls a function after a step; return the error of another."""

    class Ending(training_loop.Loop):
        def _wishes(self, steps):
            if steps == step and ranks().rank == rank and not ended:
                ended.append(step)
                end()
            return super()._wishes(steps)

    ended = []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_vae.training.fit.Loop", Ending)
        return trained(folder, 4, every_steps=5)


def terminate():
    for _ in range(2):  # a scheduler of jobs and torchrun
        os.kill(os.getpid(), signal.SIGTERM)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_on_one_rank_writes_a_checkpoint_and_ends_that_rank_and_then_the_others(rank, tmp_path):
    with pytest.raises(RuntimeError, match=f"rank {rank} of 2 ended with code -15") as ended:
        run_on_ranks(ends_at, 2, tmp_path, rank, 7, terminate)
    text = f"rank {rank} has received SIGTERM, and has ended after step 7 of fit. A checkpoint of this step is written"
    assert f"RuntimeError: {text}" in str(ended.value)
    assert "gloo" not in str(ended.value)
    assert steps_in(tmp_path) == 7


def handled(folder):
    """Train where rank 1 gets a SIGTERM that a function of the user handles."""
    calls = []
    signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    return len(calls), ends_at(folder, 1, 7, terminate)[1], len(calls), steps_in(folder)


def test_after_a_sigterm_that_the_user_handles_all_ranks_go_on(tmp_path):
    found = run_on_ranks(handled, 2, tmp_path)
    assert [calls for _, _, calls, _ in found] == [0, 1]
    assert {steps for _, steps, _, _ in found} == {12}


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_lose_another_one_name_themselves_and_what_they_did(size, tmp_path):
    with pytest.raises(RuntimeError, match=f"rank 1 of {size} ended with code -9") as ended:
        run_on_ranks(ends_at, size, tmp_path, 1, 7, kill)
    for rank in {0, 2} & set(range(size)):
        text = (
            rf"RuntimeError: rank {rank} of {size} could not go on with .*: another rank has ended, or has not answered"
        )
        assert re.search(text, str(ended.value))
    assert steps_in(tmp_path) == 5


def killed_in_writing(folder, number):
    """Train where rank 0 is killed at a call of ``os.replace``: before a file is complete, or between two of them."""
    calls, replace = [], os.replace

    def killing(*paths):
        calls.append(paths)
        if len(calls) == number:
            kill()
        replace(*paths)

    os.replace = killing
    trained(folder, 3)


@pytest.mark.parametrize("numbers", [(2,), pytest.param((1, 3, 5, 6, 7), marks=pytest.mark.slow)])
def test_a_run_whose_rank_0_is_killed_while_it_writes_ends_with_the_same_bits(numbers, tmp_path):
    whole = run_on_ranks(trained, 2, tmp_path / "whole", 3)
    for number in numbers:
        with pytest.raises(RuntimeError, match="rank 0 of 2 ended with code -9"):
            run_on_ranks(killed_in_writing, 2, tmp_path / f"{number}", number)
        assert run_on_ranks(trained, 2, tmp_path / f"{number}", 3) == whole
        assert same(tmp_path / "whole", tmp_path / f"{number}")


KILLS = [pytest.param(2, 3, marks=pytest.mark.integration), pytest.param(40, 6, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kills", "longest"), KILLS)
def test_torchrun_restarts_a_run_whose_ranks_are_killed_and_it_ends_with_the_same_bits(kills, longest, tmp_path):
    run_on_ranks(trained, 2, tmp_path / "whole", 60, timeout=600)
    victims, runs = killed_ranks.kill_and_restart(tmp_path, kills, 2, 60, seed=0, longest=longest, wait=300)
    assert sum(victims) == kills
    assert kills < 10 or min(victims) > 0
    assert all(same(tmp_path / "whole", tmp_path / f"killed {number}") for number in range(1, runs + 1))
