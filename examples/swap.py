"""
Swap the prior, swap the guide
==============================

One loop over priors and guides on the same data, with the same networks, likelihood and number of steps. Each pair
that fits is trained, and its ELBO is compared with log p(x) of its own model on held-out data, by quadrature or
enumeration where that is possible, and otherwise estimated (~). A relaxed pair has a second row, its discrete twin:
the same parameters with hard codes. A pair that does not fit raises an error when it is built. The discrete latents
have 32 states each, five bits or one of 32 classes.
"""

import argparse
import re
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import pyro
import xarray as xr
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "swap", epochs=100)
    common.add_evaluation(parser, test_images=100)
    common.add_training(parser, batch_size=100, lr=5e-3)
    parser.add_argument("--hidden", type=common.positive_int, default=64, help="hidden units of each network")
    return parser.parse_args()


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


def make_vae(prior: str, guide: str, hidden: int) -> pv.VAE:
    """Make the VAE with this prior and this guide."""
    network = networks.mlp([hidden], activation=nn.Tanh)
    part = PRIORS[prior]()
    return pv.VAE(part, GUIDES[guide](network=network), likelihoods.Bernoulli(part().event_shape, PIXELS, network))


def evaluate(vae: pv.VAE, x: Tensor, seed: int) -> dict[str, Any]:
    """Compute the means of log p(x), of the ELBO and of their gap, in nats per image, exact if possible."""
    try:
        log_p = pv.exact.log_evidence(vae.model, x, tolerance=1e-2)
        elbo = float(pv.exact.elbo(vae.model, vae.guide, x, tolerance=1e-2).mean())
        exact = True
    except ValueError:  # no exact answer for this latent
        log_p = pv.log_evidence(vae.model, vae.guide, x, num_samples=5000, seed=seed).log_evidence
        elbo = pv.evaluate(vae.model, vae.guide, x, num_samples=200, seed=seed)["elbo"]
        exact = False
    return {"log_p": float(log_p.mean()), "elbo": elbo, "gap": float(log_p.mean()) - elbo, "exact": exact}


COLUMNS = {"log p(x)": "{sign}{log_p:.2f}", "ELBO": "{elbo:.2f}", "gap": "{gap:.2f}", "seconds": "{seconds:.1f}"}


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, _ = common.load_binary_images("digits", test_images=args.test_images)
    x, labels = test.x, test.labels
    rows: list[dict[str, Any]] = []
    trees: dict[str, xr.DataTree] = {}
    refused: dict[str, str] = {}
    # 1. Try each prior with each guide. A pair that does not fit raises an error; keep its text.
    for prior in PRIORS:
        for guide in GUIDES:
            try:
                vae = make_vae(prior, guide, args.hidden)
            except ValueError as error:
                refused[f"{prior}, {guide}"] = str(error)
                continue
            enumerated = guide.endswith("enumerated")
            fitted = pv.fit(
                vae.model,
                config_enumerate(vae.guide) if enumerated else vae.guide,
                train.x,
                elbo=TraceEnum_ELBO(max_plate_nesting=1) if enumerated else Trace_ELBO(),
                **common.training_options(args),
            )
            names = {"prior": prior, "guide": guide}
            rows.append(names | evaluate(vae, x, args.seed) | {"seconds": fitted.seconds})
            if prior.startswith(("Relaxed", "Gumbel")):
                rows.append({"prior": f"  twin of {prior}", "guide": ""} | evaluate(vae.discrete(), x, args.seed))
            file = "_".join(re.findall(r"[a-z0-9]+", guide.lower()))
            trees[f"{len(trees)}_{file}"] = common.image_tree(vae, x[:20], labels[:20], args)
            print(f"{prior}, {guide}: {fitted.seconds:.1f} s", flush=True)

    # 2. Print a table: log p(x) and ELBO of each pair.
    named = {f"{row['prior']:30s} {row['guide']}".rstrip(): row | {"sign": "" if row["exact"] else "~"} for row in rows}
    note = "in nats per held-out image of 64 pixels; ~ estimated with 5000 draws for each"
    text = common.table("prior and guide", named, COLUMNS, note)
    print(f"\n{text}\n")
    example = textwrap.indent(textwrap.fill(refused["Bernoulli(5), RelaxedBernoulli(5)"], 108), "  ")
    print(
        f"{len(refused)} pairs do not fit and raise an error, such as Bernoulli(5) with RelaxedBernoulli(5):\n{example}"
    )
    title, words = "What the guide loses of log p(x), in nats", ("gap", "log p(x)")
    figure = common.draw_elbos(named, max(row["log_p"] for row in rows) - 5.5, words, title)
    common.save(args, {"pairs": rows, "refused": refused}, {"swap": figure}, trees, text)


if __name__ == "__main__":
    main(parse_args())
