"""
An image, its label and a table, any of them missing
====================================================

A digit is seen in three ways: its image, its label, and a table of noisy measurements: ink, slant, width and the number
of holes. In training and in use, any of the three may be missing. One latent z explains them all,

    z ~ N(0, I),  image ~ Bernoulli(f(z)),  label ~ Categorical(g(z)),  table ~ columns of their own kinds (h(z)),

and the guide must work with whatever is there. Each modality m has an encoder of its own, an expert. The guide is their
product, q(z|x) ∝ p(z) Π q(z|x_m) over those that are there (MVAE, Wu and Goodman 2018), or their mixture, the mean of
the q(z|x_m) (MMVAE, Shi et al. 2019). Then any modality can be drawn from any others.

Does an image that is drawn from a label show that digit, for an independent classifier of real images? Is the joint
log p(image, label, table) above the sum of log p of models of each alone, the baseline? The product gives the better
log p, the mixture the better images from labels.
"""

import argparse
import math
from functools import partial
from typing import Any

import common
import pyro
import torch
from matplotlib.figure import Figure
from sklearn import linear_model, svm
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, families, guides, likelihoods, networks, plots, priors, schedules
from pyro_vae.handlers import WeightKL

Rows = tuple[Tensor, ...]  # images (N, D) of zeros and ones, labels (N, 1), tables (N, 4); NaN is missing
COLUMNS = ("ink", "slant", "width", "holes")
IMAGE, LABEL, TABLE = range(3)
GIVEN = {"image": (IMAGE,), "table": (TABLE,), "image and table": (IMAGE, TABLE)}


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "modalities", epochs=15)
    common.add_images(parser, default="mnist")
    common.add_training(parser, batch_size=100, lr=2e-3)
    parser.add_argument("--train-images", type=common.positive_int, default=10_000, help="rows to train on")
    parser.add_argument("--latent", type=common.positive_int, default=16, help="dimensions of z")
    parser.add_argument("--hidden", type=common.positive_int, default=128, help="hidden units of each network")
    parser.add_argument("--missing", type=common.positive_float, default=0.3, help="share of missing modalities")
    parser.add_argument("--samples", type=common.positive_int, default=200, help="draws for log p(x) of each row")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Rows, Rows, common.Shape]:
    """Load training and held-out rows, with noise in the continuous columns, and height and width of an image."""
    *splits, shape = common.load_images(args.data, args.folder)
    rows: list[Rows] = []
    for data, count in zip(splits, (args.train_images, args.test_images), strict=True):
        x, table = data.x[:count], datasets.measure_images(data.x[:count], shape)
        if not rows:
            loc, scale = table[:, :3].mean(0), table[:, :3].std(0)
        table[:, :3] = (table[:, :3] - loc) / scale + 0.3 * torch.randn(len(table), 3)
        table[:, 3].clamp_(0, 2)  # holes
        rows.append((datasets.binarize(x), data.labels[:count, None].float(), table))
    return rows[0], rows[1], shape


def only(seen: tuple[int, ...], rows: Rows) -> Rows:
    """Replace all other modalities by NaN."""
    return tuple(x if m in seen else torch.full_like(x, math.nan) for m, x in enumerate(rows))


