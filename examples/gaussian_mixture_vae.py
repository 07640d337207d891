"""
Clusters in the latent space
============================

A VAE whose latent is a mixture of Gaussians. An image first falls into a component, y ~ Categorical(1/K); its place in
the latent space is then a draw from that component, z | y ~ N(mu_y, sigma_y²), whose mean and scale are free
parameters; and from z alone come the pixels. The guide goes the same way, q(y | x) q(z | x, y). Its y is summed over,
and its z drawn, one for each component: no gradient needs a score function, and no y is relaxed.

It is held against a VAE of the same networks with one standard normal for a prior, whose codes are clustered afterwards
by a mixture that is fitted to them. Labels play no part in the training of either; they only say how good clusters are.
With two dimensions log p(x) is exact: summed over y, the prior is one density of z, and z is integrated by quadrature.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "gaussian_mixture_vae", epochs=60)
    options.add_images(parser, default="digits")
    options.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--components", type=options.count, default=10, help="K, components of the prior")
    parser.add_argument("--latent", type=options.count, default=2, help="dimensions of z")
    parser.add_argument("--hidden", type=options.count, default=128, help="units of the hidden layer of each network")
    args = parser.parse_args()
    if args.components < 2:
        parser.error(f"--components {args.components}: accepted is 2 or more")

import argparse
import math

import gaussian_mixture_pictures as pictures
import images
import pyro
import pyro.distributions as dist
import results
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.nn.functional import one_hot

import pyro_vae as pv
from pyro_vae import datasets, families, guides, handlers, likelihoods, networks, priors
from pyro_vae.parts import Conditional


class GaussianMixtureVAE(nn.Module):
    """y ~ Categorical(1/K), z | y ~ N(mu_y, sigma_y²), x | z ~ Bernoulli; the site y is one-hot, of shape (1, K)."""

    def __init__(self, pixels: int, components: int, latent: int, hidden: int):
        super().__init__()
        network = networks.mlp([hidden])
        table = nn.Linear(components, 2 * latent, bias=False)  # of a one-hot y: its mu and log sigma
        with torch.no_grad():
            table.weight[:latent].normal_()  # no two components alike
            table.weight[latent:].fill_(math.log(0.5))
        self.weights = priors.OneHotCategorical((1, components))
        self.component = Conditional(families.Normal(latent), (1, components), table)
        self.decoder = likelihoods.Bernoulli(latent, pixels, network)
        self.classifier = guides.OneHotCategorical(pixels, (1, components), network)
        self.encoder = guides.DiagonalNormal(pixels + components, latent, network)

    def model(self, x: Tensor) -> None:
        """The story, p(x, z, y)."""
        handlers.register("gaussian_mixture_vae", self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            y = pyro.sample("y", self.weights())
            z = pyro.sample("z", self.component(y))
            pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(y | x) q(z | x, y)."""
        handlers.register("gaussian_mixture_vae", self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            y = pyro.sample("y", self.classifier(x))
            pyro.sample("z", self.encoder(images.beside(x, y.flatten(-2))))

    def summed(self, x: Tensor) -> None:
        """The same p(x, z), without y: the prior is then a mixture."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(torch.distributions.Categorical(self.shares()), self.each()))
            pyro.sample("x", self.decoder(z), obs=x)

    def shares(self) -> Tensor:
        """The probability of each component, ``(K,)``."""
        return self.weights().mean[0]

    def each(self) -> dist.TorchDistribution:
        """p(z | y) of each component, batch shape ``(K,)``."""
        return self.component(torch.eye(len(self.shares()))[:, None])

    def clusters(self, x: Tensor) -> Tensor:
        """q(y | x), ``(N, K)``."""
        return self.classifier(x).mean[:, 0]

    def codes(self, x: Tensor) -> Tensor:
        """The mean of q(z | x, y) at the likeliest y, ``(N, D)``."""
        probs = self.clusters(x)
        return self.encoder(images.beside(x, one_hot(probs.argmax(1), probs.shape[1]).to(x.dtype))).mean


def standard_vae(pixels: int, latent: int, hidden: int) -> pv.VAE:
    network = networks.mlp([hidden])
    encoder, decoder = guides.DiagonalNormal(pixels, latent, network), likelihoods.Bernoulli(latent, pixels, network)
    return pv.VAE(priors.StandardNormal(latent), encoder, decoder)


def log_p(exact_model, model, guide, x: Tensor, latent: int, seed: int) -> float:
    """Mean log p(x): by quadrature over z where it has two dimensions at most, else from 1000 draws for each image."""
    if latent <= 2:
        return float(pv.exact.log_evidence(exact_model, x, tolerance=1e-2).mean())
    return float(pv.log_evidence(model, guide, x, seed=seed).log_evidence.mean())


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = images.load(args.data, args.folder)
    x_train, x = datasets.binarize(train.x), datasets.binarize(test.x)[: args.test_images]
    labels = test.labels[: args.test_images]
    mixture = GaussianMixtureVAE(x.shape[1], args.components, args.latent, args.hidden)
    standard = standard_vae(x.shape[1], args.latent, args.hidden)
    how = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    summing, enumerated = TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(mixture.guide)
    fits = {
        "one standard normal": pv.fit(standard.model, standard.guide, x_train, validation=x, **how),
        "mixture, y summed over": pv.fit(mixture.model, enumerated, x_train, validation=x, elbo=summing, **how),
    }

    with torch.no_grad():
        posterior = mixture.clusters(x)
        afterwards = GaussianMixture(args.components, random_state=args.seed)
        afterwards.fit(standard.encode(x_train).mean.double().numpy())
        probs = torch.as_tensor(afterwards.predict_proba(standard.encode(x).mean.double().numpy()))
    plain = pv.evaluate(standard.model, standard.guide, x, num_samples=20, seed=args.seed)
    found = pv.evaluate(mixture.model, enumerated, x, elbo=summing, num_samples=20, seed=args.seed)
    rows = {
        "one standard normal": plain
        | {"log_p": log_p(standard.model, standard.model, standard.guide, x, args.latent, args.seed)},
        "mixture, y summed over": found
        | {"log_p": log_p(mixture.summed, mixture.model, mixture.guide, x, args.latent, args.seed)},
    }
    for (name, row), classes in zip(rows.items(), (probs, posterior), strict=True):
        row["gap"] = row["log_p"] - row["elbo"]
        row["same_label"] = images.same_label(classes, labels)
        row["adjusted_rand"] = float(adjusted_rand_score(labels, classes.argmax(1)))
        row["seconds"] = fits[name].seconds
    columns = {"log_p": "log p(x)", "elbo": "ELBO", "gap": "gap", "same_label": "purity", "adjusted_rand": "Rand"}
    columns |= {"seconds": "seconds"}
    lines = [f"{'nats per held-out image':26s}" + "".join(f"{title:>10s}" for title in columns.values())]
    lines += [f"{name:26s}" + "".join(f"{row[key]:10.3f}" for key in columns) for name, row in rows.items()]
    lines += [
        "purity: share of images whose label is the most frequent one in their cluster; Rand: adjusted, 0 by chance",
        f"clusters of the standard normal: {args.components}, of a Gaussian mixture fitted to its codes afterwards",
    ]
    report = "\n".join(lines)
    print(report)

    histories = {name: fitted.history for name, fitted in fits.items()}
    with torch.no_grad():
        each, found_in = mixture.each(), posterior.argmax(1)
        z = torch.cat([each.mean[None], each.sample(torch.Size([11]))])
        drawn = mixture.decoder(z).mean.transpose(0, 1)  # (K, 12, pixels)
        title = "Where held-out images\nof each label fall: mean q(y|x)"
        figures = {
            "samples": pictures.samples(drawn, found_in, labels, shape),
            "clusters": images.draw_classes_of_labels(posterior, labels, title),
            "training": pictures.training(histories),
        }
        if args.latent == 2:
            codes = standard.encode(x).mean, mixture.codes(x)
            figures["latent"] = pictures.latent(codes, labels, each.mean, each.stddev)
    tree = pv.to_datatree(
        mixture.model,
        mixture.guide,
        x[:100],
        draws=args.draws,
        seed=args.seed,
        parallel=True,
        dims={"x": ["pixel"], "y": ["variable", "component"]},
        coords={"label": ("obs", labels[:100])},
    )
    results.save(args, {"models": rows, "histories": histories}, figures, {"gaussian_mixture_vae": tree}, report)


if __name__ == "__main__":
    main(args)
