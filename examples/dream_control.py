"""
Control in dreams
=================

A controller that swings a pendulum up, and has never touched it: it learns in the dreams of a world model (see the
example "A world model"), and acts in the world, where it sees images and no angle. The torque is too weak to lift the
rod at once: it must swing first.

The world tells how high the rod is in each image of the films, and a network learns to read this reward from the state
z. A dream starts at a state of a film and goes on for 30 steps, with the torque a_t = 8 tanh(c(z_t)) of the controller
c. Its return is the sum of the rewards. This is a Pyro program, too: the model draws the path and adds its return as a
factor, and the guide draws the same path, so that the objective is the expected return, and its gradient passes through
the learned dynamics. After Ha and Schmidhuber 2018, "World models", and Hafner et al. 2020, "Dream to control".

Each run in the world starts with the rod hanging, and lasts 10 seconds with gusts. The controller reads the state from
its last 8 images by the guide of the world model. It is compared with no torque, with random torques, and with a
classical controller that knows the equations and sees images without noise: it pumps energy until the rod is near the
top, and then holds it (Åström and Furuta 2000).
"""

import argparse
from typing import Any

import common
import pyro
import torch
import world_model
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, likelihoods, networks, schedules

PENDULUM = datasets.Pendulum()


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "dream_control", epochs=100)
    common.add_training(parser, batch_size=16, lr=5e-3)
    world_model.add_model(parser)
    parser.add_argument("--horizon", type=common.positive_int, default=30, help="steps of a dream")
    parser.add_argument("--practice", type=common.positive_int, default=8, help="passes of the controller over states")
    parser.add_argument("--runs", type=common.positive_int, default=100, help="runs in the world")
    parser.add_argument("--steps", type=common.positive_int, default=100, help="images of a run, 10 in each second")
    parser.add_argument("--draws", type=common.positive_int, default=20, help="draws in an ArviZ file")
    return parser.parse_args()


class Reward(nn.Module):
    """height | z ~ N(r(z), s²), which is fitted to states and heights; there is no latent."""

    def __init__(self, latent: int, hidden: int):
        super().__init__()
        self.p_height = likelihoods.Normal(latent, 1, networks.mlp([hidden], activation=nn.Tanh))

    def model(self, z: Tensor, height: Tensor) -> None:
        pyro.module("reward", self)
        with pyro.plate("data", len(z)):
            z, height = pyro.subsample(z, event_dim=1), pyro.subsample(height, event_dim=1)
            pyro.sample("height", self.p_height(z), obs=height)

    def guide(self, z: Tensor, height: Tensor) -> None:
        """There is nothing to infer."""


class Controller(nn.Module):
    """A controller, and the dreams that it learns in: model and guide draw one path, and the model adds its return."""

    def __init__(self, world: world_model.WorldModel, reward: Reward, latent: int, hidden: int, horizon: int):
        super().__init__()
        self.policy = networks.mlp([hidden, hidden], activation=nn.Tanh)(latent, 1)
        self.horizon, self.given = horizon, (world.eval().requires_grad_(False), reward.eval().requires_grad_(False))

    def forward(self, z: Tensor) -> Tensor:
        """Return the torques ``(*)`` in states ``(*, D)``."""
        return PENDULUM.max_torque * self.policy(z)[..., 0].tanh()

    def model(self, start: Tensor) -> None:
        pyro.module("controller", self.policy)
        with pyro.plate("data", len(start)):
            pyro.factor("return", self.dream(start))

    def guide(self, start: Tensor) -> None:
        pyro.module("controller", self.policy)
        with pyro.plate("data", len(start)):
            self.dream(start)

    def dream(self, start: Tensor) -> Tensor:
        world, reward = self.given
        z, total = pyro.subsample(start, event_dim=1), torch.zeros(())
        for t in pyro.markov(range(self.horizon)):
            z = pyro.sample(f"z_{t + 1}", world.p_next(z, self(z)))
            total = total + reward.p_height(z).mean[..., 0]
        return total

    @torch.no_grad()
    def act(self, images: Tensor, torques: Tensor) -> Tensor:
        """Return the torques ``(N,)`` after images ``(N, t, pixels)`` and torques ``(N, t - 1)``."""
        last = slice(-world_model.MEMORY, None)
        images = images[:, last]
        path = self.given[0].states(images, torques[:, torques.shape[1] - images.shape[1] + 1 :], draws=5)
        return self(path[:, :, -1].mean(0))


def classical(images: Tensor, torques: Tensor) -> Tensor:
    """Swing up by pumping energy, and hold by feedback; the angle is that of the image, the velocity a difference."""
    if images.shape[1] < 2:
        return torch.full((len(images),), PENDULUM.max_torque)
    before, angle = PENDULUM.angle(images[:, -2:]).unbind(1)
    turned = (angle - before + torch.pi) % (2 * torch.pi) - torch.pi
    acceleration = PENDULUM.gravity * angle.sin() + torques[:, -1]
    velocity = turned / PENDULUM.interval + PENDULUM.interval / 2 * acceleration
    missing = PENDULUM.gravity * (1 - angle.cos()) - velocity.square() / 2  # energy of the rod standing, minus its own
    pump = PENDULUM.max_torque * torch.sign(velocity * missing)
    hold = -2.5 * PENDULUM.gravity * angle.sin() - 6 * velocity
    return torch.where(angle.cos() > 0.9, hold, pump)


