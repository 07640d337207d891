"""
Music by a deep Markov model
============================

Which notes come next? A deep Markov model (Krishnan, Shalit and Sontag 2017) has a hidden state z_t for each step of a
piece, and the keys of a piano that sound then:

    z_t | z_{t-1} ~ N(mu(z_{t-1}), sigma²(z_{t-1})),    x_t[k] | z_t ~ Bernoulli(f_k(z_t)), k = 1 ... 88

with networks mu, sigma and f. The guide q(z_t | z_{t-1}, x_t ... x_T) reads the piece backwards with a recurrent
network.

The music is composed by the program: progressions of chords in four voices, in twelve keys. `--file` reads other music,
a JSON file of MIDI numbers such as the JSB chorales. The baseline is a logistic regression of each key on the keys of
the step before.

log p(x) of held-out music is bounded in three ways: the ELBO, many weighted draws, and a particle filter, which draws
particles again after each step, so that those that explain the past badly die out. All are lower bounds in expectation.
The figure is -log p(x) per step of time, in nats. Krishnan et al. report 6.39 on the JSB chorales.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, networks, schedules
from pyro_vae.handlers import WeightKL


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "music", epochs=120)
    common.add_training(parser, batch_size=100, lr=6e-3)
    parser.add_argument("--file", type=Path, help="a JSON file with the splits train and test, in place of own music")
    parser.add_argument("--pieces", type=common.positive_int, default=600, help="pieces to train on; 100 are held out")
    parser.add_argument("--latent", type=common.positive_int, default=24, help="dimensions of z_t")
    parser.add_argument("--hidden", type=common.positive_int, default=100, help="hidden units of each network")
    parser.add_argument("--particles", type=common.positive_int, default=100, help="most draws for a log p(x)")
    parser.add_argument("--draws", type=common.positive_int, default=50, help="draws in an ArviZ file")
    return parser.parse_args()


class DeepMarkov(nn.Module):
    """z_t | z_{t-1} is normal, x_t | z_t a product of Bernoullis; the guide reads the rest of the piece."""

    def __init__(self, latent: int, hidden: int, frequencies: Tensor):
        super().__init__()
        network, keys = networks.mlp([hidden], nn.Tanh), len(frequencies)
        self.start = nn.Parameter(torch.zeros(latent))
        self.transition, self.shortcut = network(latent, 2 * latent), nn.Linear(latent, latent)
        self.logits, self.emission = nn.Parameter(torch.logit(frequencies)), network(latent, keys)
        self.reader = nn.GRU(keys, hidden, batch_first=True)
        self.combiner = network(latent + hidden, 2 * latent)

    def model(self, x: Tensor, lengths: Tensor) -> None:
        """p(z_1) p(x_1 | z_1) p(z_2 | z_1) p(x_2 | z_2) ..."""
        pyro.module("deep_markov", self)
        with pyro.plate("data", len(x)):
            x, lengths = pyro.subsample(x, event_dim=2), pyro.subsample(lengths, event_dim=0)
            z, playing = self.start.expand(len(x), -1), in_piece(x, lengths)
            for t in pyro.markov(range(x.shape[1])):
                with poutine.mask(mask=playing[:, t]):
                    z = pyro.sample(f"z_{t}", self.next_state(z))
                    pyro.sample(f"x_{t}", self.keys(z), obs=x[:, t])

    def next_state(self, z: Tensor) -> dist.TorchDistribution:
        """Return p(z_t | z_{t-1})."""
        change, scale = self.transition(z).chunk(2, -1)
        return dist.Normal(self.shortcut(z) + change, nn.functional.softplus(scale) + 1e-3).to_event(1)

    def keys(self, z: Tensor) -> dist.TorchDistribution:
        """Return p(x_t | z_t)."""
        return dist.Bernoulli(logits=self.logits + self.emission(z)).to_event(1)

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        """q(z_1 | x) q(z_2 | z_1, x) ..."""
        pyro.module("deep_markov", self)
        with pyro.plate("data", len(x)):
            x, lengths = pyro.subsample(x, event_dim=2), pyro.subsample(lengths, event_dim=0)
            rest = self.reader(x.flip(1))[0].flip(1)
            z, playing = self.start.expand(len(x), -1), in_piece(x, lengths)
            for t in pyro.markov(range(x.shape[1])):
                loc, scale = self.combiner(torch.cat([z, rest[:, t]], -1)).chunk(2, -1)
                with poutine.mask(mask=playing[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, nn.functional.softplus(scale) + 1e-3).to_event(1))

    @torch.no_grad()
    def compose(self, steps: int) -> Tensor:
        """Draw a piece from the model, ``(steps, 88)``."""
        z, keys = self.start.detach(), list[Tensor]()
        for _ in range(steps):
            z = self.next_state(z).sample()
            keys.append(self.keys(z).sample())
        return torch.stack(keys)


def in_piece(x: Tensor, lengths: Tensor) -> Any:
    """Return which steps are not after the end of a piece, ``(N, T)``."""
    return torch.arange(x.shape[1]) < lengths[:, None]


class FromStepBefore(nn.Module):
    """Logistic regressions of the keys of a step on those of the step before; a model without latents."""

    def __init__(self, frequencies: Tensor):
        super().__init__()
        self.first = nn.Parameter(torch.logit(frequencies))
        self.logits = nn.Parameter(torch.logit(frequencies))
        self.weights = nn.Parameter(torch.zeros(len(frequencies), len(frequencies)))

    def model(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("from_step_before", self)
        with pyro.plate("data", len(x)):
            x, lengths = pyro.subsample(x, event_dim=2), pyro.subsample(lengths, event_dim=0)
            logits = torch.cat([self.first.expand(len(x), 1, -1), self.logits + x[:, :-1] @ self.weights], 1)
            playing = in_piece(x, lengths)[..., None]
            pyro.sample("x", dist.Bernoulli(logits=logits).mask(playing).to_event(2), obs=x)


@torch.no_grad()
def bounds(markov: DeepMarkov, test: datasets.PianoRolls, most: int, seed: int) -> dict[str, dict[int, float]]:
    """Estimate -log p(x) per step from numbers of draws for each piece, by importance sampling and particle filters."""
    pair, data = (markov.model, markov.guide), (test.x, test.lengths)
    filtered = partial(pv.particle_log_evidence, markov.model, num_filters=1, seed=seed)
    ways: dict[str, Any] = {
        "weighted draws of the guide": lambda count: pv.log_evidence(*pair, *data, num_samples=count, seed=seed),
        "particle filter, guide": lambda count: filtered(markov.guide, *data, num_particles=count),
        "particle filter, prior": lambda count: filtered(None, *data, num_particles=count),
    }
    counts = [count for count in (1, 3, 10, 30, 100, 300, 1000) if count <= most]
    return {
        name: {count: float(-way(count).log_evidence.sum() / test.lengths.sum()) for count in counts}
        for name, way in ways.items()
    }


def draw_pieces(pieces: dict[str, Tensor]) -> Figure:
    """Draw piano rolls ``(steps, 88)`` by name, above each other."""
    figure, axes = plt.subplots(len(pieces), 1, figsize=(7.5, 2.5 * len(pieces)), layout="constrained", sharex=True)
    for ax, (name, piece) in zip(axes, pieces.items(), strict=True):
        step, key = piece.nonzero().T
        ax.hlines(key + 21, step + 0.05, step + 0.95, color="black", linewidth=3.2)
        ax.set_yticks([36, 48, 60, 72, 84], ["C2", "C3", "C4", "C5", "C6"])
        ax.set(ylim=(33, 82), xlim=(0, len(piece)), ylabel="key", title=name)
        ax.grid(alpha=0.35)
    axes[-1].set_xlabel("step of time (a quarter note)")
    return figure


def draw_bounds(found: dict[str, dict[int, float]], elbo: float, baseline: float) -> Figure:
    lines = {name: (list(each), list(each.values())) for name, each in found.items()}
    axis = {"xlabel": "draws (particles) for each piece", "ylabel": "nats per step of time", "xscale": "log"}
    ax = (figure := common.draw_lines(lines, title="Upper bounds on -log p(x) (the lowest is best)", **axis)).axes[0]
    ax.set_ylim(top=1.25 * max(elbo, baseline))
    for level, name, line in ((elbo, "-ELBO", ":"), (baseline, "another model: regression on the step before", "-")):
        ax.axhline(level, color="0.4", linestyle=line)
        ax.annotate(name, (3, level), xytext=(0, 4), textcoords="offset points", color="0.3", fontsize=9)
    return figure


COLUMNS = {"-log p(x), nats per step": "{nats:.3f}", "seconds of training": "{seconds:.0f}"}
NOTES = "of held-out pieces; of the deep Markov model upper bounds in expectation, {draws} draws for each piece"


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Compose music, or read it from a file.
    if args.file:
        train, test = (datasets.piano_rolls(args.file, split) for split in ("train", "test"))
    else:
        train = datasets.chord_progressions(args.pieces, seed=2 * args.seed)
        test = datasets.chord_progressions(100, seed=2 * args.seed + 1)
    frequencies = (train.x.sum((0, 1)) + 0.5) / (train.lengths.sum() + 1)
    # 2. Train a deep Markov model with KL annealing, and the logistic regressions.
    markov, regression = DeepMarkov(args.latent, args.hidden, frequencies), FromStepBefore(frequencies)
    beta, options = torch.tensor(0.0), common.training_options(args) | {"clip_norm": 10.0}
    weight, held_out = WeightKL(beta), (test.x, test.lengths)
    annealed = {beta: schedules.linear(0.1, 1.0, steps=args.epochs * len(train) // args.batch_size // 4 + 1)}
    fit: Any = partial(pv.fit, data=(train.x, train.lengths), **options)
    slower = schedules.decayed(args.lr, hold=0.6, end=0.1)
    print(fitted := fit(weight(markov.model), weight(markov.guide), schedules=annealed, lr=slower))
    simple = fit(regression.model, lambda x, lengths: None, lr=0.03)
    # 3. Bound log p(x) of held-out music by the ELBO, weighted draws and particle filters.
    per_step = float(test.lengths.double().mean())
    elbo = -pv.evaluate(markov.model, markov.guide, held_out, num_samples=20)["elbo"] / per_step
    baseline = -pv.evaluate(regression.model, lambda x, lengths: None, held_out)["elbo"] / per_step
    found = bounds(markov, test, args.particles, args.seed)
    often = dist.Bernoulli(frequencies).log_prob(test.x[in_piece(test.x, test.lengths)]).sum(-1).mean()
    rows: dict[str, dict[str, float]] = {"how often each key sounds": {"nats": -float(often)}}
    rows["from the step before"] = {"nats": baseline, "seconds": simple.seconds}
    rows["deep Markov model, ELBO"] = {"nats": elbo, "seconds": fitted.seconds}
    rows |= {f"deep Markov model, {name}": {"nats": list(each.values())[-1]} for name, each in found.items()}
    print(text := common.table("", rows, COLUMNS, NOTES.format(draws=list(found["particle filter, prior"])[-1])))
    # 4. Draw held-out music and music from the model, and keep draws of z for ArviZ.
    piece = test.x[longest := int(test.lengths.argmax()), : test.lengths[longest]]
    pieces = {"A held-out piece": piece, "A piece drawn from the model": markov.compose(len(piece))}
    figures = {"pieces": draw_pieces(pieces), "bounds": draw_bounds(found, elbo, baseline)}
    tree = common.make_tree(markov, test.x[:10], args, test.lengths[:10])
    headline = common.headline(
        "-log p(x) of held-out music", "nats per step", min(list(each.values())[-1] for each in found.values()),
        baseline=baseline, baseline_name="logistic regression on the step before", higher_is_better=False,
        published="6.39 on the JSB chorales (Krishnan et al. 2017); 6.87, an ELBO, by Pyro's tutorial on the same data",
        differences="own chord progressions of 12 to 24 steps, not the chorales, whose entropy is another one",
    )  # fmt: skip
    results = {"rows": rows, "bounds": found, "history": fitted.history, "engine": str(fitted.engine)}
    common.save(args, results, figures, {"music": tree}, text, [headline])


if __name__ == "__main__":
    main(parse_args())
