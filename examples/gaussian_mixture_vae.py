"""
Clusters in the latent space
============================

A VAE whose latent is a mixture of Gaussians: y ~ Categorical(1/K), z | y ~ N(mu_y, sigma_y²), with free means and
scales; the pixels depend on z alone. The guide is q(y | x) q(z | x, y). Training sums over y and draws one z for each
component.

The baseline is a VAE with a standard normal prior, whose codes are clustered after training. Labels only measure how
good the clusters are. With two dimensions log p(x) is exact: summed over y, the prior is one density of z, and
quadrature integrates over z.
"""

import argparse
import math
from functools import partial
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from pyro.infer import TraceEnum_ELBO, config_enumerate
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import families, guides, likelihoods, networks, plots, priors
from pyro_vae.parts import Conditional


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "gaussian_mixture_vae", epochs=60)
    common.add_images(parser, default="digits")
    common.add_training(parser, batch_size=100, lr=3e-3)
    parser.add_argument("--components", type=common.positive_int, default=10, help="K, components of the prior")
    parser.add_argument("--latent", type=common.positive_int, default=2, help="dimensions of z")
    parser.add_argument("--hidden", type=common.positive_int, default=128, help="hidden units of each network")
    args = parser.parse_args()
    if args.components < 2:
        parser.error(f"--components must be 2 or more, got {args.components}")
    return args


