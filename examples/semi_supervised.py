"""
A hundred labels, and many images without
=========================================

The model M2 of Kingma, Mohamed, Rezende and Welling (2014): a digit's class y ~ Categorical(1/10), its style
z ~ N(0, I), and its pixels from both. A few images have a label; of the others y is a latent. The guide is
q(y | x) q(z | x, y), and its q(y | x) is the classifier that is wanted.

All images are rows of one plate, so that each batch has rows of both kinds; a label of -1 is missing. The label is
written as what it is, an observed copy of y: log p(label | y) is 0 where they agree and minus infinity elsewhere, and
masked where there is none. The guide reads it, for a label is data: its y is then that class, with probability 1. So
the one sum over classes has ten terms for an image without a label and one for an image with one, and the ELBO bounds
log p(x) of the first and log p(x, label) of the second. ``pyro.sample(..., obs_mask=)``, with its mask in the guide
too, has the same sum; but a masked prior of y is no distribution, and ``pv.log_evidence`` refuses it.

In that bound q(y | x) learns nothing from the labels. So they are observed a second time, from the classifier, alpha
times. That site is in no generative story, and with it the objective is no bound: it is reported as a surrogate.

Beside it: the same with the missing y relaxed by the Gumbel-softmax, and judged with hard classes; and the same
classifier, trained on the labelled images alone, for as many steps.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "semi_supervised", epochs=60)
    options.add_images(parser, default="digits")
    options.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--labels", type=options.count, default=100, help="labelled images, as many of each digit")
    parser.add_argument("--repeats", type=options.count, default=1, help="times that a labelled image is a row")
    parser.add_argument("--alpha", type=options.positive, default=10.0, help="weight of the labels in the classifier")
    parser.add_argument("--latent", type=options.count, default=10, help="dimensions of z")
    parser.add_argument("--hidden", type=options.count, default=128, help="units of the hidden layer of each network")
    parser.add_argument("--temperature", type=options.positive, default=0.5, help="of the Gumbel-softmax")
    parser.add_argument("--prior-temperature", type=options.positive, default=0.1, help="colder, see categorical.py")
    args = parser.parse_args()
    if args.labels % 10:
        parser.error(f"--labels {args.labels}: accepted is a multiple of ten")

import argparse
from functools import partial
from typing import Any

import images
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import results
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn
from torch.nn.functional import one_hot

import pyro_vae as pv
from pyro_vae import datasets, families, guides, handlers, likelihoods, networks, plots, priors
from pyro_vae.parts import Conditional


class ClassifierLoss(dist.Categorical):
    """log q(label | x): a score for the classifier, not a part of p(x, label)."""

    normalized = False


class M2(nn.Module):
    """y ~ Categorical(1/10), z ~ N(0, I), x | y, z ~ Bernoulli; the site y is one-hot, of shape (1, 10)."""

    def __init__(self, name: str, pixels: int, latent: int, hidden: int):
        super().__init__()
        network = networks.mlp([hidden])
        self.name = name
        self.class_prior = priors.OneHotCategorical((1, 10))
        self.style_prior = priors.StandardNormal(latent)
        self.decoder = likelihoods.Bernoulli(latent + 10, pixels, network)
        self.classifier = guides.OneHotCategorical(pixels, (1, 10), network)
        self.encoder = guides.DiagonalNormal(pixels + 10, latent, network)

    def model(self, x: Tensor, labels: Tensor, alpha: float = 0.0) -> None:
        """The story, p(x, z, y), and the label; with alpha, the classifier besides."""
        handlers.register(self.name, self)
        with pyro.plate("data", len(x)):
            x, labels = pyro.subsample(x, event_dim=1), pyro.subsample(labels, event_dim=0)
            y = pyro.sample("y", self.class_prior()).flatten(-2)
            z = pyro.sample("z", self.style_prior())
            pyro.sample("label", dist.Delta(y.argmax(-1)).mask(labels >= 0), obs=labels)
            pyro.sample("x", self.decoder(images.beside(z, y)), obs=x)
            self.classify(x, labels, alpha)

    def guide(self, x: Tensor, labels: Tensor, alpha: float = 0.0) -> None:
        """q(y | x) q(z | x, y), where there is a label q(z | x, label)."""
        handlers.register(self.name, self)
        with pyro.plate("data", len(x)):
            x, labels = pyro.subsample(x, event_dim=1), pyro.subsample(labels, event_dim=0)
            logits = torch.where(labels[:, None] >= 0, known(labels).log(), self.classifier.raw_outputs(x))
            y = pyro.sample("y", self.classifier.family(logits)).flatten(-2)
            pyro.sample("z", self.encoder(images.beside(x, y)))

    def classify(self, x: Tensor, labels: Tensor, alpha: float) -> None:
        """The second look at the labels, which makes of the bound a surrogate."""
        if alpha > 0:
            q = ClassifierLoss(logits=self.classifier.raw_outputs(x))
            with poutine.scale(scale=alpha):
                pyro.sample("classified", q.mask(labels >= 0), obs=labels.clamp(min=0))


class Relaxed:
    """The pair of an M2 with the missing y relaxed: one draw of it, where the M2 sums over ten classes.

    Where there is a label, the site y is masked in both and not read: a point mass is none of its densities.
    """

    def __init__(self, m2: M2, temperature: float, prior_temperature: float):
        self.m2 = m2
        self.prior = priors.GumbelSoftmax((1, 10), prior_temperature)
        family = families.RelaxedOneHotCategorical((1, 10), temperature)
        self.classifier = Conditional(family, m2.classifier.context_shape, m2.classifier.network)

    def model(self, x: Tensor, labels: Tensor, alpha: float = 0.0) -> None:
        """The story, p(x, z, y), and the label; with alpha, the classifier besides."""
        handlers.register(self.m2.name, self.m2)
        with pyro.plate("data", len(x)):
            x, labels = pyro.subsample(x, event_dim=1), pyro.subsample(labels, event_dim=0)
            y = self.sample(self.prior(), labels)
            z = pyro.sample("z", self.m2.style_prior())
            pyro.sample("label", dist.Categorical(self.m2.class_prior().mean[0]).mask(labels >= 0), obs=labels.clamp(0))
            pyro.sample("x", self.m2.decoder(images.beside(z, y)), obs=x)
            self.m2.classify(x, labels, alpha)

    def guide(self, x: Tensor, labels: Tensor, alpha: float = 0.0) -> None:
        """q(y | x) q(z | x, y), where there is a label q(z | x, label)."""
        handlers.register(self.m2.name, self.m2)
        with pyro.plate("data", len(x)):
            x, labels = pyro.subsample(x, event_dim=1), pyro.subsample(labels, event_dim=0)
            y = self.sample(self.classifier(x), labels)
            pyro.sample("z", self.m2.encoder(images.beside(x, y)))

    def sample(self, fn: dist.TorchDistribution, labels: Tensor) -> Tensor:
        """The class that decoder and encoder read: the label, or a soft class."""
        y = pyro.sample("y", fn.mask(labels < 0))
        return torch.where(labels[:, None] >= 0, known(labels), self.prior.read(y).flatten(-2))


def known(labels: Tensor) -> Tensor:
    """One-hot labels ``(N, 10)``; of a missing one, whatever comes."""
    return one_hot(labels.clamp(min=0), 10).to(torch.get_default_dtype())


def supervised(m2: M2, x: Tensor, labels: Tensor) -> None:
    """The classifier alone."""
    pyro.module("supervised", m2.classifier)
    with pyro.plate("data", len(x)):
        x, labels = pyro.subsample(x, event_dim=1), pyro.subsample(labels, event_dim=0)
        pyro.sample("label", dist.Categorical(logits=m2.classifier.raw_outputs(x)), obs=labels)


def hide(data: datasets.Dataset, count: int, repeats: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Rows with a label, as many of each digit, and all rows, of which the others have lost theirs."""
    chosen = torch.cat([(data.labels == digit).nonzero()[: count // 10, 0] for digit in range(10)])
    rest = torch.ones(len(data), dtype=torch.bool).index_fill(0, chosen, False)
    x = datasets.binarize(data.x)
    first = x[chosen], data.labels[chosen]
    rows = torch.cat([first[0].repeat(repeats, 1), x[rest]])
    return first, (rows, torch.cat([first[1].repeat(repeats), torch.full_like(data.labels[rest], -1)]))


def draw_analogies(m2: M2, x: Tensor, labels: Tensor, shape: images.Shape) -> Figure:
    """Held-out images, each in its style as every class."""
    first = torch.stack([x[labels == digit][0] for digit in labels.unique()])
    y = m2.classifier(first).mean[:, 0].argmax(1)
    z = m2.encoder(images.beside(first, known(y))).mean
    means = m2.decoder(images.beside(z[:, None], torch.eye(10))).mean  # (images, 10, pixels)
    shown = torch.cat([first[:, None], torch.zeros_like(means[:, :1]), means], 1).reshape(-1, *shape)
    figure, ax = plt.subplots(figsize=(7, 6.2), layout="constrained")
    plots.image_grid(shown, 12, ax)
    figure.suptitle("Left: held-out images. Right: in the style z of each, the classes y = 0, 1, ... 9")
    return figure


def draw_training(histories: dict[str, dict[str, list[float]]]) -> Figure:
    """The objective of both pairs, epoch by epoch; that of the relaxed pair is of a relaxed model."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for ax, (name, history) in zip(axes, histories.items(), strict=True):
        plots.training_curves(history, ax, terms=["elbo"])
        ax.set_title(f"Missing y {name}")
        ax.get_legend().remove()
    figure.suptitle(
        "Solid: the objective, with alpha taken for 1. Dashed: held-out images without labels, an ELBO of log p(x)"
    )
    return figure


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = images.load(args.data, args.folder)
    labelled, rows = hide(train, args.labels, args.repeats)
    x, truth = datasets.binarize(test.x)[: args.test_images], test.labels[: args.test_images]
    held_out = x, torch.full_like(truth, -1)
    m2s = {name: M2(name, x.shape[1], args.latent, args.hidden) for name in ("enumerated", "relaxed", "alone")}
    relaxed = Relaxed(m2s["relaxed"], args.temperature, args.prior_temperature)
    summing = TraceEnum_ELBO(max_plate_nesting=1)
    how: dict[str, Any] = {"batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    m2, alpha = m2s["enumerated"], args.alpha
    fits = {
        "enumerated": pv.fit(
            partial(m2.model, alpha=alpha),
            config_enumerate(m2.guide),
            rows,
            epochs=args.epochs,
            validation=held_out,
            elbo=summing,
            **how,
        ),
        "relaxed": pv.fit(
            partial(relaxed.model, alpha=alpha), relaxed.guide, rows, epochs=args.epochs, validation=held_out, **how
        ),
    }
    epochs = max(1, fits["enumerated"].steps // -(-args.labels // args.batch_size))
    fits["alone"] = pv.fit(partial(supervised, m2s["alone"]), lambda x, labels: None, labelled, epochs=epochs, **how)

    found: dict[str, dict[str, float]] = {}
    for name, judged in m2s.items():
        with torch.no_grad():
            right = judged.classifier(x).mean[:, 0].argmax(1) == truth
        row = found[name] = {"accuracy": float(right.double().mean())}
        row |= {"seconds": fits[name].seconds, "steps": fits[name].steps}
        if name != "alone":
            guide = config_enumerate(judged.guide)
            row |= pv.evaluate(judged.model, guide, held_out, elbo=summing, num_samples=20, seed=args.seed)
            draws = pv.log_evidence(judged.model, judged.guide, *held_out, num_samples=200, seed=args.seed)
            row["log_p"] = float(draws.log_evidence.mean())
    titles = {"enumerated": "M2, missing y summed over", "relaxed": "M2, missing y relaxed"}
    titles["alone"] = "classifier on labels alone"
    columns = {"accuracy": ("accuracy", ".3f"), "elbo": ("ELBO", ".2f"), "log_p": ("log p(x)", ".2f")}
    columns |= {"steps": ("steps", "d"), "seconds": ("seconds", ".1f")}
    first = f"{args.labels} labels, {len(train)} images"
    lines = [f"{first:28s}" + "".join(f"{title:>10s}" for title, _ in columns.values())]
    for name, row in found.items():
        cells = [f"{row[key]:{form}}" if key in row else "" for key, (_, form) in columns.items()]
        lines.append(f"{titles[name]:28s}" + "".join(f"{cell:>10s}" for cell in cells))
    error = (found["enumerated"]["accuracy"] * (1 - found["enumerated"]["accuracy"]) / len(x)) ** 0.5
    lines.append(f"on {len(x)} held-out images: a standard error of {error:.3f} for an accuracy, nats per image")
    lines.append("ELBO and log p(x) without labels, y summed over or drawn hard, also where it was trained relaxed")
    report = "\n".join(lines)
    print(report)

    histories = {name: fits[name].history for name in ("enumerated", "relaxed")}
    with torch.no_grad():
        posterior = m2.classifier(x).mean[:, 0]
        figures = {"analogies": draw_analogies(m2, x, truth, shape), "training": draw_training(histories)}
    figures["classes"] = images.draw_classes_of_labels(
        posterior, truth, "The class that held-out images\nof each label are given: mean q(y|x)"
    )
    tree = pv.to_datatree(
        m2.model,
        m2.guide,
        *(tensor[:100] for tensor in held_out),
        draws=args.draws,
        seed=args.seed,
        parallel=True,
        dims={"x": ["pixel"], "y": ["variable", "class"]},
        coords={"truth": ("obs", truth[:100])},
    )
    results.save(args, {"methods": found, "histories": histories}, figures, {"semi_supervised": tree}, report)


if __name__ == "__main__":
    main(args)
