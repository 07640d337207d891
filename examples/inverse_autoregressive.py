"""
Inverse autoregressive flow
===========================

How much does a better q(z|x) gain, and is it worth its time? A VAE of binary MNIST digits with 32 latent dimensions and
residual convolutions is trained five times. Everything is the same but the family of the guide:

    diagonal         z = μ(x) + σ(x) ⊙ ε
    low-rank         z = μ(x) + σ(x) ⊙ (ε + V(x) η), with four columns V
    full covariance  z = μ(x) + σ(x) ⊙ (I + N(x)) ε, with N below the diagonal
    autoregressive   z = μ(x) + σ(x) ⊙ f(ε; h(x)), f of steps y_d ↦ m_d(y_1, ..., y_{d-1}, h) + s_d(...) · y_d
    spline           the same, with splines in place of these lines

Each step of f is a masked network that reads a context h(x) of the encoder: a draw and its density take one pass. The
diagonal guide is the baseline. The ELBO is log p(x) - KL(q(z|x) ‖ p(z|x)), so a richer family can gain twice: its bound
is tighter, and the decoder need not make its posteriors simple. log p(x) is estimated from draws of q and, on fewer
images, by annealing. The gap to the ELBO is split: the part that the best q of the family for each image leaves
(approximation), and what the network adds (amortization). Half the steps of that search show whether they suffice.
Kingma et al. (2016, "Improved variational inference with inverse autoregressive flow", section 6.1, Table 1) use such
a model for MNIST, with larger networks and one layer of 32 latent variables; their ladder of layers is for CIFAR-10.
Their ELBOs are -84.08 for a diagonal guide and -82.02 for two steps of 320 units. The flows need the extra zuko.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, plots, priors, schedules

DIAGONAL, FULL, FLOW = "diagonal", "full covariance", "autoregressive"


def parse_args() -> argparse.Namespace:
    count = common.positive_int
    parser = common.make_parser(__doc__, "inverse_autoregressive", epochs=5)
    common.add_images(parser, default="mnist")
    common.add_training(parser, batch_size=64, lr=2e-3)
    parser.add_argument("--train-images", type=count, default=60_000, help="images to train on")
    parser.add_argument("--latent", type=count, default=32, help="dimensions of z")
    parser.add_argument("--channels", type=count, default=16, help="channels of each convolution")
    parser.add_argument("--hidden", type=count, default=256, help="units of the dense layer of encoder and decoder")
    parser.add_argument("--width", type=count, default=320, help="units of each autoregressive network")
    parser.add_argument("--samples", type=count, default=100, help="draws for log p(x) of each image")
    parser.add_argument("--annealed-images", type=count, default=24, help="images for annealing and for the split")
    parser.add_argument("--steps", type=count, default=100, help="steps to the best q of each of these images")
    parser.add_argument("--temperatures", type=count, default=30, help="temperatures of annealed importance sampling")
    return parser.parse_args()


class Residual(nn.Module):
    """h ↦ h + two convolutions of h, each after an activation (He et al. 2016)."""

    def __init__(self, channels: int):
        super().__init__()
        layers = [layer for _ in range(2) for layer in (nn.ELU(), nn.Conv2d(channels, channels, 3, padding=1))]
        self.change = nn.Sequential(*layers)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.change(h)


def make_networks(shape: common.Shape, channels: int, hidden: int) -> tuple[networks.NetworkFactory, ...]:
    """Return the networks of encoder and decoder: residual convolutions on patches of 4 × 4 pixels."""
    patches, size = (channels, shape[0] // 4, shape[1] // 4), channels * shape[0] * shape[1] // 16

    def encode(in_features: int, out_features: int) -> nn.Module:
        convolutions = [nn.PixelUnshuffle(4), nn.Conv2d(16, channels, 3, padding=1), Residual(channels), nn.ELU()]
        dense = [nn.Flatten(), nn.Linear(size, hidden), nn.ELU(), nn.Linear(hidden, out_features)]
        return nn.Sequential(*convolutions, *dense)

    def decode(in_features: int, out_features: int) -> nn.Module:
        dense = [nn.Linear(in_features, hidden), nn.ELU(), nn.Linear(hidden, size), nn.Unflatten(1, patches)]
        convolutions = [Residual(channels), nn.ELU(), nn.Conv2d(channels, 16, 3, padding=1), nn.PixelShuffle(4)]
        return nn.Sequential(*dense, *convolutions)

    return networks.reshaped(encode, (1, *shape)), networks.reshaped(decode)


def make_guides(args: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    """Return the class of each guide, with its own options."""
    return {
        DIAGONAL: guides.DiagonalNormal,
        "low-rank": partial(guides.LowRankNormal, rank=min(4, args.latent)),
        FULL: guides.FullRankNormal,
        FLOW: partial(guides.InverseAutoregressiveFlow, transforms=2, hidden=[args.width], context=args.latent),
        "spline": partial(guides.SplineFlow, transforms=1, hidden=[args.width // 2], context=args.latent),
    }


def train(args: argparse.Namespace, vae: pv.VAE, x: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Train on resampled pixels; return the held-out ELBO after each epoch, and its seconds at the median pace."""
    times = [time.process_time()]
    options = common.training_options(args) | {"lr": schedules.decayed(args.lr), "validation": held_out}
    options |= {"transform": datasets.resample, "callbacks": [lambda epoch: times.append(time.process_time())]}
    fitted = pv.fit(vae.model, vae.guide, x, elbo=TraceMeanField_ELBO(), **options)
    lap = statistics.median(end - begin for begin, end in pairwise(times))
    history = {"elbo": fitted.history["validation_elbo"], "seconds": [lap * epoch for epoch in range(1, len(times))]}
    return {"steps": fitted.steps, "seconds": history["seconds"][-1], "engine": fitted.engine, "history": history}