class GaussianMixtureVAE(nn.Module):
    """y ~ Categorical(1/K), z | y ~ N(mu_y, sigma_y²), x | z ~ Bernoulli; the site y is one-hot, of shape (1, K)."""

    def __init__(self, pixels: int, components: int, latent: int, hidden: int):
        super().__init__()
        network = networks.mlp([hidden])
        table = nn.Linear(components, 2 * latent, bias=False)  # maps a one-hot y to mu and log sigma
        with torch.no_grad():
            table.weight[:latent].normal_()  # the components start at different places
            table.weight[latent:].fill_(math.log(0.5))
        self.weights = priors.OneHotCategorical((1, components))
        self.component = Conditional(families.Normal(latent), (1, components), table)
        self.decoder = likelihoods.Bernoulli(latent, pixels, network)
        self.classifier = guides.OneHotCategorical(pixels, (1, components), network)
        self.encoder = guides.DiagonalNormal(pixels + components, latent, network)

    def model(self, x: Tensor) -> None:
        """The generative model, p(y) p(z | y) p(x | z)."""
        pyro.module("gaussian_mixture_vae", self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            y = pyro.sample("y", self.weights())
            z = pyro.sample("z", self.component(y))
            pyro.sample("x", self.decoder(z), obs=x)

    @config_enumerate
    def guide(self, x: Tensor) -> None:
        """The guide, q(y | x) q(z | x, y)."""
        pyro.module("gaussian_mixture_vae", self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            y = pyro.sample("y", self.classifier(x))
            pyro.sample("z", self.encoder(common.concat_broadcast(x, y.flatten(-2))))

    def marginal_model(self, x: Tensor) -> None:
        """The same p(x, z), summed over y: the prior is then a mixture."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(self.weights().mean[0]), self.components()))
            pyro.sample("x", self.decoder(z), obs=x)

    def components(self) -> dist.TorchDistribution:
        """Return p(z | y) of every y, batch shape ``(K,)``."""
        return self.component(torch.eye(self.component.context_shape[1])[:, None])


@torch.no_grad()
def cluster_codes(vae: pv.VAE, train: Tensor, x: Tensor, components: int, seed: int) -> Tensor:
    """Cluster codes by a Gaussian mixture fitted to those of the training data; probabilities ``(N, K)``."""
    codes, held_out = (vae.encode(each).mean.double().numpy() for each in (train, x))
    fitted = GaussianMixture(components, random_state=seed).fit(codes)
    return torch.as_tensor(fitted.predict_proba(held_out))


@torch.no_grad()
def draw(mixture: GaussianMixtureVAE, x: Tensor, labels: Tensor, shape: common.Shape) -> dict[str, Figure]:
    """Draw images of each component, the clusters of held-out images and, in two dimensions, their codes."""
    prior, posterior = mixture.components(), mixture.classifier(x).mean[:, 0]
    z = torch.cat([prior.mean[None], prior.sample(torch.Size([11]))]).transpose(0, 1)  # (K, 12, D)
    images = plots.image_grid(mixture.decoder(z).mean.reshape(-1, *shape), columns=12)
    figures = {"samples": common.set_title(images, "A row for each component: its centre, and eleven draws z | y")}
    figures["clusters"] = common.draw_classes(posterior, labels, "Mean q(y|x) of the held-out images of each label")
    if z.shape[2] == 2:
        figures["latent"], ax = plt.subplots(figsize=(7, 6.4), layout="constrained")
        y = nn.functional.one_hot(posterior.argmax(1), len(prior.mean)).to(x.dtype)
        plots.latent_map(mixture.encoder(common.concat_broadcast(x, y)).mean, labels, ax=ax)
        for centre, scale in zip(prior.mean.tolist(), prior.stddev.tolist(), strict=True):
            ax.add_patch(Ellipse(tuple(centre), 4 * scale[0], 4 * scale[1], fill=False))
        ax.set_title("Codes of held-out images, by label\nellipses: two standard deviations of each component")
    return figures


COLUMNS = {"log p(x)": "{log_p:.3f}", "ELBO": "{elbo:.3f}", "gap": "{gap:.3f}", "seconds": "{seconds:.1f}"}
COLUMNS |= {"purity": "{same_label:.3f}", "Rand": "{adjusted_rand:.3f}"}
NOTES = """in nats per held-out image; log p(x) by quadrature, with --latent 3 or more from 1000 draws, a lower bound
purity: share of images with the most frequent label of their cluster; Rand: adjusted, 0 by chance"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = common.load_binary_images(args.data, args.folder, args.test_images)
    x, seed = test.x, args.seed
    # 1. Build a VAE whose prior is a mixture of Gaussians, and the same one with a standard normal prior.
    mixture = GaussianMixtureVAE(x.shape[1], args.components, args.latent, args.hidden)
    plain = common.plain_vae(x.shape[1], args.latent, networks.mlp([args.hidden]))
    # 2. Train both. The component y is summed over in every step.
    enum = TraceEnum_ELBO(max_plate_nesting=1)
    fit: Any = partial(pv.fit, data=train.x, validation=x, **common.training_options(args))
    one, several = "one standard normal", "mixture, y summed over"
    fits = {one: fit(plain.model, plain.guide), several: fit(mixture.model, mixture.guide, elbo=enum)}
    # 3. Compare log p(x), by quadrature, and how well the clusters agree with the labels.
    exact = (plain.model, mixture.marginal_model) if args.latent <= 2 else (None, None)
    rows = {one: common.evaluate(plain, x, seed=seed, exact=exact[0])}
    rows[several] = common.evaluate(mixture, x, seed=seed, exact=exact[1], elbo=enum)
    codes = cluster_codes(plain, train.x, x, args.components, seed), mixture.classifier(x).mean[:, 0].detach()
    for (name, row), found in zip(rows.items(), codes, strict=True):
        row |= {"gap": row["log_p"] - row["elbo"], "seconds": fits[name].seconds}
        row |= common.cluster_agreement(found, test.labels)
    print(text := common.table(f"{args.components} clusters", rows, COLUMNS, NOTES))
    found = {"models": rows, "histories": {name: fitted.history for name, fitted in fits.items()}}
    tree = common.image_tree(mixture, x[:100], test.labels[:100], args, y=["variable", "component"])
    common.save(args, found, draw(mixture, x, test.labels, shape), {"gaussian_mixture_vae": tree}, text)


if __name__ == "__main__":
    main(parse_args())
