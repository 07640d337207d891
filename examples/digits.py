"""
Handwritten digits, with the exact answer
=========================================

A first VAE on real images: the 1797 digits of 8 × 8 pixels that come with scikit-learn, a Gaussian latent of two
dimensions and a Bernoulli likelihood. It is trained on 1500 digits. On the other 297 the ELBO is compared with the
exact log p(x), which quadrature gives for a latent of two dimensions.
"""

import argparse

import common
import pyro
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "digits", epochs=150)
    common.add_evaluation(parser, test_images=297, draws=500)
    common.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--hidden", type=common.positive_int, default=128, help="hidden units of each network")
    return parser.parse_args()


# 1. A prior, an encoder and a decoder: a latent of two dimensions, and pixels that are 0 or 1.
def digits_vae(hidden: int) -> pv.VAE:
    network = networks.mlp([hidden], activation=nn.Tanh)
    return pv.VAE(
        prior=priors.StandardNormal(2),
        encoder=guides.DiagonalNormal(in_features=64, latent=2, network=network),
        decoder=likelihoods.Bernoulli(latent=2, out_features=64, network=network),
    )


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 2. Read 1500 digits to train on, and others to evaluate on. Train.
    train, test, shape = common.load_binary_images("digits", test_images=args.test_images)
    x, labels = test.x, test.labels
    vae = digits_vae(args.hidden)
    fitted = pv.fit(vae.model, vae.guide, train.x, validation=x, **common.training_options(args))

    # 3. Compute log p(x) of held-out digits by quadrature, and compare the ELBO with it.
    evidence = pv.exact.log_evidence(vae.model, x, tolerance=1e-3)
    elbo = pv.exact.elbo(vae.model, vae.guide, x, tolerance=1e-3)
    found = {
        "log_p": float(evidence.mean()),
        "log_p_standard_error": common.standard_error(evidence),
        "elbo": float(elbo.mean()),
        "kl": float((evidence - elbo).mean()),
        "seconds": fitted.seconds,
        "history": fitted.history,
    }
    print(f"On {len(x)} held-out digits, in nats per image of 64 binary pixels, by quadrature over the 2-D latent:")
    print(f"  exact log p(x)  {found['log_p']:.3f} ± {found['log_p_standard_error']:.3f} (standard error)")
    print(f"  ELBO            {found['elbo']:.3f}")
    print(f"  gap, KL(q || p) {found['kl']:.3f}")

    # 4. Draw the pictures, and write draws of z for ArviZ.
    figures = common.draw_images(vae, fitted.history, x, labels, shape)
    common.save(args, found, figures, {"digits": common.image_tree(vae, x, labels, args)})


if __name__ == "__main__":
    main(parse_args())
