"""
A hundred labels, and many images without
=========================================

The model M2 of Kingma, Mohamed, Rezende and Welling (2014): a digit has a class y ~ Categorical(1/10) and a style z ~
N(0, I), and its pixels depend on both. A few images have a label, the others -1. The guide is q(y | x) q(z | x, y),
and q(y | x) is the classifier. It is compared with a Gumbel-softmax y, and with a classifier trained on labels alone.
The label is an observed copy of y, masked if it is missing, and the guide reads it. In this ELBO q(y | x) learns
nothing from labels, so the classifier observes them again with weight alpha: the objective is then a surrogate.
"""

import argparse
import math
from functools import partial
from typing import Any

import common
import pyro
import pyro.distributions as dist
import torch
from common import concat_broadcast, one_hot
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import families, guides, likelihoods, networks, priors


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "semi_supervised", epochs=60)
    common.add_images(parser, default="digits")
    common.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--labels", type=common.positive_int, default=100, help="labelled images, a multiple of ten")
    parser.add_argument("--alpha", type=common.positive_float, default=10.0, help="weight of the classifier's labels")
    parser.add_argument("--latent", type=common.positive_int, default=10, help="dimensions of z")
    parser.add_argument("--hidden", type=common.positive_int, default=128, help="hidden units of each network")
    args = parser.parse_args()
    if args.labels % 10:
        parser.error(f"--labels must be a multiple of ten, got {args.labels}")
    return args


class LabelScore(dist.Categorical):
    """log q(label | x), a score for the classifier that is not a part of p(x, label)."""

    normalized = False


class M2(nn.Module):
    """y ~ Categorical(1/10), z ~ N(0, I), x | y, z ~ Bernoulli; the site y is one-hot, of shape (1, 10)."""

    def __init__(self, name: str, pixels: int, latent: int, hidden: int):
        super().__init__()
        self.name, network = name, networks.mlp([hidden])
        self.class_prior = priors.OneHotCategorical((1, 10))
        self.style_prior = priors.StandardNormal(latent)
        self.decoder = likelihoods.Bernoulli(latent + 10, pixels, network)
        self.classifier = guides.OneHotCategorical(pixels, (1, 10), network)
        self.encoder = guides.DiagonalNormal(pixels + 10, latent, network)
        self.soft_prior = priors.GumbelSoftmax((1, 10), temperature=0.1)  # colder than the guide: see categorical.py
        self.soft_family = families.RelaxedOneHotCategorical((1, 10), 0.5)

    def model(self, x: Tensor, labels: Tensor, alpha: float = 0.0, relaxed: bool = False) -> None:
        """p(y) p(z) p(label | y) p(x | y, z), and with alpha the score of the classifier."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x, labels = pyro.subsample(x, event_dim=1), pyro.subsample(labels, event_dim=0)
            if relaxed:
                y = self.sample_soft(self.soft_prior(), labels)
                label, observed = dist.Categorical(self.class_prior().mean[0]), labels.clamp(min=0)
            else:
                y = pyro.sample("y", self.class_prior()).flatten(-2)
                label, observed = dist.Delta(y.argmax(-1)), labels
            z = pyro.sample("z", self.style_prior())
            pyro.sample("label", label.mask(labels >= 0), obs=observed)
            pyro.sample("x", self.decoder(concat_broadcast(z, y)), obs=x)
            if alpha > 0:
                self.score_classifier(x, labels, alpha)

    @config_enumerate
    def guide(self, x: Tensor, labels: Tensor, relaxed: bool = False) -> None:
        """q(y | x) q(z | x, y), and q(z | x, label) if there is a label."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x, labels = pyro.subsample(x, event_dim=1), pyro.subsample(labels, event_dim=0)
            logits = self.classifier.raw_outputs(x)
            if relaxed:
                y = self.sample_soft(self.soft_family(logits), labels)
            else:
                logits = torch.where(labels[:, None] >= 0, one_hot(labels).log(), logits)
                y = pyro.sample("y", self.classifier.family(logits)).flatten(-2)
            pyro.sample("z", self.encoder(concat_broadcast(x, y)))

    def sample_soft(self, soft: dist.TorchDistribution, labels: Tensor) -> Tensor:
        """Return the label, or a soft class; with a label, the site y is masked and not read."""
        y = pyro.sample("y", soft.mask(labels < 0))
        return torch.where(labels[:, None] >= 0, one_hot(labels), self.soft_prior.read(y).flatten(-2))

    def score_classifier(self, x: Tensor, labels: Tensor, weight: float = 1.0) -> None:
        """Observe the labels from the classifier, with this weight."""
        with poutine.scale(scale=weight):
            score = LabelScore(logits=self.classifier.raw_outputs(x)).mask(labels >= 0)
            pyro.sample("classified", score, obs=labels.clamp(min=0))

    def supervised_model(self, x: Tensor, labels: Tensor) -> None:
        """A model of labels given images, the classifier alone; its guide has no latents."""
        pyro.module(f"{self.name}_classifier", self.classifier)
        with pyro.plate("data", len(x)):
            self.score_classifier(pyro.subsample(x, event_dim=1), pyro.subsample(labels, event_dim=0))


