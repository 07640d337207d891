"""
Beside the published figures
============================

A VAE of 50 latent dimensions on MNIST with resampled pixels, and three ways to a tighter bound or a better model: the
importance-weighted bound of five draws, a VampPrior, an inverse autoregressive flow as the guide. Each is judged by log
p(x) of held-out images, from thousands of draws each, beside the published figure, which was trained for much longer.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "published", epochs=80)
    options.add_images(parser, default="mnist")
    options.add_training(parser, batch_size=128, lr=2e-3)
    options.add_choices(parser, "--method", "vae", "iwae", "vampprior", "flow", meaning="several are compared")
    parser.add_argument("--latent", type=options.count, default=50, help="dimensions of z")
    parser.add_argument("--hidden", type=options.count, nargs="+", default=[400, 400], help="of the encoder; mirrored")
    parser.add_argument("--warm-up", type=options.count, default=10, help="epochs in which the KL's weight rises to 1")
    parser.add_argument("--particles", type=options.count, default=5, help="draws of the importance-weighted bound")
    parser.add_argument("--pseudo-data", type=options.count, default=500, help="of the VampPrior")
    parser.add_argument("--samples", type=options.count, default=5000, help="draws for log p(x) of each image")
    args = parser.parse_args()

import argparse
from functools import partial

import pyro
import runs
import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, objectives, priors, schedules
from pyro_vae.handlers import WeightKL

PUBLISHED = """
Published, log p(x) in nats: VAE -86.76, with five importance-weighted draws -85.54 (784-200-200-50, 5000 draws; Burda
et al. 2016, Table 1); one layer with a standard normal prior -84.50, with a VampPrior -82.38 (Tomczak and Welling
2018)."""


def image_vae(args: argparse.Namespace, method: str, train: Tensor) -> pv.VAE:
    """A VAE whose prior or guide is the one that the method is about."""
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
    decoder = likelihoods.Bernoulli(args.latent, pixels, networks.mlp(args.hidden[::-1], nn.SiLU))
    runs.start_at(decoder, mean)
    return pv.VAE(prior, encoder, decoder)


def trained(args: argparse.Namespace, method: str, train: Tensor, test: Tensor) -> runs.Run:
    """Train by a method, with a weight of the KL that rises to 1, so that no dimension is given up early; and judge."""
    pyro.set_rng_seed(args.seed)
    vae = image_vae(args, method, train)
    elbo: ELBO = TraceMeanField_ELBO()
    if method == "iwae":
        elbo = objectives.ImportanceWeighted(args.particles, "doubly-reparameterized")
    beta = torch.tensor(0.0)
    weigh = WeightKL(beta)
    rising = {beta: schedules.linear(0.0, 1.0, args.warm_up * runs.steps_of_epoch(args, train))}
    training = runs.fit_resampled(args, weigh(vae.model), weigh(vae.guide), train, elbo=elbo, schedules=rising)
    return runs.judged(args, vae, training, test)


def main(args: argparse.Namespace) -> None:
    title, code = f"{args.latent} dimensions", f"{args.latent} numbers each"
    runs.compare(args, "published", args.method, title, code, partial(trained, args))
    print(PUBLISHED)


if __name__ == "__main__":
    main(args)