class Modalities(nn.Module):
    """p(z) p(image | z) p(label | z) p(table | z), with a product or a mixture of experts as the guide."""

    def __init__(self, name: str, combine: Any, pixels: int, latent: int, hidden: int):
        super().__init__()
        self.name, network = name, networks.mlp([hidden])
        self.prior = priors.StandardNormal(latent)
        self.image = likelihoods.Bernoulli(latent, pixels, network, missing=True)
        self.label = likelihoods.Categorical(latent, 1, 10, network, missing=True)
        columns: dict[str, Any] = {name: families.Normal(1, scale="shared", min_scale=0.01) for name in COLUMNS[:3]}
        self.table = likelihoods.Columns(latent, columns | {"holes": families.Categorical(1, 3)}, network)
        sizes = {pixels: network, 1: networks.one_hot(10, network), len(COLUMNS): networks.with_missing(network)}
        self.encoder = combine([guides.DiagonalNormal(size, latent, factory) for size, factory in sizes.items()])

    def model(self, image: Tensor, label: Tensor, table: Tensor) -> None:
        """p(z) p(image | z) p(label | z) p(table | z)."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(image)):
            image, label, table = (pyro.subsample(x, event_dim=1) for x in (image, label, table))
            z = pyro.sample("z", self.prior())
            pyro.sample("image", self.image(z), obs=image)
            pyro.sample("label", self.label(z), obs=label)
            pyro.sample("table", self.table(z), obs=table)

    def guide(self, image: Tensor, label: Tensor, table: Tensor) -> None:
        """q(z | the modalities that are there)."""
        pyro.module(self.name, self)
        with pyro.plate("data", len(image)):
            rows = [pyro.subsample(x, event_dim=1) for x in (image, label, table)]
            pyro.sample("z", self.encoder(torch.cat(rows, 1)))

    def draw(self, seen: tuple[int, ...], rows: Rows, count: int = 100) -> Tensor:
        """Draw z given the modalities that are seen, ``(count, N, D)``."""
        return self.encoder(torch.cat(only(seen, rows), 1)).sample(torch.Size([count]))


def fit(pair: Modalities, rows: Rows, args: argparse.Namespace, transform: Any = None) -> pv.Fitted:
    """Train; the weight of the KL rises from 0 to 1, since an expert that has become vague hardly learns any more."""
    beta, steps = torch.tensor(0.0), args.epochs * math.ceil(len(rows[0]) / args.batch_size)
    options = common.training_options(args) | {"schedules": {beta: schedules.linear(0.0, 1.0, math.ceil(0.4 * steps))}}
    weighted = WeightKL(beta)
    return pv.fit(weighted(pair.model), weighted(pair.guide), rows, transform=transform, **options)


def mean_log_p(pair: Modalities, rows: Rows, args: argparse.Namespace) -> float:
    """Estimate log p(x) of the modalities that are there, in nats per row."""
    found = pv.log_evidence(pair.model, pair.guide, *rows, num_samples=args.samples, seed=args.seed)
    return found.log_evidence.mean().item()


@torch.no_grad()
def evaluate(pair: Modalities, test: Rows, judge: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a guide: accuracy and coherence in %, the error of the table, and log p(x) of all and of the image."""
    row, classes = {}, torch.arange(10.0).reshape(10, 1, 1, 1)
    for name, seen in GIVEN.items():  # the mean of p(label | z) over draws of z
        probs = pair.label(pair.draw(seen, test)).log_prob(classes).exp().mean(1)
        row[name] = percent(probs.argmax(0), test[LABEL])
    row["coherence"] = percent(judge.predict(pair.image(pair.draw((LABEL,), test, 1)[0]).mean.numpy()), test[LABEL])
    row["rmse"] = rmse(pair.table(pair.draw((IMAGE,), test)).mean.mean(0), test[TABLE])
    row["log_p"], row["log_p_image"] = mean_log_p(pair, test, args), mean_log_p(pair, only((IMAGE,), test), args)
    return row


def percent(found: Any, label: Tensor) -> float:
    """Return the percentage of right labels."""
    return 100 * (torch.as_tensor(found) == label[:, 0]).double().mean().item()


def rmse(found: Any, table: Tensor) -> float:
    """Return the error of ink, slant and width, in standard deviations over digits."""
    return (torch.as_tensor(found) - table)[:, :3].square().mean().sqrt().item()


