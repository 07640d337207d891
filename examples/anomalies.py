"""
Which score finds anomalies, and why log p(x) alone does not
============================================================

A VAE is trained on handwritten digits of binary pixels. Then it sees images that are no digits: mirrored ones, digits
turned by 90 degrees, digits whose pixels are shuffled, a few black pixels, and constant images, white or black. An
anomaly score should be higher for them than for held-out digits.

The scores are -log p(x); typicality, |log p(x) - mean log p of digits| (Nalisnick et al. 2019), of one image or of ten
together; the reconstruction error -E_q log p(x|z); and the likelihood regret, what the ELBO gains if q is fitted to the
image alone (Xiao et al. 2020), which is the amortization gap of ``pv.inference_gap``. The baselines are the error of
PCA, its distance from the mean error of digits, in either direction, and the distance from the mean image.

A white image has the *highest* density of all, though no digit is empty: each pixel is white with a high probability,
and the density falls with each black pixel. Digits are not where the density is highest, but where it is middling and
many images are. So -log p(x) takes empty images for the most normal ones; typicality finds them too probable. No score
is best for all kinds: -log p(x) is ahead of PCA for digits that are turned or mirrored, and fails where ink is missing.
Each score is judged by the AUROC, the probability that an anomaly has a higher score than a digit: 0.5 for a coin.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor

import pyro_vae as pv
from pyro_vae import networks, plots

DIGITS = "held-out digits"
OTHER_DIGITS = {kind: f"{kind}\n(other digits)" for kind in ("mirrored", "turned by 90°")}
SMALLEST = 60  # held-out images, for groups of ten


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "anomalies", epochs=20)
    common.add_images(parser, default="mnist")
    common.add_training(parser, batch_size=200, lr=2e-3)
    parser.add_argument("--train-images", type=common.positive_int, default=10_000, help="images to train on")
    parser.add_argument("--latent", type=common.positive_int, default=16, help="dimensions of z, and components of PCA")
    parser.add_argument("--hidden", type=common.positive_int, default=256, help="hidden units of each network")
    parser.add_argument("--samples", type=common.positive_int, default=100, help="draws for log p(x) of each image")
    parser.add_argument("--refined", type=common.positive_int, default=200, help="images of each kind for the regret")
    args = parser.parse_args()
    if args.test_images < SMALLEST:
        parser.error(f"--test-images must be {SMALLEST} or more, got {args.test_images}")
    return args


def make_anomalies(images: Tensor, shape: common.Shape) -> dict[str, Tensor]:
    """Make images of each kind from digits ``(N, D)``."""
    grid = images.reshape(-1, *shape)
    return {
        "mirrored": grid.flip(2).flatten(1),
        "turned by 90°": grid.rot90(1, (1, 2)).flatten(1),
        "shuffled pixels": images.gather(1, torch.rand(images.shape).argsort(1)),
        "few pixels": (torch.rand(images.shape) < 0.01).float(),
        "white": torch.zeros_like(images),
        "black": torch.ones_like(images),
    }


class Scores:
    """Anomaly scores of images; typicality compares them with the reference, held-out digits."""

    def __init__(self, vae: pv.VAE, train: Tensor, reference: Tensor, args: argparse.Namespace):
        self.vae, self.args, self.mean = vae, args, train.mean(0)
        self.pca = PCA(args.latent, random_state=args.seed).fit(train.numpy())
        self.log_p_reference, self.pca_reference = self.log_p(reference), self.pca_error(reference)

    def log_p(self, x: Tensor) -> Tensor:
        """Estimate log p(x) of each image."""
        options = {"num_samples": self.args.samples, "seed": self.args.seed}
        return pv.log_evidence(self.vae.model, self.vae.guide, x, **options).log_evidence

    def pca_error(self, x: Tensor) -> Tensor:
        """Return the squared error of PCA of each image."""
        found = self.pca.inverse_transform(self.pca.transform(x.numpy()))
        return (x - torch.as_tensor(found)).square().sum(1)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Return the scores by name, ``(N,)`` each; the regret is that of the first images."""
        log_p, error, few = self.log_p(x), self.pca_error(x), x[: self.args.refined]
        z = self.vae.encode(x).sample(torch.Size([20]))
        options = {"num_particles": 4, "num_samples": 50, "tolerance": None, "seed": self.args.seed}
        gap = pv.inference_gap(self.vae.model, self.vae.guide, few, **options)
        assert gap.amortization is not None
        return {
            "-log p(x)": -log_p,
            "typicality": pv.typicality(log_p, self.log_p_reference),
            "typicality of ten images together": pv.typicality(log_p, self.log_p_reference, group_size=10),
            "reconstruction error": -self.vae.decode(z).log_prob(x).mean(0),
            "likelihood regret": gap.amortization,
            "PCA error": error,
            "PCA error, too large or too small": (error - self.pca_reference.mean()).abs(),
            "distance from the mean": (x - self.mean).square().sum(1),
        }


