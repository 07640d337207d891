"""
A VAE on MNIST
==============

The 784-512-2 VAE that most tutorials show: two latent dimensions, so that one can look at all of them. By option it is
another: of another size, with fully connected or convolutional networks, another likelihood and what that takes (pixels
resampled, thresholded or grey), another prior and guide. It is judged on held-out images, in nats per image: the ELBO,
and log p(x) estimated with 1000 draws from q(z|x).
"""

import argparse

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "mnist", epochs=10)
    options.add_images(parser, default="mnist")
    options.add_training(parser, batch_size=128, lr=2e-3)
    parser.add_argument("--latent", type=options.count, default=2, help="dimensions of z")
    options.add_choice(parser, "--network", "mlp", "convolutional", meaning="of encoder and decoder")
    sizes = "units of the encoder's hidden layers, the decoder's in reverse"
    parser.add_argument("--hidden", type=options.count, nargs="+", default=[512], help=sizes)
    parser.add_argument("--channels", type=options.count, nargs="+", default=[32, 64], help="of the convolutions")
    options.add_choice(parser, "--prior", "standard-normal", "normal", "relaxed-bernoulli", meaning="p(z)")
    options.add_choice(parser, "--guide", "diagonal-normal", "relaxed-bernoulli", meaning="q(z|x)")
    options.add_choice(parser, "--likelihood", "bernoulli", "continuous-bernoulli", "normal", meaning="p(x|z)")
    pixels = "resample: 1 with the grey value as probability, drawn anew for each batch (default for a Bernoulli); "
    pixels += "threshold: 1 where it is above 1/2; none: grey, for likelihoods with a density on it (default for those)"
    parser.add_argument(
        "--binarization", choices=["resample", "threshold", "none"], default=argparse.SUPPRESS, help=pixels
    )
    parser.add_argument("--samples", type=options.count, default=1000, help="draws for log p(x) of each image")
    args = parser.parse_args()
    has_mass = args.likelihood == "bernoulli"
    args.binarization = vars(args).get("binarization", "resample" if has_mass else "none")
    if has_mass == (args.binarization == "none"):
        accepted = "resample, threshold" if has_mass else "none"
        parser.error(f"--binarization {args.binarization}: accepted with --likelihood {args.likelihood} is {accepted}")

from collections.abc import Callable
from functools import partial

import images
import pyro
import results
import runs
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
For the order of magnitude: the published -86.8 is log p(x) of resampled pixels with 50 latent dimensions, after a very
long training (VAE; Burda et al. 2016, Table 1). Two dimensions hold less: tutorials print losses around 150, which are
a cross-entropy on grey pixels and no log-likelihood (docs/losses.md)."""


def image_vae(args: argparse.Namespace, shape: tuple[int, int]) -> pv.VAE:
    """The VAE that the options ask for."""
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
    train, test, shape = images.load(args.data, args.folder)
    pixels = PIXELS[args.binarization]
    vae = image_vae(args, shape)
    fitted = runs.fit(args, vae.model, vae.guide, train.x, validation=test.x, transform=pixels)

    # A relaxed VAE is judged as the discrete one that it stands for.
    judged = vae.discrete() if {args.prior, args.guide} == {"relaxed-bernoulli"} else vae
    x, labels = pixels(test.x), test.labels
    few = x[: args.test_images]
    terms = pv.evaluate(judged.model, judged.guide, x, num_samples=10, seed=args.seed)
    elbo_of_few = pv.evaluate(judged.model, judged.guide, few, num_samples=100, seed=args.seed)["elbo"]
    drawn = {"num_samples": args.samples, "seed": args.seed, "compile": args.compile}
    estimate = pv.log_evidence(judged.model, judged.guide, few, **drawn)
    log_p, ess = estimate.log_evidence, estimate.ess.median()
    error = estimate.standard_error.square().sum().sqrt() / len(log_p)  # of the estimate
    spread = log_p.std() / len(log_p) ** 0.5  # standard error of the mean over images
    split = f"-{terms['distortion']:.2f} (distortion) - {terms['rate']:.2f} (rate)".replace("--", "")
    report = [
        f"{args.epochs} epochs, {fitted.seconds:.0f} s. Held out, in nats per image of {x.shape[1]} pixels:",
        f"  all {len(x)} images: ELBO {terms['elbo']:.2f} = {split}",
        f"  {len(few)} of them: ELBO {elbo_of_few:.2f}, log p(x) {log_p.mean():.2f} from {args.samples} draws each,",
        f"    effective {ess:.0f} in the median; error of the estimate {error:.2f}, of the mean of images {spread:.2f}",
    ]
    print("\n".join(report))
    if (args.data, args.binarization, args.latent) == ("mnist", "resample", 2):
        print(PUBLISHED)

    found = {
        **terms,
        "elbo_of_test_images": elbo_of_few,
        "log_p": float(log_p.mean()),
        "log_p_error_of_estimate": float(error),
        "log_p_standard_error_over_images": float(spread),
        "effective_draws": float(ess),
        "seconds": fitted.seconds,
        "history": fitted.history,
    }
    figures = images.pictures(judged, fitted.history, x[:3000], labels[:3000], shape, f"{args.latent} numbers each")
    results.save(args, found, figures, {"mnist": images.tree(judged, x[:20], labels[:20], args.draws, args.seed)})


if __name__ == "__main__":
    main(args)
