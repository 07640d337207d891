"""
Counts of genes in single cells
===============================

How many molecules of each gene are in a cell? The counts tell what kind of cell it is, but they also depend on how much
of the cell was caught, and on the batch that it was measured in. scVI (Lopez, Regier, Cole, Jordan and Yosef 2018)
takes these apart. Cell n of batch b has a state z, a library size l, and for each gene g a count

    z ~ N(0, I),   log l ~ N(m_b, s_b²),   x_g ~ NB(l · softmax(f(z, b))_g, dispersion_g),

where zero inflation replaces a count by 0 with the probability sigmoid(h(z, b)_g). The data are real: 700 blood cells
of one donor, 500 genes, eight wells as batches. Each model is judged by log p(x) of 175 cells that it was not trained
on, in pairs, cell by cell. The simple baseline has no state: its cells differ by their library size only. Others are
genes that are independent, a factor analysis of log(1 + x), and a linear f, which is a factor analysis of counts.

Published figures of log p(x) are for other cells and genes. So the peer is scvi-tools, the authors' own program, on the
same cells: ``python tests/scvi_peer.py`` trains it and scores its networks, as a model and a guide in Pyro.
"""

import argparse
from typing import Any, cast

import common
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import FactorAnalysis
from torch import Tensor, nn
from torch.nn import functional

import pyro_vae as pv
from pyro_vae import datasets, families, guides, networks, plots

PEER = "no figure for these cells; -576.2 ± 0.2 by scvi-tools 1.4.2 in our own run (3 seeds of tests/scvi_peer.py)"
SAME = "none in cells, split and estimator; scvi-tools, in its best setting of six, has zero inflation and batches"


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "single_cells", epochs=200, unit="passes over the data, at most")
    common.add_training(parser, batch_size=75, lr=5e-3)
    parser.add_argument("--latent", type=common.positive_int, default=10, help="dimensions of the state z")
    parser.add_argument("--hidden", type=common.positive_int, default=128, help="hidden units of each network")
    parser.add_argument("--genes", type=common.positive_int, default=500, help="use the first genes only")
    parser.add_argument("--samples", type=common.positive_int, default=200, help="draws for log p(x) of each cell")
    parser.add_argument("--draws", type=common.positive_int, default=100, help="draws in an ArviZ file")
    return parser.parse_args()


class Cells(nn.Module):
    """The model of the docstring for a one-hot batch; without ``latent`` no state, without ``hidden`` f is linear."""

    size_prior: Tensor

    def __init__(self, name: str, x: Tensor, batch: Tensor, latent: int, hidden: int, zeros: bool, batches: bool):
        super().__init__()
        (_, genes), self.name, self.latent, self.use_batch = x.shape, name, latent, batches
        counts = families.NegativeBinomial(genes, "per_dimension")
        self.counts = families.ZeroInflated(counts) if zeros else counts
        sizes = [x[rows].sum(1).log() for rows in batch.T.bool()]
        self.register_buffer("size_prior", torch.stack([torch.stack([each.mean(), each.std()]) for each in sizes]))
        inputs = latent + (batch.shape[1] if batches else 0)
        network = networks.mlp([hidden]) if hidden else networks.linear()
        self.decoder = network(inputs, self.counts.num_raw) if inputs else None
        start = torch.full((self.counts.num_raw,), -3.0)
        start[:genes] = ((x.sum(0) + 1) / x.sum()).log()
        self.start = nn.Parameter(start)
        self.q_size = guides.DiagonalNormal(genes, 1, networks.mlp([32]))
        if latent:
            body = networks.mlp([128])  # without some of its inputs it cannot learn 450 cells by heart
            self.q_z = guides.DiagonalNormal(genes, latent, lambda *sizes: nn.Sequential(nn.Dropout(0.2), body(*sizes)))

    def read(self, z: Tensor | None, size: Tensor, batch: Tensor) -> dist.TorchDistribution:
        """p(x | z, log l, batch)."""
        parts = ([] if z is None else [z]) + ([batch.expand(*size.shape[:-1], -1)] if self.use_batch else [])
        raw = self.start + (self.decoder(torch.cat(parts, -1)) if self.decoder is not None else 0 * size)
        genes = self.counts.event_shape.numel()
        return self.counts(torch.cat([size + raw[..., :genes].log_softmax(-1), raw[..., genes:]], -1))

    def model(self, x: Tensor, batch: Tensor) -> None:
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x, batch = pyro.subsample(x, event_dim=1), pyro.subsample(batch, event_dim=1)
            loc, scale = (batch @ self.size_prior).split(1, -1)
            size = pyro.sample("size", dist.Normal(loc, scale).to_event(1))
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1)) if self.latent else None
            pyro.sample("x", self.read(z, size, batch), obs=x)

    def guide(self, x: Tensor, batch: Tensor) -> None:
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            q = self.q_size(x.log1p())  # of how far log l is from the log of the count of all molecules
            pyro.sample("size", dist.Normal(x.sum(-1, keepdim=True).log() + q.mean, q.stddev).to_event(1))
            if self.latent:
                pyro.sample("z", self.q_z(x.log1p()))


