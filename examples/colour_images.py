"""
Colour images, in bits per dimension
====================================

How many bits does a model need for each colour of each pixel? The likelihood is a discretised logistic: a mass on the
256 levels of a colour, so that -log2 p(x) is the length of a code that loses nothing. Images have 32 × 32 pixels:
patches of two photographs, tested on other parts of them, and drawn shapes.

A ladder has L levels of latents, each a grid, the coarsest on top:

    p(x, z) = p(z_L) p(z_{L-1} | z_L) ... p(z_1 | z_2, ..., z_L) p(x | z_1, ..., z_L)

The guide goes the same way from the top down, and reads features of x that a network has computed from the bottom up.
With one level this is the usual convolutional VAE: under its prior the places of its 8 × 8 grid are independent. The
levels above learn how neighbours agree. Both have the same number of blocks of layers, and are trained alike. The
simple baseline is probabilistic PCA, whose density of the levels with uniform noise bounds their mass from below.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import common
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.nn import functional

import pyro_vae as pv
from pyro_vae import datasets, families, plots, schedules

IMAGE = (3, 32, 32)
HEADLINE: dict[str, Any] = {
    "unit": "bits per dimension", "higher_is_better": False,
    "published": "2.91 bits per dimension on CIFAR-10 (Vahdat and Kautz 2020, NVAE, abstract)",
    "differences": "there 50,000 photographs of objects and a deep network; here patches of two photographs, or shapes",
}  # fmt: skip
LEVELS, BLOCKS = 3, {1: (4,), 3: (2, 1, 1)}  # levels of the ladder; blocks of each level, up and down, by their number
NAMES = {1: "VAE, one level", LEVELS: f"ladder, {LEVELS} levels"}
DATA = "photographs", "shapes"
BITS = math.prod(IMAGE) * math.log(2)  # nats of one bit for each dimension


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "colour_images", epochs=6)
    common.add_training(parser, batch_size=32, lr=3e-3)
    common.add_evaluation(parser, test_images=100, draws=20)
    parser.add_argument("--images", type=common.positive_int, default=8000, help="images to train on, of each kind")
    parser.add_argument("--channels", type=common.positive_int, default=48, help="channels of the networks")
    parser.add_argument("--latent", type=common.positive_int, default=8, help="latents at each place of a grid")
    return parser.parse_args()


def load(kind: str, args: argparse.Namespace) -> list[Tensor]:
    sizes = (args.images, args.test_images)
    if kind == "photographs":
        both = [datasets.photograph_patches(split, stride=n).x for split, n in (("train", 4), ("test", 16))]
    else:
        both = [datasets.shapes(n, noise=10.0, seed=2 * args.seed + i).x for i, n in enumerate(sizes)]
    return [x[torch.randperm(len(x))[:n]].float().reshape(-1, *IMAGE) for x, n in zip(both, sizes, strict=True)]


def normalized(state: Tensor) -> Tensor:
    """Divide features by their root mean square over the channels, where it is large."""
    return state / (1 + state.square().mean(-3, keepdim=True)).sqrt()


def loc_and_scale(head: nn.Module, *states: Tensor) -> tuple[Tensor, Tensor]:
    """Bound log scales: else a patch unlike all others can cost more than the rest together."""
    loc, log_scale = head(torch.cat([normalized(state) for state in states], -3)).chunk(2, -3)
    return loc, (3 * (log_scale / 3).tanh()).exp()


class Block(nn.Conv2d):
    """Features, and what a convolution of the normalised ones adds to them."""

    def forward(self, state: Tensor) -> Tensor:
        return state + super().forward(functional.silu(normalized(state)))


class Ladder(nn.Module):
    """Grids of 8 × 8, 4 × 4, ... latents; the guide moves and scales the prior, as in Vahdat and Kautz 2020."""

    def __init__(self, name: str, levels: int, channels: int, latent: int):
        super().__init__()
        self.name, self.levels, half, same = name, levels, max(1, channels // 3), (channels, channels, 3, 1, 1)
        self.start = nn.Parameter(torch.zeros(channels, 8 >> (levels - 1), 8 >> (levels - 1)))

        def heads(inputs: int, outputs: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(inputs, outputs, 1) for _ in range(levels))

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(nn.Sequential(*(Block(*same) for _ in range(number))) for number in BLOCKS[levels])

        self.stem = nn.Sequential(nn.Conv2d(3, half, 2, 2), Block(half, half, 3, 1, 1), nn.Conv2d(half, channels, 2, 2))
        self.bottom_up, self.top_down = blocks(), blocks()
        self.priors, self.guides = heads(channels, 2 * latent), heads(2 * channels, 2 * latent)
        self.readers = heads(latent, channels)
        wide = (nn.Conv2d(channels, 4 * half, 1), nn.PixelShuffle(2), Block(half, half, 3, 1, 1), nn.SiLU())
        self.output = nn.Sequential(*wide, nn.Conv2d(half, 2 * 3 * 4, 1), nn.PixelShuffle(2))
        self.likelihood = families.DiscretizedLogisticMixture(IMAGE)

    def prior(self, level: int, state: Tensor) -> dist.TorchDistribution:
        return dist.Normal(*loc_and_scale(self.priors[level], state)).to_event(3)

    def posterior(self, level: int, state: Tensor, features: list[Tensor]) -> dist.TorchDistribution:
        prior, (step, ratio) = self.prior(level, state), loc_and_scale(self.guides[level], state, features[level])
        return dist.Normal(prior.mean + prior.stddev * step, prior.stddev * ratio).to_event(3)

    def features(self, x: Tensor) -> list[Tensor]:
        state, found = self.stem(x / 127.5 - 1), []
        for level, blocks in enumerate(self.bottom_up):
            state = blocks(functional.avg_pool2d(state, 2) if level else state)
            found.append(state)
        return found

    def descend(self, draw: Callable[..., Tensor], count: int) -> dist.TorchDistribution:
        """Draw the latents from the top down, and return p(x | z)."""
        state = self.start.expand(count, *self.start.shape)
        for level in reversed(range(self.levels)):
            state = self.top_down[level](state + self.readers[level](draw(level, state)))
            state = functional.interpolate(state, scale_factor=2) if level else state
        return self.likelihood(self.output(state).flatten(-3))

    def model(self, x: Tensor) -> None:
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=3)
            p = self.descend(lambda level, state: pyro.sample(f"z{level + 1}", self.prior(level, state)), len(x))
            pyro.sample("x", p, obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=3)
            features = self.features(x)
            self.descend(lambda level, s: pyro.sample(f"z{level + 1}", self.posterior(level, s, features)), len(x))


def principal_components(train: Tensor, x: Tensor, seed: int) -> Tensor:
    """Compute log p(x + uniform noise) by probabilistic PCA, with the number of components that is best for x."""
    base, held = ((each + torch.rand_like(each) - 0.5).flatten(1).double().numpy() for each in (train, x))
    fits = [PCA(n, svd_solver="randomized", random_state=seed).fit(base) for n in (16, 64, 256) if n < min(base.shape)]
    return max((torch.as_tensor(pca.score_samples(held)) for pca in fits), key=torch.mean)


def measured(log_p: Tensor, **more: Any) -> dict[str, Any]:
    """Return bits per dimension, and their standard error over images."""
    bits = -log_p / BITS
    return {"bits": bits.mean().item(), "error": common.standard_error(bits)} | more


@torch.no_grad()
def draw(kind: str, ladders: dict[int, Ladder], x: Tensor) -> dict[str, Figure]:
    """Draw reconstructions, samples of both models, and what the latents of the ladder's top level do."""
    ladder, top = ladders[LEVELS], LEVELS - 1
    features, start = ladder.features(x), ladder.start.expand(len(x), *ladder.start.shape)
    rebuilt = ladder.descend(lambda level, state: ladder.posterior(level, state, features).mean, len(x)).mean[:12]
    new = [each.descend(lambda level, s, of=each: of.prior(level, s).sample(), 12).mean for each in ladders.values()]
    names = ["held-out", f"reconstructed,\n{NAMES[LEVELS]}", *(f"new,\n{name}" for name in NAMES.values())]
    grid = plots.image_grid(torch.cat([x[:12], rebuilt, *new]) / 255, columns=12, row_names=names)
    prior, q = ladder.prior(top, start), ladder.posterior(top, start, features)
    largest = kl_divergence(q.base_dist, prior.base_dist).mean(0).flatten().argsort(descending=True)[:6].tolist()

    def decode(steps: Tensor) -> Tensor:
        z = prior.mean[:1] + prior.stddev[:1] * steps.reshape(-1, *prior.event_shape)
        return ladder.descend(lambda level, s: z if level == top else ladder.prior(level, s).mean, len(z)).mean / 255

    rows = plots.traversals(decode, ((q.mean - prior.mean) / prior.stddev)[0].flatten(), IMAGE, coordinates=largest)
    rows.set(yticklabels=[f"channel {i // 4}, row {i // 2 % 2}, column {i % 2}" for i in largest], ylabel="latent")
    moved = common.set_title(rows, "One latent of the top level moves, in standard deviations of the prior")
    return {kind: common.set_title(grid, f"Images of {kind}, and what the models make of them"), f"{kind}_moved": moved}


