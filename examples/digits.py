"""
Handwritten digits, with the exact answer
=========================================

A first VAE on real images: the 1797 digits of 8 × 8 pixels that come with scikit-learn, a Gaussian latent of two
dimensions and a Bernoulli likelihood. It is fitted to 1500 of them; on the other 297 the held-out ELBO stands beside
the exact log p(x), which a latent of two dimensions allows.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "digits", epochs=150)
    options.add_digits(parser, test_images=297, draws=500)
    options.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--hidden", type=options.count, default=128, help="units of the hidden layer, each way")
    args = parser.parse_args()

import argparse

import images
import pyro
import results
import runs
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors


def digits_vae(hidden: int) -> pv.VAE:
    network = networks.mlp([hidden], activation=nn.Tanh)
    return pv.VAE(
        prior=priors.StandardNormal(2),
        encoder=guides.DiagonalNormal(in_features=64, latent=2, network=network),
        decoder=likelihoods.Bernoulli(latent=2, out_features=64, network=network),
    )


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = images.binarized(args)
    x, labels = test.x, test.labels
    vae = digits_vae(args.hidden)
    fitted = runs.fit(args, vae.model, vae.guide, train.x, validation=x)

    evidence = pv.exact.log_evidence(vae.model, x, tolerance=1e-3)
    elbo = pv.exact.elbo(vae.model, vae.guide, x, tolerance=1e-3)
    found = {
        "log_p": float(evidence.mean()),
        "log_p_standard_error": float(evidence.std() / len(evidence) ** 0.5),
        "elbo": float(elbo.mean()),
        "kl": float((evidence - elbo).mean()),
        "seconds": fitted.seconds,
        "history": fitted.history,
    }
    print(f"On {len(x)} held-out digits, nats per image of 64 binary pixels; both by quadrature over the 2-D latent:")
    print(f"  exact log p(x)  {found['log_p']:.3f} ± {found['log_p_standard_error']:.3f} (standard error)")
    print(f"  ELBO            {found['elbo']:.3f}")
    print(f"  gap, KL(q || p) {found['kl']:.3f}")

    figures = images.pictures(vae, fitted.history, x, labels, shape, "two numbers each")
    results.save(args, found, figures, {"digits": images.tree(vae, x, labels, args.draws, args.seed)})


if __name__ == "__main__":
    main(args)