def independent_genes(x: Tensor, held_out: Tensor, epochs: int, compile: bool | None = None) -> Tensor:
    """log p(x) of held-out cells, if counts of genes are negative binomial and independent: no latent at all."""
    counts = families.NegativeBinomial(x.shape[1], "per_dimension")
    log_mean = (x.mean(0) + 1e-2).log()  # the most likely mean is that of the data

    def model(x: Tensor) -> None:
        pyro.module("independent", counts)
        with pyro.plate("data", len(x)):
            pyro.sample("x", counts(log_mean.expand(len(x), -1)), obs=x)

    pv.fit(model, lambda x: None, x, epochs=epochs, lr=0.05, compile=compile)
    return counts(log_mean).log_prob(held_out).detach()


def factor_analysis(x: Tensor, held_out: Tensor, latent: int, draws: int, seed: int) -> Tensor:
    r"""A bound of log p(x) by a factor analysis of y = log(1 + x + u), u ~ U(0, 1) (Theis et al. 2016).

    P(x) = E_u[p(x + u)] for the density of x + u, which is that of y times dy/dx; draws of u give the mean.
    """
    rng = np.random.default_rng(seed)
    noisy = [np.log1p(x.numpy() + rng.random(x.shape)) for _ in range(5)]
    factors = FactorAnalysis(latent, random_state=seed).fit(np.concatenate(noisy))
    ys = (np.log1p(held_out.numpy() + rng.random(held_out.shape)) for _ in range(draws))
    densities = torch.stack([torch.from_numpy(factors.score_samples(y) - y.sum(1)) for y in ys])
    return densities.logsumexp(0) - np.log(draws)


@torch.no_grad()
def draw_zeros(pairs: dict[str, Cells], x: Tensor, batch: Tensor) -> Figure:
    """Draw the share of cells without a molecule of each gene, in the data and as models generate it, by mean count."""
    figure, axes = plt.subplots(1, len(pairs), figsize=(4.5 * len(pairs), 4.4), layout="constrained", sharey=True)
    for ax, (name, pair) in zip(axes, pairs.items(), strict=True):
        site = pyro.poutine.trace(pyro.poutine.uncondition(pair.model)).get_trace(x, batch).nodes["x"]
        drawn = [cast(Any, site["fn"]).sample() for _ in range(20)]
        ax.plot(x.mean(0), (x == 0).double().mean(0), "o", markersize=3, label="held-out cells", color="0.6")
        generated = torch.stack([(each == 0).double().mean(0) for each in drawn]).mean(0)
        ax.plot(x.mean(0), generated, "+", markersize=4, label="generated", color=plots.colours.PALETTE[0])
        ax.set(xscale="log", xlabel="mean count of a gene (a point for each)", title=name)
    axes[0].set_ylabel("share of cells with count 0")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Share of cells with count 0, for each gene: held-out cells, and cells that each model generates")
    return figure


STATELESS, LINEAR, SCVI_LIKE = "no state, library size only", "linear state", "network, zero-inflated, batches"
MODELS: dict[str, dict[str, Any]] = {
    STATELESS: {"latent": 0, "hidden": 0, "zeros": False, "batches": False},
    LINEAR: {"hidden": 0, "zeros": False, "batches": False},
    "network": {"zeros": False, "batches": False},
    "network, zero-inflated": {"zeros": True, "batches": False},
    "network, batches": {"zeros": False, "batches": True},
    SCVI_LIKE: {"zeros": True, "batches": True},
}
COLUMNS = {"log p(x)": "{log_p:.1f} ± {error:.1f}", "to the best": "{difference:.1f} ± {difference_error:.1f}"}
COLUMNS |= {"ELBO": "{elbo:.1f}", "gap": "{gap:.1f}", "of it amortization": "{amortization:.1f}", "epochs": "{epochs}"}
WORTH = "Held-out cells: log p(x) minus that of the best\n(hollow: lower bound, may be better)"
NOTES = """in nats per held-out cell; ± the standard error over cells, of differences the one in pairs. log p(x) is a
lower bound in expectation, from a guide that is refined for each cell; without a state it is exact, an integral or a
sum. The gap is log p(x) minus the ELBO, and its amortization is what the refinement of the guide gains"""


