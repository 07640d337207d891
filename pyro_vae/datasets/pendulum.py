"""A pendulum that a torque turns, seen as images: sequences to learn from, and the world itself, to act in."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from pyro_vae._utils.display import Result, Table, count_of
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.validation import describe, number, positive, positive_int, real_tensor, seed_number
from pyro_vae.datasets.base import on_default_device

__all__ = ["Pendulum", "PendulumSequences", "pendulum"]

Control = Callable[[Tensor, Tensor], Tensor]
_FASTEST = 6.0  # radians per second at the start of a sequence; at the bottom, it carries the rod almost to the top


@dataclass(frozen=True)
class Pendulum:
    r"""A rod that turns around its end, driven by gravity and a torque.

    .. math:: \ddot\theta = g \sin\theta - b\,\dot\theta + u, \qquad |u| \le u_{\max}

    The angle :math:`\theta` is 0 if the rod stands, and :math:`\pm\pi` if it hangs; it grows clockwise, with no
    limit.
    The torque u, in rad/s², is constant between two frames. A state is :math:`(\theta, \dot\theta)`, the last dimension
    of a tensor, so that many pendulums move at once.

    Attributes:
        gravity: g, in rad/s².
        damping: b, per second.
        max_torque: the largest torque; larger ones are cut off. Below ``gravity``, it cannot hold the rod in every
            place.
        interval: seconds between two frames.

    Source: after the swing-up task of Doya 2000, "Reinforcement learning in continuous time and space", section 5.1.

    >>> world = Pendulum()
    >>> state = torch.tensor([torch.pi, 0.0])  # it hangs at rest
    >>> for _ in range(12):
    ...     state = world.step(state, torch.tensor(8.0))
    >>> world.render(state).shape, world.height(state) > 0
    (torch.Size([32, 32]), tensor(True))
    """

    gravity: float = 10.0
    damping: float = field(default=0.5, kw_only=True)
    max_torque: float = field(default=8.0, kw_only=True)
    interval: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        for each in fields(self):
            check = number if each.name == "damping" else positive
            check(getattr(self, each.name), each.name, *([0.0] if each.name == "damping" else []))

    def step(self, state: Tensor, torque: Tensor, disturbance: Tensor | float = 0.0) -> Tensor:
        """Return the state one interval later, by the fourth-order Runge-Kutta method.

        Args:
            state: ``(*, 2)``, angle and velocity.
            torque: ``(*)``, cut off at ``max_torque``.
            disturbance: a torque of the surroundings, ``(*)``, which is added and not cut off.
        """
        _check_state(state)
        torque = real_tensor(torque, "torque", "a tensor of torques (*)").clamp(-self.max_torque, self.max_torque)
        torque = torque + disturbance

        def slope(state: Tensor) -> Tensor:
            angle, velocity = state.unbind(-1)
            return torch.stack([velocity, self.gravity * angle.sin() - self.damping * velocity + torque], -1)

        h = self.interval
        first = slope(state)
        second = slope(state + h / 2 * first)
        third = slope(state + h / 2 * second)
        fourth = slope(state + h * third)
        return state + h / 6 * (first + 2 * second + 2 * third + fourth)

    def height(self, state: Tensor) -> Tensor:
        r"""The height of the free end, :math:`\cos\theta`, from 1, standing, to -1, hanging: ``(*, 2)`` to ``(*)``."""
        return _check_state(state)[..., 0].cos()

    def render(self, state: Tensor, size: int = 32) -> Tensor:
        """Draw the rod as grey images, 1 on the rod and 0 beyond it, ``(*, size, size)``.

        The rod goes from the centre to 0.8 of the way to the border; its edge is soft.

        Args:
            state: ``(*, 2)``; the image shows the angle, and not the velocity.
            size: pixels along a side.
        """
        positive_int(size, "size")
        angle = _check_state(state)[..., 0, None, None]
        place = _places(size, state)
        right, up = place, -place[:, None]
        sine, cosine = angle.sin(), angle.cos()
        along = (right * sine + up * cosine).clamp(0, 0.4 * size)
        distance = ((right - along * sine).square() + (up - along * cosine).square()).sqrt()
        return ((size / 16 - distance) / (size / 10) + 0.5).clamp(0, 1)

    def angle(self, frames: Tensor) -> Tensor:
        r"""Read the angle from images, ``(*, size²)`` to ``(*)``, from :math:`-\pi` to :math:`\pi`.

        It is the direction of the centre of the ink: within 0.01 of the truth for a rendered image of 24 × 24 pixels or
        more. Images that a model
        predicts, with values in [0, 1], have an angle, too; that of a blank image is arbitrary.

        >>> world = Pendulum()
        >>> frames = world.render(torch.tensor([[2.0, 0.0], [7.0, 0.0]])).flatten(1)
        >>> [round(angle, 2) for angle in world.angle(frames).tolist()]  # 7 - 2π = 0.72
        [2.0, 0.72]
        """
        expected = "square images (*, size²), floats"
        ink = real_tensor(frames, "frames", expected)
        size = math.isqrt(ink.shape[-1]) if ink.dim() else 0
        if not ink.is_floating_point() or not size or size**2 != ink.shape[-1]:
            raise ValueError(f"`frames` must be {expected}, got {describe(frames)}")
        place, ink = _places(size, ink), ink.unflatten(-1, (size, size))
        return torch.atan2((ink * place).sum((-1, -2)), -(ink * place[:, None]).sum((-1, -2)))

    def run(
        self,
        control: Control,
        start: Tensor,
        num_frames: int,
        *,
        size: int = 32,
        gusts: float = 0.0,
        camera: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> "PendulumSequences":
        """Let a controller act: it sees the images so far, and returns the next torque.

        Args:
            control: function of images ``(N, t, size²)`` and torques ``(N, t - 1)`` up to now that returns the torques
                ``(N,)`` until the next image.
            start: states at the first image, ``(N, 2)``.
            num_frames: T, 2 or more.
            size: pixels along a side of an image.
            gusts: standard deviation of a random torque that is added in each step, in rad/s², and not observed.
            camera: what is seen of a grey image, such as :func:`pyro_vae.datasets.resample`; all by default.
            seed: seed of the gusts, and of the draws of camera and control.

        >>> world = Pendulum()
        >>> film = world.run(lambda frames, torques: torch.zeros(1), torch.tensor([[0.1, 0.0]]), 20)
        >>> film, bool(world.height(film.states[0, -1]) < 0)  # it falls
        (PendulumSequences(1 sequence of 20 frames with 1,024 pixels), True)
        """
        for value, name in ((num_frames, "num_frames"), (size, "size")):
            positive_int(value, name)
        if num_frames < 2:
            raise ValueError(f"`num_frames` must be 2 or more, got {num_frames}")
        for function, name in ((control, "control"), (self.height if camera is None else camera, "camera")):
            if not callable(function):
                raise TypeError(f"`{name}` must be a function, got {describe(function)}")
        gusts = number(gusts, "gusts", 0.0)
        if _check_state(start).dim() != 2:
            raise ValueError(f"`start` must be states (N, 2), got {describe(start)}")
        states = start[:, None].repeat(1, num_frames, 1)
        frames = start.new_zeros(len(start), num_frames, size**2)
        torques = start.new_zeros(len(start), num_frames - 1)
        with seeded(seed):
            for t in range(num_frames):
                if t:
                    torques[:, t - 1] = _checked_torques(control(frames[:, :t], torques[:, : t - 1]), torques[:, 0])
                    wind = gusts * torch.randn(len(start), dtype=start.dtype, device="cpu").to(start)
                    states[:, t] = self.step(states[:, t - 1], torques[:, t - 1], wind)
                image = self.render(states[:, t], size).flatten(1)
                frames[:, t] = image if camera is None else _checked_images(camera(image), image)
        return PendulumSequences(frames, torques.clamp(-self.max_torque, self.max_torque), states, self)


@dataclass(frozen=True, repr=False)
class PendulumSequences(Result):
    """N sequences of T frames of a pendulum, with the torques between them.

    Attributes:
        frames: images as the camera saw them, ``(N, T, size²)``; by default in grey.
        torques: ``(N, T - 1)``; the torque ``[:, t]`` leads from frame t to frame t + 1.
        states: the true angle and velocity at each frame, ``(N, T, 2)``.
        world: the :class:`Pendulum`.
    """

    frames: Tensor
    torques: Tensor
    states: Tensor
    world: Pendulum

    def __len__(self) -> int:
        return len(self.frames)

    def to_data(self) -> tuple[Tensor, Tensor]:
        """Return frames and torques: the arguments of a model of both."""
        return self.frames, self.torques

    def _line(self) -> str:
        count, steps, pixels = self.frames.shape
        return f"{count_of(count, 'sequence')} of {count_of(steps, 'frame')} with {count_of(pixels, 'pixel')}"

    def _table(self) -> Table:
        angle, velocity = self.states.unbind(-1)
        rows: list[tuple[object, object]] = [
            ("sequences", f"{len(self):,}"),
            ("frames of each", self.frames.shape[1]),
            ("seconds between frames", f"{self.world.interval:g}"),
            ("pixels", self.frames.shape[2]),
            ("torques", f"{self.torques.min().item():.3g} to {self.torques.max().item():.3g} rad/s²"),
            ("velocities", f"{velocity.min().item():.3g} to {velocity.max().item():.3g} rad/s"),
            ("frames with the rod above the centre", f"{(angle.cos() > 0).double().mean().item():.0%}"),
        ]
        return Table(("property", "value"), rows)


def pendulum(
    num_sequences: int,
    num_frames: int = 20,
    *,
    size: int = 32,
    hold: int = 4,
    gusts: float = 0.0,
    camera: Callable[[Tensor], Tensor] | None = None,
    world: Pendulum | None = None,
    seed: int = 0,
) -> PendulumSequences:
    """Sequences of images of a pendulum under random torques.

    A sequence starts at any angle, with a velocity up to 6 rad/s, both uniform. A torque is uniform between its limits,
    and lasts a few frames. Gusts, which nobody observes, make the future uncertain.

    Args:
        num_sequences: N.
        num_frames: T, 2 or more.
        size: pixels along a side of a frame.
        hold: frames for which a torque lasts.
        gusts: standard deviation of the random torque that is added in each step, in rad/s².
        camera: what is seen of a grey image, such as :func:`pyro_vae.datasets.resample`; all by default.
        world: the pendulum; by default ``Pendulum()``.
        seed: seed of the draws. Another seed gives an independent test set.

    Source: the data of Watter, Springenberg, Boedecker and Riedmiller 2015, "Embed to control", section 4, and of Karl,
    Soelch, Bayer and van der Smagt 2017, "Deep variational Bayes filters", section 4, are of this kind.

    >>> data = pendulum(100, seed=0)
    >>> data
    PendulumSequences(100 sequences of 20 frames with 1,024 pixels)
    >>> bool((data.world.step(data.states[:, 0], data.torques[:, 0]) == data.states[:, 1]).all())
    True
    """
    for value, name in ((num_sequences, "num_sequences"), (num_frames, "num_frames"), (hold, "hold")):
        positive_int(value, name)
    world = Pendulum() if world is None else world
    if not isinstance(world, Pendulum):
        raise TypeError(f"`world` must be a Pendulum, got {describe(world)}")
    generator = torch.Generator("cpu").manual_seed(seed_number(seed))
    limits = torch.tensor([math.pi, _FASTEST], device="cpu")
    start = limits * (2 * torch.rand(num_sequences, 2, generator=generator, device="cpu") - 1)
    shape = num_sequences, -(-num_frames // hold)
    chosen = world.max_torque * (2 * torch.rand(*shape, generator=generator, device="cpu") - 1)
    torques, start = on_default_device(chosen.repeat_interleave(hold, 1), start)
    run_seed = int(torch.randint(2**31, (), generator=generator, device="cpu"))  # gusts do not follow the starts

    def control(frames: Tensor, past: Tensor) -> Tensor:
        return torques[:, past.shape[1]]

    return world.run(control, start, num_frames, size=size, gusts=gusts, camera=camera, seed=run_seed)


def _places(size: int, like: Tensor) -> Tensor:
    """Return the places of pixels, from the centre."""
    return torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2


def _check_state(state: object) -> Tensor:
    expected = "states (*, 2), angle and velocity, floats"
    found = real_tensor(state, "state", expected)
    if not found.is_floating_point() or found.shape[-1:] != (2,):
        raise ValueError(f"`state` must be {expected}, got {describe(state)}")
    return found


def _checked_torques(torques: object, like: Tensor) -> Tensor:
    if not isinstance(torques, Tensor) or torques.shape != like.shape:
        raise ValueError(f"`control` must return torques ({len(like)},), got {describe(torques)}")
    if torques.isnan().any():
        raise ValueError(f"`control` must return torques, got NaN in row {int(torques.isnan().nonzero()[0])}")
    return torques


def _checked_images(images: object, like: Tensor) -> Tensor:
    if not isinstance(images, Tensor) or images.shape != like.shape:
        raise ValueError(f"`camera` must return images of the same shape {tuple(like.shape)}, got {describe(images)}")
    return images
