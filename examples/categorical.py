"""
Gumbel-softmax classes of images
================================

A VAE with a categorical latent: each image belongs to one of twenty classes, or has several such variables. It is
trained relaxed, by the Gumbel-softmax with an annealed temperature, and evaluated as its discrete twin: the model
with the same parameters and hard classes. Log p(x), ELBO and posterior of the twin are sums over all states.

The prior is colder than the guide. As a code becomes more certain, its logits grow, and the relaxed KL grows with
them, by about t_prior / t_guide nats for each unit, while the discrete KL is at most log k. At equal temperatures
this cost is more than these codes are worth, and they carry no information. So the relaxed ELBO is far below that of
the twin; the result is the twin.
"""

import argparse
import math

import common
import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import one_hot

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, plots, priors, schedules


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "categorical", epochs=150)
    common.add_images(parser, default="digits")
    common.add_training(parser, batch_size=100, lr=3e-3)
    count, positive = common.positive_int, common.positive_float
    parser.add_argument("--variables", type=count, default=1, help="categorical variables of an image")
    parser.add_argument("--classes", type=count, default=20, help="classes of each variable")
    parser.add_argument("--hidden", type=count, nargs="+", default=[256], help="units of the hidden layers")
    parser.add_argument("--temperature", type=positive, default=1.0, help="temperature of the guide at the first step")
    parser.add_argument("--floor", type=positive, default=0.5, help="temperature of the guide from halfway on")
    parser.add_argument("--prior-temperature", type=positive, default=0.1, help="temperature of the prior")
    args = parser.parse_args()
    if args.floor > args.temperature:
        parser.error(f"--floor must be at most --temperature, {args.temperature}, got {args.floor}")
    return args


@torch.no_grad()
def prototypes(vae: pv.VAE, num_others: int = 200) -> Tensor:
    """Decode each class of each variable, averaged over draws of the other variables, ``(n, k, pixels)``."""
    n, k = vae.prior().event_shape
    z = vae.prior().sample(torch.Size([num_others if n > 1 else 1])).expand(n, k, -1, -1, -1).clone()
    for variable in range(n):
        z[variable, :, :, variable] = one_hot(torch.arange(k), k).to(z.dtype)[:, None]
    return vae.decode(z).mean.mean(2)


def draw_prototypes(means: Tensor, shares: Tensor, shape: tuple[int, int]) -> Figure:
    """Draw the mean image of each class under its share of the images, the largest first."""
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
            plots.image_grid(means[variable, chosen].reshape(1, *shape), columns=1, ax=ax)
            ax.set_title(f"#{int(chosen)}: {shares[variable, chosen]:.1%}", fontsize=9)
    figure.suptitle("The mean image of each class, with its number and its share of the held-out images")
    return figure


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Build the VAE: relaxed classes in prior and encoder.
    train, test, shape = common.load_images(args.data, args.folder)
    pixels, latent = train.x.shape[1], (args.variables, args.classes)
    prior = priors.GumbelSoftmax(latent, args.prior_temperature)
    encoder = guides.GumbelSoftmax(pixels, latent, networks.mlp(args.hidden), args.temperature)
    vae = pv.VAE(prior, encoder, decoder=likelihoods.Bernoulli(latent, pixels, networks.mlp(args.hidden[::-1])))

    # 2. Train it, while the temperature falls to its floor.
    halfway = args.epochs * math.ceil(len(train.x) / args.batch_size) / 2
    rate = math.log(args.temperature / args.floor) / halfway
    cooling = schedules.exponential(args.temperature, rate, args.floor)
    fitted = pv.fit(
        vae.model,
        vae.guide,
        train.x,
        validation=test.x,
        transform=datasets.binarize,
        schedules={encoder.get_buffer("family.temperature"): cooling},
        **common.training_options(args),
    )

    # 3. Evaluate the discrete twin, the model with the same parameters and hard classes.
    twin = vae.discrete()
    x, labels = datasets.binarize(test.x)[: args.test_images], test.labels[: args.test_images]
    relaxed = pv.evaluate(vae.model, vae.guide, x, num_samples=20, seed=args.seed)["elbo"]
    if latent[1] ** latent[0] <= pv.exact.MAX_STATES:
        how = {"elbo": "by enumeration", "log_p": "by enumeration"}
        elbo = float(pv.exact.elbo(twin.model, twin.guide, x).mean())
        log_p = float(pv.exact.log_evidence(twin.model, x).mean())
    else:
        how = {"elbo": "with 20 draws for each image", "log_p": "estimated with 1000 draws for each image"}
        elbo = pv.evaluate(twin.model, twin.guide, x, num_samples=20, seed=args.seed)["elbo"]
        log_p = float(pv.log_evidence(twin.model, twin.guide, x, seed=args.seed).log_evidence.mean())
    with torch.no_grad():
        posterior = twin.encode(x).mean  # (N, n, k)
    pure = common.purity(posterior[:, 0], labels)
    print(f"On {len(x)} held-out images of {pixels} binary pixels, {latent[0]} × {latent[1]} classes, nats per image:")
    print(f"  ELBO of the relaxed model {relaxed:8.2f}")
    print(f"  ELBO of its discrete twin {elbo:8.2f}  {how['elbo']}")
    print(f"  log p(x) of the twin      {log_p:8.2f}  {how['log_p']}")
    print(f"  {pure:.1%} of the images have the most frequent label of their class")

    found = {
        "relaxed_elbo": relaxed,
        "elbo": elbo,
        "log_p": log_p,
        "kl": log_p - elbo,
        "same_label": pure,
        "seconds": fitted.seconds,
        "history": fitted.history,
    }
    # 4. Draw what each class stands for.
    figures = common.draw_images(twin, fitted.history, x, labels, shape)
    figures["classes"] = draw_prototypes(prototypes(twin), posterior.mean(0), shape)
    figures["labels"] = common.draw_classes(posterior[:, 0], labels, "Mean q(z|x) of the held-out images of each label")
    common.save(args, found, figures, {"categorical": common.image_tree(twin, x[:50], labels[:50], args)})


if __name__ == "__main__":
    main(parse_args())
