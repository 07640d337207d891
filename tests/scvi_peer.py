"""scvi-tools on the cells of the example ``single_cells.py``: ``pip install scvi-tools``, then

    python examples/single_cells.py --out results/single_cells
    python tests/scvi_peer.py --results results/single_cells

scvi-tools trains its own model in several settings: the default one, batch normalisation and 400 epochs, and layer
normalisation, each with both likelihoods. The one with the best ELBO of the cells for early stopping is kept. Its
networks are then a model and a guide in Pyro, so that both programs are scored with the same estimator on the same
held-out cells, in pairs.
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

LAYER = {"use_batch_norm": "none", "use_layer_norm": "both"}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    f"scvi-tools, {likelihood}, {norm}, {epochs} epochs": (epochs, {"gene_likelihood": likelihood} | options)
    for likelihood in ("zinb", "nb")
    for norm, options, epochs in (("batch norm", {}, 400), ("layer norm", LAYER, 200), ("layer norm", LAYER, 400))
}


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


def train(x: Tensor, batch: Tensor, num_train: int, epochs: int, seed: int, **options: Any) -> Any:
    """Train ``scvi.model.SCVI`` on the first rows, and return its networks in evaluation mode."""
    import anndata
    import scvi

    scvi.settings.seed = seed
    frame = pd.DataFrame({"batch": batch.argmax(1).numpy()}, index=[f"cell {row}" for row in range(len(x))])
    cells = anndata.AnnData(x.numpy(), obs=frame)
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    found = scvi.model.SCVI(cells, use_observed_lib_size=False, **options)
    rows = np.split(np.arange(len(x)), [num_train])
    found.train(
        epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        plan_kwargs={"n_epochs_kl_warmup": 20},  # its default, 400, would leave a weight below 1 at the end
        datasplitter_kwargs={"external_indexing": [*rows, rows[0][:0]]},
    )
    return found.module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of the example's results")
    args = parser.parse_args()
    from single_cells import load

    ours = json.loads((args.results / "results.json").read_text())
    settings = ours["settings"]
    seed: int = settings["seed"]
    train_rows, validation, test = load(settings["genes"])
    x, batch = (torch.cat(both) for both in zip(train_rows, validation, strict=True))
    found = {}
    for name, (epochs, options) in SETTINGS.items():
        started = time.perf_counter()
        pair = as_pair(train(x, batch, len(train_rows[0]), epochs, seed, **options))
        elbo = pv.evaluate(*pair, validation, num_samples=20, seed=seed)["elbo"]
        print(f"{name}: {time.perf_counter() - started:.0f} s, validation ELBO {elbo:.1f}", flush=True)
        found[name] = elbo, pair
    best = max(found, key=lambda name: found[name][0])
    pair = found[best][1]
    evidence: dict[str, Any] = {name: torch.tensor(values) for name, values in ours["log_p_of_cells"].items()}
    gap = pv.inference_gap(*pair, *test, num_samples=settings["samples"], seed=seed)
    evidence[best] = gap.evidence
    table = pv.compare_evidence(evidence)
    print(table.drop(columns="unreliable").round(2).to_string())
    print(gap)
    elbos = {name: elbo for name, (elbo, _) in found.items()}
    written = {"validation_elbos": elbos, "best": best, "gap": gap.gap.mean().item(), "table": table.to_dict("index")}
    (args.results / "scvi_peer.json").write_text(json.dumps(written, indent=2))


if __name__ == "__main__":
    main()
