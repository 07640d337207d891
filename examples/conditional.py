"""
A VAE with a condition: draw a given digit, complete half an image
==================================================================

z ~ p(z|c), x ~ p(x|z, c), with the guide q(z|x, c): everything that a VAE has, given a context c. Where c is the label,
the model draws any digit on demand, and Bayes' rule turns it into a classifier, p(y|x) = p(y) p(x|y) / p(x) with
p(x) = Σ p(y) p(x|y): ten exact evidences of an image, by quadrature over z, say which digit it is. Where c is the upper
half of an image, x is the lower half, and each z is another way to complete it.

Beside each stands the VAE of the same latent and networks that is not told the context.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "conditional", epochs=100)
    contexts = "label: draw a digit and classify; upper-half: complete the lower half"
    options.add_choices(parser, "--given", "label", "upper-half", meaning=contexts)
    options.add_digits(parser, test_images=297)
    options.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--hidden", type=options.count, default=128, help="units of the hidden layer, each way")
    args = parser.parse_args()

import argparse
from functools import partial
from typing import Any

import conditional_pictures as pictures
import images
import pyro
import results
import runs
import torch
from images import beside, one_hot
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, families, guides, likelihoods, networks
from pyro_vae._utils.param_store import register
from pyro_vae.parts.base import Conditional

LATENT = 2  # for which quadrature is exact


class ConditionalVAE(nn.Module):
    """Sohn, Lee and Yan 2015, "Learning structured output representation using deep conditional generative models"."""

    def __init__(self, name: str, pixels: int, context: int, hidden: int):
        super().__init__()
        self.name = name
        network = networks.mlp([hidden], activation=nn.Tanh)
        code = families.Normal(LATENT)
        self.prior = Conditional(code, context, network(context, code.num_raw))
        self.encoder = guides.DiagonalNormal(pixels + context, LATENT, network)
        self.decoder = likelihoods.Bernoulli(LATENT + context, pixels, network)

    def model(self, x: Tensor, c: Tensor) -> None:
        """p(z|c) p(x|z, c)."""
        register(self.name, self)
        with pyro.plate("data", len(x)):
            x, c = pyro.subsample(x, event_dim=1), pyro.subsample(c, event_dim=1)
            z = pyro.sample("z", self.prior(c))
            pyro.sample("x", self.decoder(beside(z, c)), obs=x)

    def guide(self, x: Tensor, c: Tensor) -> None:
        """q(z|x, c)."""
        register(self.name, self)
        with pyro.plate("data", len(x)):
            x, c = pyro.subsample(x, event_dim=1), pyro.subsample(c, event_dim=1)
            pyro.sample("z", self.encoder(beside(x, c)))


def evidence_by_label(cvae: ConditionalVAE, x: Tensor) -> Tensor:
    """log p(x|y) of every image and label, ``(N, 10)``. A context of one row is that of all images."""
    return torch.stack([runs.exact_log_p(partial(cvae.model, c=label[None]), x) for label in torch.eye(10)], 1)


def split(data: datasets.Dataset, given: str) -> tuple[Tensor, Tensor]:
    """What is modelled, x, and what is given, c."""
    if given == "label":
        return data.x, one_hot(data.labels)
    upper, lower = data.x.split(32, dim=1)
    return lower, upper


COLUMNS = {"log p(x|c)": "{log_p_given_context:.2f}", "ELBO": "{elbo:.2f}", "log Σ p(c) p(x|c)": "{log_p_by_sum:.2f}"}
COLUMNS |= {"log p(x), no context": "{log_p_without_context:.2f}", "right labels": "{accuracy:.1%}"}
NOTES = """in nats per held-out digit: 64 binary pixels given the label, the lower 32 given the upper; by quadrature,
but for the ELBO (20 draws for each) and log p(lower half|upper half) (at least that, by 1000 draws for each);
right labels: found by Bayes' rule"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, _ = images.binarized(args)
    labels = test.labels
    found: dict[str, dict[str, Any]] = {}
    figures: dict[str, Any] = {}
    trees = {}
    for given in args.given:
        rows, (x, c) = split(train, given), split(test, given)
        cvae = ConditionalVAE(f"given_{given}", x.shape[1], c.shape[1], args.hidden)
        vae = runs.plain_vae(x.shape[1], LATENT, networks.mlp([args.hidden], activation=nn.Tanh))
        fitted = runs.fit(args, cvae.model, cvae.guide, rows)
        runs.fit(args, vae.model, vae.guide, rows[0])
        row = found[given] = {"seconds": fitted.seconds, "history": fitted.history}
        row["elbo"] = pv.evaluate(cvae.model, cvae.guide, (x, c), num_samples=20, seed=args.seed)["elbo"]
        row["log_p_without_context"] = runs.exact_log_p(vae.model, x).mean().item()
        if given == "label":
            log_p = evidence_by_label(cvae, x)
            log_joint = log_p + rows[1].mean(0).log()  # p(y): how often each label is
            posterior = log_joint.softmax(1)  # p(y|x), by Bayes' rule
            row["log_p_given_context"] = log_p.gather(1, labels[:, None]).mean().item()
            row["log_p_by_sum"] = log_joint.logsumexp(1).mean().item()
            row["accuracy"] = (posterior.argmax(1) == labels).float().mean().item()
            figures |= pictures.of_labels(cvae, vae, x, labels, posterior)
        else:
            log_p = pv.log_evidence(cvae.model, cvae.guide, x, c, seed=args.seed).log_evidence
            row["log_p_given_context"] = log_p.mean().item()
            figures |= pictures.of_halves(cvae, x[:12], c[:12])
        trees[f"given_{given}"] = images.tree(cvae, x[:50], labels[:50], args.draws, args.seed, c[:50])
    report = results.table("context c", found, COLUMNS, NOTES)
    print(report)
    results.save(args, found, figures, trees, report)


if __name__ == "__main__":
    main(args)
