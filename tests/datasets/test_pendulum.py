"""The pendulum obeys its equation of motion, and its images show the angle."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from pyro_vae import datasets
from pyro_vae.datasets import Pendulum

STATES = torch.tensor([[0.3, 0.0], [2.0, -3.0], [-3.0, 6.0], [0.01, 0.02]], dtype=torch.float64)
TORQUES = torch.tensor([0.0, 5.0, -8.0, 2.0], dtype=torch.float64)


def path(world, state, steps, torque=None):
    torque = torch.zeros(state.shape[:-1], dtype=state.dtype) if torque is None else torque
    states = [state]
    for _ in range(steps):
        states.append(world.step(states[-1], torque))
    return torch.stack(states)


@pytest.mark.parametrize("world", [Pendulum(), Pendulum(4.0, damping=0.0, max_torque=6.0, interval=0.05)])
def test_steps_solve_the_equation_of_motion(world):
    found = path(world, STATES, 10, TORQUES)
    torques = TORQUES.clamp(-world.max_torque, world.max_torque)
    for index, (start, torque) in enumerate(zip(STATES.numpy(), torques.tolist(), strict=True)):

        def slope(_, y, torque=torque):
            return [y[1], world.gravity * math.sin(y[0]) - world.damping * y[1] + torque]

        exact = solve_ivp(slope, (0, 10 * world.interval), start, rtol=1e-10, atol=1e-10).y[:, -1]
        np.testing.assert_allclose(found[-1, index], exact, atol=2e-3)


def test_energy_is_kept_without_damping_and_torque_and_lost_with_damping():
    free, damped = (Pendulum(damping=damping, interval=0.02) for damping in (0.0, 0.5))

    def energy(world, state):
        return state[..., 1].square() / 2 + world.gravity * world.height(state)

    assert torch.allclose(energy(free, path(free, STATES, 200)), energy(free, STATES), atol=1e-3)
    assert (energy(damped, path(damped, STATES, 200))[-1] < energy(damped, STATES)).all()


def test_small_swings_have_the_period_of_a_harmonic_oscillator():
    world = Pendulum(damping=0.0, interval=0.01)
    angles = path(world, torch.tensor([math.pi + 1e-3, 0.0], dtype=torch.float64), 1000)[:, 0] - math.pi
    turns = ((angles[1:] > 0) & (angles[:-1] <= 0)).nonzero()[:, 0]
    period = float(turns[-1] - turns[0]) / (len(turns) - 1) * world.interval
    assert period == pytest.approx(2 * math.pi / math.sqrt(world.gravity), rel=5e-3)


def test_a_torque_below_gravity_does_not_lift_the_rod_unless_it_swings():
    world, hanging = Pendulum(), torch.tensor([math.pi, 0.0])
    assert path(world, hanging, 60, torch.tensor(8.0))[:, 0].min() > 0  # it stays on one side of the top
    swinging = [hanging]
    for _ in range(60):
        swinging.append(world.step(swinging[-1], torch.where(swinging[-1][1] < 0, -8.0, 8.0)))
    assert world.height(torch.stack(swinging)).max() > 0.99


def test_torques_are_cut_off_and_disturbances_are_not():
    world = Pendulum(max_torque=2.0)
    most, more = (world.step(STATES, torch.full((4,), torque, dtype=torch.float64)) for torque in (2.0, 5.0))
    assert torch.equal(most, more)
    pushed = world.step(STATES, torch.full((4,), 2.0, dtype=torch.float64), disturbance=3.0)
    assert torch.equal(pushed, Pendulum(max_torque=5.0).step(STATES, torch.full((4,), 5.0, dtype=torch.float64)))


@pytest.mark.parametrize("size", [16, 24, 32, 33])
def test_an_image_shows_the_angle_and_nothing_else(size):
    world, angles = Pendulum(), torch.linspace(-3, 3, 13, dtype=torch.float64)
    images = world.render(torch.stack([angles, torch.zeros(13)], -1), size)
    assert images.shape == (13, size, size)
    assert ((images >= 0) & (images <= 1)).all()
    assert torch.allclose(world.angle(images.flatten(1)), angles, atol=0.01 if size >= 24 else 0.02)
    moving = torch.stack([angles + 2 * math.pi, torch.full((13,), 5.0)], -1)
    assert torch.allclose(world.render(moving, size), images, atol=1e-9)


def test_a_quarter_turn_turns_the_image():
    upright, level = Pendulum().render(torch.tensor([[0.0, 0.0], [math.pi / 2, 0.0]]))
    assert torch.allclose(torch.rot90(upright, -1), level, atol=1e-5)
    assert torch.allclose(upright.flip(1), upright, atol=1e-5)


def test_sequences_follow_the_world_and_are_the_same_for_a_seed():
    world = Pendulum(5.0)
    data = datasets.pendulum(30, 7, size=16, hold=3, world=world, seed=2)
    assert (data.frames.shape, data.torques.shape, data.states.shape) == ((30, 7, 256), (30, 6), (30, 7, 2))
    for t in range(6):
        assert torch.equal(world.step(data.states[:, t], data.torques[:, t]), data.states[:, t + 1])
    assert torch.equal(world.render(data.states, 16).flatten(2), data.frames)
    assert torch.equal(data.torques[:, [0, 3]], data.torques[:, [2, 5]])
    assert not (data.torques[:, 2] == data.torques[:, 3]).any()
    again, other = (datasets.pendulum(30, 7, size=16, hold=3, world=world, seed=seed) for seed in (2, 3))
    assert torch.equal(again.frames, data.frames)
    assert not torch.equal(other.states[:, 0], data.states[:, 0])
    assert data.to_data() == (data.frames, data.torques)


def test_gusts_are_the_noise_that_the_torque_leaves():
    data = datasets.pendulum(4000, 3, gusts=0.7, seed=1)
    still = data.world.step(data.states[:, 0], data.torques[:, 0])
    noise = (data.states[:, 1] - still)[:, 1] / (0.7 * data.world.interval)
    assert noise.mean().abs() < 4.5 / 4000**0.5
    assert noise.std() == pytest.approx(1, abs=0.1)  # damping and gravity change it by a few per cent


def test_starts_and_torques_are_uniform_between_their_limits():
    data = datasets.pendulum(20_000, 2, size=2, seed=4)
    for values, limit in ((data.states[:, 0, 0], math.pi), (data.states[:, 0, 1], 6.0), (data.torques[:, 0], 8.0)):
        assert values.abs().max() <= limit
        assert values.mean().abs() < 4.5 * limit / 3**0.5 / 20_000**0.5
        assert values.abs().mean() == pytest.approx(limit / 2, rel=0.02)


def test_a_controller_sees_what_the_camera_saw_up_to_now_and_its_torques_move_the_rod():
    world, start, seen = Pendulum(max_torque=3.0), torch.tensor([[0.0, 1.0], [2.0, 0.0]]), []

    def control(frames, torques):
        seen.append((frames.clone(), torques.clone()))
        return torch.tensor([9.0, -1.0]) * len(seen)

    film = world.run(control, start, 4, size=8, camera=datasets.resample, seed=1)
    assert [(len(frames[0]), len(torques[0])) for frames, torques in seen] == [(1, 0), (2, 1), (3, 2)]
    assert set(film.frames.unique().tolist()) == {0, 1}
    assert torch.equal(seen[-1][0], film.frames[:, :3])
    assert film.torques.tolist() == [[3.0, 3.0, 3.0], [-1.0, -2.0, -3.0]]
    state = start
    for t in range(3):
        state = world.step(state, film.torques[:, t])
        assert torch.equal(film.states[:, t + 1], state)


def test_a_run_leaves_random_numbers_and_the_start_as_they_were(random_states):
    start, before = torch.tensor([[0.0, 1.0]]), random_states()
    runs = [
        Pendulum().run(lambda frames, torques: torch.randn(1), start, 5, gusts=1.0, camera=datasets.resample, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert random_states() == before
    assert start.tolist() == [[0.0, 1.0]]
    assert torch.equal(runs[0].frames, runs[1].frames)
    assert not torch.equal(runs[0].torques, runs[2].torques)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: datasets.pendulum(3, 1), "`num_frames` must be 2 or more, got 1"),
        (lambda: datasets.pendulum(3, gusts=-1.0), "`gusts` must be a finite number, 0 or more, got -1.0"),
        (lambda: datasets.pendulum(3, world="earth"), "`world` must be a Pendulum, got a str"),
        (lambda: Pendulum(0.0), "`gravity` must be a positive, finite number, got 0.0"),
        (lambda: Pendulum(damping=-0.1), "`damping` must be a finite number, 0 or more, got -0.1"),
        (lambda: Pendulum().height(torch.zeros(3)), r"`state` must be states \(\*, 2\).*got a torch.float32 tensor"),
        (
            lambda: Pendulum().angle(torch.zeros(3)),
            r"`frames` must be square images \(\*, size²\), floats, got a torch",
        ),
        (lambda: Pendulum().run(None, torch.zeros(1, 2), 3), "`control` must be a function, got a NoneType"),
        (lambda: Pendulum().run(torch.add, torch.zeros(2), 3), r"`start` must be states \(N, 2\), got a torch.float32"),
        (
            lambda: Pendulum().run(lambda frames, torques: 1.0, torch.zeros(1, 2), 3),
            r"`control` must return torques \(1,\), got a float",
        ),
        (
            lambda: Pendulum().run(lambda frames, torques: torch.full((2,), torch.nan), torch.zeros(2, 2), 3),
            "`control` must return torques, got NaN in row 0",
        ),
        (
            lambda: datasets.pendulum(3, camera=lambda x: x[:, :4]),
            r"`camera` must return images of the same shape \(3, 1024\), got a torch.float32 tensor of shape \(3, 4\)",
        ),
        (lambda: datasets.pendulum(3, camera=3), "`camera` must be a function, got an int"),
        (lambda: Pendulum().step(torch.zeros(2), 1.0), r"`torque` must be a tensor of torques \(\*\), got a float"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
