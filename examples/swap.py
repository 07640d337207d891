"""
Swap the prior, swap the guide
==============================

One loop over priors and guides on one data set. Everything else stays: the networks, the likelihood, the number of
steps. Each pair that fits is trained, and its ELBO held against log p(x) of its own model on held-out data: by
quadrature or enumeration where that can be done, and otherwise estimated (~). A relaxed pair has a second row, its
discrete twin: the same parameters with hard codes. A pair that does not fit is refused when it is built. The discrete
latents have 32 states each, five bits or one of 32 classes.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "swap", epochs=100)
    options.add_digits(parser, test_images=100)
    options.add_training(parser, batch_size=100, lr=5e-3)
    parser.add_argument("--hidden", type=options.count, default=64, help="units of the hidden layer, each way")
    args = parser.parse_args()

import argparse
import re
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import images
import matplotlib.pyplot as plt
import pyro
import results
import runs
import xarray as xr
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

PIXELS = 64
PRIORS: dict[str, Callable[[], nn.Module]] = {
    "StandardNormal(2)": lambda: priors.StandardNormal(2),
    "Normal(2)": lambda: priors.Normal(2),
    "Bernoulli(5)": lambda: priors.Bernoulli(5),
    "RelaxedBernoulli(5)": lambda: priors.RelaxedBernoulli(5, temperature=0.2),
    "OneHotCategorical(1, 32)": lambda: priors.OneHotCategorical((1, 32)),
    "GumbelSoftmax(1, 32)": lambda: priors.GumbelSoftmax((1, 32), temperature=0.1),
}
GUIDES: dict[str, Callable[..., nn.Module]] = {
    "DiagonalNormal(2)": partial(guides.DiagonalNormal, PIXELS, 2),
    "Bernoulli(5), enumerated": partial(guides.Bernoulli, PIXELS, 5),
    "Bernoulli(5), score function": partial(guides.Bernoulli, PIXELS, 5),
    "RelaxedBernoulli(5)": partial(guides.RelaxedBernoulli, PIXELS, 5, temperature=0.66),
    "OneHotCategorical(1, 32), enumerated": partial(guides.OneHotCategorical, PIXELS, (1, 32)),
    "GumbelSoftmax(1, 32)": partial(guides.GumbelSoftmax, PIXELS, (1, 32), temperature=0.66),
}


def swapped(prior: str, guide: str, hidden: int) -> pv.VAE:
    """The VAE of this prior and this guide."""
    network = networks.mlp([hidden], activation=nn.Tanh)
    made = PRIORS[prior]()
    latent = made().event_shape
    return pv.VAE(made, GUIDES[guide](network=network), likelihoods.Bernoulli(latent, PIXELS, network))


def evaluate(vae: pv.VAE, x: Tensor, seed: int) -> dict[str, Any]:
    """Mean log p(x), ELBO and what lies between them, in nats per image, exact if that can be."""
    try:
        log_p = pv.exact.log_evidence(vae.model, x, tolerance=1e-2)
        elbo = float(pv.exact.elbo(vae.model, vae.guide, x, tolerance=1e-2).mean())
        exact = True
    except ValueError:  # no exact answer for this latent
        log_p = pv.log_evidence(vae.model, vae.guide, x, num_samples=5000, seed=seed).log_evidence
        elbo = pv.evaluate(vae.model, vae.guide, x, num_samples=200, seed=seed)["elbo"]
        exact = False
    return {"log_p": float(log_p.mean()), "elbo": elbo, "gap": float(log_p.mean()) - elbo, "exact": exact}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'prior':31s}{'guide':37s}{'log p(x)':>9s}{'ELBO':>9s}{'gap':>7s}{'seconds':>9s}"]
    for row in rows:
        log_p = ("" if row["exact"] else "~") + f"{row['log_p']:.2f}"
        seconds = f"{row['seconds']:9.1f}" if "seconds" in row else ""
        lines.append(f"{row['prior']:31s}{row['guide']:37s}{log_p:>9s}{row['elbo']:9.2f}{row['gap']:7.2f}{seconds}")
    lines.append("log p(x), ELBO and gap in nats per held-out image of 64 pixels; ~ by 5000 draws for each")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The ELBO of each pair, and how far above it log p(x) of its model is."""
    figure, ax = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.6), layout="constrained")
    places = range(len(rows), 0, -1)
    log_p, elbo = ([row[key] for row in rows] for key in ("log_p", "elbo"))
    ax.hlines(places, elbo, log_p, color="0.6", linewidth=2, label="gap, KL(q(z|x) || p(z|x))")
    ax.plot(elbo, places, "o", color="tab:blue", label="ELBO")
    ax.plot(log_p, places, "|", color="black", markersize=14, markeredgewidth=2, label="log p(x)")
    left = max(min(elbo), max(log_p) - 5) - 0.5
    for place, row in zip(places, rows, strict=True):
        if row["elbo"] < left:
            ax.text(
                left + 0.1, place, f"off the scale: ELBO {row['elbo']:.1f}, log p(x) {row['log_p']:.1f}", va="center"
            )
    names = [f"{row['prior']}  |  {row['guide']}".removesuffix("  |  ") + " ~" * (not row["exact"]) for row in rows]
    ax.set(yticks=places, yticklabels=names, xlim=(left, max(log_p) + 0.5), xlabel="nats per held-out image")
    figure.suptitle("prior  |  guide, and what the guide loses of log p(x); ~ is estimated")
    ax.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, _ = images.binarized(args)
    x, labels = test.x, test.labels
    rows: list[dict[str, Any]] = []
    trees: dict[str, xr.DataTree] = {}
    refused: dict[str, str] = {}
    for prior in PRIORS:
        for guide in GUIDES:
            try:
                vae = swapped(prior, guide, args.hidden)
            except ValueError as error:
                refused[f"{prior}, {guide}"] = str(error)
                continue
            enumerated = guide.endswith("enumerated")
            fitted = runs.fit(
                args,
                vae.model,
                config_enumerate(vae.guide) if enumerated else vae.guide,
                train.x,
                elbo=TraceEnum_ELBO(max_plate_nesting=1) if enumerated else Trace_ELBO(),
            )
            names = {"prior": prior, "guide": guide}
            rows.append(names | evaluate(vae, x, args.seed) | {"seconds": fitted.seconds})
            if prior.startswith(("Relaxed", "Gumbel")):
                rows.append({"prior": f"  twin of {prior}", "guide": ""} | evaluate(vae.discrete(), x, args.seed))
            file = "_".join(re.findall(r"[a-z0-9]+", guide.lower()))
            trees[f"{len(trees)}_{file}"] = images.tree(vae, x[:20], labels[:20], args.draws, args.seed)
            print(f"{prior}, {guide}: {fitted.seconds:.1f} s", flush=True)

    report = table(rows)
    print(f"\n{report}\n")
    reason = textwrap.fill(
        refused["Bernoulli(5), RelaxedBernoulli(5)"], 110, initial_indent="  ", subsequent_indent="  "
    )
    print(f"{len(refused)} pairs do not fit and are refused, such as Bernoulli(5) with RelaxedBernoulli(5):\n{reason}")
    results.save(args, {"pairs": rows, "refused": refused}, {"swap": draw(rows)}, trees, report)


if __name__ == "__main__":
    main(args)
