"""
A world model
=============

A pendulum is seen as images of 32 × 32 pixels, black with the grey value as probability, and a torque turns it. Gusts
push it, too. Can a model that has seen 800 short films with their torques, and neither angle, velocity nor equations,
foresee the next 50 images, and does it know how sure it is? In the next example, a controller learns in its dreams.

The model is a state-space VAE: z_t | z_(t-1), a_(t-1) ~ N(z_(t-1) + f(z_(t-1), a_(t-1)), σ²), and the image x_t given
z_t has Bernoulli pixels. The guide, q(z_t | z_(t-1), a_(t-1), x_t, ..., x_T), corrects what the model expects by what a
recurrent network reads in the images from x_t on. After Krishnan et al. 2017, Karl et al. 2017, "Deep variational Bayes
filters", and Hafner et al. 2019, "Learning latent dynamics for planning from pixels".

Predictions are compared with the last image, the mean image, and a linear autoregression of 20 principal components
with the torques as inputs.
"""

import argparse
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import common
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, likelihoods, networks, priors, schedules

MEMORY = 8  # images that are seen before a prediction or an action
FILMED: dict[str, Any] = {"gusts": 0.5, "camera": datasets.resample}


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "world_model", epochs=100)
    common.add_training(parser, batch_size=16, lr=5e-3)
    add_model(parser)
    parser.add_argument("--horizon", type=common.positive_int, default=50, help="images that are predicted")
    parser.add_argument("--test-sequences", type=common.positive_int, default=200, help="held-out films")
    parser.add_argument("--draws", type=common.positive_int, default=50, help="draws in an ArviZ file")
    return parser.parse_args()


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of the films and the model."""
    parser.add_argument("--sequences", type=common.positive_int, default=800, help="films to learn from")
    parser.add_argument("--frames", type=common.positive_int, default=12, help="images in a film")
    parser.add_argument("--latent", type=common.positive_int, default=4, help="dimensions of the state z")
    parser.add_argument("--hidden", type=common.positive_int, default=48, help="hidden units of the smallest networks")


class WorldModel(nn.Module):
    """p(z_1) Π p(z_t | z_(t-1), a_(t-1)) Π p(x_t | z_t), and a guide that reads the images from x_t on."""

    def __init__(self, mean_image: Tensor, latent: int, hidden: int):
        super().__init__()
        network, pixels, logits = networks.mlp([2 * hidden]), len(mean_image), torch.logit(mean_image, eps=1e-3)
        self.p_start = priors.StandardNormal(latent)
        self.change = networks.mlp([2 * hidden, 2 * hidden])(latent + 1, latent)
        self.log_scale = nn.Parameter(torch.full((latent,), math.log(0.1)))
        self.p_image = likelihoods.Bernoulli(latent, pixels, networks.starting_at(network, logits))
        halved = nn.Sequential(nn.Unflatten(-1, [math.isqrt(pixels)] * 2), nn.AvgPool2d(2), nn.Flatten(-2))
        self.reader = nn.Sequential(halved, network(pixels // 4, hidden))
        self.memory = nn.GRU(hidden + 1, hidden, batch_first=True)
        self.correction = networks.mlp([hidden], activation=nn.Tanh)(latent + hidden, 2 * latent)

    def p_next(self, z: Tensor, torque: Tensor) -> dist.TorchDistribution:
        """p(z_t | z_(t-1), a_(t-1)) of states ``(*, N, D)`` and torques ``(*, N)``."""
        loc = z + self.change(common.concat_broadcast(z, torque[..., None] / 4))
        return dist.Normal(loc, self.log_scale.exp()).to_event(1)

    def model(self, images: Tensor, torques: Tensor) -> None:
        """Images ``(N, T, pixels)`` and the torques between them, ``(N, T - 1)``."""
        pyro.module("world", self)
        with pyro.plate("data", len(images)):
            images, torques = pyro.subsample(images, event_dim=2), pyro.subsample(torques, event_dim=1)
            path = [pyro.sample("z_1", self.p_start())]
            for t in pyro.markov(range(1, images.shape[1])):
                path.append(pyro.sample(f"z_{t + 1}", self.p_next(path[-1], torques[:, t - 1])))
            pyro.sample("x", self.p_image(torch.stack(path, -2)).to_event(1), obs=images)

    def guide(self, images: Tensor, torques: Tensor) -> None:
        pyro.module("world", self)
        with pyro.plate("data", len(images)):
            images, torques = pyro.subsample(images, event_dim=2), pyro.subsample(torques, event_dim=1)
            seen = torch.cat([self.reader(images), nn.functional.pad(torques, (0, 1))[..., None] / 4], -1)
            future = self.memory(seen.flip(1))[0].flip(1)
            z = pyro.sample("z_1", self.q(self.p_start().mean.expand(len(images), -1), future[:, 0]))
            for t in pyro.markov(range(1, images.shape[1])):
                z = pyro.sample(f"z_{t + 1}", self.q(self.p_next(z, torques[:, t - 1]).mean, future[:, t]))

    def q(self, expected: Tensor, future: Tensor) -> dist.TorchDistribution:
        """Correct what the model expects by what comes."""
        change, log_scale = self.correction(common.concat_broadcast(expected, future)).chunk(2, -1)
        return dist.Normal(expected + change, (log_scale - 2).exp()).to_event(1)

    @torch.no_grad()
    def states(self, images: Tensor, torques: Tensor, draws: int = 1) -> Tensor:
        """Draw z_1, ..., z_T given images, ``(draws, N, T, D)``."""
        with pyro.plate("draws", draws, dim=-2):
            trace = poutine.trace(self.guide).get_trace(images, torques)
        return torch.stack([torch.as_tensor(trace.nodes[f"z_{t + 1}"]["value"]) for t in range(images.shape[1])], -2)


def learn(args: argparse.Namespace) -> tuple[WorldModel, pv.Fitted, datasets.PendulumSequences]:
    """Make films, and train a world model on them; the rate of each step is in closed form."""
    train = datasets.pendulum(args.sequences, args.frames, seed=2 * args.seed, **FILMED)
    world = WorldModel(train.frames.mean((0, 1)), args.latent, args.hidden)
    options = common.training_options(args) | {"lr": schedules.decayed(args.lr, end=0.1), "elbo": TraceMeanField_ELBO()}
    return world, pv.fit(world.model, world.guide, train.to_data(), **options), train


@torch.no_grad()
def dream(world: WorldModel, seen: Tensor, before: Tensor, after: Tensor, draws: int) -> Iterator[Tensor]:
    """Predict images ``(draws, N, pixels)``, from images seen, the torques between them and those after them."""
    z = world.states(seen, before, draws)[..., -1, :]
    for torque in after.T:
        z = world.p_next(z, torque).sample()
        yield world.p_image(z).mean


def measure(predict: common.Function, given: tuple[Any, ...], film: Any) -> dict[str, list[Any]]:
    """Return, for each step, the error of pixels, the CRPS of angles in degrees, and the coverage of intervals."""
    world, found = film.world, {key: list[Any]() for key in ("pixel", "angle", "coverage")}
    for images, state in zip(predict(*given), film.states[:, MEMORY:].unbind(1), strict=True):
        angles = world.angle(images)
        centre = torch.atan2(angles.sin().mean(0), angles.cos().mean(0))  # a mean of angles
        truth, spread = common.wrap(state[:, 0] - centre), common.wrap(angles - centre)
        found["pixel"].append((images.mean(0) - world.render(state).flatten(1)).square().mean().sqrt().item())
        found["angle"].append(common.angle_crps(angles, state[:, 0]).mean().rad2deg().item())
        found["coverage"].append(common.coverage(spread, truth, LEVELS).tolist())
    return found


def draw(films: dict[str, Tensor], found: dict[str, Any], interval: float) -> dict[str, Figure]:
    """Draw a film that goes on in dreams, the errors of each method by time, and the calibration."""
    count = len(films["the truth"])
    shown = [*range(MEMORY - 3, MEMORY), *range(MEMORY + 1, count, max(1, (count - MEMORY) // 12))]
    times = [f"{interval * (t + 1 - MEMORY):.1f}" for t in shown]
    title = "Left of the line: what the camera saw. Right: the true future, and three that the model dreams"
    axis = {"xlabel": "seconds after the last image that was seen", "title": title}
    figures = {"dreams": common.draw_films({name: film[shown] for name, film in films.items()}, times, **axis)}
    figures["dreams"].axes[0].axvline(3 * 33 - 1, color="black", linewidth=2)
    later = interval * (1 + torch.arange(count - MEMORY))
    crps = "CRPS, degrees (0: exact;\nof a single prediction: its mean absolute error)"
    for kind, unit in (("pixel", "root mean squared error (white 0, black 1)"), ("angle", crps)):
        lines = {name: (later, row[kind]) for name, row in found.items()}
        axis = {"xlabel": "predicted time, s", "ylabel": unit, "title": f"Errors of predicted {kind}s, held-out films"}
        figures[f"{kind}_error"] = common.draw_lines(lines, **axis)
    covered, third = torch.tensor(found[DREAM]["coverage"]), -(-(count - MEMORY) // 3)
    curves = {f"{LINEAR}, all times": torch.tensor(found[LINEAR]["coverage"]).mean(0)}
    for part, when in zip(covered.split(third), later.split(third), strict=True):
        curves[f"{DREAM}, {when[0]:.1f} to {when[-1]:.1f} s"] = part.mean(0)
    axis = {"xlabel": f"probability of an interval of the predicted angle, from {FUTURES} draws"}
    axis |= {"ylabel": "share of true angles inside", "title": CALIBRATION}
    figures["calibration"] = common.draw_lines({name: (LEVELS, y) for name, y in curves.items()}, **axis)
    figures["calibration"].axes[0].plot(LEVELS, LEVELS, color="black")
    return figures


CALIBRATION = "Calibration: above the black line\nintervals are too wide, below it too narrow"
DREAM, LINEAR = "world model", "linear autoregression"
LEVELS, FUTURES = torch.linspace(0.1, 0.9, 9), 30  # of intervals, and how many draws they are from
COLUMNS = {"pixel error": "{pixel:.4f}", "CRPS": "{angle:.1f}°", "in 90 %": "{inside:.1f} %", "log p(x)": "{log_p:.1f}"}
NOTES = """pixel error: root mean square, from 0 to 1; CRPS: of angles, error minus half of the distance of two draws
in 90 %: true angles inside of 90 % intervals; log p(x): nats per held-out film of the length of a training film,
for the world model a lower bound, not reliable (by the shape of the weights) for {unreliable:.0%} of the films"""
NONE = "no figure found: Karl et al. 2017 and Hafner et al. 2019 show predictions of this kind as pictures"
MEASURES = ("pixel", "root mean square error of pixels", "on a scale of 0 to 1"), ("angle", "CRPS of angles", "degrees")
HOW = "the truth is an image without the camera's noise, or its angle; CRPS as in Grimit et al. 2006"


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Make films, train the world model on them, and make longer held-out films.
    world, fitted, train = learn(args)
    test = datasets.pendulum(args.test_sequences, MEMORY + args.horizon, seed=2 * args.seed + 1, **FILMED)
    # 2. Predict the images after the first ones, by each method, and measure errors and calibration.
    mean = train.frames.mean((0, 1))
    methods: dict[str, Any] = {DREAM: partial(dream, world), LINEAR: common.linear_forecast(*train.to_data())}
    methods["last image"] = lambda seen, before, after, draws: [seen[None, :, -1]] * after.shape[1]
    methods["mean image"] = lambda seen, before, after, draws: [mean.expand(1, len(seen), -1)] * after.shape[1]
    torques = test.torques.split([MEMORY - 1, args.horizon], 1)  # between the images that are seen, and after them
    found = {name: measure(each, (test.frames[:, :MEMORY], *torques, FUTURES), test) for name, each in methods.items()}
    rows = {name: {key: sum(row[key]) / args.horizon for key in ("pixel", "angle")} for name, row in found.items()}
    for name in (DREAM, LINEAR):
        rows[name]["inside"] = 100 * torch.tensor(found[name]["coverage"]).mean(0)[-1].item()
    # 3. Compare log p(x) of held-out films with that of the camera's noise alone, if the truth is known.
    x, a = test.frames[:, : args.frames], test.torques[:, : args.frames - 1]
    evidence = pv.log_evidence(world.model, world.guide, x, a, num_samples=100, seed=args.seed)
    rows[DREAM]["log_p"] = evidence.log_evidence.mean().item()
    grey = test.world.render(test.states).flatten(2)
    pixels = dist.Bernoulli(grey[:, : args.frames].clamp(1e-6, 1 - 1e-6))
    rows["the truth"] = {"log_p": pixels.log_prob(x).sum((1, 2)).mean().item()}
    notes = NOTES.format(unreliable=evidence.unreliable.double().mean().item())
    print(text := common.table("prediction", rows, COLUMNS, notes))
    # 4. Draw a held-out film and its dreams, and save all.
    futures = torch.stack([*dream(world, test.frames[:1, :MEMORY], torques[0][:1], torques[1][:1], 3)], 2)[:, 0]
    films = {"the truth": torch.cat([test.frames[0, :MEMORY], grey[0, MEMORY:]])}
    films |= {f"dream {n}": nn.functional.pad(each, (0, 0, MEMORY, 0)) for n, each in enumerate(futures, 1)}
    same: dict[str, Any] = {"higher_is_better": False, "published": NONE, "differences": HOW}
    others = {name: row for name, row in rows.items() if "pixel" in row and name != DREAM}
    best = [min((row[key], name) for name, row in others.items()) for key, _, _ in MEASURES]
    headlines = [
        common.headline(what, unit, rows[DREAM][key], baseline=lowest, baseline_name=name, **same)
        for (key, what, unit), (lowest, name) in zip(MEASURES, best, strict=True)
    ]
    tree = common.make_tree(world, x[:5], args, a[:5], dims={"x": ["frame", "pixel"]})
    results = {"methods": rows, "steps": found, "history": fitted.history, "engine": fitted.engine}
    common.save(args, results, draw(films, found, test.world.interval), {"world_model": tree}, text, headlines)


if __name__ == "__main__":
    main(parse_args())