def hanging(count: int, seed: int) -> Tensor:
    """Return states of a rod that hangs almost at rest."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return torch.tensor([torch.pi, 0.0]) + 0.1 * noise


def draw(films: dict[str, datasets.PendulumSequences]) -> dict[str, Figure]:
    """Draw one run of each controller as a film, and the mean height of all runs by time."""
    steps = next(iter(films.values())).frames.shape[1]
    shown = [*range(0, min(steps, 40), 3)]
    rows = {name: PENDULUM.render(film.states[0, shown]).flatten(1) for name, film in films.items()}
    times = [f"{PENDULUM.interval * step:.1f}" for step in shown]
    title = "A run of each controller from the same start: the rod hangs at first"
    figures = {"swing_up": common.draw_films(rows, times, xlabel="time, s", title=title)}
    seconds = PENDULUM.interval * torch.arange(steps)
    lines = {name: (seconds, PENDULUM.height(film.states).mean(0)) for name, film in films.items()}
    title = f"How high the free end is: mean over {len(next(iter(films.values())).states)} runs"
    axis = {"xlabel": "time, s", "ylabel": "height (1: it stands, -1: it hangs)", "title": title}
    return figures | {"heights": common.draw_lines(lines, **axis)}


DREAMED, NOTHING, RANDOM, CLASSICAL = "trained in dreams", "no torque", "random torques", "classical, knows equations"
COLUMNS = {"mean height": "{height:.3f} ± {error:.3f}", "stands at the end": "{stands:.0f} %"}
NOTES = """mean height: over {args.runs} runs, from -1, hanging, to 1, standing, ± the standard error over runs
stands at the end: runs with a height above 0.9 in all of their last second
in dreams, the controller's mean height was {dreamed:.3f}, over {args.horizon} steps from any state of the films"""

NONE = "no figure found for this pendulum; Watter et al. 2015 and Hafner et al. 2019 swing up similar ones from images"
GIVEN = "the classical controller, in the same runs, knows the equations and sees images without noise"


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Learn a world model from films, with random torques.
    world, fitted, train = world_model.learn(args)
    # 2. Learn to read the reward from the state.
    z = world.states(*train.to_data())[0].flatten(0, 1)
    reward = Reward(args.latent, args.hidden)
    options: dict[str, Any] = {"lr": 5e-3, "batch_size": 500, "seed": args.seed, "compile": args.compile}
    read = pv.fit(
        reward.model, reward.guide, (z, PENDULUM.height(train.states).flatten()[:, None]), epochs=20, **options
    )
    # 3. Train the controller in dreams that start in these states.
    controller = Controller(world, reward, args.latent, args.hidden, args.horizon)
    options |= {"lr": schedules.decayed(3e-3, hold=0.3, end=0.05), "batch_size": 100, "clip_norm": 10.0}
    practised = pv.fit(controller.model, controller.guide, z, epochs=args.practice, **options)
    # 4. Let it act in the world, and others from the same starts in the same gusts.
    random = datasets.pendulum(args.runs, args.steps, seed=args.seed).torques
    controls = {
        DREAMED: controller.act,
        CLASSICAL: classical,
        RANDOM: lambda images, torques: random[:, torques.shape[1]],
        NOTHING: lambda images, torques: torch.zeros(len(images)),
    }
    films, rows = {}, {}
    for name, control in controls.items():
        seen = world_model.FILMED | ({"camera": None} if name == CLASSICAL else {})
        films[name] = PENDULUM.run(control, hanging(args.runs, args.seed), args.steps, seed=args.seed, **seen)
        height = PENDULUM.height(films[name].states)
        stands = (height[:, -10:] > 0.9).all(1).double().mean().item()
        rows[name] = {
            "height": height.mean().item(),
            "error": common.standard_error(height.mean(1)),
            "stands": 100 * stands,
        }
    dreamed = practised.history["surrogate"][-1] / args.horizon
    print(text := common.table("controller", rows, COLUMNS, NOTES.format(args=args, dreamed=dreamed)))
    # 5. Draw, and save all.
    tree = common.make_tree(world, train.frames[:5], args, train.torques[:5], dims={"x": ["frame", "pixel"]})
    reached, least, most = (rows[name]["height"] for name in (DREAMED, RANDOM, CLASSICAL))
    other: dict[str, Any] = {"baseline_name": RANDOM, "higher_is_better": True, "published": NONE, "differences": GIVEN}
    share = 100 * (reached - least) / (most - least)  # of the way to the controller that knows the equations
    headlines = [
        common.headline("mean height of the rod (1 standing, -1 hanging)", "", reached, baseline=least, **other),
        common.headline("way from random torques to the classical controller", "%", share, baseline=0.0, **other),
    ]
    histories = {"world": fitted.history, "reward": read.history, "controller": practised.history}
    results = {"controllers": rows, "dreamed_height": dreamed, "histories": histories, "engine": practised.engine}
    common.save(args, results, draw(films), {"dream_control": tree}, text, headlines)


if __name__ == "__main__":
    main(parse_args())
