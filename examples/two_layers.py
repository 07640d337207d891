"""
Two layers of latents
=====================

z2 → z1 → x: the prior of the code z1 is itself a VAE with the latent z2. The guide is bottom-up, q(z1|x) q(z2|z1), or
top-down, q(z2|x) q(z1|x, z2), where q(z1|x, z2) is a product of q(z1|x) and p(z1|z2). Each is trained with and
without KL annealing and compared with a VAE with the same z1 and networks and without z2.

A layer often collapses: its guide equals its prior, and its rate is zero. On the 8 × 8 digits this is z1 of the
top-down guide; KL annealing recovers a part of it. Rates are KLs in nats; bottom-up, only the sum of both rates is a
KL.
"""

import argparse
import math
from typing import Any

import common
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import families, guides, likelihoods, networks, plots, priors, schedules
from pyro_vae.handlers import WeightKL
from pyro_vae.parts import Conditional


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "two_layers", epochs=150)
    common.add_images(parser, default="digits")
    common.add_training(parser, batch_size=100, lr=2e-3)
    parser.add_argument("--hidden", type=common.positive_int, default=128, help="units of each hidden layer")
    parser.add_argument(
        "--latent", type=common.positive_int, nargs=2, default=[8, 2], help="dimensions of z1 and of z2"
    )
    parser.add_argument(
        "--warm-up", type=common.positive_int, default=50, help="epochs in which the weight of the KL rises to 1"
    )
    parser.add_argument("--samples", type=common.positive_int, default=1000, help="draws for log p(x) of each image")
    return parser.parse_args()


