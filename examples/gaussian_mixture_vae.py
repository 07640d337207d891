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

import clusters
import gaussian_mixture_pictures as pictures
import images
import pyro
import pyro.distributions as dist
import results
import runs
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

from pyro_vae import families, guides, handlers, likelihoods, networks, priors
from pyro_vae.parts.base import Conditional


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

    @config_enumerate
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
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(self.weights().mean[0]), self.components()))
            pyro.sample("x", self.decoder(z), obs=x)

    def components(self) -> dist.TorchDistribution:
        """p(z | y) of each y, batch shape ``(K,)``."""
        return self.component(torch.eye(self.component.context_shape[1])[:, None])


ONE, MIXTURE = "one standard normal", "mixture, y summed over"
COLUMNS = {"log p(x)": "{log_p:.3f}", "ELBO": "{elbo:.3f}", "gap": "{gap:.3f}"}
COLUMNS |= {"purity": "{same_label:.3f}", "Rand": "{adjusted_rand:.3f}", "seconds": "{seconds:.3f}"}
NOTES = """purity: share of images whose label is the most frequent one in their cluster; Rand: adjusted, 0 by chance
on held-out images; clusters of the standard normal: by a Gaussian mixture fitted to its codes afterwards"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = images.binarized(args)
    x, pixels = test.x, test.x.shape[1]
    mixture = GaussianMixtureVAE(pixels, args.components, args.latent, args.hidden)
    standard = runs.plain_vae(pixels, args.latent, networks.mlp([args.hidden]))
    summing = TraceEnum_ELBO(max_plate_nesting=1)
    fits = {
        ONE: runs.fit(args, standard.model, standard.guide, train.x, validation=x),
        MIXTURE: runs.fit(args, mixture.model, mixture.guide, train.x, validation=x, elbo=summing),
    }
    exact = (standard.model, mixture.summed) if args.latent <= 2 else (None, None)
    rows = {
        ONE: runs.evaluate(standard, x, seed=args.seed, exact=exact[0]),
        MIXTURE: runs.evaluate(mixture, x, seed=args.seed, exact=exact[1], elbo=summing),
    }
    found = {
        ONE: clusters.of_codes(standard, train.x, x, args.components, args.seed),
        MIXTURE: mixture.classifier(x).mean[:, 0].detach(),
    }
    for name, row in rows.items():
        row |= clusters.agreement(found[name], test.labels)
        row |= {"gap": row["log_p"] - row["elbo"], "seconds": fits[name].seconds}
    how = "exact, by quadrature" if args.latent <= 2 else "and the gap at least, from 1000 draws of each image"
    report = results.table(f"{args.components} clusters, nats per image", rows, COLUMNS, NOTES, f"log p(x): {how}")
    print(report)

    histories = {name: fitted.history for name, fitted in fits.items()}
    figures = pictures.draw(mixture, standard, test, histories, shape)
    tree = images.tree(mixture, x[:100], test.labels[:100], args.draws, args.seed, y=["variable", "component"])
    results.save(args, {"models": rows, "histories": histories}, figures, {"gaussian_mixture_vae": tree}, report)


if __name__ == "__main__":
    main(args)
