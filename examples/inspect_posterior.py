"""
Can the posterior be believed?
==============================

After training: how good is the model, how good is its q(z|x), and where is it wrong? One call finds out, for any Pyro
model and guide, and writes a page with tables and pictures. It is asked twice: of a VAE as it was trained, and of the
same with a fault planted in its guide, half the variance it should have. Nobody tells the call that there is one.

No encoder that is trained is exact, and the ranks of enough simulated data tell so. What is named a fault is certain,
and would be mended by one change of all variances, or of all means: of that, training leaves none.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "inspect_posterior", epochs=20)
    options.add_images(parser, default="mnist")
    options.add_training(parser, batch_size=128, lr=2e-3)
    parser.add_argument("--latent", type=options.count, default=10, help="dimensions of z")
    parser.add_argument("--hidden", type=options.count, default=256, help="units of the hidden layer, each way")
    parser.add_argument(
        "--variance", type=options.positive, default=0.5, help="of the faulty guide, times the sound one"
    )
    parser.add_argument("--simulations", type=options.count, default=1000, help="data drawn from the model")
    args = parser.parse_args()

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import images
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import results
import runs
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import networks


def scaled(vae: pv.VAE, factor: float) -> Callable[[Tensor], None]:
    """The guide of a VAE, with the variance times a factor."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            q = vae.encode(pyro.subsample(x, event_dim=1))
            pyro.sample("z", dist.Normal(q.mean, factor**0.5 * q.stddev).to_event(1))

    return guide


def forest(trees: dict[str, Any], count: int) -> Figure:
    """ArviZ's forest plot of the codes of a few images, by either guide."""
    with warnings.catch_warnings():  # ArviZ 0.23 warns on import that version 1 will be another
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az
    data = {name: pv.to_arviz(tree.isel(obs=slice(count))) for name, tree in trees.items()}
    if hasattr(az, "InferenceData"):
        az.plot_forest(list(data.values()), model_names=list(data), var_names=["z"], combined=True, figsize=(7, 9))
    else:
        az.plot_forest(data, var_names=["z"], combined=True)
    figure = plt.gcf()
    figure.suptitle("q(z|x) of one held-out image: draws of either guide, by ArviZ")
    return figure


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, shape = images.binarized(args)
    vae = runs.plain_vae(train.x.shape[1], args.latent, networks.mlp([args.hidden], nn.SiLU))
    fitted = runs.fit(args, vae.model, vae.guide, train.x, validation=test.x)
    pairs = {"as trained": vae.guide, f"variance times {args.variance:g}": scaled(vae, args.variance)}
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
        print(f"{texts[-1]}{page}\n", flush=True)
        log_p = inspection.evidence.log_evidence.mean().item()
        found[name] = {"faults": inspection.faults, "cautions": inspection.warnings, "log_p": log_p}
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
    figures = {"forest": forest(trees, count=1)}
    named = {name.replace(" ", "_"): tree for name, tree in trees.items()}
    results.save(args, {"guides": found, "history": fitted.history}, figures, named, "\n".join(texts))


if __name__ == "__main__":
    main(args)
