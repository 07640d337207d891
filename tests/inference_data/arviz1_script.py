"""Read a file of the package with ArviZ 1, in an environment without Pyro and torch: see `test_arviz.py`.

Usage: python arviz1_script.py FILE FOLDER

The script writes pictures to the folder and prints the means of a summary as JSON.
"""

import json
import sys
from pathlib import Path

import xarray as xr


def pictures(az, tree: xr.DataTree) -> dict:
    """Functions that draw the pictures, by name."""
    two = {"obs": tree["posterior"].coords["obs"].values[:2]}
    drawn = {
        "density": lambda: az.plot_dist(tree, var_names=["z"], coords=two),
        "forest": lambda: az.plot_forest(tree),
        "pair": lambda: az.plot_pair(tree, var_names=["z"], coords=two),
        "posterior predictive": lambda: az.plot_ppc_dist(tree, num_samples=20),
        "prior predictive": lambda: az.plot_ppc_dist(tree, group="prior_predictive", num_samples=20),
        "prior and posterior": lambda: az.plot_prior_posterior(tree, var_names=["z"], coords=two),
        "aggregate posterior": lambda: az.plot_dist(tree, var_names=["z"], sample_dims=["chain", "draw", "obs"]),
        "guide": lambda: az.plot_dist(tree, group="guide", var_names=["z_"], filter_vars="like", sample_dims=["obs"]),
    }
    if "label" in tree["posterior"].coords:
        labels = tree["posterior"].coords["label"].values
        ones = {"obs": tree["posterior"].coords["obs"].values[labels == labels[0]]}
        drawn["density of one label"] = lambda: az.plot_dist(tree, var_names=["z"], coords=ones)
        colours = [f"C{sorted(set(labels)).index(label)}" for label in labels]
        drawn["forest by label"] = lambda: az.plot_forest(
            tree, var_names=["z"], combined=True, aes={"color": ["obs"]}, color=colours
        )
    return drawn


def main(path: Path, folder: Path) -> None:
    """Summarise the file and draw it."""
    import arviz as az  # here, since the collection of tests must not import ArviZ

    with xr.open_datatree(path) as tree:
        tree.load()
    means = {
        name: az.summary(tree, var_names=[name], kind="stats", round_to="none")["mean"].tolist()
        for name in tree["posterior"].data_vars
    }
    for name, draw in pictures(az, tree).items():
        draw().savefig(folder / f"{name}.png")
    heavy = [name for name in ("torch", "pyro", "pyro_vae") if name in sys.modules]
    print(json.dumps({"version": az.__version__, "means": means, "groups": list(tree.children), "heavy": heavy}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