class TwoLayers(nn.Module):
    """Top-down after Sønderby et al. 2016, "Ladder variational autoencoders", section 2.2."""

    def __init__(self, name: str, pixels: int, latent: tuple[int, int], hidden: int):
        super().__init__()
        self.name, self.bottom_up, (z1, z2) = name, name.startswith("bottom-up"), latent
        network = networks.mlp([hidden], activation=nn.Tanh)
        code = families.Normal(z1)
        self.p_z2 = priors.StandardNormal(z2)
        self.p_z1 = Conditional(code, z2, network(z2, code.num_raw))
        self.p_x = likelihoods.Bernoulli(z1, pixels, network)
        self.q_z1 = guides.DiagonalNormal(pixels, z1, network)
        inputs, sizes = (z1, [hidden]) if self.bottom_up else (pixels, [hidden, hidden])
        self.q_z2 = guides.DiagonalNormal(inputs, z2, networks.mlp(sizes, activation=nn.Tanh))

    def model(self, x: Tensor) -> None:
        """p(z2) p(z1|z2) p(x|z1)."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z2 = pyro.sample("z2", self.p_z2())
            z1 = pyro.sample("z1", self.p_z1(z2))
            pyro.sample("x", self.p_x(z1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Bottom-up q(z1|x) q(z2|z1), or top-down q(z2|x) q(z1|x, z2)."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            if self.bottom_up:
                z1 = pyro.sample("z1", self.q_z1(x))
                pyro.sample("z2", self.q_z2(z1))
            else:
                z2 = pyro.sample("z2", self.q_z2(x))
                pyro.sample("z1", product(self.q_z1(x), self.p_z1(z2)))


def product(first: Any, second: Any) -> dist.TorchDistribution:
    """Multiply two normals: the precision is the sum, and the mean is weighted by the precisions."""
    precision = 1 / first.variance + 1 / second.variance
    loc = (first.mean / first.variance + second.mean / second.variance) / precision
    return dist.Normal(loc, precision.rsqrt()).to_event(1)


@torch.no_grad()
def evaluate_layers(pair: Any, x: Tensor, seed: int) -> dict[str, float]:
    """Estimate the ELBO and the rate of each latent, E_q[log q - log p], from 50 draws, in nats per datum."""
    with torch.random.fork_rng():
        pyro.set_rng_seed(seed)
        with pyro.plate("draws", 50, dim=-2):
            q = poutine.trace(pair.guide).get_trace(x)
            p = poutine.trace(poutine.replay(pair.model, q)).get_trace(x)
    q.compute_log_prob()
    p.compute_log_prob()
    log_q, log_p = ({name: t.nodes[name].get("log_prob") for name in t.nodes} for t in (q, p))
    rates = {f"rate_{z}": (log_q[z] - log_p[z]).mean().item() for z in ("z", "z1", "z2") if z in q}
    return {"elbo": log_p["x"].mean().item() - sum(rates.values())} | rates


@torch.no_grad()
def draw(pair: TwoLayers, shape: common.Shape) -> Figure:
    """Draw rows with one z2 each; similar images in a row show that z2 determines the digit and z1 its style."""
    z1 = pair.p_z1(pair.p_z2().sample(torch.Size([8]))).sample(torch.Size([10])).transpose(0, 1)
    ax = plots.image_grid(pair.p_x(z1).mean.reshape(-1, *shape))
    return common.set_title(ax, f"{pair.name}: each row one z2 ~ p(z2) and ten z1 ~ p(z1|z2)")


ONE = "one layer"
TWO = ["bottom-up", "bottom-up, warm-up", "top-down", "top-down, warm-up"]
COLUMNS = {"log p(x)": "{log_p:.2f}", "over one layer": "{gain:+.2f} ± {gain_error:.2f}", "ELBO": "{elbo:.2f}"}
COLUMNS |= {"rate z1": "{rate_z1:.2f}", "rate z2": "{rate_z2:.2f}", "seconds": "{seconds:.0f}"}


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = common.load_binary_images(args.data, args.folder, args.test_images)
    x, pixels = test.x, test.x.shape[1]
    # 1. Build a VAE with one layer, and models with two layers: bottom-up and top-down guides.
    one = common.plain_vae(pixels, args.latent[0], networks.mlp([args.hidden], activation=nn.Tanh))
    pairs: dict[str, Any] = {ONE: one} | {name: TwoLayers(name, pixels, args.latent, args.hidden) for name in TWO}
    steps = args.warm_up * math.ceil(len(train.x) / args.batch_size)
    rows, histories, log_p = {}, {}, {}
    # 2. Train each, with and without KL annealing, and measure the rate of each layer and log p(x).
    for name, pair in pairs.items():
        beta = torch.tensor(0.0 if name.endswith("warm-up") else 1.0)
        options = common.training_options(args) | {"schedules": {beta: schedules.linear(beta.item(), 1.0, steps)}}
        weighted = WeightKL(beta)
        fitted = pv.fit(weighted(pair.model), weighted(pair.guide), train.x, validation=x, **options)
        histories[name], rows[name] = fitted.history, evaluate_layers(pair, x, args.seed)
        estimate = pv.log_evidence(pair.model, pair.guide, x, num_samples=args.samples, seed=args.seed)
        log_p[name] = estimate.log_evidence
        rows[name] |= {"log_p": log_p[name].mean().item(), "seconds": fitted.seconds}
        if name != ONE:
            gain = log_p[name] - log_p[ONE]
            rows[name] |= {"gain": gain.mean().item(), "gain_error": common.standard_error(gain)}
    # 3. Print the table, and draw samples of the best model.
    rows[ONE]["rate_z1"] = rows[ONE].pop("rate_z")
    print(text := common.table("model and guide", rows, COLUMNS, "in nats per held-out image; log p(x): a lower bound"))
    best = max(TWO, key=lambda name: rows[name]["log_p"])
    found = {"models": rows, "best_of_two_layers": best, "histories": histories}
    tree = common.image_tree(pairs[best], x[:50], test.labels[:50], args, z1=["code"], z2=["top"])
    common.save(args, found, {"samples_by_layer": draw(pairs[best], shape)}, {"two_layers": tree}, text)


if __name__ == "__main__":
    main(parse_args())
