"""
An image, its label and a table, any of them missing
====================================================

A digit is seen in three ways: its image, its label, and a table of noisy measurements: ink, slant, width and the number
of holes. In training and in use, any of the three may be missing. One latent z explains them all,

    z ~ N(0, I),  image ~ Bernoulli(f(z)),  label ~ Categorical(g(z)),  table ~ columns of their own kinds (h(z)),

and the guide must work with whatever is there. Each modality m has an encoder of its own, an expert. The guide is their
product, q(z|x) ∝ p(z) Π q(z|x_m) over those that are there (MVAE, Wu and Goodman 2018), or their mixture, the mean of
the q(z|x_m) (MMVAE, Shi et al. 2019). Then any modality can be drawn from any others.

Judged are the joint log p(image, label, table), next to models of each alone, and the error of the table from an image,
next to ridge regression. And do images from labels show that digit, for a classifier of real images? The product has
the better log p, the mixture the better images. A class mean with pixel noise is right more often, and always the same.
"""

import argparse
import math
from functools import partial
from typing import Any

import common
import pyro
import torch
from matplotlib.figure import Figure
from sklearn import decomposition, linear_model, pipeline, svm
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import datasets, families, guides, likelihoods, networks, plots, priors, schedules
from pyro_vae.handlers import WeightKL

Rows = tuple[Tensor, ...]  # images (N, D) of zeros and ones, labels (N, 1), tables (N, 4); NaN is missing
COLUMNS = ("ink", "slant", "width", "holes")
IMAGE, LABEL, TABLE = range(3)


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
    weigh, steps = WeightKL(beta := torch.tensor(0.0)), args.epochs * math.ceil(len(rows[0]) / args.batch_size)
    options = common.training_options(args) | {"schedules": {beta: schedules.linear(0.0, 1.0, math.ceil(0.4 * steps))}}
    return pv.fit(weigh(pair.model), weigh(pair.guide), rows, transform=transform, **options)


