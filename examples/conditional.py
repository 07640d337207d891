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
    options.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--hidden", type=options.count, default=128, help="units of the hidden layer, each way")
    parser.add_argument("--test-images", type=options.count, default=297, help="held-out digits to judge on")
    parser.add_argument("--draws", type=options.count, default=200, help="draws in the ArviZ files")
    args = parser.parse_args()

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import conditional_pictures as pictures
import images
import pyro
import results
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import one_hot

import pyro_vae as pv
from pyro_vae import datasets, families, guides, likelihoods, networks, priors
from pyro_vae.handlers import register
from pyro_vae.parts import Conditional

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

    @torch.no_grad()
    def means(self, c: Tensor, noise: Tensor) -> Tensor:
        """Mean images at z = μ(c) + σ(c) ε, for each ε."""
        p = self.prior(c)
        return self.decoder(beside(p.mean + p.stddev * noise, c)).mean


def beside(first: Tensor, second: Tensor) -> Tensor:
    """Side by side along the last dimension, the others broadcast: particles and quadrature put theirs on the left."""
    batch = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    return torch.cat([first.expand(*batch, -1), second.expand(*batch, -1)], dim=-1)


def trained(name: str, pixels: int, context: int, data: tuple[Tensor, Tensor], args: argparse.Namespace) -> Any:
    """The conditional VAE of x given c, and the VAE of x alone."""
    cvae = ConditionalVAE(name, pixels, context, args.hidden)
    network = networks.mlp([args.hidden], activation=nn.Tanh)
    encoder = guides.DiagonalNormal(pixels, LATENT, network)
    vae = pv.VAE(priors.StandardNormal(LATENT), encoder, likelihoods.Bernoulli(LATENT, pixels, network))
    settings = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    fitted = pv.fit(cvae.model, cvae.guide, data, **settings), pv.fit(vae.model, vae.guide, data[0], **settings)
    return cvae, vae, {"seconds": fitted[0].seconds, "history": fitted[0].history}


def evidence(model: Callable[..., None], x: Tensor) -> Tensor:
    """Exact log p(x), in parts: one hard image does not refine the quadrature of all."""
    return torch.cat([pv.exact.log_evidence(model, rows, tolerance=1e-2) for rows in x.split(50)])


def evidence_by_label(cvae: ConditionalVAE, x: Tensor) -> Tensor:
    """log p(x|y) of every image and label, ``(N, 10)``. A context of one row is that of all images."""
    return torch.stack([evidence(partial(cvae.model, c=label[None]), x) for label in torch.eye(10)], 1)


def given_label(train: Any, x: Tensor, labels: Tensor, args: argparse.Namespace) -> tuple[dict, dict, xr.DataTree]:
    pixels, c = datasets.binarize(train.x), one_hot(train.labels, 10).float()
    cvae, vae, found = trained("given_label", x.shape[1], 10, (pixels, c), args)
    told = one_hot(labels, 10).float()
    log_p_given_y = evidence_by_label(cvae, x)
    log_joint = log_p_given_y + c.mean(0).log()  # p(y): how often each label is
    log_p = log_joint.logsumexp(1)
    posterior = (log_joint - log_p[:, None]).exp()
    found |= {
        "log_p_given_context": float(log_p_given_y.gather(1, labels[:, None]).mean()),
        "log_p_by_sum": float(log_p.mean()),
        "log_p_without_context": float(evidence(vae.model, x).mean()),
        "elbo": pv.evaluate(cvae.model, cvae.guide, (x, told), num_samples=20)["elbo"],
        "accuracy": float((posterior.argmax(1) == labels).float().mean()),
    }
    figures = {
        "samples_by_label": pictures.draw_samples(cvae.means(torch.eye(10)[:, None], torch.randn(12, LATENT))),
        "bayes_rule": pictures.draw_bayes(posterior, labels),
    }
    with torch.no_grad():
        p, q = cvae.prior(told), cvae.encoder(beside(x, told))
        figures["latent_maps"] = pictures.draw_maps(vae.encode(x).mean, (q.mean - p.mean) / p.stddev, labels)
    return found, figures, tree(cvae, x[:50], told[:50], labels[:50], args)


def given_upper_half(train: Any, x: Tensor, labels: Tensor, args: argparse.Namespace) -> tuple[dict, dict, xr.DataTree]:
    upper, lower = datasets.binarize(train.x).split(32, dim=1)
    cvae, vae, found = trained("given_upper_half", 32, 32, (lower, upper), args)
    c, x = x.split(32, dim=1)
    log_p = pv.log_evidence(cvae.model, cvae.guide, x, c, seed=args.seed).log_evidence
    found |= {
        "log_p_given_context": float(log_p.mean()),
        "log_p_without_context": float(evidence(vae.model, x).mean()),
        "elbo": pv.evaluate(cvae.model, cvae.guide, (x, c), num_samples=20)["elbo"],
    }
    means = cvae.means(c[:12], torch.randn(6, 1, LATENT))
    return (
        found,
        {"completions": pictures.draw_completions(x[:12], c[:12], means)},
        tree(cvae, x[:50], c[:50], labels[:50], args),
    )


def tree(cvae: ConditionalVAE, x: Tensor, c: Tensor, labels: Tensor, args: argparse.Namespace) -> xr.DataTree:
    """Draws for ArviZ of some held-out images, with their labels along ``obs``."""
    return pv.to_datatree(
        cvae.model,
        cvae.guide,
        x,
        c,
        draws=args.draws,
        seed=args.seed,
        parallel=True,
        dims={"x": ["pixel"]},
        coords={"label": ("obs", labels)},
    )


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, _ = images.load("digits")
    x, labels = datasets.binarize(test.x[: args.test_images]), test.labels[: args.test_images]
    makers = {"label": given_label, "upper-half": given_upper_half}
    found: dict[str, Any] = {}
    figures: dict[str, Figure] = {}
    trees: dict[str, xr.DataTree] = {}
    lines = [f"{'context c':12s}{'log p(x|c)':>12s}{'ELBO':>9s}{'log Σ p(c) p(x|c)':>20s}{'log p(x), no context':>22s}"]
    for given in args.given:
        row, drawn, trees[f"given_{given}"] = makers[given](train, x, labels, args)
        found[given], figures = row, figures | drawn
        by_sum = f"{row['log_p_by_sum']:20.2f}" if "log_p_by_sum" in row else f"{'':20s}"
        start = f"{given:12s}{row['log_p_given_context']:12.2f}{row['elbo']:9.2f}"
        lines.append(f"{start}{by_sum}{row['log_p_without_context']:22.2f}")
    lines.append(
        "in nats per held-out digit: 64 binary pixels given the label, the lower 32 given the upper; by quadrature,"
    )
    lines.append(
        "but for the ELBO (20 draws for each) and log p(lower half|upper half) (1000 draws of the guide for each)"
    )
    print("\n".join(lines))
    if "label" in found:
        print(f"By Bayes' rule {found['label']['accuracy']:.1%} of the {len(x)} held-out digits get their label.")
    results.save(args, found, figures, trees, "\n".join(lines))


if __name__ == "__main__":
    main(args)
