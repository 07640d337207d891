"""
A hundred labels, and many images without
=========================================

The model M2 of Kingma, Mohamed, Rezende and Welling (2014): a digit's class y ~ Categorical(1/10), its style
z ~ N(0, I), and its pixels from both. A few images have a label; of the others y is a latent. The guide is
q(y | x) q(z | x, y), and its q(y | x) is the classifier that is wanted.

All images are rows of one plate; a label of -1 is missing. The label is written as what it is, an observed copy of y:
log p(label | y) is 0 where they agree and minus infinity elsewhere, and masked where there is none. The guide reads it,
for a label is data: its y is then that class. So the sum over classes has ten terms for an image without a label and
one for an image with one, and the ELBO bounds log p(x) of the first and log p(x, label) of the second.
(``pyro.sample(..., obs_mask=)`` has the same sum, but a masked prior of y is no distribution for ``pv.log_evidence``.)

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
    parser.add_argument("--alpha", type=options.positive, default=10.0, help="weight of the labels in the classifier")
    parser.add_argument("--latent", type=options.count, default=10, help="dimensions of z")
    parser.add_argument("--hidden", type=options.count, default=128, help="units of the hidden layer of each network")
    args = parser.parse_args()
    if args.labels % 10:
        parser.error(f"--labels {args.labels}: accepted is a multiple of ten")

import argparse
import math
from functools import partial

import classifiers
import images
import pyro
import pyro.distributions as dist
import results
import runs
import semi_supervised_pictures as pictures
import torch
from images import beside
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

from pyro_vae import guides, handlers, likelihoods, networks, priors


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
            pyro.sample("x", self.decoder(beside(z, y)), obs=x)
            classifiers.score(self.classifier, x, labels, alpha)

    @config_enumerate
    def guide(self, x: Tensor, labels: Tensor) -> None:
        """q(y | x) q(z | x, y), where there is a label q(z | x, label)."""
        handlers.register(self.name, self)
        with pyro.plate("data", len(x)):
            x, labels = pyro.subsample(x, event_dim=1), pyro.subsample(labels, event_dim=0)
            logits = torch.where(labels[:, None] >= 0, images.one_hot(labels).log(), self.classifier.raw_outputs(x))
            y = pyro.sample("y", self.classifier.family(logits)).flatten(-2)
            pyro.sample("z", self.encoder(beside(x, y)))


TITLES = {"enumerated": "M2, missing y summed over", "relaxed": "M2, missing y relaxed"}
TITLES |= {"alone": "classifier on labels alone"}
COLUMNS = {"accuracy": "{accuracy:.3f} ± {accuracy_error:.3f}", "ELBO": "{elbo:.2f}", "log p(x)": "{log_p:.2f}"}
COLUMNS |= {"steps": "{steps}", "seconds": "{seconds:.1f}"}
NOTES = """on held-out images, ± the standard error; ELBO and log p(x), from 200 draws at least that, in nats per image
they are those without labels, y summed over or drawn hard, also where it was trained relaxed"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = images.binarized(args)
    labels = images.hide(train.labels, args.labels)
    x, missing = test.x, torch.full_like(test.labels, -1)
    m2s = {name: M2(name, x.shape[1], args.latent, args.hidden) for name in TITLES}
    m2, relaxed, classifier = m2s["enumerated"], classifiers.Relaxed(m2s["relaxed"]), m2s["alone"].classifier

    summing = TraceEnum_ELBO(max_plate_nesting=1)
    fit = partial(runs.fit, args, data=(train.x, labels), validation=(x, missing))
    fits = {
        "enumerated": fit(partial(m2.model, alpha=args.alpha), m2.guide, elbo=summing),
        "relaxed": fit(partial(relaxed.model, alpha=args.alpha), relaxed.guide),
    }
    histories = {name: fitted.history for name, fitted in fits.items()}
    known = train.x[labels >= 0], labels[labels >= 0]
    epochs = max(1, fits["enumerated"].steps // math.ceil(args.labels / args.batch_size))
    alone = partial(classifiers.alone, classifier)
    fits["alone"] = runs.fit(args, alone, classifiers.no_guide, known, epochs=epochs)

    found: dict[str, dict[str, float]] = {}
    for name, judged in m2s.items():
        right = (judged.classifier(x).mean[:, 0].argmax(1) == test.labels).double()
        row = found[name] = {"accuracy": right.mean().item(), "accuracy_error": right.std().item() / len(x) ** 0.5}
        row |= {"seconds": fits[name].seconds, "steps": fits[name].steps}
        if name != "alone":
            row |= runs.evaluate(judged, x, missing, seed=args.seed, samples=200, elbo=summing)
    rows = {TITLES[name]: row for name, row in found.items()}
    report = results.table(f"{args.labels} labels, {len(train)} images", rows, COLUMNS, NOTES)
    print(report)

    figures = pictures.draw(m2, test, histories, shape)
    names = {"dims": {"x": ["pixel"], "y": ["variable", "class"]}, "coords": {"truth": ("obs", test.labels[:100])}}
    tree = results.tree(m2, x[:100], missing[:100], draws=args.draws, seed=args.seed, **names)
    results.save(args, {"methods": found, "histories": histories}, figures, {"semi_supervised": tree}, report)


if __name__ == "__main__":
    main(args)
