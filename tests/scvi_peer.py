"""scvi-tools on the cells of the example ``single_cells.py``: ``pip install scvi-tools``, then

    python examples/single_cells.py --out results/single_cells
    python tests/scvi_peer.py --results results/single_cells

scvi-tools trains its own model with its own settings. Its networks are then a model and a guide in Pyro, so that both
programs are scored with the same estimator on the same held-out cells, in pairs.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.distributions import tabular

sys.path.append(str(Path(__file__).parents[1] / "examples"))

NAME = "scvi-tools"


def as_pair(module: Any) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the networks of a trained ``scvi.module.VAE`` as a model and a guide of ``(x, batch)``; batch is one-hot.

    The counts are negative binomial, with or without zero inflation, and the library size is latent.
    """

    def model(x: Tensor, batch: Tensor) -> None:
        with pyro.plate("data", len(x)):
            x, batch = pyro.subsample(x, event_dim=1), pyro.subsample(batch, event_dim=1).argmax(-1, keepdim=True)
            loc, variance = module._compute_local_library_params(batch)
            size = pyro.sample("size", dist.Normal(loc, variance.sqrt()).to_event(1))
            z = pyro.sample("z", dist.Normal(torch.zeros(module.n_latent), 1.0).to_event(1))
            theirs = module.generative(z=z, library=size, batch_index=batch)["px"]
            counts = tabular.NegativeBinomial(theirs.mu.log(), 1 / theirs.theta)
            if hasattr(theirs, "zi_logits"):
                counts = tabular.ZeroInflated(counts, theirs.zi_logits)
            pyro.sample("x", counts.to_event(1), obs=x)

    def guide(x: Tensor, batch: Tensor) -> None:
        with pyro.plate("data", len(x)):
            x, batch = pyro.subsample(x, event_dim=1), pyro.subsample(batch, event_dim=1).argmax(-1, keepdim=True)
            theirs = module.inference(x, batch)
            for name, key in (("size", "ql"), ("z", "qz")):
                pyro.sample(name, dist.Normal(theirs[key].loc, theirs[key].scale).to_event(1))

    return model, guide


def train(x: Tensor, batch: Tensor, num_train: int, epochs: int, likelihood: str, seed: int) -> Any:
    """Train ``scvi.model.SCVI`` with its own settings on the first rows; return it, with its history on the others."""
    import anndata
    import scvi

    scvi.settings.seed = seed
    frame = pd.DataFrame({"batch": batch.argmax(1).numpy()}, index=[f"cell {row}" for row in range(len(x))])
    cells = anndata.AnnData(x.numpy(), obs=frame)
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    found = scvi.model.SCVI(cells, gene_likelihood=likelihood, use_observed_lib_size=False)
    rows = np.split(np.arange(len(x)), [num_train])
    found.train(
        epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        plan_kwargs={"n_epochs_kl_warmup": epochs // 4},
        datasplitter_kwargs={"external_indexing": [*rows, rows[0][:0]]},
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of the example's results")
    parser.add_argument("--epochs", type=int, nargs="+", default=[25, 50, 100, 400], help="the best one is kept")
    args = parser.parse_args()
    from single_cells import load

    ours = json.loads((args.results / "results.json").read_text())
    settings = ours["settings"]
    train_rows, validation, test = load(settings["genes"])
    x, batch = (torch.cat(both) for both in zip(train_rows, validation, strict=True))
    best: tuple[float, Any] = (-float("inf"), None)
    for likelihood in ("nb", "zinb"):
        for epochs in args.epochs:
            started = time.perf_counter()
            found = train(x, batch, len(train_rows[0]), epochs, likelihood, settings["seed"])
            pair = as_pair(found.module.eval())
            elbo = pv.evaluate(*pair, validation, num_samples=20, seed=settings["seed"])["elbo"]
            print(f"{likelihood}, {epochs} epochs, {time.perf_counter() - started:.0f} s: validation ELBO {elbo:.1f}")
            best = max(best, (elbo, (likelihood, epochs, pair)), key=lambda each: each[0])
    likelihood, epochs, pair = best[1]
    name = f"{NAME}, {likelihood}, {epochs} epochs"
    score = {each: torch.tensor(values) for each, values in ours["log_p_of_cells"].items()}
    score[name] = pv.log_evidence(*pair, *test, num_samples=settings["samples"], seed=settings["seed"])
    table = pv.compare_evidence(score)
    elbo = pv.evaluate(*pair, test, num_samples=20, seed=settings["seed"])["elbo"]
    print(table.round(2).to_string())
    found = {"scvi": name, "elbo": elbo, "table": table.to_dict("index")}
    (args.results / "scvi_peer.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