def normal_of(vae: pv.VAE, x: Tensor) -> Callable[..., None]:
    """Return a guide of these images to anneal from: for each, a normal with the moments of 500 draws of q(z|x)."""
    with torch.no_grad():
        z = vae.encode(x).sample(torch.Size([500]))
    centred = (z - z.mean(0)).transpose(0, 1)
    mu, cov = z.mean(0), centred.transpose(1, 2) @ centred / len(z)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(pyro.subsample(mu, event_dim=1), pyro.subsample(cov, event_dim=2)))

    return guide


def measure(args: argparse.Namespace, vae: pv.VAE, x: Tensor) -> dict[str, float]:
    """Estimate ELBO and log p(x) from draws of q; of fewer images, log p(x) by annealing and the parts of the gap."""
    few, found = x[: args.annealed_images], dict[str, float]()
    options = {"lr": 0.1, "num_particles": 16, "num_samples": args.samples, "seed": args.seed}
    for name, steps in (("half", max(1, args.steps // 2)), ("amortization", args.steps)):
        split = pv.inference_gap(vae.model, vae.guide, few, steps=steps, **options)
        assert split.amortization is not None
        found[name] = split.amortization.mean().item()
    chains = {"num_chains": 10, "num_temperatures": args.temperatures, "num_leapfrog_steps": 3, "seed": args.seed}
    annealed = pv.annealed_log_evidence(vae.model, normal_of(vae, few), few, **chains)
    found["annealing_adds"] = (annealed.log_evidence - split.log_evidence).mean().item()
    found["annealed_gap"] = gap = (annealed.log_evidence - split.elbo).mean().item()
    found["approximation"] = gap - found["amortization"]
    return common.evaluate(vae, x, seed=args.seed, samples=args.samples) | found


def draw_time(rows: dict[str, dict[str, Any]]) -> Figure:
    """Draw the held-out ELBO of each guide against the time of training, and log p(x) at its end."""
    _, ax = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for index, (name, row) in enumerate(rows.items()):
        style, seconds, elbo = plots.colours.style(index), row["history"]["seconds"], row["history"]["elbo"]
        ax.plot(seconds, elbo, markersize=5, label=name, **style)
        ax.plot(seconds[-1], row["log_p"], "*", color=style["color"], markersize=13)
    shown = [elbo for row in rows.values() for elbo in row["history"]["elbo"][len(row["history"]["elbo"]) // 4 :]]
    ax.set_ylim(min(shown) - 0.5, max(row["log_p"] for row in rows.values()) + 0.7)
    ax.set(xlabel="seconds of training, on one core", ylabel="nats per held-out image (higher is better)")
    ax.plot([], [], "*", color="0.5", markersize=13, label="log p(x) at the end, of each guide")
    ax.legend(loc="lower right", fontsize=9)
    return common.set_title(ax, "Validation ELBO after each epoch, by the family of q(z|x)")


def draw_parts(rows: dict[str, dict[str, Any]]) -> Figure:
    """Draw the gap of each guide as two bars, one for each cause."""
    (figure, ax), left = plt.subplots(figsize=(8, 3.6), layout="constrained"), [0.0] * len(rows)
    for part, grey, why in (("approximation", "0.7", "too simple a family"), ("amortization", "0.95", "its network")):
        widths = [row[part] for row in rows.values()]
        bars = ax.barh([*rows], widths, left=left, color=grey, edgecolor="black", label=f"{part}: {why}", height=0.65)
        ax.bar_label(bars, fmt="%.1f", label_type="center")
        left = [one + other for one, other in zip(left, widths, strict=True)]
    ax.set(ylim=ax.get_ylim()[::-1], xlabel="log p(x) by annealing - ELBO, nats per image, first held-out images")
    figure.legend(loc="outside lower center", ncols=2)
    return common.set_title(ax, "What the ELBO of each guide lacks, by cause")


COLUMNS = {"ELBO": "{elbo:.2f}", "gains": "{gain_elbo:+.2f}", "log p(x)": "{log_p:.2f}", "gains ": "{gain_log_p:+.2f}"}
COLUMNS |= {"gap": "{annealed_gap:.2f}", "family": "{approximation:.2f}", "network": "{amortization:.2f}"}
COLUMNS |= {"half": "{half:.2f}", "seconds": "{seconds:.0f}", "ms/step": "{step:.1f}", "passes": "{passes:.0f} s"}
NOTES = """in nats per held-out image; gains are over the diagonal guide; log p(x): a lower bound, from draws of q
gap: log p(x) by annealing minus the ELBO, of the first images; family: approximation; network: amortization, also by
half the steps to the best q; seconds of training on one core, and until a guide passes the last diagonal ELBO"""
PAPER = "-82.02, and -84.08 with a diagonal guide (Kingma et al. 2016, Table 1, depth 2, width 320)"


def main(args: argparse.Namespace) -> None:
    # 1. Load MNIST; each training step draws the pixels again, with the grey values as probabilities.
    data, test, shape = common.load_images(args.data, args.folder)
    images, held_out = data.x[: args.train_images], test.x[: args.test_images]
    torch.manual_seed(args.seed)
    x, labels = datasets.resample(held_out), test.labels
    encode, decode = make_networks(shape, args.channels, args.hidden)
    vaes, rows = {}, {}
    for name, guide in make_guides(args).items():
        # 2. Build and train a VAE with each guide; nothing else differs.
        pyro.set_rng_seed(args.seed)
        decoder = likelihoods.Bernoulli(args.latent, x.shape[1], decode)
        vaes[name] = pv.VAE(priors.StandardNormal(args.latent), guide(x.shape[1], args.latent, encode), decoder)
        rows[name] = train(args, vaes[name], images, held_out)
        # 3. Measure the bound and log p(x) of held-out images, and what is between them.
        rows[name] |= measure(args, vaes[name], x)
        print(f"{name}: {rows[name]['seconds']:.0f} s, ELBO {rows[name]['elbo']:.2f}", flush=True)
    # 4. Compare with the diagonal guide: in nats, and by the time until its last ELBO is passed.
    for row in rows.values():
        history = zip(*row["history"].values(), strict=True)
        passed = [seconds for elbo, seconds in history if elbo > rows[DIAGONAL]["history"]["elbo"][-1]]
        row |= {"step": 1000 * row["seconds"] / row["steps"]} | ({"passes": passed[0]} if passed else {})
        row |= {f"gain_{key}": row[key] - rows[DIAGONAL][key] for key in ("elbo", "log_p")}
    coins = dist.Bernoulli(datasets.grey(images).mean(0).clamp(1e-3, 1 - 1e-3)).log_prob(x).sum(1).mean().item()
    print(text := common.table("guide", rows, COLUMNS, NOTES, f"independent pixels: log p(x) {coins:.1f}"))
    figures = {"time": draw_time(rows), "comparison": common.draw_elbos(rows), "parts": draw_parts(rows)}
    trees = {"inverse_autoregressive": common.image_tree(vaes[FLOW], x[:50], labels[:50][: len(x)], args)}
    less = f"here {args.epochs} passes over {len(images)} images, smaller networks and {len(x)} test images"
    options: dict[str, Any] = {"baseline": rows[DIAGONAL]["elbo"], "baseline_name": "diagonal guide"}
    options |= {"higher_is_better": True, "differences": less}
    headlines = [
        common.headline(f"held-out ELBO, {name} guide", "nats per image", rows[name]["elbo"], published=ref, **options)
        for name, ref in ((FLOW, PAPER), (FULL, "no figure found"))
    ]
    common.save(args, {"guides": rows, "independent": coins}, figures, trees, text, headlines)


if __name__ == "__main__":
    main(parse_args())
