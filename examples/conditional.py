"""
A conditional VAE: draw a given digit, complete half an image
=============================================================

A VAE of x given a context c: z ~ p(z|c), x ~ p(x|z, c), with the guide q(z|x, c). If c is the label, the model draws
any digit on demand, and Bayes' rule makes it a classifier, p(y|x) = p(y) p(x|y) / p(x) with p(x) = Σ p(y) p(x|y),
from ten exact evidences of an image by quadrature over z. If c is the upper half of an image and x the lower half,
each z is another way to complete the image.

The baseline of each is a VAE with the same latent and networks and without the context.
"""

import argparse
from functools import partial
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, families, guides, likelihoods, networks, plots
from pyro_vae.parts import Conditional

LATENT = 2  # dimensions, few enough for quadrature
CONTEXTS = ["label", "upper-half"]


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "conditional", epochs=100)
    contexts = "label: draw a digit and classify; upper-half: complete the lower half"
    parser.add_argument("--given", nargs="+", choices=[*CONTEXTS, "all"], default=["label"], help=contexts)
    common.add_evaluation(parser, test_images=297)
    common.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--hidden", type=common.positive_int, default=128, help="hidden units of each network")
    args = parser.parse_args()
    args.given = CONTEXTS if "all" in args.given else list(dict.fromkeys(args.given))
    return args


def conditional_vae(pixels: int, context: int, hidden: int) -> pv.VAE:
    """Sohn, Lee and Yan 2015, "Learning structured output representation using deep conditional generative models"."""
    network = networks.mlp([hidden], activation=nn.Tanh)
    code = families.Normal(LATENT)
    prior = Conditional(code, context, network(context, code.num_raw))
    encoder = guides.DiagonalNormal(pixels + context, LATENT, network)
    return pv.VAE(prior, encoder, likelihoods.Bernoulli(LATENT + context, pixels, network), context=context)


@torch.no_grad()
def mean_images(cvae: pv.VAE, c: Tensor, noise: Tensor) -> Tensor:
    """Decode z = μ(c) + σ(c) ε for each ε."""
    p: Any = cvae.prior(c)
    return cvae.decode(p.mean + p.stddev * noise, c).mean


def evidence_by_label(cvae: pv.VAE, x: Tensor) -> Tensor:
    """Return log p(x|y) of every image and label, ``(N, 10)``; the context has one row, shared by all images."""
    return torch.stack([common.exact_log_p(partial(cvae.model, context=label[None]), x) for label in torch.eye(10)], 1)


def split(data: datasets.Dataset, given: str) -> tuple[Tensor, Tensor]:
    """Split data into x, which is modelled, and the context c."""
    if given == "label":
        return data.x, common.one_hot(data.labels)
    upper, lower = data.x.split(32, dim=1)
    return lower, upper


def draw_grid(images: Tensor, rows: list[str], title: str) -> Figure:
    """Draw images ``(rows, columns, 64)``, with a name for each row."""
    figure, ax = plt.subplots(figsize=(8, 0.65 * len(rows) + 0.5), layout="constrained")
    plots.image_grid(images.reshape(-1, 8, 8), columns=images.shape[1], ax=ax)
    ax.set_axis_on()
    ax.set(xticks=[], yticks=[9 * row + 3.5 for row in range(len(rows))], yticklabels=rows, title=title)
    return figure


COLUMNS = {"log p(x|c)": "{log_p_given_context:.2f}", "ELBO": "{elbo:.2f}", "log Σ p(c) p(x|c)": "{log_p_by_sum:.2f}"}
COLUMNS |= {"log p(x), no context": "{log_p_without_context:.2f}", "right labels": "{accuracy:.1%}"}
NOTES = """in nats per held-out digit: 64 binary pixels given the label, or the lower 32 given the upper; by quadrature,
except the ELBO (20 draws for each) and log p(lower half|upper half) (1000 draws for each, a lower bound)"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, _ = common.load_binary_images("digits", test_images=args.test_images)
    labels, options = test.labels, common.training_options(args)
    found: dict[str, dict[str, Any]] = {}
    figures, trees = {}, {}
    for given in args.given:
        rows, (x, c) = split(train, given), split(test, given)
        # 1. Train a VAE with the context, and one without it.
        cvae = conditional_vae(x.shape[1], c.shape[1], args.hidden)
        vae = common.plain_vae(x.shape[1], LATENT, networks.mlp([args.hidden], activation=nn.Tanh))
        fitted = pv.fit(cvae.model, cvae.guide, rows, **options)
        pv.fit(vae.model, vae.guide, rows[0], **options)
        row = found[given] = {"seconds": fitted.seconds, "history": fitted.history}
        row["elbo"] = pv.evaluate(cvae.model, cvae.guide, (x, c), num_samples=20, seed=args.seed)["elbo"]
        row["log_p_without_context"] = common.exact_log_p(vae.model, x).mean().item()
        if given == "label":
            # 2. Given a label: log p(x|y) for each of ten labels makes a classifier, by Bayes' rule.
            log_p = evidence_by_label(cvae, x)
            log_joint = log_p + rows[1].mean(0).log()  # p(y): the share of each label in the training data
            posterior = log_joint.softmax(1)  # p(y|x), by Bayes' rule
            row["log_p_given_context"] = log_p.gather(1, labels[:, None]).mean().item()
            row["log_p_by_sum"] = log_joint.logsumexp(1).mean().item()
            row["accuracy"] = (posterior.argmax(1) == labels).float().mean().item()
            title = "Mean p(y|x) of the held-out images of each label, by Bayes' rule"
            figures["bayes_rule"] = common.draw_classes(posterior, labels, title, sort=False)
            images, names = mean_images(cvae, torch.eye(10)[:, None], torch.randn(12, LATENT)), [*"0123456789"]
            figures["samples_by_label"] = draw_grid(images, names, "Each row a label y, each column the same noise ε")
        else:
            # 3. Given the upper half: each z is another way to complete the image.
            log_p = pv.log_evidence(cvae.model, cvae.guide, x, c, seed=args.seed).log_evidence
            row["log_p_given_context"] = log_p.mean().item()
            lower = mean_images(cvae, c[:12], torch.randn(6, 1, LATENT))
            lower = torch.cat([x[None, :12], torch.full((1, *lower.shape[1:]), 0.3), lower])  # grey: not in the context
            names = ["held-out image", "context", *(f"completion {number}" for number in range(1, 7))]
            images = torch.cat([c[:12].expand(len(lower), -1, -1), lower], -1)
            figures["completions"] = draw_grid(images, names, "Each row another z ~ p(z|upper half)")
        trees[f"given_{given}"] = common.image_tree(cvae, x[:50], labels[:50], args, c[:50])
    text = common.table("context c", found, COLUMNS, NOTES)
    print(text)
    common.save(args, found, figures, trees, text)


if __name__ == "__main__":
    main(parse_args())