COLUMNS = {"bits/dim": "{bits:.3f} ± {error:.3f}", "ELBO": "{elbo:.3f}", "rate": "{rate:.0f}"}
COLUMNS |= {"weights": "{weights}", "s": "{seconds:.0f}"}
NOTES = """-log2 p(x) / 3072 on held-out images, ± the standard error over images; of VAEs and PCA an upper bound
ELBO in bits per dimension, with its sign changed; rate in nats per image; s: seconds of training"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    found, figures, trees, texts, headlines = {}, dict[str, Figure](), {}, "", []
    options = common.training_options(args) | {"elbo": TraceMeanField_ELBO(), "lr": schedules.decayed(args.lr)}
    for kind in DATA:
        # 1. Load training and held-out images, and measure the baseline.
        train, x = load(kind, args)
        rows, log_p, histories = {"PCA": measured(principal_components(train, x, args.seed))}, {}, {}
        # 2. Train a VAE with one level, and a ladder; bound log p(x) from below by importance sampling.
        ladders = {levels: Ladder(f"{kind}_{levels}", levels, args.channels, args.latent) for levels in NAMES}
        for (levels, pair), name in zip(ladders.items(), NAMES.values(), strict=True):
            fitted = pv.fit(pair.model, pair.guide, train, **options)
            terms = pv.evaluate(pair.model, pair.guide, x, num_samples=5, seed=args.seed)
            estimate = pv.log_evidence(pair.model, pair.guide, x, num_samples=50, seed=args.seed)
            log_p[levels], histories[name] = estimate.log_evidence, fitted.history
            more: dict[str, Any] = {"seconds": fitted.seconds, "weights": sum(w.numel() for w in pair.parameters())}
            more |= {"elbo": -terms["elbo"] / BITS, "rate": terms["rate"], "engine": fitted.engine}
            rows[name] = measured(estimate.log_evidence, **more)
        gain = measured(log_p[1] - log_p[LEVELS])
        note = f"image by image, the ladder saves {gain['bits']:.3f} ± {gain['error']:.3f} bits over one level"
        print(text := common.table(f"{kind}, 32 × 32 pixels", rows, COLUMNS, NOTES, note))
        # What the ladder gains over one level is in the table: it changes from run to run, and may be below 0.
        numbers = {"value": rows[NAMES[LEVELS]]["bits"], "baseline": rows["PCA"]["bits"], "baseline_name": "PCA"}
        headlines.append(common.headline(f"-log2 p(x) of {kind}, ladder", **numbers, **HEADLINE))
        found[kind] = {"models": rows, "gain": gain, "histories": histories}
        # 3. Draw images, and save draws of the latents.
        texts, figures = texts + text + "\n", figures | draw(kind, ladders, x)
        dims = {f"z{i}": [f"channel_{i}", f"row_{i}", f"column_{i}"] for i in range(1, LEVELS + 1)}
        trees[kind] = common.make_tree(ladders[LEVELS], x[:10], args, dims=dims | {"x": ["colour", "row", "column"]})
    common.save(args, found, figures, trees, texts.strip(), headlines)


if __name__ == "__main__":
    main(parse_args())