@torch.no_grad()
def evaluate(pair: Modalities, test: Rows, classifier: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a guide: accuracy and coherence in %, the error of the table, and log p(x) of all and of the image."""
    row, classes, label = {}, torch.arange(10.0).reshape(10, 1, 1, 1), test[LABEL][:, 0]
    for name, seen in {"image": (IMAGE,), "table": (TABLE,), "image and table": (IMAGE, TABLE)}.items():
        probs = pair.label(pair.draw(seen, test)).log_prob(classes).exp().mean(1)  # over draws of z
        row[name] = common.accuracy(probs.argmax(0), label)
    drawn = pair.image(pair.draw((LABEL,), test, 1)[0]).mean
    row["coherence"] = common.accuracy(predicted(classifier, drawn), label)
    row["rmse"] = rmse(pair.table(pair.draw((IMAGE,), test)).mean.mean(0), test[TABLE])
    for name, rows in {"log_p": test, "log_p_image": only((IMAGE,), test)}.items():
        row[name] = common.evaluate(pair, *rows, seed=args.seed, samples=args.samples)["log_p"]
    return row


def predicted(fitted: Any, images: Tensor) -> Tensor:
    """Return what a classifier or a regression of scikit-learn predicts."""
    return torch.as_tensor(fitted.predict(images))


def rmse(found: Tensor, table: Tensor) -> float:
    """Return the error of ink, slant and width, in standard deviations over digits."""
    return (found - table)[:, :3].square().mean().sqrt().item()


def fit_alone(train: Rows, test: Rows, args: argparse.Namespace) -> dict[str, float]:
    """Fit a model of each modality alone, to the rows that have it."""
    log_p = []
    for m in (LABEL, TABLE, IMAGE):
        alone = Modalities(f"alone {m}", guides.ProductOfExperts, test[IMAGE].shape[1], args.latent, args.hidden)
        fit(alone, only((m,), tuple(x[~train[m].isnan().all(1)] for x in train)), args)
        found = common.evaluate(alone, *only((m,), test), seed=args.seed, samples=args.samples)
        log_p.append(found["log_p"])
    return {"log_p": sum(log_p), "log_p_image": log_p[-1]}


def baselines(train: Rows, test: Rows, classifier: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Predict label and table from pixels by regressions; draw the mean image of each label with pixel noise."""
    x, labels, columns = (each.squeeze(1)[~train[IMAGE].isnan().any(1)] for each in train)
    new, label, known = test[IMAGE], test[LABEL][:, 0], ~labels.isnan()
    logistic = pipeline.make_pipeline(decomposition.PCA(64), linear_model.LogisticRegression(max_iter=500))
    logistic.fit(x[known], labels[known])
    ridge, there = linear_model.RidgeCV([10.0, 30.0, 100.0, 300.0]), ~columns.isnan()
    found = [predicted(ridge.fit(x[ok], y[ok]), new) for y, ok in zip(columns.T, there.T, strict=True)]
    means = torch.stack([x[labels == digit].mean(0) for digit in range(10)])[label.long()]
    row = {"image": common.accuracy(predicted(logistic, new), label), "rmse": rmse(torch.stack(found, 1), test[TABLE])}
    return row, {"coherence": common.accuracy(predicted(classifier, torch.bernoulli(means)), label)}


@torch.no_grad()
def draw(pairs: dict[str, Modalities], test: Rows, shape: common.Shape) -> dict[str, Figure]:
    """Draw an image of each digit from its label, and from its label and table."""
    rows = tuple(x[[int((test[LABEL] == digit).nonzero()[0, 0]) for digit in range(10)]] for x in test)
    images = {"real": rows[IMAGE]}
    for name, pair in pairs.items():
        for given, seen in {"label": (LABEL,), "label and table": (LABEL, TABLE)}.items():
            images[f"{name},\nfrom the {given}"] = pair.image(pair.draw(seen, rows, 1)[0]).mean
    grid = torch.cat([*images.values()]).reshape(-1, *shape)
    ax = plots.image_grid(grid, row_names=[*images], column_names=[*"0123456789"])
    ax.set(xlabel="label, and that of the real image\ntable: ink, slant, width, number of holes")
    return {"images_from_labels": common.set_title(ax, "Images drawn from the other modalities")}


PRODUCT, MIXTURE, APART, REGRESSIONS = "product of experts", "mixture of experts", "each alone", "regressions on pixels"
RESULTS = {"label from image": "{image:.1f}", "from table": "{table:.1f}", "from both": "{image and table:.1f}"}
RESULTS |= {"image from label": "{coherence:.1f}", "table from image": "{rmse:.3f}"}
RESULTS |= {"log p(all)": "{log_p:.2f}", "log p(image)": "{log_p_image:.2f}"}
NOTES = """labels: % right; image from label: % that a classifier of real images takes for that label; table from image:
error of ink, slant and width, in standard deviations; log p: nats per held-out digit, a lower bound in expectation
trade-off: experts of a product rely on each other, and its log p is better; those of a mixture stand alone, and draw"""


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Hide modalities of the training rows, and some entries of the tables; fit the judge to whole rows.
    whole, test, shape = load(args)
    real = pipeline.make_pipeline(decomposition.PCA(40), svm.SVC(C=10)).fit(whole[IMAGE], whole[LABEL][:, 0])
    image, label, table = datasets.hide_modalities(*whole, share=args.missing)
    train = image, label, table.masked_fill(torch.rand(table.shape) < 0.1, math.nan)
    # 2. Train each guide. More is hidden in each step from the product, so that its experts learn to work alone.
    pairs, rows, hide = {}, {}, partial(datasets.hide_modalities, share=args.missing)
    for name, experts in {PRODUCT: guides.ProductOfExperts, MIXTURE: guides.MixtureOfExperts}.items():
        pair = pairs[name] = Modalities(name, experts, image.shape[1], args.latent, args.hidden)
        fitted = fit(pair, train, args, hide if name == PRODUCT else None)
        rows[name] = evaluate(pair, test, real, args) | {"seconds": fitted.seconds, "history": fitted.history}
    # 3. Compare with models of each modality alone, and with regressions.
    rows[APART] = fit_alone(train, test, args)
    rows[REGRESSIONS], rows["class mean, pixel noise"] = baselines(train, test, real)
    print(text := common.table(f"{len(test[0])} held-out digits", rows, RESULTS, NOTES))
    table_error = common.headline(
        "error of ink, slant and width, from the image, mixture of experts", "standard deviations",
        rows[MIXTURE]["rmse"], baseline=rows[REGRESSIONS]["rmse"], baseline_name="ridge regression on pixels",
        higher_is_better=False, published="no figure found; MVAE and MMVAE draw images, labels and texts of each other",
        differences="modalities are missing in training; at best 0.3, the noise of the measurements")  # fmt: skip
    joint = common.headline(
        "log p of image, label and table, product of experts", "nats per digit", rows[PRODUCT]["log_p"],
        baseline=rows[APART]["log_p"], baseline_name="sum of models of each alone", higher_is_better=True,
        published="log p of MNIST images -86.86 (JMVAE, Suzuki et al. 2016, as MultiVae cites it)",
        differences="there log p(image), the last printed column, and larger networks; here of all three")  # fmt: skip
    some, names = datasets.hide_modalities(*(x[:50] for x in test)), {"coords": {"measurement": list(COLUMNS)}}
    tree = common.make_tree(pairs[PRODUCT], some[0], args, *some[1:], dims={"table": ["measurement"]}, **names)
    common.save(args, {"models": rows}, draw(pairs, test, shape), {"modalities": tree}, text, [joint, table_error])


if __name__ == "__main__":
    main(parse_args())
