"""
Two layers of latents, and what the second is used for
======================================================

z2 → z1 → x: the prior of the code z1 is itself a VAE, of a second latent z2. The guide is written bottom-up,
q(z1|x) q(z2|z1), and top-down, q(z2|x) q(z1|x, z2), where q(z1|x, z2) is what the image says of z1 times what the model
expects of it after z2. Each is trained with and without a warm-up of the KL, and stands beside a VAE of the same z1 and
the same networks that has no z2.

A layer is easily lost: where the guide falls onto the prior, the rate is zero, and there is one layer left. It need not
be the upper one: on the 8 × 8 digits it is z1 top-down, whose z2 has learnt to draw digits before z1 has anything to
add; the warm-up brings some of it back. The rates say how many nats each layer carries. That of z2 is a KL, never below
zero, and so is that of z1 top-down. Bottom-up z1 is charged after a z2 that has seen it; only the sum is then a KL.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "two_layers", epochs=150)
    options.add_images(parser, default="digits")
    options.add_training(parser, batch_size=100, lr=2e-3)
    parser.add_argument("--hidden", type=options.count, default=128, help="units of each hidden layer")
    parser.add_argument("--latent", type=options.count, nargs=2, default=[8, 2], help="dimensions of z1 and of z2")
    parser.add_argument("--warm-up", type=options.count, default=50, help="epochs in which the KL's weight rises to 1")
    parser.add_argument("--samples", type=options.count, default=1000, help="draws for log p(x) of an image")
    args = parser.parse_args()

import argparse
from typing import Any

import images
import pyro
import pyro.distributions as dist
import results
import runs
import torch
import two_layers_pictures as pictures
from torch import Tensor, nn

from pyro_vae import families, guides, likelihoods, networks, priors, schedules
from pyro_vae._utils.param_store import register
from pyro_vae.handlers import WeightKL
from pyro_vae.parts.base import Conditional


class TwoLayers(nn.Module):
    """Top-down after Sønderby et al. 2016, "Ladder variational autoencoders", section 2.2."""

    def __init__(self, name: str, pixels: int, latent: tuple[int, int], hidden: int):
        super().__init__()
        self.name, self.bottom_up = name, name.startswith("bottom-up")
        z1, z2 = latent
        network = networks.mlp([hidden], activation=nn.Tanh)
        code = families.Normal(z1)
        self.p_z2 = priors.StandardNormal(z2)
        self.p_z1 = Conditional(code, z2, network(z2, code.num_raw))
        self.p_x = likelihoods.Bernoulli(z1, pixels, network)
        self.q_z1 = guides.DiagonalNormal(pixels, z1, network)
        reads, sizes = (z1, [hidden]) if self.bottom_up else (pixels, [hidden, hidden])
        self.q_z2 = guides.DiagonalNormal(reads, z2, networks.mlp(sizes, activation=nn.Tanh))

    def model(self, x: Tensor) -> None:
        """p(z2) p(z1|z2) p(x|z1)."""
        register(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z2 = pyro.sample("z2", self.p_z2())
            z1 = pyro.sample("z1", self.p_z1(z2))
            pyro.sample("x", self.p_x(z1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The model's way back, q(z1|x) q(z2|z1), or its way, q(z2|x) q(z1|x, z2)."""
        register(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            if self.bottom_up:
                z1 = pyro.sample("z1", self.q_z1(x))
                pyro.sample("z2", self.q_z2(z1))
            else:
                z2 = pyro.sample("z2", self.q_z2(x))
                pyro.sample("z1", product(self.q_z1(x), self.p_z1(z2)))


def product(first: Any, second: Any) -> dist.TorchDistribution:
    """Two normals multiplied and normalised: precisions add up, and weight the means."""
    precision = 1 / first.variance + 1 / second.variance
    loc = (first.mean / first.variance + second.mean / second.variance) / precision
    return dist.Normal(loc, precision.rsqrt()).to_event(1)


ONE = "one layer"
TWO = ["bottom-up", "bottom-up, warm-up", "top-down", "top-down, warm-up"]
COLUMNS = {"log p(x)": "{log_p:.2f}", "over one layer": "{gain:+.2f} ± {gain_error:.2f}", "ELBO": "{elbo:.2f}"}
COLUMNS |= {"rate z1": "{rate_z1:.2f}", "rate z2": "{rate_z2:.2f}"}


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = images.binarized(args)
    x, pixels = test.x, test.x.shape[1]
    one = runs.plain_vae(pixels, args.latent[0], networks.mlp([args.hidden], activation=nn.Tanh))
    two = {name: TwoLayers(name, pixels, tuple(args.latent), args.hidden) for name in TWO}
    steps = args.warm_up * runs.steps_of_epoch(args, train.x)
    log_p: dict[str, Tensor] = {}
    rows, histories = {}, {}
    for name, pair in ({ONE: one} | two).items():
        beta = torch.tensor(0.0 if name.endswith("warm-up") else 1.0)
        rising = {beta: schedules.linear(beta.item(), 1.0, steps)}
        weigh = WeightKL(beta)
        fitted = runs.fit(args, weigh(pair.model), weigh(pair.guide), train.x, validation=x, schedules=rising)
        histories[name] = fitted.history
        rows[name], log_p[name] = runs.judge_layers(pair, x, args.seed, args.samples, than=log_p.get(ONE))
        rows[name]["seconds"] = fitted.seconds
        print(f"{name}: {fitted.seconds:.1f} s", flush=True)
    rows[ONE]["rate_z1"] = rows[ONE].pop("rate_z")
    note = f"in nats per held-out image, ± the standard error; log p(x) at least, by {args.samples} draws for each"
    report = results.table("model and guide", rows, COLUMNS, note)
    print(f"\n{report}")

    best = max(TWO, key=lambda name: rows[name]["log_p"])
    found = {"models": rows, "best_of_two_layers": best, "histories": histories}
    figures = pictures.draw(two, rows, histories, test, shape)
    tree = images.tree(two[best], x[:50], test.labels[:50], args.draws, args.seed, z1=["code"], z2=["top"])
    results.save(args, found, figures, {"two_layers": tree}, report)


if __name__ == "__main__":
    main(args)
