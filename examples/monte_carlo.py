"""
Naive Monte Carlo, and draws from the guide
===========================================

log p(x) is an expectation over the prior, so K draws from the prior estimate it. Draws from a trained guide, weighted
by p(x, z) / q(z|x), estimate it too, with fewer draws. A VAE with one Gaussian latent is trained on a mixture of two
Gaussians, and the error of both estimates is compared with quadrature.
"""

import argparse

import common
import pyro
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "monte_carlo", epochs=3000, unit="steps, on all 1000 points")
    parser.add_argument("--lr", type=common.positive_float, default=1e-2, help="learning rate of Adam")
    parser.add_argument("--test-points", type=common.positive_int, default=200, help="new points to evaluate on")
    parser.add_argument("--repeats", type=common.positive_int, default=20, help="estimates of each point")
    parser.add_argument("--largest", type=common.positive_int, default=4096, help="largest number of draws K")
    return parser.parse_args()


def gaussian_vae() -> pv.VAE:
    network = networks.mlp([32], activation=nn.Tanh)
    encoder = guides.DiagonalNormal(in_features=2, latent=1, network=network)
    return pv.VAE(priors.StandardNormal(1), encoder, likelihoods.Normal(latent=1, out_features=2, network=network))


@torch.no_grad()
def estimation_error(vae: pv.VAE, x: Tensor, draws: int, repeats: int, from_prior: bool) -> float:
    """Compute the mean |log p̂(x) - log p(x)| of estimates with draws from the prior or from the guide."""
    proposal = vae.prior().expand([len(x)]) if from_prior else vae.encode(x)
    z = proposal.sample(torch.Size([repeats, draws]))
    log_weight = vae.decode(z).log_prob(x) + vae.prior().log_prob(z) - proposal.log_prob(z)
    estimate = log_weight.logsumexp(1) - torch.tensor(draws).log()
    return float((estimate - pv.exact.log_evidence(vae.model, x)).abs().mean())


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Train a VAE with one Gaussian latent on points from two Gaussians.
    train = pv.datasets.two_gaussians(1000, seed=args.seed)
    test = pv.datasets.two_gaussians(args.test_points, seed=args.seed + 1)
    vae = gaussian_vae()
    fitted = pv.fit(vae.model, vae.guide, train.x, epochs=args.epochs, lr=args.lr, seed=args.seed)

    # 2. Estimate log p(x) from 1, 4, 16, ... draws of the prior and of the guide, and compare with quadrature.
    sizes = [4**power for power in range(7) if 4**power <= args.largest]
    errors = {
        name: [estimation_error(vae, test.x, size, args.repeats, name == "prior") for size in sizes]
        for name in ("prior", "q")
    }
    rows = {str(size): {name: errors[name][index] for name in errors} for index, size in enumerate(sizes)}
    columns = {"draws from the prior": "{prior:.4f}", "draws from q(z|x)": "{q:.4f}"}
    text = common.table("K", rows, columns, "mean |error| of log p(x), nats per point")
    print(text)
    lines = {"draws from the prior": (sizes, errors["prior"]), "draws from q(z|x), weighted": (sizes, errors["q"])}
    axis = {"xscale": "log", "yscale": "log", "xlabel": "draws K", "ylabel": "mean |error| of log p(x), nats"}
    figures = {"monte_carlo": common.draw_lines(lines, title="Error of log p(x)", **axis)}
    found = {"samples": sizes, "errors": errors, "seconds": fitted.seconds}
    common.save(args, found, figures, {}, text)


if __name__ == "__main__":
    main(parse_args())
