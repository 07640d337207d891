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
import math
from typing import Any

import images
import pyro
import pyro.distributions as dist
import results
import torch
import two_layers_pictures as pictures
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, families, guides, likelihoods, networks, priors, schedules
from pyro_vae.decomposition import log_density
from pyro_vae.handlers import WeightKL, latent_sites, register
from pyro_vae.parts import Conditional

ONE = "one layer"


class TwoLayers(nn.Module):
    """The model, z2 → z1 → x, and of the guide what both kinds have: what the image says of z1."""

    def __init__(self, name: str, pixels: int, latent: tuple[int, int], hidden: int):
        super().__init__()
        self.name = name
        z1, z2 = latent
        network = networks.mlp([hidden], activation=nn.Tanh)
        code = families.Normal(z1)
        self.p_z2 = priors.StandardNormal(z2)
        self.p_z1 = Conditional(code, z2, network(z2, code.num_raw))
        self.p_x = likelihoods.Bernoulli(z1, pixels, network)
        self.q_z1 = guides.DiagonalNormal(pixels, z1, network)

    def model(self, x: Tensor) -> None:
        """p(z2) p(z1|z2) p(x|z1)."""
        register(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z2 = pyro.sample("z2", self.p_z2())
            z1 = pyro.sample("z1", self.p_z1(z2))
            pyro.sample("x", self.p_x(z1), obs=x)


class BottomUp(TwoLayers):
    """With a guide that goes the model's way back."""

    def __init__(self, name: str, pixels: int, latent: tuple[int, int], hidden: int):
        super().__init__(name, pixels, latent, hidden)
        self.q_z2 = guides.DiagonalNormal(*latent, networks.mlp([hidden], activation=nn.Tanh))

    def guide(self, x: Tensor) -> None:
        """q(z1|x) q(z2|z1)."""
        register(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z1 = pyro.sample("z1", self.q_z1(x))
            pyro.sample("z2", self.q_z2(z1))

    def top(self, x: Tensor) -> dist.TorchDistribution:
        """q(z2|z1) at the mean of q(z1|x)."""
        return self.q_z2(self.q_z1(x).mean)


class TopDown(TwoLayers):
    """With a guide that goes the model's way: Sønderby et al. 2016, "Ladder variational autoencoders", section 2.2."""

    def __init__(self, name: str, pixels: int, latent: tuple[int, int], hidden: int):
        super().__init__(name, pixels, latent, hidden)
        self.q_z2 = guides.DiagonalNormal(pixels, latent[1], networks.mlp([hidden, hidden], activation=nn.Tanh))

    def guide(self, x: Tensor) -> None:
        """q(z2|x) q(z1|x, z2)."""
        register(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z2 = pyro.sample("z2", self.q_z2(x))
            pyro.sample("z1", product(self.q_z1(x), self.p_z1(z2)))

    def top(self, x: Tensor) -> dist.TorchDistribution:
        """q(z2|x)."""
        return self.q_z2(x)


def product(first: Any, second: Any) -> dist.TorchDistribution:
    """Two normals multiplied and normalised: precisions add up, and weight the means."""
    precision = 1 / first.variance + 1 / second.variance
    loc = (first.mean / first.variance + second.mean / second.variance) / precision
    return dist.Normal(loc, precision.rsqrt()).to_event(1)


def pairs(pixels: int, latent: tuple[int, int], hidden: int) -> dict[str, Any]:
    """The models side by side; a name that ends in "warm-up" is trained with one."""
    network = networks.mlp([hidden], activation=nn.Tanh)
    parts = guides.DiagonalNormal(pixels, latent[0], network), likelihoods.Bernoulli(latent[0], pixels, network)
    kinds = {"bottom-up": BottomUp, "top-down": TopDown}
    names = {f"{kind}{how}": kind for kind in kinds for how in ("", ", warm-up")}
    deep = {name: kinds[kind](name, pixels, latent, hidden) for name, kind in names.items()}
    return {ONE: pv.VAE(priors.StandardNormal(latent[0]), *parts, name=ONE)} | deep


@torch.no_grad()
def judge(pair: Any, x: Tensor, samples: int, seed: int) -> tuple[dict[str, float], Tensor]:
    """ELBO, log p(x) and the rate of each layer, E_q[log q - log p], in nats per image; log p(x) of each image."""
    pyro.set_rng_seed(seed)
    with pyro.plate("draws", 50, dim=-2):
        q = poutine.trace(pair.guide).get_trace(x)
        p = poutine.trace(poutine.replay(pair.model, q)).get_trace(x)
    rates = {
        name: float((log_density(site) - log_density(p.nodes[name])).mean()) for name, site in latent_sites(q).items()
    }
    log_p = pv.log_evidence(pair.model, pair.guide, x, num_samples=samples, seed=seed).log_evidence
    elbo = float(log_density(p.nodes["x"]).mean()) - sum(rates.values())
    rates = {"z1": rates["z"]} if "z" in rates else rates
    return {"log_p": float(log_p.mean()), "elbo": elbo} | {f"rate_{name}": rates[name] for name in rates}, log_p


def table(rows: dict[str, dict[str, float]], samples: int) -> str:
    lines = [
        f"{'model and guide':20s}{'log p(x)':>10s}{'over one layer':>16s}{'ELBO':>9s}{'rate z1':>9s}{'rate z2':>9s}"
    ]
    for name, row in rows.items():
        gain = f"{row['gain']:+.2f} ± {row['gain_error']:.2f}" if name != ONE else ""
        second = f"{row['rate_z2']:9.2f}" if name != ONE else ""
        lines.append(f"{name:20s}{row['log_p']:10.2f}{gain:>16s}{row['elbo']:9.2f}{row['rate_z1']:9.2f}{second}")
    lines.append(f"in nats per held-out image, ± the standard error; log p(x) by {samples} draws of the guide for each")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = images.load(args.data, args.folder)
    data = datasets.binarize(train.x)
    x, labels = datasets.binarize(test.x[: args.test_images]), test.labels[: args.test_images]
    models = pairs(data.shape[1], tuple(args.latent), args.hidden)
    steps = args.warm_up * math.ceil(len(data) / args.batch_size)
    rows: dict[str, dict[str, float]] = {}
    log_p: dict[str, Tensor] = {}
    histories = {}
    for name, pair in models.items():
        beta = torch.tensor(0.0 if "warm-up" in name else 1.0)
        weigh = WeightKL(beta)
        fitted = pv.fit(
            weigh(pair.model),
            weigh(pair.guide),
            data,
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            validation=x,
            schedules={beta: schedules.linear(float(beta), 1.0, steps)},
            seed=args.seed,
        )
        rows[name], log_p[name] = judge(pair, x, args.samples, args.seed)
        gain = log_p[name] - log_p[ONE]
        rows[name] |= {"gain": float(gain.mean()), "gain_error": float(gain.std() / len(gain) ** 0.5)}
        rows[name]["seconds"] = fitted.seconds
        histories[name] = fitted.history
        print(f"{name}: {fitted.seconds:.1f} s", flush=True)
    report = table(rows, args.samples)
    print(f"\n{report}")
    deep = {name: pair for name, pair in models.items() if name != ONE}
    figures = {
        "training": pictures.draw_training(histories),
        "rates": pictures.draw_rates(rows),
        "latent_maps": pictures.draw_maps(deep, x, labels),
        "samples_by_layer": pictures.draw_samples(deep, shape),
    }
    best = max(deep, key=lambda name: rows[name]["log_p"])
    drawn = pv.to_datatree(
        models[best].model,
        models[best].guide,
        x[:50],
        draws=args.draws,
        seed=args.seed,
        parallel=True,
        dims={"z1": ["code"], "z2": ["top"], "x": ["pixel"]},
        coords={"label": ("obs", labels[:50])},
    )
    found = {"models": rows, "best_of_two_layers": best, "histories": histories}
    results.save(args, found, figures, {"two_layers": drawn}, report)


if __name__ == "__main__":
    main(args)
