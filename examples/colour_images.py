"""
Colour images, in bits per dimension
====================================

How many bits does a model need for each colour of each pixel? Pixels have 256 levels in red, green and blue. The
likelihood is a discretised logistic: a mass on the levels, so that -log2 p(x) is the length of a code that loses
nothing. Data are patches of 32 × 32 pixels from two photographs; the test patches are from other parts of them.

A ladder has L levels of latents, each a grid, the coarsest on top:

    p(x, z) = p(z_L) p(z_{L-1} | z_L) ... p(z_1 | z_2, ..., z_L) p(x | z_1, ..., z_L)

The guide goes the same way from the top down, and reads features of x that a network has computed from the bottom up.
With one level this is the usual convolutional VAE: under its prior the places of its 8 × 8 grid are independent. The
levels above learn how neighbours agree. The baselines are a histogram of each channel, and probabilistic PCA, whose
density of the levels with uniform noise bounds their mass from below.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional

import pyro_vae as pv
from pyro_vae import datasets, families, plots

IMAGE = (3, 32, 32)
HEADLINE: dict[str, Any] = {
    "quantity": "-log2 p(x) of photographs, ladder", "unit": "bits per dimension", "higher_is_better": False,
    "published": "2.91 bits per dimension on CIFAR-10 (Vahdat and Kautz 2020, NVAE, abstract)",
    "differences": "CIFAR-10 has 50,000 photographs of objects; here patches of two photographs, and few layers",
}  # fmt: skip
LEVELS = 3  # of the ladder
BITS = math.prod(IMAGE) * math.log(2)  # nats of one bit for each dimension


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "colour_images", epochs=7)
    common.add_training(parser, batch_size=64, lr=3e-3)
    common.add_evaluation(parser, test_images=100, draws=20)
    parser.add_argument("--channels", type=common.positive_int, default=48, help="channels of the networks")
    parser.add_argument("--latent", type=common.positive_int, default=8, help="latents at each place of a grid")
    parser.add_argument("--stride", type=common.positive_int, default=8, help="pixels between training patches")
    parser.add_argument("--samples", type=common.positive_int, default=50, help="draws for log p(x) of each image")
    return parser.parse_args()


class Ladder(nn.Module):
    """Grids of 8 × 8, 4 × 4, ... latents; the guide moves and scales the prior, as in Vahdat and Kautz 2020."""

    def __init__(self, levels: int, channels: int, latent: int):
        super().__init__()
        self.levels = levels
        self.stem = nn.Conv2d(3, channels, 4, stride=4)
        self.start = nn.Parameter(torch.zeros(channels, 8 >> (levels - 1), 8 >> (levels - 1)))

        def layers(inputs: int, outputs: int, size: int = 1) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(inputs, outputs, size, padding=size // 2) for _ in range(levels))

        self.bottom_up, self.top_down = layers(channels, channels, 3), layers(channels, channels, 3)
        self.priors, self.guides = layers(channels, 2 * latent), layers(2 * channels, 2 * latent)
        self.readers = layers(latent, channels)
        with torch.no_grad():
            for head in (*self.priors, *self.guides):
                head.weight.mul_(0.1)  # all scales start near 1
        self.likelihood = families.DiscretizedLogisticMixture(IMAGE)
        self.output = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, 2 * 3 * 4 * 4, 1), nn.PixelShuffle(4))

    def prior(self, level: int, state: Tensor) -> dist.TorchDistribution:
        """p(z_level | the levels above), which have made the state."""
        loc, log_scale = self.priors[level](state).chunk(2, -3)
        return dist.Normal(loc, log_scale.exp()).to_event(3)

    def posterior(self, level: int, state: Tensor, features: list[Tensor]) -> dist.TorchDistribution:
        prior = self.prior(level, state)
        step, log_ratio = self.guides[level](torch.cat([state, features[level]], -3)).chunk(2, -3)
        return dist.Normal(prior.mean + prior.stddev * step, prior.stddev * log_ratio.exp()).to_event(3)

    def features(self, x: Tensor) -> list[Tensor]:
        state, found = self.stem(x / 127.5 - 1), []
        for level, layer in enumerate(self.bottom_up):
            state = functional.avg_pool2d(state, 2) if level else state
            state = state + layer(functional.silu(state))
            found.append(state)
        return found

    def descend(self, draw: Callable[[int, Tensor], Tensor], count: int) -> dist.TorchDistribution:
        """Draw the latents from the top down, and return p(x | z)."""
        state = self.start.expand(count, *self.start.shape)
        for level in reversed(range(self.levels)):
            state = state + self.readers[level](draw(level, state))
            state = state + self.top_down[level](functional.silu(state))
            state = functional.interpolate(state, scale_factor=2) if level else state
        return self.likelihood(self.output(state).flatten(-3))

    def model(self, x: Tensor) -> None:
        """p(z) p(x | z)."""
        pyro.module(f"ladder_{self.levels}", self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=3)
            p = self.descend(lambda level, state: pyro.sample(f"z{level + 1}", self.prior(level, state)), len(x))
            pyro.sample("x", p, obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        pyro.module(f"ladder_{self.levels}", self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=3)
            features = self.features(x)
            self.descend(lambda level, s: pyro.sample(f"z{level + 1}", self.posterior(level, s, features)), len(x))


def independent_colours(train: Tensor, x: Tensor) -> Tensor:
    """Compute log p(x) by the histogram of each channel, with one count more at each level."""
    log_p = torch.zeros(len(x))
    for channel in range(3):
        counts = train[:, channel].long().flatten().bincount(minlength=256) + 1.0
        log_p += (counts / counts.sum()).log()[x[:, channel].long()].sum((1, 2))
    return log_p


def principal_components(train: Tensor, x: Tensor, seed: int) -> Tensor:
    """Compute log p(x + uniform noise) by probabilistic PCA, with the number of components that is best for x."""
    noisy = [(each + torch.rand_like(each) - 0.5).flatten(1).double().numpy() for each in (train, x)]
    sizes = [size for size in (16, 64, 256) if size < min(noisy[0].shape)]
    fits = [PCA(size, svd_solver="randomized", random_state=seed).fit(noisy[0]) for size in sizes]
    return max((torch.as_tensor(pca.score_samples(noisy[1])) for pca in fits), key=torch.mean)


def measured(log_p: Tensor, **more: Any) -> dict[str, Any]:
    """Return bits per dimension, and their standard error over images."""
    bits = -log_p / BITS
    return {"bits": bits.mean().item(), "error": common.standard_error(bits)} | more


@torch.no_grad()
def draw(one: Ladder, several: Ladder, x: Tensor) -> Figure:
    """Draw reconstructions, and samples of both models."""

    def image(p: Any) -> Tensor:
        return p.mean / 255

    def generated(pair: Ladder) -> Tensor:
        return image(pair.descend(lambda level, state: pair.prior(level, state).sample(), 12))

    features = several.features(x[:12])
    rebuilt = image(several.descend(lambda level, state: several.posterior(level, state, features).mean, 12))
    rows = ["held-out", f"reconstructed,\n{LEVELS} levels", "new,\none level", f"new,\n{LEVELS} levels"]
    images = torch.cat([x[:12] / 255, rebuilt, generated(one), generated(several)])
    ax = plots.image_grid(images, columns=12, row_names=rows)
    return common.set_title(ax, "Patches of photographs, and what the models make of them")


def draw_bits(rows: dict[str, dict[str, Any]]) -> Figure:
    """Draw the bits per dimension of each model, with two standard errors."""
    figure, ax = plt.subplots(figsize=(7.5, 3.0), layout="constrained")
    bits, errors = [row["bits"] for row in rows.values()], [2 * row["error"] for row in rows.values()]
    bars = ax.barh(list(rows), bits, xerr=errors, color="0.75", edgecolor="black", capsize=4)
    ax.bar_label(bars, [f"{value:.2f}" for value in bits], label_type="center")
    ax.invert_yaxis()
    ax.set(xlim=(0, 8), xlabel="bits for each colour of a pixel: fewer are better, 8 need no model")
    ax.set_title("Held-out patches of photographs, ± two standard errors")
    return figure


COLUMNS = {"bits/dim": "{bits:.3f} ± {error:.3f}", "ELBO": "{elbo:.3f}", "rate": "{rate:.0f}", "s": "{seconds:.0f}"}
NOTES = """-log2 p(x) / 3072 on held-out patches, ± the standard error over patches; of VAEs and PCA an upper bound
ELBO in bits per dimension, with its sign changed; rate in nats per patch; s: seconds of training"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Load patches of photographs, as floats from 0 to 255.
    train = datasets.photograph_patches("train", stride=args.stride).x.float().reshape(-1, *IMAGE)
    x = datasets.photograph_patches("test", stride=16).x.float().reshape(-1, *IMAGE)
    x = x[torch.randperm(len(x))][: args.test_images]
    # 2. The baselines: no latents, and probabilistic PCA.
    rows: dict[str, dict[str, Any]] = {"independent colours": measured(independent_colours(train, x))}
    rows["probabilistic PCA"] = measured(principal_components(train, x, args.seed))
    # 3. Train a VAE with one level, and a ladder. The KL is computed in closed form, level by level.
    names = {1: "VAE, one level", LEVELS: f"ladder, {LEVELS} levels"}
    ladders = {levels: Ladder(levels, args.channels, args.latent) for levels in names}
    log_p, histories = {}, {}
    for levels, pair in ladders.items():
        fitted = pv.fit(pair.model, pair.guide, train, elbo=TraceMeanField_ELBO(), **common.training_options(args))
        terms = pv.evaluate(pair.model, pair.guide, x, num_samples=5, seed=args.seed)
        # 4. Estimate log p(x) by importance sampling, in expectation a lower bound.
        estimate = pv.log_evidence(pair.model, pair.guide, x, num_samples=args.samples, seed=args.seed)
        log_p[levels], histories[names[levels]] = estimate.log_evidence, fitted.history
        rows[names[levels]] = measured(estimate.log_evidence, engine=fitted.engine, seconds=fitted.seconds)
        rows[names[levels]] |= {"elbo": -terms["elbo"] / BITS, "rate": terms["rate"]}
    saved = (log_p[LEVELS] - log_p[1]) / BITS
    gain = {"bits": saved.mean().item(), "error": common.standard_error(saved)}
    note = f"patch by patch, the ladder saves {gain['bits']:.3f} ± {gain['error']:.3f} bits over one level"
    print(text := common.table("patches of 32 × 32 pixels", rows, COLUMNS, NOTES, note))
    # 5. Draw patches, and save draws of the latents.
    figures = {"bits": draw_bits(rows), "images": draw(ladders[1], ladders[LEVELS], x)}
    dims = {f"z{i}": [f"channel_{i}", f"row_{i}", f"column_{i}"] for i in range(1, LEVELS + 1)}
    tree = common.make_tree(ladders[LEVELS], x[:10], args, dims=dims | {"x": ["colour", "row", "column"]})
    headlines = [
        common.headline(baseline=rows[name]["bits"], baseline_name=name, value=rows[names[LEVELS]]["bits"], **HEADLINE)
        for name in ("probabilistic PCA", names[1])
    ]
    found = {"models": rows, "gain": gain, "histories": histories}
    common.save(args, found, figures, {"colour_images": tree}, text, headlines)


if __name__ == "__main__":
    main(parse_args())
