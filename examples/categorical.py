"""
Gumbel-softmax classes of images
================================

A VAE whose latent is categorical: each image falls into one of twenty classes, or has several such variables. It is
trained relaxed, by the Gumbel-softmax with its temperature annealed, and judged on its discrete twin: the model with
the same parameters and hard classes, whose log p(x), ELBO and posterior are sums over all states.

The prior is colder than the guide. As a code gets surer its logits grow, and the relaxed KL grows with them, by about
t_prior / t_guide nats for each unit, where the discrete KL never exceeds log k. At equal temperatures that charge is
more than these codes are worth, and they say nothing at all. So the relaxed ELBO is far below that of the twin, and the
twin is what counts.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "categorical", epochs=150)
    options.add_images(parser, default="digits")
    options.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--variables", type=options.count, default=1, help="categorical variables of an image")
    parser.add_argument("--classes", type=options.count, default=20, help="classes of each variable")
    parser.add_argument("--hidden", type=options.count, nargs="+", default=[256], help="units of the hidden layers")
    parser.add_argument("--temperature", type=options.positive, default=1.0, help="of the guide, at the first step")
    parser.add_argument("--floor", type=options.positive, default=0.5, help="of the guide, from halfway on")
    parser.add_argument("--prior-temperature", type=options.positive, default=0.1, help="colder than the guide")
    args = parser.parse_args()
    if args.floor > args.temperature:
        parser.error(f"--floor {args.floor}: accepted is at most --temperature, {args.temperature}")

import argparse
import math

import clusters
import images
import matplotlib.pyplot as plt
import numpy as np
import pyro
import results
import runs
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import one_hot

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, plots, priors, schedules


@torch.no_grad()
def prototypes(vae: pv.VAE, num_others: int = 200) -> Tensor:
    """What each class of each variable decodes to, in the mean over the other variables, ``(n, k, pixels)``."""
    n, k = vae.prior().event_shape
    z = vae.prior().sample(torch.Size([num_others if n > 1 else 1])).expand(n, k, -1, -1, -1).clone()
    for variable in range(n):
        z[variable, :, :, variable] = one_hot(torch.arange(k), k).to(z.dtype)[:, None]
    return vae.decode(z).mean.mean(2)


def draw_classes(means: Tensor, shares: Tensor, shape: tuple[int, int]) -> Figure:
    """The prototype of each class under its share of the images, a row or two for each variable, largest first."""
    n, k = shares.shape
    columns = k if n > 1 else math.ceil(k / 2)
    rows = math.ceil(n * k / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(0.95 * columns, 1.25 * rows + 0.5), layout="constrained")
    order = shares.argsort(1, descending=True)
    for index, ax in enumerate(np.ravel(axes)):
        ax.set_axis_off()
        if index < n * k:
            variable, place = divmod(index, k)
            chosen = order[variable, place]
            plots.image_grid(means[variable, chosen].reshape(1, *shape), 1, ax)
            ax.set_title(f"#{int(chosen)}: {shares[variable, chosen]:.1%}", fontsize=9)
    figure.suptitle("What each class has learnt: its mean image, under its number and its share of the held-out images")
    return figure


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = images.load(args.data, args.folder)
    pixels, latent = train.x.shape[1], (args.variables, args.classes)
    prior = priors.GumbelSoftmax(latent, args.prior_temperature)
    encoder = guides.GumbelSoftmax(pixels, latent, networks.mlp(args.hidden), args.temperature)
    vae = pv.VAE(prior, encoder, decoder=likelihoods.Bernoulli(latent, pixels, networks.mlp(args.hidden[::-1])))

    halfway = args.epochs * runs.steps_of_epoch(args, train.x) / 2
    rate = math.log(args.temperature / args.floor) / halfway
    cooling = schedules.exponential(args.temperature, rate, args.floor)
    fitted = runs.fit(
        args,
        vae.model,
        vae.guide,
        train.x,
        validation=test.x,
        transform=datasets.binarize,
        schedules={encoder.get_buffer("family.temperature"): cooling},
    )

    twin = vae.discrete()
    x, labels = datasets.binarize(test.x)[: args.test_images], test.labels[: args.test_images]
    relaxed = pv.evaluate(vae.model, vae.guide, x, num_samples=20, seed=args.seed)["elbo"]
    if latent[1] ** latent[0] <= pv.exact.MAX_STATES:
        how = {"elbo": "by enumeration", "log_p": "by enumeration"}
        elbo = float(pv.exact.elbo(twin.model, twin.guide, x).mean())
        log_p = float(pv.exact.log_evidence(twin.model, x).mean())
    else:
        how = {"elbo": "with 20 draws for each", "log_p": "estimated with 1000 draws for each"}
        elbo = pv.evaluate(twin.model, twin.guide, x, num_samples=20, seed=args.seed)["elbo"]
        log_p = float(pv.log_evidence(twin.model, twin.guide, x, seed=args.seed).log_evidence.mean())
    with torch.no_grad():
        posterior = twin.encode(x).mean  # (N, n, k)
    pure = clusters.same_label(posterior[:, 0], labels)
    print(
        f"On {len(x)} held-out images of {pixels} binary pixels, {latent[0]} × {latent[1]} classes, in nats per image:"
    )
    print(f"  ELBO of the relaxed model {relaxed:8.2f}")
    print(f"  ELBO of its discrete twin {elbo:8.2f}  {how['elbo']}")
    print(f"  log p(x) of the twin      {log_p:8.2f}  {how['log_p']}")
    print(f"  {pure:.1%} of the images have the label that is most frequent in their class")

    found = {
        "relaxed_elbo": relaxed,
        "elbo": elbo,
        "log_p": log_p,
        "kl": log_p - elbo,
        "same_label": pure,
        "seconds": fitted.seconds,
        "history": fitted.history,
    }
    figures = {
        "classes": draw_classes(prototypes(twin), posterior.mean(0), shape),
        "labels": images.draw_classes_of_labels(
            posterior[:, 0], labels, "Where held-out images of each label fall: mean q(z|x)"
        ),
    }
    figures |= images.pictures(twin, fitted.history, x, labels, shape, f"{latent[0]} × {latent[1]} classes")
    tree = images.tree(twin, x[:50], labels[:50], args.draws, args.seed)
    results.save(args, found, figures, {"categorical": tree})


if __name__ == "__main__":
    main(args)
