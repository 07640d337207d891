import random
from functools import partial

import numpy as np
import pyro
import pytest
import torch

from pyro_vae._utils import rng
from pyro_vae._utils.rng import (
    RandomStream,
    is_random_state,
    preserve_rng_state,
    random_states,
    seed_all,
    seeded,
    set_random_states,
    set_torch_random_states,
    torch_random_states,
)


class Devices:
    """A module of torch for two devices, each with a random stream, as ``torch.cuda`` is one: reading starts them."""

    def __init__(self, count=2, started=True):
        self.count, self.started, self.starts, self.current = count, started, 0, 0
        self.generators = [torch.Generator("cpu").manual_seed(torch.initial_seed()) for _ in range(count)]

    def start(self):
        self.starts += not self.started
        self.started = True

    def is_initialized(self):
        return self.started

    def is_available(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def device_count(self):
        return self.count

    def current_device(self):
        self.start()
        return self.current

    def get_rng_state(self, device):
        self.start()
        return self.generators[torch.device(device).index].get_state()

    def set_rng_state(self, state, device):
        self.generators[torch.device(device).index].set_state(state)

    def manual_seed_all(self, seed):
        for generator in self.generators:
            generator.manual_seed(seed)

    def draw(self, device=1):
        self.start()
        return torch.rand(3, generator=self.generators[device]).tolist()


@pytest.fixture
def cuda(monkeypatch):
    """Devices in place of ``torch.cuda``, which torch itself seeds."""
    with preserve_rng_state():
        devices = Devices()
        for name in dir(Devices):
            if not name.startswith("__") and hasattr(torch.cuda, name):
                monkeypatch.setattr(torch.cuda, name, getattr(devices, name))
        yield devices


def draw_all(cuda):
    numbers = torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]  # noqa: NPY002
    return [*numbers, cuda.draw(0), cuda.draw(1)]


def test_states_are_those_of_the_cpu_and_of_each_device_by_name(cuda):
    assert list(torch_random_states()) == ["torch", "cuda:0", "cuda:1"]
    assert all(map(is_random_state, torch_random_states()))


@pytest.mark.parametrize("block", [preserve_rng_state, partial(seeded, 3), lambda: RandomStream(3)])
def test_a_block_leaves_the_streams_of_all_devices_as_they_were(cuda, block):
    with preserve_rng_state():
        expected = draw_all(cuda)
    with block():
        draw_all(cuda)
        cuda.draw(1)
    assert draw_all(cuda) == expected


def test_a_seed_fixes_the_numbers_of_all_devices(cuda):
    with seeded(3):
        first = draw_all(cuda)
    draw_all(cuda)
    with seeded(3):
        assert draw_all(cuda) == first
    with seeded(4):
        assert all(one != other for one, other in zip(draw_all(cuda), first, strict=True))


def test_a_stream_of_its_own_continues_on_all_devices(cuda):
    with seeded(3):
        expected = [draw_all(cuda), draw_all(cuda)]
    stream, found = RandomStream(3), []
    for _ in range(2):
        with stream:
            found.append(draw_all(cuda))
        draw_all(cuda)
    assert found == expected


def test_states_restore_the_numbers_that_follow(cuda):
    for take, put in ((torch_random_states, set_torch_random_states), (random_states, lambda s: set_random_states(*s))):
        states = take()
        first = [torch.rand(3).tolist(), cuda.draw(0), cuda.draw(1)]
        put(states)
        assert [torch.rand(3).tolist(), cuda.draw(0), cuda.draw(1)] == first


def test_no_device_is_started_by_reading_restoring_or_seeding(cuda):
    cuda.started = False
    assert list(torch_random_states()) == ["torch"]
    with seeded(3), RandomStream(2):
        set_random_states(*random_states())
    assert cuda.starts == 0


def test_a_device_that_a_block_starts_begins_after_it_as_if_the_block_had_not_been(cuda):
    torch.manual_seed(5)
    expected = [cuda.draw(0), cuda.draw(1)]
    for starts in (True, False):
        torch.manual_seed(5)
        cuda.started = False
        with seeded(3):
            if starts:
                cuda.draw(1)
        assert [cuda.draw(0), cuda.draw(1)] == expected


@pytest.mark.parametrize("started", [True, False])
def test_seeding_all_streams_is_that_of_pyro_also_for_devices_that_start_later(cuda, started):
    expected = None
    for seed in (pyro.set_rng_seed, seed_all):
        torch.manual_seed(1)
        cuda.started = started
        seed(7)
        assert torch.initial_seed() == 7
        found = draw_all(cuda)
        assert expected in (None, found)
        expected = found


def test_seeding_all_streams_leaves_nothing_to_devices_that_cannot_start(cuda, monkeypatch):
    """They would keep the seed with the text of the call stack, which takes milliseconds."""
    cuda.started, left = False, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", left.append)
    seed_all(7)
    ours = torch.rand(3)
    assert not left
    pyro.set_rng_seed(7)
    assert left
    assert torch.equal(ours, torch.rand(3))


def test_a_state_of_an_earlier_file_is_that_of_the_current_device(cuda):
    states, tensors = random_states()
    cuda.current = 1
    expected = cuda.draw(1)
    set_random_states(states, {"torch": tensors["torch"], "cuda": tensors["cuda:1"]})
    assert cuda.draw(1) == expected


def test_states_of_devices_that_are_not_here_are_left_out(cuda):
    states, tensors = random_states()
    expected = cuda.draw(1)
    set_random_states(states, tensors | {"cuda:7": tensors["cuda:0"], "xpu:0": tensors["cuda:0"]})
    assert cuda.draw(1) == expected


@pytest.mark.parametrize("seeds_all", [True, False])
def test_a_backend_outside_of_torch_and_one_with_a_single_device_have_states_too(monkeypatch, seeds_all):
    with preserve_rng_state():
        devices = Devices(count=1)
        if not seeds_all:  # as `torch.mps` does
            monkeypatch.delattr(Devices, "manual_seed_all")
            monkeypatch.delattr(Devices, "is_initialized")
            devices.manual_seed = devices.generators[0].manual_seed
        name = torch.device(rng._KINDS[-1]).type
        before = torch_random_states()
        monkeypatch.setattr(torch, name, devices, raising=False)
        assert torch_random_states().keys() - before.keys() == {f"{name}:0"}
        with preserve_rng_state():
            expected = devices.draw(0)
        assert devices.draw(0) == expected
        set_torch_random_states(before)  # of before it was used
        with_seed = torch.Generator("cpu").manual_seed(torch.initial_seed())
        assert devices.draw(0) == torch.rand(3, generator=with_seed).tolist()