METHODS = ["enumerated", "relaxed", "alone"]
COLUMNS = {"steps": "{steps}", "accuracy": "{accuracy:.3f} ± {accuracy_error:.3f}"}
COLUMNS |= {"ELBO": "{elbo:.2f}", "log p(x)": "{log_p:.2f}"}
NOTES = "ELBO and log p(x) (200 draws) of held-out images without labels, with hard classes, in nats per image"


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Keep a hundred labels, and set all others to -1.
    train, test, _ = common.load_binary_images(args.data, args.folder, args.test_images)
    labels = common.mask_labels(train.labels, args.labels)
    x, missing = test.x, torch.full_like(test.labels, -1)
    m2s = {name: M2(name, x.shape[1], args.latent, args.hidden) for name in METHODS}
    m2, soft, enum = m2s["enumerated"], m2s["relaxed"], TraceEnum_ELBO(max_plate_nesting=1)
    options = common.training_options(args)
    # 2. Train with an enumerated y, with a relaxed y, and a classifier on the labels alone.
    fit: Any = partial(pv.fit, data=(train.x, labels), validation=(x, missing), **options)
    fits = {"enumerated": fit(partial(m2.model, alpha=args.alpha), m2.guide, elbo=enum)}
    fits["relaxed"] = fit(partial(soft.model, alpha=args.alpha, relaxed=True), partial(soft.guide, relaxed=True))
    options["epochs"] = max(1, fits["enumerated"].steps // math.ceil(args.labels / args.batch_size))
    known = train.x[labels >= 0], labels[labels >= 0]
    fits["alone"] = pv.fit(m2s["alone"].supervised_model, lambda x, labels: None, known, **options)
    # 3. Compare the share of right classes on held-out images, and log p(x).
    rows: dict[str, Any] = {}
    for name, pair in m2s.items():
        right = (pair.classifier(x).mean[:, 0].argmax(1) == test.labels).double()
        rows[name] = {"seconds": fits[name].seconds, "steps": fits[name].steps, "accuracy": right.mean().item()}
        rows[name]["accuracy_error"] = common.standard_error(right)
        if name != "alone":
            rows[name] |= common.evaluate(pair, x, missing, seed=args.seed, samples=200, elbo=enum)
    print(text := common.table(f"{args.labels} labels of {len(train)}", rows, COLUMNS, NOTES))
    found = {"methods": rows, "histories": {name: fits[name].history for name in METHODS[:2]}}
    classes, title = m2.classifier(x).mean[:, 0].detach(), "Mean q(y|x) of the held-out images of each label"
    figures = {"classes": common.draw_classes(classes, test.labels, title, sort=False)}
    names: dict[str, Any] = {"coord": "truth", "y": ["variable", "class"]}
    tree = common.image_tree(m2, x[:100], test.labels[:100], args, missing[:100], **names)
    common.save(args, found, figures, {"semi_supervised": tree}, text)


if __name__ == "__main__":
    main(parse_args())
