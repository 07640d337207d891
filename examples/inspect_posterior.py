"""
Is the posterior correct?
=========================

After training: how good is the model, how good is its q(z|x), and where is it wrong? One call answers this for any
Pyro model and guide, and writes a page with tables and pictures. It runs twice: on a VAE as trained, and on the same
VAE with a fault in its guide, half the variance. The call does not know of the fault, and has to find it.

No trained encoder is exact, and the ranks of enough simulated data show that: it is approximate, and the report says by
how much. A fault in the report is certain and large: one change of all variances or of all means would correct it, or
intervals cover far from what they should.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import networks


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "inspect_posterior", epochs=20)
    common.add_images(parser, default="mnist")
    common.add_training(parser, batch_size=128, lr=2e-3)
    count, positive = common.positive_int, common.positive_float
    parser.add_argument("--latent", type=count, default=10, help="dimensions of z")
    parser.add_argument("--hidden", type=count, default=256, help="hidden units of each network")
    parser.add_argument("--variance", type=positive, default=0.5, help="factor of the variance of the faulty guide")
    parser.add_argument("--simulations", type=count, default=1000, help="data drawn from the model")
    return parser.parse_args()


def scaled(vae: pv.VAE, factor: float) -> Callable[[Tensor], None]:
    """Make the guide of a VAE with its variance multiplied by a factor."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            q = vae.encode(pyro.subsample(x, event_dim=1))
            pyro.sample("z", dist.Normal(q.mean, factor**0.5 * q.stddev).to_event(1))

    return guide


def forest(trees: dict[str, Any], count: int) -> Figure:
    """Draw ArviZ's forest plot of the codes of a few images, for both guides."""
    with warnings.catch_warnings():  # ArviZ 0.23 warns on import about the changes in version 1
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az
    data = {name: pv.to_arviz(tree.isel(obs=slice(count))) for name, tree in trees.items()}
    if hasattr(az, "InferenceData"):
        az.plot_forest(list(data.values()), model_names=list(data), var_names=["z"], combined=True, figsize=(7, 9))
    else:
        az.plot_forest(data, var_names=["z"], combined=True)
    figure = plt.gcf()
    figure.suptitle("q(z|x) of one held-out image: draws of both guides, by ArviZ")
    return figure


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = common.load_binary_images(args.data, args.folder, args.test_images)
    # 1. Train a VAE. Make a second guide with a fault: half the variance.
    vae = common.plain_vae(train.x.shape[1], args.latent, networks.mlp([args.hidden], nn.SiLU))
    fitted = pv.fit(vae.model, vae.guide, train.x, validation=test.x, **common.training_options(args))
    pairs = {"as trained": vae.guide, f"variance times {args.variance:g}": scaled(vae, args.variance)}
    # 2. Inspect both. Each call writes a page, and lists the faults that it found.
    found, trees, texts = {}, {}, []
    for name, guide in pairs.items():
        page = args.out / f"{name.replace(' ', '_')}.html"
        inspection = pv.report(
            page,
            vae.model,
            guide,
            test.x,
            title=f"A VAE of {args.data}, its guide {name}",
            history=fitted.history,
            labels=test.labels,
            image_shape=shape,
            seed=args.seed,
            num_simulations=args.simulations,
        )
        texts.append(f"{name.upper()}\n{inspection}\n")
        print(texts[-1], flush=True)
        log_p = inspection.evidence.log_evidence.mean().item()
        found[name] = {"faults": inspection.faults, "warnings": inspection.warnings, "log_p": log_p}
        trees[name] = pv.to_datatree(
            vae.model,
            guide,
            test.x[:20],
            draws=args.draws,
            seed=args.seed,
            parallel=True,
            history=fitted,
            constant_data={"label": test.labels[:20]},
        )
    print("Pages:", *(f"{args.out / name.replace(' ', '_')}.html" for name in pairs))
    # 3. Draw intervals of both for ArviZ.
    figures = {"forest": forest(trees, count=1)}
    named = {name.replace(" ", "_"): tree for name, tree in trees.items()}
    common.save(args, {"guides": found, "history": fitted.history}, figures, named, "\n".join(texts))


if __name__ == "__main__":
    main(parse_args())
