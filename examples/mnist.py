"""
A VAE on MNIST
==============

The 784-512-2 VAE of most tutorials. Its two latent dimensions can be shown in one picture. Options change the size,
the networks (fully connected or convolutional), the likelihood and its pixels (resampled, thresholded or grey), the
prior and the guide. It is evaluated on held-out images, in nats per image: the ELBO, and log p(x) estimated with 1000
draws from q(z|x).
"""

import argparse
from collections.abc import Callable
from functools import partial

import common
import pyro
from torch import nn

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, priors

Parts = dict[str, Callable[..., nn.Module]]

PRIORS: Parts = {
    "standard-normal": priors.StandardNormal,
    "normal": priors.Normal,
    "relaxed-bernoulli": partial(priors.RelaxedBernoulli, temperature=0.5),
}
GUIDES: Parts = {
    "diagonal-normal": guides.DiagonalNormal,
    "relaxed-bernoulli": partial(guides.RelaxedBernoulli, temperature=0.66),
}
LIKELIHOODS: Parts = {
    "bernoulli": likelihoods.Bernoulli,
    "continuous-bernoulli": likelihoods.ContinuousBernoulli,
    "normal": likelihoods.Normal,
}
PIXELS = {"resample": datasets.resample, "threshold": datasets.binarize, "none": datasets.grey}

PUBLISHED = """
For comparison: the published -86.8 is log p(x) of resampled pixels with 50 latent dimensions after a very long training
(VAE; Burda et al. 2016, Table 1). Two dimensions carry less. Tutorials print losses of about 150: these are a
cross-entropy on grey pixels, which is no log-likelihood (docs/losses.md)."""


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "mnist", epochs=10)
    common.add_images(parser, default="mnist")
    common.add_training(parser, batch_size=128, lr=2e-3)
    parser.add_argument("--latent", type=common.positive_int, default=2, help="dimensions of z")
    parser.add_argument("--network", choices=["mlp", "convolutional"], default="mlp", help="encoder and decoder")
    sizes = "units of the encoder's hidden layers; the decoder has them in reverse order"
    parser.add_argument("--hidden", type=common.positive_int, nargs="+", default=[512], help=sizes)
    channels = "channels of the convolutional layers"
    parser.add_argument("--channels", type=common.positive_int, nargs="+", default=[32, 64], help=channels)
    parser.add_argument("--prior", choices=PRIORS, default="standard-normal", help="p(z)")
    parser.add_argument("--guide", choices=GUIDES, default="diagonal-normal", help="q(z|x)")
    parser.add_argument("--likelihood", choices=LIKELIHOODS, default="bernoulli", help="p(x|z)")
    pixels = (
        "resample: draw each pixel for each batch, 1 with its grey value as the probability (default for bernoulli); "
        "threshold: 1 if it is above 1/2; none: grey pixels, for likelihoods with a density (default for those)"
    )
    parser.add_argument("--binarization", choices=PIXELS, default=argparse.SUPPRESS, help=pixels)
    parser.add_argument("--samples", type=common.positive_int, default=1000, help="draws for log p(x) of each image")
    args = parser.parse_args()
    allowed = ["resample", "threshold"] if args.likelihood == "bernoulli" else ["none"]
    args.binarization = vars(args).get("binarization", allowed[0])
    if args.binarization not in allowed:
        expected = f"must be {' or '.join(allowed)} with --likelihood {args.likelihood}"
        parser.error(f"--binarization {expected}, got {args.binarization}")
    return args


def image_vae(args: argparse.Namespace, shape: tuple[int, int]) -> pv.VAE:
    """Make the VAE of the options."""
    pixels = shape[0] * shape[1]
    encode, decode = networks.mlp(args.hidden), networks.mlp(args.hidden[::-1])
    if args.network == "convolutional":
        encode = networks.convolutional((1, *shape), args.channels)
        decode = networks.deconvolutional((1, *shape), args.channels[::-1])
    return pv.VAE(
        prior=PRIORS[args.prior](args.latent),
        encoder=GUIDES[args.guide](pixels, args.latent, network=encode),
        decoder=LIKELIHOODS[args.likelihood](args.latent, pixels, network=decode),
    )


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Read the images, build the VAE that the options describe, and train it. Pixels are drawn again in each
    # epoch.
    train, test, shape = common.load_images(args.data, args.folder)
    pixels = PIXELS[args.binarization]
    vae = image_vae(args, shape)
    options = common.training_options(args)
    fitted = pv.fit(vae.model, vae.guide, train.x, validation=test.x, transform=pixels, **options)

    # 2. Evaluate on held-out images: ELBO, and log p(x) from many draws of q(z|x).
    # A relaxed VAE is evaluated as its discrete twin, the model with hard codes.
    if {args.prior, args.guide} == {"relaxed-bernoulli"}:
        vae = vae.discrete()
    x, labels = pixels(test.x), test.labels
    few = x[: args.test_images]
    terms = pv.evaluate(vae.model, vae.guide, x, num_samples=10, seed=args.seed)
    elbo_of_few = pv.evaluate(vae.model, vae.guide, few, num_samples=100, seed=args.seed)["elbo"]
    drawn = {"num_samples": args.samples, "seed": args.seed, "compile": args.compile}
    estimate = pv.log_evidence(vae.model, vae.guide, few, **drawn)
    log_p, ess = estimate.log_evidence, estimate.ess.median()
    error = estimate.standard_error.square().sum().sqrt() / len(log_p)
    spread = common.standard_error(log_p)
    split = f"-{terms['distortion']:.2f} (distortion) - {terms['rate']:.2f} (rate)".replace("--", "")
    print(
        f"{args.epochs} epochs, {fitted.seconds:.0f} s. On held-out images, nats per image of {x.shape[1]} pixels:\n"
        f"  all {len(x)} images: ELBO {terms['elbo']:.2f} = {split}\n"
        f"  {len(few)} of them: ELBO {elbo_of_few:.2f}, log p(x) {log_p.mean():.2f} from {args.samples} draws each,\n"
        f"    median ESS {ess:.0f}; standard error of the estimate {error:.2f}, over images {spread:.2f}"
    )
    if (args.data, args.binarization, args.latent) == ("mnist", "resample", 2):
        print(PUBLISHED)

    found = {
        **terms,
        "elbo_of_test_images": elbo_of_few,
        "log_p": float(log_p.mean()),
        "log_p_error_of_estimate": float(error),
        "log_p_standard_error_over_images": spread,
        "effective_draws": float(ess),
        "seconds": fitted.seconds,
        "history": fitted.history,
    }
    # 3. Draw training curves, latent map, reconstructions, samples and the manifold.
    figures = common.draw_images(vae, fitted.history, x, labels, shape)
    common.save(args, found, figures, {"mnist": common.image_tree(vae, x[:20], labels[:20], args)})


if __name__ == "__main__":
    main(parse_args())