def compare(scores: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Compute the AUROC of each score and kind of anomaly, with its standard error, and the mean over the kinds."""
    rows: dict[str, dict[str, Any]] = {}
    for name, normal in scores[DIGITS].items():
        areas = {kind: pv.auroc(normal, of[name]) for kind, of in scores.items() if kind != DIGITS}
        rows[name] = {kind: area.value for kind, area in areas.items()}
        rows[name]["mean"] = sum(rows[name].values()) / len(areas)
        rows[name]["standard_errors"] = {kind: area.standard_error for kind, area in areas.items()}
    return rows


def draw(
    kinds: Mapping[str, Tensor], scores: Mapping[str, Mapping[str, Tensor]], shape: common.Shape
) -> dict[str, Figure]:
    """Draw images of each kind with their log p(x), its distribution, and log p(x) against black pixels."""
    log_p = {kind: -of["-log p(x)"] for kind, of in scores.items()}
    order = sorted(kinds, key=lambda kind: -log_p[kind].mean())
    names = [f"{OTHER_DIGITS.get(kind, kind)}\n{log_p[kind].mean():.0f} nats" for kind in order]
    images = torch.cat([kinds[kind][:10] for kind in order])
    ax = plots.image_grid(images.reshape(-1, *shape), row_names=names)
    figures = {"kinds": common.set_title(ax, "The most probable images are no digits: mean log p(x)")}
    figures["ink"], ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for index, kind in enumerate(kind for kind in kinds if kind != "black"):
        style: Any = plots.colours.style(index) | {"linestyle": "none", "zorder": 3 if kind == DIGITS else 2}
        ax.plot(kinds[kind].sum(1), log_p[kind], ms=4, alpha=0.7, label=kind, **style)
    ax.plot([], [], " ", label=f"black: {log_p['black'].mean():.0f}, not shown")
    ax.set(xlabel="black pixels of the image", ylabel="log p(x), nats")
    ax.set_title("The less ink, the more probable: white images are above all digits")
    ax.grid(alpha=0.3)
    plots.axes.legend_below(ax, grow=True)
    return figures


def draw_areas(rows: Mapping[str, Mapping[str, Any]], kinds: list[str]) -> Figure:
    """Draw a table of AUROCs in grey: dark where anomalies are found, white where they look more normal than digits."""
    columns = [*kinds, "mean"]
    areas = [[row[column] for column in columns] for row in rows.values()]
    figure, ax = plt.subplots(figsize=(8, 4.4), layout="constrained")
    shown = ax.imshow(areas, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(areas):
        for x, area in enumerate(row):
            ax.text(x, y, f"{area:.2f}", ha="center", va="center", color="white" if area > 0.6 else "black")
    ax.set_xticks(range(len(columns)), [column.replace(" ", "\n", 1) for column in columns])
    ax.set_yticks(range(len(rows)), list(rows))
    ax.axvline(len(kinds) - 0.5, color="white", linewidth=6)  # a gap: the mean is no kind
    ax.set_title("AUROC: how often an anomaly has a higher score than a digit")
    figure.colorbar(shown, label="0: more normal than digits, 0.5: no difference, 1: found")
    return figure


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Train a VAE on digits.
    train, test, shape = common.load_binary_images(args.data, args.folder, args.test_images)
    x = train.x[: args.train_images]
    vae = common.plain_vae(x.shape[1], args.latent, networks.mlp([args.hidden]))
    fitted = pv.fit(vae.model, vae.guide, x, **common.training_options(args))
    # 2. Score held-out digits and anomalies, made of other digits; a third of the digits is the reference.
    reference, normal, others = test.x[: len(test) // 3 * 3].chunk(3)
    kinds = {DIGITS: normal} | make_anomalies(others, shape)
    score = Scores(vae, x, reference, args)
    scores = {kind: score(images) for kind, images in kinds.items()}
    # 3. Compare the scores.
    rows, found = compare(scores), list(kinds)[1:]
    errors = [error for row in rows.values() for error in row["standard_errors"].values()]
    columns = {kind: f"{{{kind}:.3f}}" for kind in [*found, "mean"]}
    notes = f"AUROC, with standard errors of up to {max(errors):.3f}; {len(normal)} digits and as many of each kind"
    print(text := common.table("score", rows, columns, f"{notes}, {args.refined} for the regret"))
    figures = draw(kinds, scores, shape) | {"auroc": draw_areas(rows, found)}
    differences = "there grey pixels, 60,000 digits and convolutional VAEs; here 10,000 and a small network"
    differences += "; over all six kinds, the PCA error, too large or too small, is the best score of single images"
    figures_of = {
        "mirrored": "0.59 (ELBO), 0.81 (DoSE, Morningstar et al. 2021); table 1 of Inference, fast and slow",
        "turned by 90°": "no figure found; likelihood regret (Xiao et al. 2020) is compared on other data sets",
    }
    headlines = [
        common.headline(
            f"-log p(x), digits {kind}", "AUROC", rows["-log p(x)"][kind], baseline=rows["PCA error"][kind],
            baseline_name="PCA error", higher_is_better=True, published=published, differences=differences,
        )
        for kind, published in figures_of.items()
    ]  # fmt: skip
    labels = [kind for kind, images in kinds.items() for _ in images[:8]]
    few = torch.cat([images[:8] for images in kinds.values()])
    names: dict[str, Any] = {"dims": {"x": ["pixel"]}, "coords": {"kind": ("obs", labels)}}
    tree = common.make_tree(vae, few, args, **names)
    results = {"scores": rows, "history": fitted.history, "seconds": fitted.seconds}
    common.save(args, results, figures, {"anomalies": tree}, text, headlines)


if __name__ == "__main__":
    main(parse_args())
