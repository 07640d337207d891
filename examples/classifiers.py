"""The classifier of semi_supervised.py: scored on labels, trained on them alone, and relaxed."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from images import beside, one_hot
from pyro import poutine
from torch import Tensor

from pyro_vae import families, handlers, priors
from pyro_vae.parts.base import Conditional


class ClassifierLoss(dist.Categorical):
    """log q(label | x): a score for the classifier, not a part of p(x, label)."""

    normalized = False


def score(classifier: Conditional, x: Tensor, labels: Tensor, weight: float) -> None:
    """Observe the labels from the classifier, so many times; it makes of a bound a surrogate."""
    if weight > 0:
        q = ClassifierLoss(logits=classifier.raw_outputs(x))
        with poutine.scale(scale=weight):
            pyro.sample("classified", q.mask(labels >= 0), obs=labels.clamp(min=0))


def alone(classifier: Conditional, x: Tensor, labels: Tensor) -> None:
    """A model of labels given images: the classifier, and nothing else."""
    pyro.module("classifier_alone", classifier)
    with pyro.plate("data", len(x)):
        score(classifier, pyro.subsample(x, event_dim=1), pyro.subsample(labels, event_dim=0), weight=1.0)


def no_guide(x: Tensor, labels: Tensor) -> None:
    """The guide of a model without latents."""


class Relaxed:
    """The pair of an M2, on its parameters, with a Gumbel-softmax for the missing y: one soft draw in place of a sum.

    The prior is colder than the guide, see categorical.py.

    Where there is a label, the site y is masked in both and not read: a point mass is none of its densities.
    """

    def __init__(self, m2: Any, temperature: float = 0.5, prior_temperature: float = 0.1):
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
            pyro.sample("x", self.m2.decoder(beside(z, y)), obs=x)
            score(self.m2.classifier, x, labels, alpha)

    def guide(self, x: Tensor, labels: Tensor) -> None:
        """q(y | x) q(z | x, y), where there is a label q(z | x, label)."""
        handlers.register(self.m2.name, self.m2)
        with pyro.plate("data", len(x)):
            x, labels = pyro.subsample(x, event_dim=1), pyro.subsample(labels, event_dim=0)
            y = self.sample(self.classifier(x), labels)
            pyro.sample("z", self.m2.encoder(beside(x, y)))

    def sample(self, fn: dist.TorchDistribution, labels: Tensor) -> Tensor:
        """The class that decoder and encoder read: the label, or a soft class."""
        y = pyro.sample("y", fn.mask(labels < 0))
        return torch.where(labels[:, None] >= 0, one_hot(labels), self.prior.read(y).flatten(-2))