def load(genes: int) -> list[tuple[Tensor, Tensor]]:
    """Load counts ``(N, G)`` and one-hot batches ``(N, 8)`` for training, for early stopping, and held out."""
    x, batch = (each := datasets.pbmc()).x[:, :genes], functional.one_hot(each.batches, 8)
    return list(zip(x.split([450, 75, 175]), batch.to(x.dtype).split([450, 75, 175]), strict=True))


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    # 1. Load counts of cells with their batches: 450 cells to train on, 75 to stop the training early, 175 to judge.
    train, validation, test = load(args.genes)
    # 2. Score genes that are independent, and a factor analysis of log-counts.
    evidence: dict[str, Any] = {"independent genes": independent_genes(train[0], test[0], args.epochs, args.compile)}
    evidence["factor analysis of logs"] = factor_analysis(train[0], test[0], args.latent, 20, args.seed)
    rows: dict[str, dict[str, Any]] = {name: {} for name in evidence}
    pairs, sizes = {}, {"latent": args.latent, "hidden": args.hidden}
    training = common.training_options(args) | {"validation": validation, "patience": 30}
    # 3. Train each model, with and without a state, a network, zero inflation and batches; score held-out cells.
    for name, options in MODELS.items():
        pairs[name] = pair = Cells(name, *train, **{**sizes, **options})
        fitted = pv.fit(pair.model, pair.guide, train, **training)
        pair.eval()
        gap = pv.inference_gap(pair.model, pair.guide, *test, num_samples=args.samples, seed=args.seed)
        evidence[name] = gap.log_evidence if gap.evidence is None else gap.evidence
        terms = {"elbo": gap.elbo, "gap": gap.gap, "amortization": gap.amortization}
        rows[name] = {term: values.mean().item() for term, values in terms.items() if values is not None}
        rows[name] |= {"epochs": len(fitted.history["elbo"]), "seconds": fitted.seconds, "history": fitted.history}
        print(f"{name}: {fitted.seconds:.0f} s, ELBO {rows[name]['elbo']:.1f}", flush=True)
    # 4. Compare them in pairs, cell by cell.
    compared = pv.compare_evidence(evidence)
    for name, found in compared.rename(columns={"log_evidence": "log_p", "standard_error": "error"}).iterrows():
        rows[str(name)] |= found.dropna().to_dict()  # the best has no error of a difference
    ordered = {str(name): rows[str(name)] for name in compared.index}
    print(text := common.table("model", ordered, COLUMNS, NOTES))
    # 5. Draw the states of held-out cells, zeros, and the comparison; save draws with the names of the genes.
    cells = datasets.pbmc("test")
    types = [cells.cell_types[label] for label in cells.labels]
    states = pairs[SCVI_LIKE].q_z(test[0].log1p()).mean.detach()
    figures = {
        "worth": common.set_title(plots.evidence_comparison(compared), WORTH),
        "states": common.set_title(plots.latent_map(states, types, name="z"), "Held-out cells: state and type"),
        "zeros": draw_zeros({name: pairs[name] for name in (STATELESS, "network", SCVI_LIKE)}, *test),
    }
    tree = common.make_tree(
        pairs[SCVI_LIKE], test[0][:30], args, test[1][:30], dims={"x": ["gene"], "z": ["state"], "size": ["log"]},
        coords={"gene": list(cells.genes[: args.genes]), "cell_type": ("obs", types[:30])},
    )  # fmt: skip
    headlines = [
        common.headline(
            f"log p(x) of held-out cells, {name}", "nats per cell", rows[name]["log_p"], published=PEER,
            baseline=rows[other]["log_p"], baseline_name=other, higher_is_better=True, differences=f"{SAME}, {parts}",
        )
        for name, other, parts in ((SCVI_LIKE, STATELESS, "as here"), ("network", LINEAR, "which this network lacks"))
    ]  # fmt: skip
    log_p = {name: getattr(found, "log_evidence", found).tolist() for name, found in evidence.items()}
    common.save(args, {"models": rows, "log_p_of_cells": log_p}, figures, {"single_cells": tree}, text, headlines)


if __name__ == "__main__":
    main(parse_args())