def fit_alone(train: Rows, test: Rows, judge: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Fit a model of each modality alone; and regressions on the image, on the rows that have both."""
    known, log_p = [~x.isnan().all(1) for x in train], []
    for m in (LABEL, TABLE, IMAGE):
        alone = Modalities(f"alone {m}", guides.ProductOfExperts, test[IMAGE].shape[1], args.latent, args.hidden)
        fit(alone, only((m,), tuple(x[known[m]] for x in train)), args)
        log_p.append(mean_log_p(alone, only((m,), test), args))
    drawn = alone.image(alone.prior().sample(torch.Size([len(test[IMAGE])]))).mean.detach()
    row = {"log_p": sum(log_p), "log_p_image": log_p[-1], "coherence": percent(judge.predict(drawn), test[LABEL])}
    x, y, both = train[IMAGE].numpy(), train[LABEL][:, 0].numpy(), (known[IMAGE] & known[LABEL]).numpy()
    regression = make_pipeline(PCA(64), linear_model.LogisticRegression(max_iter=500)).fit(x[both], y[both])
    both = (known[IMAGE] & ~train[TABLE].isnan().any(1)).numpy()
    ridge = make_pipeline(PCA(64), linear_model.Ridge()).fit(x[both], train[TABLE].numpy()[both])
    row["image"] = percent(regression.predict(test[IMAGE].numpy()), test[LABEL])
    return row | {"rmse": rmse(ridge.predict(test[IMAGE].numpy()), test[TABLE])}


@torch.no_grad()
def draw(pairs: dict[str, Modalities], test: Rows, shape: common.Shape) -> dict[str, Figure]:
    """Draw an image of each digit from its label, and from its label and table."""
    rows = tuple(x[[int((test[LABEL] == digit).nonzero()[0, 0]) for digit in range(10)]] for x in test)
    images = {"real": rows[IMAGE]}
    for name, pair in pairs.items():
        for given, seen in {"label": (LABEL,), "label and table": (LABEL, TABLE)}.items():
            images[f"{name},\nfrom the {given}"] = pair.image(pair.draw(seen, rows, 1)[0]).mean
    names: dict[str, Any] = {"row_names": list(images), "column_names": list(map(str, range(10)))}
    ax = plots.image_grid(torch.cat([*images.values()]).reshape(-1, *shape), **names)
    ax.set(xlabel="label, and that of the real image")
    return {"images_from_labels": common.set_title(ax, "Images drawn from the other modalities")}


MIXTURE, PRODUCT, APART = "mixture of experts", "product of experts", "each alone, and regressions"
RESULTS = {"label from image": "{image:.1f}", "from table": "{table:.1f}", "from both": "{image and table:.1f}"}
RESULTS |= {"image from label": "{coherence:.1f}", "table from image": "{rmse:.3f}"}
RESULTS |= {"log p(all)": "{log_p:.2f}", "log p(image)": "{log_p_image:.2f}"}
NOTES = """labels: % right; image from label: % that a classifier of real images takes for that label; table from image:
error of ink, slant and width, in standard deviations; log p: nats per held-out digit, a lower bound in expectation"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Hide modalities of the training rows, and some entries of the tables; fit the judge to whole rows.
    whole, test, shape = load(args)
    judge = make_pipeline(PCA(40), svm.SVC(C=10)).fit(whole[IMAGE][:10_000].numpy(), whole[LABEL][:10_000, 0].numpy())
    image, label, table = datasets.hide_modalities(*whole, share=args.missing)
    train = image, label, table.masked_fill(torch.rand(table.shape) < 0.1, math.nan)
    # 2. Train each guide. More is hidden in each step from the product, so that its experts learn to work alone.
    pairs, rows, hide = {}, {}, partial(datasets.hide_modalities, share=args.missing)
    for name, experts in {PRODUCT: guides.ProductOfExperts, MIXTURE: guides.MixtureOfExperts}.items():
        pair = pairs[name] = Modalities(name, experts, image.shape[1], args.latent, args.hidden)
        fitted = fit(pair, train, args, hide if name == PRODUCT else None)
        rows[name] = evaluate(pair, test, judge, args) | {"seconds": fitted.seconds, "history": fitted.history}
    # 3. Compare with models of each modality alone, and with regressions.
    rows[APART] = fit_alone(train, test, judge, args)
    print(text := common.table(f"{len(test[0])} held-out digits", rows, RESULTS, NOTES))
    coherence = common.headline(
        "images drawn from a label show it, mixture of experts", "%", rows[MIXTURE]["coherence"], higher_is_better=True,
        baseline=rows[APART]["coherence"], baseline_name="VAE of images alone",
        published="SVHN from MNIST 86 %, MNIST from SVHN 69 % (MMVAE, Shi et al. 2019, as MultiVae cites them)",
        differences="there one photograph of a digit from another; here from a label, and modalities are missing",
    )  # fmt: skip
    joint = common.headline(
        "log p of image, label and table, product of experts", "nats per digit", rows[PRODUCT]["log_p"],
        baseline=rows[APART]["log_p"], baseline_name="sum of models of each alone", higher_is_better=True,
        published="log p of MNIST images -86.86 (JMVAE, Suzuki et al. 2016, as MultiVae cites it)",
        differences="there the image alone, larger networks and more epochs; here label and table, too",
    )  # fmt: skip
    some, names = datasets.hide_modalities(*(x[:50] for x in test)), {"coords": {"measurement": list(COLUMNS)}}
    tree = common.make_tree(pairs[PRODUCT], some[0], args, *some[1:], dims={"table": ["measurement"]}, **names)
    common.save(args, {"models": rows}, draw(pairs, test, shape), {"modalities": tree}, text, [coherence, joint])


if __name__ == "__main__":
    main(parse_args())
