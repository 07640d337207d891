"""
Comparison with published numbers
=================================

A VAE with 50 latent dimensions on MNIST with resampled pixels, and three ways to a tighter bound or a better model:
the importance-weighted bound with five draws, a VampPrior, and an inverse autoregressive flow as the guide. For each,
log p(x) of held-out images is estimated from thousands of draws and printed with the published number, whose model
was trained for much longer.
"""

import argparse
import math

import common
import pyro
import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, objectives, priors, schedules
from pyro_vae.handlers import WeightKL

METHODS = ["vae", "iwae", "vampprior", "flow"]
PUBLISHED = """
Published, log p(x) in nats: VAE -86.76, with five importance-weighted draws -85.54 (784-200-200-50, 5000 draws; Burda
et al. 2016, Table 1); one layer with a standard normal prior -84.50, with a VampPrior -82.38 (Tomczak and Welling
2018)."""


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "published", epochs=80)
    common.add_images(parser, default="mnist")
    common.add_training(parser, batch_size=128, lr=2e-3)
    count = common.positive_int
    methods = "several are compared"
    parser.add_argument("--method", nargs="+", choices=[*METHODS, "all"], default=["vae"], help=methods)
    parser.add_argument("--latent", type=count, default=50, help="dimensions of z")
    sizes = "units of the encoder's hidden layers; the decoder has them in reverse order"
    parser.add_argument("--hidden", type=count, nargs="+", default=[400, 400], help=sizes)
    parser.add_argument("--warm-up", type=count, default=10, help="epochs in which the weight of the KL rises to 1")
    parser.add_argument("--particles", type=count, default=5, help="draws of the importance-weighted bound")
    parser.add_argument("--pseudo-data", type=count, default=500, help="pseudo-data of the VampPrior")
    parser.add_argument("--samples", type=count, default=5000, help="draws for log p(x) of each image")
    args = parser.parse_args()
    args.method = METHODS if "all" in args.method else list(dict.fromkeys(args.method))
    return args


# 1. Prior and guide for each method: a standard normal or a VampPrior, a Gaussian guide or a flow.
def image_vae(args: argparse.Namespace, method: str, train: Tensor) -> pv.VAE:
    """Make a VAE with the prior and the guide of the method."""
    x = datasets.grey(train[:10_000])
    mean, pixels = x.mean(0), x.shape[1]
    encode = networks.standardized(networks.mlp(args.hidden, nn.SiLU), loc=mean)
    encoder: guides.DiagonalNormal | guides.InverseAutoregressiveFlow
    if method == "flow":
        encoder = guides.InverseAutoregressiveFlow(pixels, args.latent, encode, transforms=2, hidden=[200])
    else:
        encoder = guides.DiagonalNormal(pixels, args.latent, encode)
    prior: nn.Module = priors.StandardNormal(args.latent)
    if method == "vampprior":
        prior = priors.VampPrior(encoder, x[: args.pseudo_data])
    decode = networks.starting_at(networks.mlp(args.hidden[::-1], nn.SiLU), torch.logit(mean, eps=1e-3))
    decoder = likelihoods.Bernoulli(args.latent, pixels, decode)
    return pv.VAE(prior, encoder, decoder)


# 2. Train with KL annealing and a falling learning rate.
def train(args: argparse.Namespace, method: str, data: Tensor) -> tuple[pv.VAE, pv.Fitted]:
    """Train by a method, with KL annealing: the weight of the KL rises to 1, so that no dimension collapses early."""
    pyro.set_rng_seed(args.seed)
    vae = image_vae(args, method, data)
    elbo: ELBO = TraceMeanField_ELBO()
    if method == "iwae":
        elbo = objectives.ImportanceWeighted(args.particles, "doubly-reparameterized")
    beta = torch.tensor(0.0)
    weighted = WeightKL(beta)
    epoch = math.ceil(len(data) / args.batch_size)  # steps
    fitted = pv.fit(
        weighted(vae.model),
        weighted(vae.guide),
        data,
        transform=datasets.resample,
        elbo=elbo,
        schedules={beta: schedules.linear(0.0, 1.0, args.warm_up * epoch)},
        **common.training_options(args) | {"lr": schedules.decayed(args.lr)},
    )
    return vae, fitted


if __name__ == "__main__":
    options = parse_args()
    common.compare(options, "published", options.method, train)
    print(PUBLISHED)
