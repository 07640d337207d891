"""Wrong calls, in a table: before any work, each raises an error that names argument, expectation and what came."""

import math
import random
import re
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import polars as pl
import pyro
import pyro.distributions as dist
import pytest
import torch
from good_calls import GOOD, NOT_CALLED, POOL, call_with
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from scipy import sparse
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae import (
    baselines,
    datasets,
    distributions,
    exact,
    families,
    gradients,
    guides,
    handlers,
    likelihoods,
    missing,
    networks,
    objectives,
    plots,
    priors,
    schedules,
    spatial,
    sweeps,
    tables,
    tabular,
)
from pyro_vae.datasets import idx
from pyro_vae.distributions.bernoulli import Bernoulli
from pyro_vae.distributions.mixture import MixtureOfNormals
from pyro_vae.distributions.relaxed import LogRelaxedOneHotCategorical
from pyro_vae.evidence.pareto import pareto_shape
from pyro_vae.parts import base
from pyro_vae.parts.families.multivariate import LowRankNormal

PACKAGE = Path(pv.__file__).parent


class DeterministicLinear(nn.Linear):
    """A linear map that starts the same each time, and draws no random numbers for it."""

    def reset_parameters(self):
        with torch.no_grad():
            torch.linspace(-0.5, 0.5, self.weight.numel(), out=self.weight.view(-1))
            self.bias.zero_()


NET = DeterministicLinear  # as a factory of networks


def decoder(latent, features, likelihood=likelihoods.Normal):
    return likelihood(latent, features, NET)


def make_inputs(folder):
    """Models, data and files, from which the calls in the table are made."""
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    (folder / "torn").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 2]))
    (folder / "foreign.gz").write_bytes(b"no gzip")
    prior, encoder = priors.StandardNormal(1), guides.DiagonalNormal(2, 1, NET)
    vae = pv.VAE(prior, encoder, decoder(1, 2))
    return SimpleNamespace(
        x=x,
        meta=x.to("meta"),
        nan=x.masked_fill(x > 1, math.nan),
        labels=torch.tensor([0, 1, 0, 1, 0, 1]),
        vae=vae,
        pair=(vae.model, vae.guide),
        curved=pv.VAE(prior, encoder, likelihoods.Normal(1, 2, nonlinear_net)),
        wide=pv.VAE(priors.StandardNormal(3), guides.DiagonalNormal(2, 3, NET), decoder(3, 2)),
        discrete=pv.VAE(priors.Bernoulli(2), guides.Bernoulli(2, 2, NET), decoder(2, 2)),
        binary=pv.VAE(prior, encoder, decoder(1, 2, likelihoods.Bernoulli)),
        slots=networks.SlotAttention(2, 3),
        folder=folder,
        dark=torch.full((4, 8, 8), 200, dtype=torch.uint8),
        history={"elbo": [-2.0], "distortion": [1.0], "rate": [1.0]},
    )


def nonlinear_net(in_features, out_features):
    return nn.Sequential(NET(in_features, 3), nn.Tanh(), NET(3, out_features))


def grey_image(z):
    return z.sigmoid()[:, :1].expand(-1, 64)


def fit(w, model=None, guide=None, data=None, **options):
    return pv.fit(model or w.vae.model, guide or w.vae.guide, w.x if data is None else data, **{"epochs": 1} | options)


def sweep(w, **options):
    good = {"make": lambda lr: (w.vae, {"lr": lr}), "space": {"lr": [0.1, 0.2]}, "data": w.x, "validation": w.x}
    return pv.sweep(**{**good, "folder": w.folder / "sweep", "engine": None, "epochs": 1} | options)


def vae_with(w, **parts):
    return pv.VAE(**{"prior": w.vae.prior, "encoder": w.vae.encoder, "decoder": w.vae.decoder} | parts)


def tree_of(w, *data):
    return pv.to_datatree(*w.pair, *data, draws=2)


class Lines(IterableDataset):
    """Rows that come in one order."""

    def __iter__(self):
        return iter(torch.zeros(4, 2))


class Keyed(Dataset):
    """A data set whose items are dictionaries, or something else that is no number."""

    def __init__(self, item=None, count=2):
        self.item, self.count = {"x": torch.zeros(2)} if item is None else item, count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return self.item


def tree(w, **options):
    return pv.to_datatree(*w.pair, w.x, draws=2, **options)


def save(w, path, **options):
    return pv.save_draws(path, *w.pair, w.x, draws=2, **options)


def page(w, path="page.html", **options):
    return pv.report(path and w.folder / path, *w.pair, w.x, **options)


def compare(w, estimators=None, **options):
    pair = gradients.Estimator(w.discrete.model, w.discrete.guide, objectives.LeaveOneOut())
    return gradients.compare({"loo": pair} if estimators is None else estimators, w.x, **{"repeats": 3} | options)


class Row(NamedTuple):
    """A wrong call, its error, and what the message says right after the argument; ``...`` stands for anything."""

    call: Callable[[Any], Any]
    error: type[Exception]
    argument: str
    says: str


def positive_int(call, argument, got):
    return Row(call, ValueError, argument, f"must be a positive integer, got {got!r}")


def positive(call, argument, got):
    return Row(call, ValueError, argument, f"must be a positive, finite number, got {got!r}")


def shape(call, got):
    return Row(call, ValueError, "latent", f"must be a positive integer or a tuple of them, got {got!r}")


def seed(call, got):
    return Row(call, ValueError, "seed", f"must be an integer from 0 to 2^32 - 1, got {got!r}")


def boolean(call, argument, got):
    return Row(call, TypeError, argument, f"must be True or False, got {got!r}")


def function(call, argument, got):
    return Row(call, TypeError, argument, f"must be a Pyro function, such as `vae.{argument}`, got {got}")


def tensors(call, got, error=TypeError):
    return Row(call, error, "data", f"must be a tensor, such as `torch.as_tensor(array)` or `dataset.x`,...got {got}")


def latent_shape(call):
    says = "must draw 'z' with the shape of the model's latent, (6, 1), got (6, 3)"
    return Row(call, ValueError, "guide", says)


def data_plate(call):
    says = "must be the data plate around the model's observed sites, got 'rows': the sites ['x'] are not in it"
    return Row(call, ValueError, "plate", says)


def enumerates_nothing(call):
    says = "must not be TraceEnum_ELBO where no latent is marked for enumeration: it would only sample"
    return Row(call, ValueError, "elbo", says)


MODELS = {
    "the class of a part as the prior": Row(lambda w: vae_with(w, prior=priors.StandardNormal),
        TypeError, "prior", "must be a module that returns a distribution...got the class StandardNormal"),
    "a function as the prior": Row(lambda w: vae_with(w, prior=lambda: dist.Normal(0.0, 1.0)),
        TypeError, "prior", "must be a module that returns a distribution...got a function"),
    "an encoder as the prior": Row(lambda w: vae_with(w, prior=w.vae.encoder),
        ValueError, "prior", "must take no context, or covariates...got guides.DiagonalNormal, which takes (2,)"),
    "a network as the decoder": Row(lambda w: vae_with(w, decoder=NET(1, 2)), TypeError, "decoder",
        "must take shape (1,) from the prior...it returns a torch.float32 tensor of shape (3, 2)"),
    "a network as the encoder": Row(lambda w: vae_with(w, encoder=NET(2, 1)), TypeError, "encoder",
        "must take shape (2,) from the decoder...it returns a torch.float32 tensor of shape (3, 1)"),
    "a decoder that does not fit the prior": Row(lambda w: vae_with(w, decoder=w.wide.decoder),
        ValueError, "decoder", "must take shape (1,) from the prior...which takes (3,). What would fit: latent=1"),
    "an encoder that does not fit the decoder": Row(lambda w: vae_with(w, encoder=guides.DiagonalNormal(5, 1, NET)),
        ValueError, "encoder", "must take shape (2,)...which takes (5,). What would fit: in_features=2"),
    "a discrete encoder for a continuous prior": Row(
        lambda w: pv.VAE(w.wide.prior, guides.Bernoulli(2, 3, NET), w.wide.decoder), ValueError, "encoder",
        "must be of one kind, shape and support with the prior...a mass of shape (3,)..."
        "What would fit: guides.DiagonalNormal(latent=3"),
    "a decoder of another precision": Row(lambda w: vae_with(w, decoder=decoder(1, 2).double()),
        TypeError, "decoder", "...must be torch.float64, as its network is, got torch.float32"),
    "an encoder on another device": Row(lambda w: vae_with(w, encoder=guides.DiagonalNormal(2, 1, NET).to("meta")),
        ValueError, "encoder", "...must be on meta, as its network is, got cpu"),
    "a number as the name": Row(lambda w: vae_with(w, name=3),
        TypeError, "name", "must be a string that is not empty, got 3"),
    "an empty name": Row(lambda w: vae_with(w, name=""),
        TypeError, "name", "must be a string that is not empty, got ''"),
    "lists where the model wants a tensor": Row(lambda w: w.vae.model([[0.0, 1.0]]),
        TypeError, "x", "must be a tensor, (N, 2), got a list"),
    "data of one dimension": Row(lambda w: w.vae.guide(w.x[:, 0]), ValueError, "x", "must be (N, 2)...got shape (6,)"),
    "no rows for the model": Row(lambda w: w.vae.model(w.x[:0]),
        ValueError, "x", "must be (N, 2) with N >= 1, got shape (0, 2), without rows"),
    "truth values as data": Row(lambda w: exact.log_evidence(w.vae.model, w.x > 0),
        TypeError, "x", "must be real numbers...got a torch.bool tensor of shape (6, 2)"),
    "a list where the decoder wants a tensor": Row(lambda w: w.vae.decode([0.0]),
        TypeError, "z", "must be a tensor, such as a draw of the site, got a list"),
    "half a datum to generate": positive_int(lambda w: w.vae.generate(2.5), "num_samples", 2.5),
    "more data to generate than there are numbers for": Row(lambda w: w.vae.generate(10**30),
        ValueError, "num_samples", "must be a positive integer below 2^63, got 1000000000000000000000000000000"),
    "a word for a truth value": boolean(lambda w: w.vae.generate(3, mean="no"), "mean", "no"),
    "no draws of what is missing": positive_int(lambda w: w.vae.impute(w.x, 0), "num_samples", 0),
    "the twin of what is not relaxed": Row(lambda w: w.vae.discrete(),
        TypeError, "StandardNormal", "has no discrete twin: only relaxed parts have one"),
}  # fmt: skip

PARTS = {
    "a latent of size zero": shape(lambda w: priors.StandardNormal(0), 0),
    "a latent of half a size": shape(lambda w: priors.Normal((2, 1.5)), (2, 1.5)),
    "a truth value as a size": shape(lambda w: priors.Laplace(True), True),
    "a tensor as a shape": shape(lambda w: priors.StandardNormal(torch.tensor([2, 3])), torch.tensor([2, 3])),
    "a latent that no tensor could hold": Row(lambda w: priors.StandardNormal((2**40, 2**40)),
        ValueError, "latent", "must be a size below 2^63, got (1099511627776, 1099511627776)"),
    "infinite degrees of freedom": positive(lambda w: priors.StudentT(1, df=math.inf), "df", math.inf),
    "a probability of one": Row(lambda w: priors.Bernoulli(2, probs=1.0),
        ValueError, "probs", "must be strictly between 0 and 1, got 1.0"),
    "complex probabilities": Row(lambda w: priors.Bernoulli(2, probs=torch.full((2,), 0.5 + 0j)),
        TypeError, "probs", "must be a number or a tensor of them...got a torch.complex64 tensor of shape (2,)"),
    "probabilities without values": Row(lambda w: priors.Bernoulli(2, probs=torch.full((2,), 0.5, device="meta")),
        ValueError, "probs", "must be a number or a tensor of them...got a torch.float32 tensor of shape (2,) on meta"),
    "probabilities of another number of variables": Row(lambda w: priors.Bernoulli(2, probs=torch.full((3,), 0.5)),
        ValueError, "probs", "must expand to shape (2,), got shape (3,)"),
    "no components": positive_int(lambda w: priors.MixtureOfNormals(2, 0), "num_components", 0),
    "a temperature of NaN": positive(lambda w: priors.RelaxedBernoulli(2, math.nan), "temperature", math.nan),
    "one class": Row(lambda w: priors.GumbelSoftmax((2, 1), 0.5),
        ValueError, "latent", "must be (n, k)...got (2, 1)"),
    "an array of pseudo-data": Row(lambda w: priors.VampPrior(w.vae.encoder, w.x.numpy()),
        TypeError, "pseudo_data", "must be a tensor, such as x[:20], got an ndarray"),
    "infinite pseudo-data": Row(lambda w: priors.VampPrior(w.vae.encoder, w.x * math.inf),
        ValueError, "pseudo_data", "must hold finite numbers, got inf at row 0, column (0,)"),
    "pseudo-data for a guide that is not amortized": Row(
        lambda w: priors.VampPrior(guides.PerDatum(families.Normal(1), 3), w.x),
        TypeError, "encoder", "must be an amortized guide of this package, a Conditional, got a PerDatum"),
    "a finished module where a factory is wanted": Row(lambda w: guides.DiagonalNormal(2, 1, NET(2, 2)),
        TypeError, "network", "must be a factory...got a DeterministicLinear, a finished module"),
    "a part where a factory is wanted": Row(lambda w: guides.DiagonalNormal(2, 1, w.vae.prior),
        TypeError, "network", "must be a factory...got a StandardNormal, a finished module"),
    "sizes where a factory is wanted": Row(lambda w: likelihoods.Normal(1, 2, [32]),
        TypeError, "network", "must be a factory...called with (1, 2), it raised: 'list' object is not callable"),
    "a factory that makes a class": Row(lambda w: likelihoods.Normal(1, 2, lambda i, o: nn.Linear),
        TypeError, "network", "must be a factory...called with (1, 2), it returned <class 'torch...Linear'>"),
    "a factory that makes a part": Row(lambda w: guides.DiagonalNormal(2, 1, lambda i, o: w.vae.encoder)(w.x),
        TypeError, "network", "must return a tensor, (*, 2), got an Independent"),
    "a network that gives another number of outputs": Row(
        lambda w: guides.DiagonalNormal(2, 1, lambda i, o: NET(i, o + 1))(w.x),
        ValueError, "network", "must return 2 outputs...got 3"),
    "a network that mixes data": Row(
        lambda w: guides.DiagonalNormal(2, 1, lambda i, o: nn.Sequential(nn.Flatten(0), NET(12, o)))(w.x),
        ValueError, "network", "must keep the dimensions on the left, got outputs of shape (2,)"),
    "a rank above the size": Row(lambda w: guides.LowRankNormal(2, 2, NET, rank=3),
        ValueError, "rank", "must be 1 to 2...got 3"),
    "no columns": positive_int(lambda w: guides.LowRankNormal(2, 2, NET, rank=0), "rank", 0),
    "a latent of two dimensions with all correlations": Row(lambda w: guides.FullRankNormal(2, (2, 3), NET),
        ValueError, "latent", "must be (D,)...got (2, 3)"),
    "the class of a family": Row(lambda w: guides.PerDatum(families.Normal, 3),
        TypeError, "family", "must be a family...got the class Normal"),
    "raw outputs of NaN": Row(lambda w: guides.PerDatum(families.Normal(1), torch.full((3, 2), math.nan)),
        ValueError, "raw", "must be floats (N, 2), for Normal(event_shape=(1,), scale='network'), got nan"),
    "raw outputs of no data": Row(lambda w: guides.PerDatum(families.Normal(1), torch.zeros(0, 2)),
        ValueError, "raw", "must be floats (N, 2), for Normal(event_shape=(1,), scale='network'), got shape (0, 2)"),
    "integers as raw outputs": Row(lambda w: guides.PerDatum(families.Normal(1), torch.zeros(3, 2, dtype=torch.long)),
        TypeError, "raw", "must be floats (N, 2)...got a torch.int64 tensor of shape (3, 2)"),
    "refining on no data": Row(lambda w: guides.PerDatum.refining(w.vae.encoder, w.x[:0]),
        ValueError, "x", "must have shape (N, ...) with N >= 1, got shape (0, 2), without rows"),
    "rows that a guide was not made for": Row(lambda w: guides.PerDatum(families.Normal(1), 3)(w.x),
        ValueError, "PerDatum", "must be the 3 data that it was made for, got 6 rows"),
    "data on another device than the network": Row(lambda w: w.vae.encode(w.meta),
        ValueError, "DiagonalNormal", "must be on cpu, as its network is, got meta"),
    "infinite data for an encoder": Row(lambda w: w.vae.encode(w.x * math.inf),
        ValueError, "DiagonalNormal", "must be finite numbers, got inf"),
    "missing data for an encoder that cannot read them": Row(lambda w: w.vae.encode(w.nan),
        ValueError, "DiagonalNormal", "must accept missing entries...got a context with NaN"),
    "images that were flattened": Row(lambda w: guides.DiagonalNormal((1, 2, 3), 1, NET)(torch.zeros(5, 6)),
        ValueError, "DiagonalNormal", "must be (*, 1, 2, 3), got shape (5, 6)"),
    "too many raw outputs, some of which would not be read": Row(lambda w: families.StudentT(2)(torch.zeros(3, 9)),
        ValueError, "raw", "must be (*, 4)...got a torch.float32 tensor of shape (3, 9)"),
    "too few raw outputs": Row(lambda w: families.Bernoulli(3)(torch.zeros(5, 2)),
        ValueError, "raw", "must be (*, 3)...got a torch.float32 tensor of shape (5, 2)"),
    "raw outputs that make no covariance": Row(lambda w: LowRankNormal(2, 1)(torch.full((6,), math.nan)),
        ValueError, "raw", "must be finite numbers, not too large...got nan to nan"),
    "free outputs of another size": Row(lambda w: base.Unconditional(families.Normal(2), torch.zeros(3)),
        ValueError, "raw", "must be floats (*, 4), for Normal(event_shape=(2,), scale='network'), got shape (3,)"),
    "a factory where a network is wanted": Row(lambda w: base.Conditional(families.Normal(2), 2, NET.__call__),
        TypeError, "network", "must be a module, such as networks.linear()(2, 3), got a function"),
    "a scale that is none": Row(lambda w: likelihoods.Normal(1, 2, NET, scale="all"),
        ValueError, "scale", "must be 'network'...got 'all'"),
    "a negative floor": Row(lambda w: likelihoods.Normal(1, 2, NET, min_scale=-1.0),
        ValueError, "min_scale", "must be a finite number, 0 or more, got -1.0"),
    "a weight of zero": positive(lambda w: likelihoods.Normal.mse(1, 2, NET, kl_weight=0), "kl_weight", 0),
    "half a class": positive_int(lambda w: likelihoods.Categorical(1, 2, 2.5, NET), "num_classes", 2.5),
    "one level": Row(lambda w: likelihoods.Ordinal(1, 2, 1, NET),
        ValueError, "num_levels", "must be an integer of 2 or more, got 1"),
    "one level of a colour": Row(lambda w: likelihoods.DiscretizedLogisticMixture(1, 2, NET, 1),
        ValueError, "num_levels", "must be an integer of 2 or more, got 1"),
    "codes without factors": Row(lambda w: pv.disentanglement(torch.zeros(30, 2), {"x": torch.arange(30)}),
        ValueError, "factors", "must be two or more, got 1"),
    "zeros added to a density": Row(lambda w: families.ZeroInflated(families.Normal(2)),
        ValueError, "base", "must be a family of counts...has no mass at 0...got Normal(event_shape=(2,)"),
    "zeros added to the class of a family": Row(lambda w: families.ZeroInflated(families.Poisson),
        TypeError, "base", "must be a family of counts...got the class Poisson"),
    "a gate without a chance": Row(lambda w: likelihoods.ZeroInflatedPoisson(1, 2, NET, gate=0),
        ValueError, "gate", "must be a probability between 0 and 1, got 0"),
    "a column of two variables": Row(lambda w: likelihoods.Columns(1, {"age": families.Normal(2)}, NET),
        ValueError, "columns", "must be a mapping...of event shape (1,)...got Normal(event_shape=(2,)...'age'"),
    "a table without columns": Row(lambda w: likelihoods.Columns(1, {}, NET),
        ValueError, "columns", "must be a mapping from names of columns...got no column"),
    "a family in place of a table": Row(lambda w: likelihoods.Columns(1, families.Normal(1), NET),
        TypeError, "columns", "must be a mapping from names of columns...got a Normal"),
    "the class of a family as a column": Row(lambda w: likelihoods.Columns(1, {"age": families.Normal}, NET),
        ValueError, "columns", "must be...got the class Normal for 'age'"),
    "a column with a number for a name": Row(lambda w: likelihoods.Columns(1, {0: families.Normal(1)}, NET),
        TypeError, "columns", "must be...got the name 0"),
    "cut points of no level": Row(lambda w: tabular.Ordinal(0.0, torch.tensor(1.0)),
        ValueError, "cuts", "must be a tensor (*, k - 1) of increasing numbers, got a torch.float32 tensor"),
    "a distribution whose entries cannot go missing": Row(
        lambda w: missing.with_missing(dist.MultivariateNormal(torch.zeros(2), torch.eye(2))),
        ValueError, "base_dist", "must be a distribution of single...got a MultivariateNormal of event shape (2,)"),
    "no distribution at all": Row(lambda w: missing.with_missing(w.vae.decoder),
        TypeError, "distribution", "must be a distribution of single variables, got a Normal"),
    "logits of no classes": Row(lambda w: LogRelaxedOneHotCategorical(0.5, torch.tensor(1.0)),
        ValueError, "logits", "must be a tensor (*, k), of k classes, got tensor(1.)"),
    "components that do not match their weights": Row(
        lambda w: MixtureOfNormals(torch.zeros(3), torch.zeros(2, 2), torch.ones(2, 2)),
        ValueError, "loc", "must be (*batch, K) and (*batch, K, D), got shapes (3,) and (2, 2)"),
    "images of other slots": Row(
        lambda w: distributions.SpatialMixture(torch.zeros(3, 4), torch.zeros(2, 3, 4), 0.1),
        ValueError, "loc", "must be (*batch, K, P) and (*batch, K, C, P), got shapes (3, 4) and (2, 3, 4)"),
    "pixels without a scale": positive(
        lambda w: distributions.SpatialMixture(torch.zeros(2, 4), torch.zeros(2, 3, 4), 0.0), "scale", 0.0),
    "slots of a list of pixels": Row(
        lambda w: distributions.SpatialMixture(torch.zeros(2, 4), torch.zeros(2, 3, 4), 1.0).responsibilities([0.0]),
        TypeError, "value", "must be images (3, 4), or such that broadcast with these, got a list"),
    "slots of other pixels": Row(lambda w: distributions.SpatialMixture(
        torch.zeros(2, 4), torch.zeros(2, 3, 4), 1.0).responsibilities(torch.zeros(3, 5)), ValueError, "value",
        "must be images (3, 4), or such that broadcast with these, got a torch.float32 tensor of shape (3, 5)"),
    "slots of other images": Row(lambda w: distributions.SpatialMixture(
        torch.zeros(6, 2, 4), torch.zeros(2, 3, 4), 1.0).responsibilities(torch.zeros(5, 3, 4)), ValueError, "value",
        "must be images (6, 3, 4), or such that broadcast with these, got a torch.float32 tensor of shape (5, 3, 4)"),
}  # fmt: skip

NETWORKS = {
    "hidden layers of size zero": Row(lambda w: networks.mlp([0]),
        ValueError, "hidden", "must be a list of positive sizes...got [0]"),
    "a finished activation": Row(lambda w: networks.mlp([3], activation=nn.ReLU()),
        TypeError, "activation", "must be a class or function of a module, such as nn.Tanh, got a ReLU"),
    "the name of an activation": Row(lambda w: networks.convolutional((1, 2, 2), activation="relu"),
        TypeError, "activation", "must be a class or function of a module, such as nn.Tanh, got a str"),
    "a word for a bias": boolean(lambda w: networks.linear(bias="no"), "bias", "no"),
    "a location of NaN": Row(lambda w: networks.standardized(NET, loc=math.nan),
        ValueError, "loc", "must be a finite number...got nan"),
    "a scale of zero": Row(lambda w: networks.standardized(NET, scale=0.0),
        ValueError, "scale", "must be positive numbers, got 0.0"),
    "locations of another number of features": Row(lambda w: networks.standardized(NET, loc=torch.zeros(3))(2, 1),
        ValueError, "loc", "must have 2 numbers, one for each feature, got 3"),
    "a first output of NaN": Row(lambda w: networks.starting_at(NET, math.nan),
        ValueError, "outputs", "must be a finite number...got nan"),
    "first outputs of another number": Row(lambda w: networks.starting_at(NET, torch.zeros(3))(2, 1),
        ValueError, "outputs", "must have 1 numbers, one for each raw output, got 3"),
    "an image of two sizes": Row(lambda w: networks.convolutional((8, 8))(64, 1),
        ValueError, "image", "must be (channels, height, width) with a product of in_features = 64, got (8, 8)"),
    "one number for an image": Row(lambda w: networks.deconvolutional(64)(1, 64),
        ValueError, "image", "must be (channels, height, width) with a product of out_features = 64, got 64"),
    "an image of negative sizes": Row(lambda w: networks.convolutional((1, -8, -8))(64, 1),
        ValueError, "image", "must be (channels, height, width) with a product of in_features = 64, got (1, -8, -8)"),
    "one number of channels": Row(lambda w: networks.convolutional((1, 8, 8), 16)(64, 1),
        ValueError, "channels", "must be one or more positive sizes, such as (16, 32), got 16"),
    "one number for a shape": Row(lambda w: networks.reshaped(NET, 8),
        ValueError, "shape", "must be one or more positive sizes, such as (1, 28, 28), got 8"),
    "a shape of another size": Row(lambda w: networks.reshaped(NET, (1, 8, 8))(63, 2),
        ValueError, "shape", "must have a product of in_features = 63, got (1, 8, 8)"),
    "one class to read": Row(lambda w: networks.one_hot(1, NET),
        ValueError, "num_classes", "must be an integer of 2 or more, got 1"),
    "no slots": positive_int(lambda w: networks.SlotAttention(0, 3), "num_slots", 0),
    "slots of no features": positive_int(lambda w: networks.SlotAttention(2, 0), "features", 0),
    "slots that read a list": Row(lambda w: w.slots([[0.0]]),
        TypeError, "inputs", "must be a tensor (*, T, 3), got a list"),
    "first slots of other features": Row(
        lambda w: w.slots(torch.zeros(5, 4, 3), slots=torch.zeros(5, 2, 4)), ValueError, "slots",
        "must be (*, K, 3), as many as there are inputs, got a torch.float32 tensor of shape (5, 2, 4)"),
    "first slots of other inputs": Row(
        lambda w: w.slots(torch.zeros(5, 4, 3), slots=torch.zeros(4, 2, 3)), ValueError, "slots",
        "must be (*, K, 3), as many as there are inputs, got a torch.float32 tensor of shape (4, 2, 3)"),
    "a bias of other places": Row(
        lambda w: w.slots(torch.zeros(5, 4, 3), bias=torch.zeros(2, 3)), ValueError, "bias",
        "must be a number or a tensor (5, 2, 4), got a torch.float32 tensor of shape (2, 3)"),
    "a bias of other first slots": Row(
        lambda w: w.slots(torch.zeros(1, 4, 3), slots=torch.zeros(5, 2, 3), bias=torch.zeros(3, 2, 4)), ValueError,
        "bias", "must be a number or a tensor (5, 2, 4), got a torch.float32 tensor of shape (3, 2, 4)"),
    "a list as bias": Row(lambda w: w.slots(torch.zeros(5, 4, 3), bias=[0.0]),
        TypeError, "bias", "must be a number or a tensor (5, 2, 4), got a list"),
    "boxes of another dtype": Row(lambda w: spatial.crop(torch.zeros(2, 4, 4), torch.ones(2, 3).double(), 2),
        ValueError, "boxes", "must have the dtype of `images`, torch.float32, got torch.float64"),
    "objects of another dtype": Row(lambda w: spatial.place(torch.zeros(2, 4, 4).double(), torch.ones(3), (4, 4)),
        ValueError, "boxes", "must have the dtype of `objects`, torch.float64, got torch.float32"),
    "a box without a side": Row(lambda w: spatial.place(torch.ones(2, 2), torch.tensor([0.0, 1.0, 1.0]), (4, 4)),
        ValueError, "boxes", "must have positive sides, got 0.0"),
    "a mirrored box": Row(lambda w: spatial.crop(torch.ones(4, 4), torch.tensor([-2.0, 1.0, 1.0]), 2),
        ValueError, "boxes", "must have positive sides, got -2.0"),
    "slots that do not move": positive_int(lambda w: networks.SlotAttention(2, 3, 0), "iterations", 0),
    "a baseline of no features": positive_int(lambda w: baselines.NeuralBaseline(0, NET), "in_features", 0),
    "a baseline that forgets nothing": Row(lambda w: baselines.RunningAverage(decay=1.0),
        ValueError, "decay", "must be a number from 0 to below 1, got 1.0"),
}  # fmt: skip

DATA = {
    "a list of lists": tensors(lambda w: exact.log_evidence(w.vae.model, [[0.0, 1.0]]), "a list"),
    "an array of strings": tensors(lambda w: pv.log_evidence(*w.pair, w.x.numpy().astype(str)),
        "an ndarray of dtype <U32 and shape (6, 2)"),
    "an array of complex numbers": tensors(lambda w: exact.kl(*w.pair, w.x.numpy() + 1j), "an ndarray of dtype comp"),
    "a number as an array": Row(lambda w: pv.decompose(*w.pair, np.array(1.0)),
        ValueError, "data", "must have shape (N, ...) with N >= 1, got shape (), without rows"),
    "a frame with strings": Row(lambda w: fit(w, data=datasets.penguins()),
        TypeError, "data", "must have columns of numbers, got the columns 'species' (...), 'island' (...Encode such"),
    "a frame with dates": Row(lambda w: pv.evaluate(*w.pair, pd.DataFrame({"a": pd.date_range("2020", periods=2)})),
        TypeError, "data", "must have columns of numbers, got the column 'a' (datetime64["),
    "a frame of polars with categories": Row(
        lambda w: fit(w, data=pl.DataFrame({"a": [1.0], "b": ["x"]}, schema={"a": pl.Float32, "b": pl.Categorical})),
        TypeError, "data", "must have columns of numbers, got the column 'b' (Categorical)"),
    "a lazy frame": Row(lambda w: exact.log_evidence(w.vae.model, pl.LazyFrame({"a": [1.0]})),
        TypeError, "data", "must be a frame whose rows are in memory, got a LazyFrame of polars. Collect it"),
    "a frame with an infinity": Row(lambda w: tree_of(w, pd.DataFrame({"a": [0.0, 1.0], "b": [0.0, math.inf]})),
        ValueError, "data", "must hold finite numbers, got inf at row 1, column 'b'"),
    "a frame with a column twice": Row(lambda w: fit(w, data=pd.DataFrame([[0.0, 1.0]], columns=["a", "a"])),
        ValueError, "data", "must have different names for its columns, got 'a' 2 times"),
    "a frame without columns": Row(lambda w: fit(w, data=pd.DataFrame(index=[0, 1])),
        ValueError, "data", "must have columns of numbers, got a frame without columns"),
    "a frame without rows": Row(lambda w: fit(w, data=pd.DataFrame({"a": [0.0], "b": [1.0]})[:0]),
        ValueError, "data", "must have shape (N, ...) with N >= 1, got shape (0, 2), without rows"),
    "frames of different rows": Row(
        lambda w: fit(w, data=(pd.DataFrame({"a": [0.0, 1.0]}, index=["u", "v"]), pd.Series([0.0, 1.0], ["v", "u"]))),
        ValueError, "data", "must be frames with the same index, got different ones"),
    "validation with other columns": Row(lambda w: fit(
        w, data=pd.DataFrame(w.x, columns=["a", "b"]), validation=pd.DataFrame(w.x, columns=["b", "a"])),
        ValueError, "validation", "must have the columns of `data` in the same order, got 'b' in place of 'a'"),
    "a sparse matrix of complex numbers": tensors(lambda w: fit(w, data=sparse.eye_array(3, dtype=complex)),
        "a sparse matrix of complex128"),
    "a sparse matrix with an infinity": Row(lambda w: fit(w, data=sparse.csr_array([[0.0, 1.0], [0.0, math.inf]])),
        ValueError, "data", "must hold finite numbers, got inf at row 1, column (1,)"),
    "a loader for exact answers": tensors(lambda w: exact.log_evidence(w.vae.model, DataLoader(TensorDataset(w.x))),
        "a DataLoader, which `fit`"),
    "a batch size next to a loader": Row(lambda w: fit(w, data=DataLoader(TensorDataset(w.x)), batch_size=2),
        ValueError, "batch_size", "must be left out where a DataLoader makes the batches, got 2"),
    "a stream without a batch size": Row(lambda w: pv.evaluate(*w.pair, Lines()),
        ValueError, "data", "must come in batches, with `batch_size` or from a DataLoader, got a Lines"),
    "a number of rows next to a tensor": Row(lambda w: fit(w, num_data=6),
        ValueError, "num_data", "must be left out for data that have N rows, got 6"),
    "fewer rows than a batch has": Row(lambda w: fit(w, data=DataLoader(TensorDataset(w.x), 4), num_data=3),
        ValueError, "num_data", "must be the number of rows in a pass over the stream, got 3 and a batch of 4 rows"),
    "a loader of dictionaries": Row(lambda w: fit(w, data=DataLoader(Keyed())),
        TypeError, "data", "must give tensors, or tuples of them for several arguments, got a dict with the keys 'x'"),
    "a loader with labels": Row(lambda w: fit(w, data=DataLoader(TensorDataset(w.x, w.labels), 3)),
        TypeError, "context", "must be left out for a VAE without covariates"),
    "a loader with an infinity": Row(lambda w: fit(w, data=DataLoader(TensorDataset(w.x / 0), 3)),
        ValueError, "data", "must hold finite numbers, got"),
    "a validation loader of other rows": Row(
        lambda w: fit(w, validation=DataLoader(TensorDataset(torch.zeros(4, 3)), 2)),
        ValueError, "validation", "must have rows like those of `data`, shape (2,), torch.float32, got shape (3,)"),
    "a data set of dictionaries": Row(lambda w: pv.calibrate(*w.pair, Keyed()),
        TypeError, "data", "must give tensors, or tuples of them for several arguments, got a dict with the keys 'x'"),
    "a data set of strings": Row(lambda w: pv.decompose(*w.pair, Keyed("x")),
        TypeError, "data", "must give a tensor, an array or a number in each item, or a tuple of these, got a str"),
    "a data set without rows": Row(lambda w: pv.decompose(*w.pair, Keyed(count=0)),
        ValueError, "data", "must have shape (N, ...) with N >= 1, got a data set without rows"),
    "a word": tensors(lambda w: exact.posterior(w.vae.model, "x"), "a str"),
    "nothing": tensors(lambda w: pv.log_evidence(*w.pair), "no tensor", ValueError),
    "None": tensors(lambda w: pv.decompose(*w.pair, None), "a NoneType"),
    "no rows": Row(lambda w: exact.elbo(*w.pair, w.x[:0]),
        ValueError, "data", "must have shape (N, ...) with N >= 1, got shape (0, 2), without rows"),
    "no columns": Row(lambda w: exact.kl(*w.pair, w.x[:, :0]), ValueError, "x", "must be (N, 2)...got shape (6, 0)"),
    "one number": Row(lambda w: exact.log_evidence(w.vae.model, torch.tensor(1.0)),
        ValueError, "data", "must have shape (N, ...) with N >= 1, got shape (), without rows"),
    "one dimension": Row(lambda w: pv.calibrate(*w.pair, w.x[:, 0]),
        ValueError, "x", "must be (N, 2)...got shape (6,)"),
    "a dimension too many": Row(lambda w: pv.inference_gap(*w.pair, w.x[None]),
        ValueError, "x", "must be (N, 2)...got shape (1, 6, 2)"),
    "a column too many": Row(lambda w: pv.reference(w.vae.model, torch.zeros(4, 3)),
        ValueError, "x", "must be (N, 2)...got shape (4, 3)"),
    "double precision for a model of single": Row(lambda w: pv.log_evidence(*w.pair, w.x.double()),
        TypeError, "DiagonalNormal", "must be torch.float32, as its network is, got torch.float64"),
    "double precision to calibrate on": Row(lambda w: pv.calibrate(*w.pair, w.x.double()),
        TypeError, "DiagonalNormal", "must be torch.float32, as its network is, got torch.float64"),
    "integers for an encoder": Row(lambda w: pv.to_datatree(*w.pair, w.x.long(), draws=2),
        TypeError, "DiagonalNormal", "must be torch.float32, as its network is, got torch.int64"),
    "integers where the model draws fractions": Row(
        lambda w: pv.calibrate(w.vae.model, lambda x: w.vae.guide(x.float()), w.x.long()), ValueError, "data",
        "must have a dtype that holds the draws of 'x', torch.float32 with fractions, got torch.int64"),
    "complex numbers": Row(lambda w: exact.log_evidence(w.vae.model, w.x + 0j),
        TypeError, "data", "must be a tensor...got a torch.complex64 tensor of shape (6, 2)"),
    "sparse tensors": Row(lambda w: exact.log_evidence(w.vae.model, w.x.to_sparse()),
        TypeError, "data", "must be a tensor...got a torch.float32 tensor of shape (6, 2), torch.sparse_coo"),
    "tensors without values": Row(lambda w: pv.log_evidence(*w.pair, w.meta),
        ValueError, "data", "must be a tensor...got a torch.float32 tensor of shape (6, 2) on meta"),
    "NaN where nothing may be missing": Row(lambda w: pv.calibrate(*w.pair, w.nan),
        ValueError, "data", "must hold finite numbers, got nan at row 0, column (0,)"),
    "infinity": Row(lambda w: pv.decompose(*w.pair, -w.x * math.inf),
        ValueError, "data", "must hold finite numbers, got -inf at row 0, column (0,)"),
    "tensors of different numbers of rows": Row(lambda w: pv.log_evidence(*w.pair, w.x, w.x[:3]),
        ValueError, "data", "must be tensors of one number of rows, got 6 and 3"),
    "grey values for a Bernoulli likelihood": Row(
        lambda w: exact.log_evidence(w.binary.model, w.x.sigmoid()), ValueError, "data",
        "of a Bernoulli likelihood must be 0s and 1s, got...threshold the data, `datasets.binarize(x)`"),
    "bytes for a Bernoulli likelihood": Row(
        lambda w: exact.log_evidence(w.binary.model, torch.full((3, 2), 255, dtype=torch.uint8)), ValueError, "data",
        "of a Bernoulli likelihood must be 0s and 1s, got 255 to 255...Bring them to [0, 1] first, such as `x / 255`"),
    "a list of grey values": Row(lambda w: datasets.grey([0.5]),
        TypeError, "x", "must be bytes (torch.uint8)...got a list"),
    "grey values above one": Row(lambda w: datasets.resample(torch.tensor([0.5, 2.0])),
        ValueError, "x", "must be bytes (torch.uint8), or grey values from 0 to 1, got torch.float32 from 0.5 to 2"),
    "NaN as a grey value": Row(lambda w: datasets.resample(torch.tensor([0.5, math.nan])),
        ValueError, "x", "must be bytes (torch.uint8), or grey values from 0 to 1, got torch.float32 from nan to nan"),
    "bytes that were divided already": Row(lambda w: datasets.grey(torch.tensor([0, 1], dtype=torch.uint8)),
        ValueError, "x", "must be bytes from 0 to 255, or grey values, got bytes that are all 0 or 1"),
    "a threshold of NaN": Row(lambda w: datasets.binarize(torch.tensor([0.5]), threshold=math.nan),
        ValueError, "threshold", "must be a finite number, got nan"),
    "points of one coordinate": Row(lambda w: datasets.two_gaussians(3).log_prob(torch.zeros(4, 1)),
        ValueError, "x", "must be points (*, 2), floats, got a torch.float32 tensor of shape (4, 1)"),
    "no points": positive_int(lambda w: datasets.two_gaussians(0), "num_points", 0),
    "no scenes": positive_int(lambda w: datasets.shape_scenes(0), "num_scenes", 0),
    "scenes of a few pixels": Row(lambda w: datasets.shape_scenes(2, size=11),
        ValueError, "size", "must be 12 or more, for shapes of a few pixels, got 11"),
    "a range of counts the wrong way round": Row(lambda w: datasets.shape_scenes(2, counts=(3, 2)),
        ValueError, "counts", "must be two integers from 1 to 6, smallest and largest, got (3, 2)"),
    "no seed for scenes": seed(lambda w: datasets.shape_scenes(2, seed=None), None),
    "a negative scale": positive(lambda w: datasets.two_gaussians(3, scale=-1.0), "scale", -1.0),
    "no sequences": positive_int(lambda w: datasets.pendulum(0), "num_sequences", 0),
    "a pendulum without gravity": positive(lambda w: datasets.Pendulum(0.0), "gravity", 0.0),
    "an unknown split": Row(lambda w: datasets.digits("validation"),
        ValueError, "split", "must be one of 'train'...got 'validation'"),
    "an unknown split of cells": Row(lambda w: datasets.pbmc("validation"),
        ValueError, "split", "must be one of 'train', 'test', 'all', got 'validation'"),
    "a list of splits": Row(lambda w: datasets.mnist(["train"]),
        ValueError, "split", "must be one of 'train', 'test', got ['train']"),
}  # fmt: skip

PAIRS = {
    "a VAE as the model": Row(lambda w: pv.log_evidence(w.vae, w.vae.guide, w.x),
        TypeError, "model", "must be one Pyro function, `vae.model`, got a VAE, a pair of functions"),
    "a VAE as the guide": Row(lambda w: pv.to_datatree(w.vae.model, w.vae, w.x),
        TypeError, "guide", "must be one Pyro function, `vae.guide`, got a VAE, a pair of functions"),
    "None as the model": function(lambda w: exact.posterior(None, w.x), "model", "a NoneType"),
    "a word as the model": function(lambda w: pv.reference("model", w.x), "model", "a str"),
    "None as the guide": function(lambda w: pv.calibrate(w.vae.model, None, w.x), "guide", "a NoneType"),
    "the class of an autoguide": function(lambda w: exact.elbo(w.vae.model, pyro.infer.autoguide.AutoNormal, w.x),
        "guide", "the class AutoNormal"),
    "the model in place of the guide": Row(lambda w: pv.annealed_log_evidence(w.vae.model, w.vae.model, w.x),
        ValueError, "guide", "must have latent sites alone...got one that observes ['x']"),
    "the model in place of the guide, to draw from": Row(lambda w: pv.to_datatree(w.vae.model, w.vae.model, w.x),
        ValueError, "guide", "must have latent sites alone...got one that observes ['x']"),
    "the guide in place of the model": Row(lambda w: exact.log_evidence(w.vae.guide, w.x),
        ValueError, "model", "must have latent and observed sites, got the latents ['z'] and the observed sites []"),
    "the guide of another model": latent_shape(lambda w: exact.kl(w.vae.model, w.wide.guide, w.x)),
    "the guide of another model, to draw from": latent_shape(lambda w: pv.to_datatree(w.vae.model, w.wide.guide, w.x)),
    "a guide without latents": Row(lambda w: pv.log_evidence(w.vae.model, lambda x: None, w.x),
        ValueError, "guide", "must draw the latents of the model, ['z'], got []"),
    "a refined guide that is none": Row(lambda w: pv.inference_gap(*w.pair, w.x, refined=3),
        TypeError, "refined", "must be a Pyro function, such as `vae.guide`, got an int"),
    "an unknown plate": data_plate(lambda w: pv.log_evidence(*w.pair, w.x, plate="rows")),
    "an unknown plate to calibrate on": data_plate(lambda w: pv.calibrate(*w.pair, w.x, plate="rows")),
    "an unknown plate to name dimensions by": data_plate(lambda w: tree(w, plate="rows")),
    "too many dimensions for quadrature": Row(lambda w: plots.posterior(w.wide.model, w.wide.guide, w.x[:1]),
        ValueError, "model", "must have a continuous latent of at most 2 dimensions for quadrature, got 3 at 'z'"),
    "a discrete latent to anneal": Row(lambda w: pv.annealed_log_evidence(w.discrete.model, w.discrete.guide, w.x),
        ValueError, "model", "must have continuous latents...got the discrete 'z'"),
    "latents of one step to filter": Row(lambda w: pv.particle_log_evidence(*w.pair, w.x),
        ValueError, "model", "must observe data between its latents, as a loop over time does, got the latents ['z']"),
    "a discrete latent to walk": Row(lambda w: pv.reference(w.discrete.model, w.x),
        ValueError, "model", "must have continuous latents, got the discrete ['z']; use pv.exact.posterior"),
}  # fmt: skip

NUMBERS = {
    "no draws for log p(x)": positive_int(lambda w: pv.log_evidence(*w.pair, w.x, num_samples=0), "num_samples", 0),
    "a truth value for a number of draws": positive_int(lambda w: pv.log_evidence(*w.pair, w.x, num_samples=True),
        "num_samples", True),
    "one draw for a standard error": Row(lambda w: pv.decompose(*w.pair, w.x, num_samples=1),
        ValueError, "num_samples", "must be 2 or more...got 1"),
    "half a chain": positive_int(lambda w: pv.annealed_log_evidence(*w.pair, w.x, num_chains=0.5), "num_chains", 0.5),
    "no particles": positive_int(lambda w: pv.particle_log_evidence(*w.pair, w.x, num_particles=0), "num_particles", 0),
    "half a filter": positive_int(lambda w: pv.particle_log_evidence(*w.pair, w.x, num_filters=0.5),
        "num_filters", 0.5),
    "no sentences": positive_int(lambda w: datasets.sentences(0), "num_sentences", 0),
    "no pairs": positive_int(lambda w: datasets.sentence_pairs(-1), "num_pairs", -1),
    "no pieces": positive_int(lambda w: datasets.chord_progressions(0), "num_pieces", 0),
    "no temperatures": positive_int(lambda w: pv.annealed_log_evidence(*w.pair, w.x, num_temperatures=0),
        "num_temperatures", 0),
    "a word for a number of steps": positive_int(lambda w: pv.inference_gap(*w.pair, w.x, steps="many"),
        "steps", "many"),
    "an infinite learning rate": positive(lambda w: pv.inference_gap(*w.pair, w.x, lr=math.inf), "lr", math.inf),
    "a tolerance of zero": positive(lambda w: exact.log_evidence(w.curved.model, w.x, tolerance=0.0), "tolerance", 0.0),
    "a tolerance of NaN": positive(lambda w: exact.elbo(*w.pair, w.x, tolerance=math.nan), "tolerance", math.nan),
    "a word for a tolerance, which would not be used": positive(
        lambda w: pv.inference_gap(*w.pair, w.x, tolerance="1e-4"), "tolerance", "1e-4"),
    "too few simulations": Row(lambda w: pv.calibrate(*w.pair, w.x, num_simulations=5),
        ValueError, "num_simulations", "must be 10 or more, for a test of uniform ranks, got 5"),
    "no processes": positive_int(lambda w: pv.calibrate(*w.pair, w.x, processes=0), "processes", 0),
    "a number of epochs for a refit": Row(lambda w: pv.calibrate(*w.pair, w.x, refit=100),
        TypeError, "refit", "must be a mapping, such as ...epochs...got an int"),
    "a refit without a length": Row(lambda w: pv.calibrate(*w.pair, w.x, refit={"lr": 0.1}),
        ValueError, "refit", "must have the number of `epochs`...got {'lr': 0.1}"),
    "a refit with a seed of its own": Row(lambda w: pv.calibrate(*w.pair, w.x, refit={"epochs": 1, "seed": 3}),
        ValueError, "refit", "must be arguments of `fit`...got 'seed'"),
    "a latent that is none": Row(lambda w: pv.calibrate(*w.pair, w.x, latents=["y"]),
        ValueError, "latents", "must be names of latents that the guide draws, of ['z'], got ['y']"),
    "a chance above one": Row(lambda w: pv.calibrate(*w.pair, w.x, alpha=2.0),
        ValueError, "alpha", "must be a probability between 0 and 1, got 2.0"),
    "a negative number of rows": positive_int(lambda w: pv.inspect(*w.pair, w.x, max_rows=-1), "max_rows", -1),
    "no chains": positive_int(lambda w: pv.reference(w.vae.model, w.x, chains=0), "chains", 0),
    "no draws of a chain": positive_int(lambda w: pv.reference(w.vae.model, w.x, draws=0), "draws", 0),
    "no warm-up": positive_int(lambda w: pv.reference(w.vae.model, w.x, warmup=0), "warmup", 0),
    "a negative seed": seed(lambda w: pv.log_evidence(*w.pair, w.x, seed=-1), -1),
    "a word for a seed": seed(lambda w: tree(w, seed="a"), "a"),
    "half a seed": seed(lambda w: pv.decompose(*w.pair, w.x, seed=1.5), 1.5),
    "a seed that is too large": seed(lambda w: fit(w, seed=2**40), 1099511627776),
    "no seed for data": seed(lambda w: datasets.two_gaussians(3, seed=None), None),
    "a word for a progress bar": boolean(lambda w: pv.log_evidence(*w.pair, w.x, progress="no"), "progress", "no"),
    "no combinations of states": positive_int(
        lambda w: gradients.exact_gradient(w.discrete.model, w.discrete.guide, w.x, num_draws=0), "num_draws", 0),
    "one repeat": Row(lambda w: compare(w, repeats=1), ValueError, "repeats", "must be 2 or more...got 1"),
    "fewer evaluations than an estimate takes": Row(lambda w: compare(w, evaluations=1),
        ValueError, "evaluations", "must be 2 or more, which 'loo' takes for each estimate, got 1"),
    "a list of estimators": Row(lambda w: compare(w, [Trace_ELBO()]),
        TypeError, "estimators", "must be a dict from names to Estimators, got [...]"),
    "an estimator without an ELBO": Row(lambda w: gradients.Estimator(w.discrete.model, w.discrete.guide, Trace_ELBO),
        TypeError, "elbo", "must be an instance, such as Trace_ELBO(), got <class 'pyro.infer.trace_elbo.Trace_ELBO'>"),
    "one particle that leaves itself out": Row(lambda w: objectives.LeaveOneOut(1),
        ValueError, "num_particles", "must be an integer, 2 or more, got 1"),
    "an odd number of antithetic draws": Row(lambda w: objectives.DisARM(3),
        ValueError, "num_particles", "must be an even number, 2 or more, got 3"),
    "an unknown gradient": Row(lambda w: objectives.ImportanceWeighted(2, gradient="stl"), ValueError, "gradient",
        "must be one of 'pathwise', 'sticking-the-landing', 'doubly-reparameterized', got 'stl'"),
    "a negative weight of the total correlation": Row(lambda w: objectives.TotalCorrelation(-1.0),
        ValueError, "weight", "must be a finite number, 0 or more, got -1.0"),
    "free bits of NaN": positive(lambda w: objectives.FreeBits(math.nan), "nats", math.nan),
    "the class of a baseline": Row(lambda w: objectives.ScoreFunction(baselines.RunningAverage),
        TypeError, "baseline", "must be a module such as baselines.RunningAverage(), got <class '...RunningAverage'>"),
    "a number as the name of a baseline": Row(lambda w: objectives.ScoreFunction(baselines.RunningAverage(), name=3),
        TypeError, "name", "must be a string that is not empty, got 3"),
    "a negative weight of the KL": Row(lambda w: handlers.WeightKL(-1),
        ValueError, "weight", "must be a finite number, 0 or more, got -1"),
    "fractions as row numbers": Row(lambda w: handlers.SubsampleRows("data", torch.tensor([1.0])),
        TypeError, "rows", "must be row numbers, integers of shape (B,), got a torch.float32 tensor of shape (1,)"),
    "masks that are numbers": Row(lambda w: handlers.MaskSites({"z": torch.ones(2)}),
        TypeError, "masks", "must be tensors of booleans, got a torch.float32 tensor of shape (2,) for 'z'"),
    "a mask without a name": Row(lambda w: handlers.MaskSites(torch.tensor([True])),
        TypeError, "masks", "must be a mapping, such as {'z': mask}, got a torch.bool tensor of shape (1,)"),
    "no row numbers": Row(lambda w: handlers.SubsampleRows("data", torch.tensor([], dtype=torch.long)),
        ValueError, "rows", "must be one or more row numbers, (B,), got none"),
    "weights of one dimension": Row(lambda w: pareto_shape(torch.zeros(100)),
        ValueError, "log_weights", "must be (S, N), got shape (100,)"),
    "weights that are integers": Row(lambda w: pareto_shape(torch.zeros(100, 2).long()),
        TypeError, "log_weights", "must be floats, (S, N), got a torch.int64 tensor of shape (100, 2)"),
    "a schedule that begins below zero": positive(lambda w: schedules.exponential(-1.0, 0.1), "start", -1.0),
    "a schedule of no steps": positive_int(lambda w: schedules.linear(0.0, 1.0, 0), "steps", 0),
    "a schedule that never rises": Row(lambda w: schedules.cyclical(0.0, 1.0, 10, rise=0.0),
        ValueError, "rise", "must be a share above 0...got 0.0"),
    "a schedule that grows at its end": Row(lambda w: schedules.decayed(1.0, 10, end=2.0),
        ValueError, "hold, end", "must be shares...got 0.5 and 2.0"),
    "a constant that is no number": Row(lambda w: schedules.constant("0.1"),
        ValueError, "value", "must be a finite number, got '0.1'"),
}  # fmt: skip

TRAINING = {
    "arguments next to others": Row(lambda w: fit(w, data=(pv.Arguments(w.x), w.x)),
        TypeError, "data", "must be one Arguments(...), with all arguments in it, got others next to it"),
    "arguments that the model does not take": Row(lambda w: fit(w, data=pv.Arguments(w.x, covariates=None)),
        TypeError, "data", "must be arguments that model and guide take, got Arguments(a torch.float32 tensor of "
        "shape (6, 2), covariates=a NoneType), which raise TypeError:"),
    "a dictionary for a model of tensors": tensors(lambda w: pv.log_evidence(*w.pair, {"x": w.x}),
        "a dict. As arguments of model and guide, they raise TypeError: `x` must be a tensor"),
    "a list of data": tensors(lambda w: fit(w, data=[1.0]), "a float"),
    "data without values": Row(lambda w: fit(w, data=w.meta),
        ValueError, "data", "must be a tensor...got a torch.float32 tensor of shape (6, 2) on meta"),
    "data on two devices": Row(lambda w: pv.evaluate(*w.pair, (w.x, w.meta)),
        ValueError, "data", "must be a tensor...got a torch.float32 tensor of shape (6, 2) on meta"),
    "complex data": Row(lambda w: fit(w, data=w.x + 0j),
        TypeError, "data", "must be a tensor...got a torch.complex64 tensor of shape (6, 2)"),
    "data of another shape": Row(lambda w: fit(w, data=torch.zeros(4, 3)),
        ValueError, "x", "must be (N, 2)...got shape (4, 3)"),
    "data with NaN": Row(lambda w: fit(w, data=w.nan),
        ValueError, "data", "must hold finite numbers, got nan at row 0"),
    "validation data of another precision": Row(lambda w: fit(w, validation=w.x.double()),
        ValueError, "validation", "must have rows like those of `data`...got shape (2,), torch.float64"),
    "validation data of another shape": Row(lambda w: fit(w, validation=w.x[:, :1]),
        ValueError, "validation", "must have rows like those of `data`...got shape (1,), torch.float32"),
    "no epochs": positive_int(lambda w: fit(w, epochs=0), "epochs", 0),
    "half an epoch": positive_int(lambda w: fit(w, epochs=0.5), "epochs", 0.5),
    "batches of no rows": positive_int(lambda w: fit(w, batch_size=0), "batch_size", 0),
    "a learning rate of NaN": positive(lambda w: fit(w, lr=math.nan), "lr", math.nan),
    "two learning rates": Row(lambda w: fit(w, lr=0.1, optimizer=partial(torch.optim.SGD, lr=0.1)),
        ValueError, "lr", "must be left out where `optimizer` sets the learning rate itself, got 0.1 and SGD"),
    "the name of an optimizer": Row(lambda w: fit(w, optimizer="Adam"),
        TypeError, "optimizer", "must be a class of torch.optim, or a function from a list of...got a str"),
    "an optimizer of Pyro": Row(lambda w: fit(w, optimizer=pyro.optim.Adam({})),
        TypeError, "optimizer", "must be a class of torch.optim, or a function...got PyroOptim, which returns a Non"),
    "an optimizer that needs a closure": Row(lambda w: fit(w, optimizer=torch.optim.LBFGS),
        ValueError, "optimizer", "must take a step from one gradient, got LBFGS, which computes the loss several"),
    "a factor that lets a rate grow": Row(lambda w: schedules.on_plateau(factor=1.5),
        ValueError, "factor", "must be above 0 and below 1, got 1.5"),
    "a word for a learning rate": positive(lambda w: fit(w, lr="1e-3"), "lr", "1e-3"),
    "the class of an ELBO": Row(lambda w: fit(w, elbo=TraceEnum_ELBO),
        TypeError, "elbo", "must be an instance...got <class 'pyro.infer.traceenum_elbo.TraceEnum_ELBO'>"),
    "a list of schedules": Row(lambda w: fit(w, schedules=[lambda step: 1.0]),
        TypeError, "schedules", "must be a dict from tensors to schedules, got a list"),
    "a name as the key of a schedule": Row(lambda w: fit(w, schedules={"temperature": lambda step: 1.0}),
        ValueError, "schedules", "must be a 0-dim tensor without gradient...got 'temperature' as a key"),
    "a vector as the key of a schedule": Row(lambda w: fit(w, schedules={torch.zeros(2): lambda step: 1.0}),
        ValueError, "schedules", "must be a 0-dim tensor without gradient...got '(2,), torch.float32' as a key"),
    "a number as a schedule": Row(lambda w: fit(w, schedules={torch.zeros(()): 1.0}),
        TypeError, "schedules", "must be a function of the step, such as `exponential()`, got 1.0"),
    "a number as a transform": Row(lambda w: fit(w, transform=2),
        TypeError, "transform", "must be a function that returns a tensor for each data tensor...got 2"),
    "a transform that loses rows": Row(lambda w: fit(w, transform=lambda x: x[:1]),
        ValueError, "transform", "must return one tensor for each data tensor...got tensors of [1] rows"),
    "no model": function(lambda w: pv.fit(None, w.vae.guide, w.x, epochs=1), "model", "a NoneType"),
    "no guide": function(lambda w: pv.fit(w.vae.model, None, w.x, epochs=1), "guide", "a NoneType"),
    "a VAE instead of its model": Row(lambda w: pv.fit(w.vae, w.vae.guide, w.x, epochs=1),
        TypeError, "model", "must be one Pyro function, `vae.model`, got a VAE, a pair of functions"),
    "a number as a model to evaluate": function(lambda w: pv.evaluate(3, w.vae.guide, w.x), "model", "an int"),
    "an empty list of schedules": Row(lambda w: fit(w, schedules=[]),
        TypeError, "schedules", "must be a dict from tensors to schedules, got a list"),
    "a word for progress": boolean(lambda w: fit(w, progress="no"), "progress", "no"),
    "a word for compile": Row(
        lambda w: fit(w, compile="yes"), TypeError, "compile", "must be True, False or None, got 'yes'"
    ),
    "a precision of another kind": Row(lambda w: fit(w, precision="fp16"),
        ValueError, "precision", "must be 'bf16-mixed', or None for float32, got 'fp16'"),
    "a number for the precision": Row(lambda w: fit(w, precision=16),
        ValueError, "precision", "must be 'bf16-mixed', or None for float32, got 16"),
    "a number for compile": Row(
        lambda w: pv.log_evidence(*w.pair, w.x, compile=1), TypeError, "compile", "must be True, False or None, got 1"
    ),
    "gradients clipped to nothing": positive(lambda w: fit(w, clip_norm=0.0), "clip_norm", 0.0),
    "patience without validation": Row(lambda w: fit(w, patience=3),
        ValueError, "patience", "needs held-out data, `validation=`, got none"),
    "no patience": positive_int(lambda w: fit(w, patience=0, validation=w.x), "patience", 0),
    "another way with what is not finite": Row(lambda w: fit(w, nonfinite="ignore"),
        ValueError, "nonfinite", "must be 'stop' or 'skip', got 'ignore'"),
    "a number as a callback": Row(lambda w: fit(w, callbacks=[3]),
        TypeError, "callbacks", "must be a sequence of functions of an Epoch, got [3]"),
    "a file instead of a folder of checkpoints": Row(lambda w: fit(w, checkpoints=__file__),
        ValueError, "folder", "must be a folder...got the file '"),
    "checkpoints at half steps": positive_int(lambda w: pv.Checkpoints("run", every_steps=0.5), "every_steps", 0.5),
    "a scheduler instead of an optimizer": Row(lambda w: pv.SVI(*w.pair, "Adam", Trace_ELBO()),
        TypeError, "optim", "must be an optimizer of pyro.optim...got 'Adam'"),
    "the guide of another model": latent_shape(lambda w: pv.fit(w.vae.model, w.wide.guide, w.x, epochs=1)),
    "the guide of another model, in batches": latent_shape(
        lambda w: pv.fit(w.vae.model, w.wide.guide, w.x, epochs=1, batch_size=2)),
    "the guide of another model to evaluate": latent_shape(lambda w: pv.evaluate(w.vae.model, w.wide.guide, w.x)),
    "another plate": data_plate(lambda w: fit(w, plate="rows")),
    "another plate to evaluate": data_plate(lambda w: pv.evaluate(*w.pair, w.x, plate="rows")),
    "data of another precision": Row(lambda w: fit(w, data=w.x.double()),
        TypeError, "DiagonalNormal", "must be torch.float32, as its network is, got torch.float64"),
    "training on enumeration of what is not discrete": Row(lambda w: fit(w, elbo=TraceEnum_ELBO()),
        ValueError, "elbo", "must not be TraceEnum_ELBO where no latent is marked for enumeration"),
    "enumeration of what is not discrete": Row(lambda w: pv.evaluate(*w.pair, w.x, elbo=TraceEnum_ELBO()),
        ValueError, "elbo", "must not be TraceEnum_ELBO where no latent is marked for enumeration"),
    "no draws to evaluate": positive_int(lambda w: pv.evaluate(*w.pair, w.x, num_samples=0), "num_samples", 0),
}  # fmt: skip

EXPORTS = {
    "no draws": positive_int(lambda w: pv.to_datatree(*w.pair, w.x, draws=0), "draws", 0),
    "no draws of local latents": positive_int(
        lambda w: pv.to_datatree(*w.pair, w.x, draws=2, local_draws=0), "local_draws", 0),
    "no process for a chain": positive_int(lambda w: pv.reference(w.vae.model, w.x, processes=0), "processes", 0),
    "more draws than the memory holds": Row(lambda w: pv.to_datatree(*w.pair, w.x, draws=10**9),
        ValueError, "draws", "must take at most 4294967296 bytes...got 1000000000 draws of z, x from posterior"),
    "a word for a truth value": boolean(lambda w: tree(w, parallel="no"), "parallel", "no"),
    "dimensions of an unknown site": Row(lambda w: tree(w, dims={"y": ["a"]}),
        ValueError, "dims", "must have variables as keys, of ['x', 'z'], got ['y']"),
    "a list of dimensions": Row(lambda w: tree(w, dims=["row"]), TypeError, "dims", "must be a mapping...got a list"),
    "numbers as names of dimensions": Row(lambda w: tree(w, dims={"x": [3]}),
        TypeError, "dims", "must be names...got [3] for 'x'"),
    "a list of coordinates": Row(lambda w: tree(w, coords=[1]), TypeError, "coords", "must be a mapping...got a list"),
    "coordinates of another size": Row(lambda w: tree(w, coords={"obs": [1, 2]}),
        ValueError, "coords", "must have one entry for each element...'obs': 6...got 2 entries for 'obs'"),
    "a number as the history": Row(lambda w: tree(w, history=3),
        TypeError, "history", "must be the result of `fit`, or a mapping from names...got an int"),
    "constant data without names": Row(lambda w: tree(w, constant_data=[1]),
        TypeError, "constant_data", "must be a mapping...got a list"),
    "constant data of rows of different lengths": Row(lambda w: tree(w, constant_data={"c": [[1], [1, 2]]}),
        ValueError, "constant_data", "must have rows of one length, got 'c':"),
    "constant data that are objects": Row(lambda w: tree(w, constant_data={"c": object()}),
        TypeError, "constant_data", "must have numbers, booleans or strings, got 'c', an object of dtype object"),
    "a dictionary for ArviZ": Row(lambda w: pv.to_arviz({}),
        TypeError, "tree", "must be an `xarray.DataTree`...got a dict"),
    "draws into a folder that is not there": Row(lambda w: save(w, w.folder / "gone" / "draws.nc"),
        FileNotFoundError, "path", "must be in a folder that exists: there is no folder '...gone' for 'draws.nc'"),
    "draws into a file of another format": Row(lambda w: save(w, w.folder / "draws.zarr"),
        ValueError, "path", "must be a netCDF file...got '...draws.zarr'"),
    "draws over a folder": Row(lambda w: save(w, w.folder),
        ValueError, "path", "must be a file, such as 'draws.nc', got the folder '"),
    "draws to nowhere": Row(lambda w: save(w, None), TypeError, "path", "must be a path...got None"),
    "draws of no number into a file": positive_int(
        lambda w: pv.save_draws(w.folder / "d.nc", *w.pair, w.x, draws=0), "draws", 0),
    "more draws than the disk holds": Row(lambda w: pv.save_draws(w.folder / "d.nc", *w.pair, w.x, draws=10**15),
        OSError, "path", "must be on a disk with 216000000000000000 free bytes for the draws, got "),
    "dimensions of an unknown site in a file": Row(lambda w: save(w, w.folder / "d.nc", dims={"y": ["a"]}),
        ValueError, "dims", "must have variables as keys, of ['x', 'z'], got ['y']"),
    "no draws at a time": positive_int(lambda w: save(w, w.folder / "d.nc", chunk=0), "chunk", 0),
    "a page in a folder that is not there": Row(lambda w: page(w, "gone/page.html"),
        FileNotFoundError, "path", "must be in a folder that exists: there is no folder '...gone' for 'page.html'"),
    "a page instead of a folder": Row(lambda w: page(w, "."),
        IsADirectoryError, "path", "must be the path of a file, got '...', a folder"),
    "a page nowhere": Row(lambda w: page(w, None), TypeError, "path", "must be a path...got None"),
    "labels of other data": Row(lambda w: page(w, labels=torch.zeros(3)),
        ValueError, "labels", "must be whole numbers...got shape (3,)"),
    "labels with fractions": Row(lambda w: page(w, labels=w.x[:, 0]),
        ValueError, "labels", "must be whole numbers...got 1.5409960746765137"),
    "complex labels": Row(lambda w: page(w, labels=torch.zeros(6) + 0j),
        TypeError, "labels", "must be whole numbers...got a torch.complex64 tensor of shape (6,)"),
    "images of another size": Row(lambda w: page(w, image_shape=(3, 3)),
        ValueError, "image_shape", "must be height and width, or (3, height, width), of the 2 pixels in...got (3, 3)"),
    "a history of nothing that is known": Row(lambda w: page(w, history={"loss": [1.0]}),
        ValueError, "history", "must be the result of `fit`...with one or more of the names ['elbo'...got ['loss']"),
    "a list of pictures": Row(lambda w: page(w, pictures=[3]), TypeError, "pictures", "must be a mapping...got a list"),
    "a number as the title": Row(lambda w: page(w, title=3),
        TypeError, "title", "must be a string that is not empty, got 3"),
    "a folder that is none": Row(lambda w: datasets.mnist(folder=w.folder / "gone"),
        FileNotFoundError, "folder", "must be a folder with MNIST's files: there is no folder '...gone'"),
    "a folder without the files": Row(lambda w: datasets.mnist(folder=w.folder), FileNotFoundError, "folder",
        "must be a folder with MNIST's files: there is no train-images-idx3-ubyte.gz or train-images-idx3-ubyte in '"),
    "a number as a folder": Row(lambda w: datasets.mnist(folder=3), TypeError, "folder", "must be a path...got 3"),
    "music that is not there": Row(lambda w: datasets.piano_rolls(w.folder / "gone"),
        FileNotFoundError, "path", "must be a JSON file: there is no file '...gone'"),
    "one mirror in place of a list": Row(lambda w: datasets.mnist(mirrors="https://localhost"),
        ValueError, "mirrors", "must be a sequence of URLs, such as `datasets.MIRRORS`, got 'https://localhost'"),
    "a file that is not there": Row(lambda w: idx.read(w.folder / "gone"),
        FileNotFoundError, "path", "must be that of an IDX file: there is no file '...gone'"),
    "a file that is cut off": Row(lambda w: idx.read(w.folder / "torn"),
        ValueError, "path", "must be an IDX file of 16 bytes, for its shape is [2, 0, 0]: '...torn' has 8"),
    "a file of another kind": Row(lambda w: idx.read(w.folder / "foreign.gz"),
        ValueError, "path", "must be a whole gzip file: '...foreign.gz' is damaged: Not a gzipped file"),
    "a comparison of no models": Row(lambda w: pv.compare_evidence({}),
        ValueError, "evidence", "must have one or more models, got none"),
    "a list of evidence": Row(lambda w: pv.compare_evidence([w.x[:, 0]]),
        TypeError, "evidence", "must be a mapping from names to Evidence, got a list"),
    "evidence of different data": Row(
        lambda w: pv.compare_evidence({"a": w.x[:, 0], "b": w.x[:3, 0]}), ValueError, "evidence",
        "must have the same data, in the same order, for each model, got {'a': 6, 'b': 3} data"),
    "truth values as evidence": Row(lambda w: pv.compare_evidence({"a": w.x[:, 0] > 0}),
        TypeError, "evidence['a']", "must be floats (N,), nats of each datum, got a torch.bool tensor of shape (6,)"),
}  # fmt: skip

SWEEPS = {
    "an engine of another name": Row(lambda w: sweep(w, engine="dask"),
        ValueError, "engine", "must be 'ray', 'optuna' or None, got 'dask'"),
    "early stopping without an engine": Row(lambda w: sweep(w, early_stopping=3),
        ValueError, "engine", "must be 'ray' or 'optuna' for `early_stopping`, got None"),
    "early stopping by a truth value": Row(lambda w: sweep(w, engine="ray", early_stopping=True),
        TypeError, "early_stopping", "must be a number of epochs, a scheduler of Ray or a pruner of Optuna, got True"),
    "a searcher without a number of settings": Row(lambda w: sweep(w, engine="optuna", search=object()),
        ValueError, "num_settings", "must be given with `search`, got None"),
    "a VAE in place of what makes one": Row(lambda w: sweep(w, make=w.vae),
        TypeError, "make", "must be a function of the settings that returns what to fit"),
    "settings that are not taken": Row(lambda w: sweep(w, make=lambda lr: w.vae, space={"latent": [1]}),
        TypeError, "make", "must be a function of the settings...got one that does not take latent: "),
    "settings called as a column": Row(lambda w: sweep(w, make=lambda elbo: w.vae, space={"elbo": [1, 2]}),
        ValueError, "space", "must have other names than columns of the table, got 'elbo'"),
    "the same value twice": Row(lambda w: sweep(w, space={"lr": [0.1, 0.1]}),
        ValueError, "space['lr']", "must have values that differ, got 0.1 twice"),
    "the same seed twice": Row(lambda w: sweep(w, seeds=[1, 1]), ValueError, "seeds", "must differ, got [1, 1]"),
    "seeds in words": Row(lambda w: sweep(w, seeds="all"),
        TypeError, "seeds", "must be a number of seeds, or a list of them, got 'all'"),
    "no retries by a truth value": Row(lambda w: sweep(w, retries=False),
        ValueError, "retries", "must be 0 or a positive integer, got False"),
    "an option that fit does not have": Row(lambda w: sweep(w, epoch=3),
        TypeError, "options", "must be keyword arguments of pv.fit, got 'epoch'"),
    "an option of fit that the sweep sets": Row(lambda w: sweep(w, checkpoints="run"), TypeError, "options",
        "must be keyword arguments of pv.fit, without those that the sweep sets, got 'checkpoints'"),
    "a sweep of other held-out data": Row(lambda w: sweep(w, validation=w.x[:, :1]),
        ValueError, "validation", "must have rows like those of `data`, shape (2,)"),
    "a resource of nothing": Row(lambda w: sweep(w, resources={"gpu": 0}),
        ValueError, "resources['gpu']", "must be a positive, finite number, got 0"),
    "a file in place of a folder": Row(lambda w: sweep(w, folder=w.folder / "torn"),
        ValueError, "folder", "must be a folder, or a path to make one at, got the file '...torn'"),
    "a dictionary in place of a sweep": Row(lambda w: plots.sweep({}),
        TypeError, "result", "must be a result of `pv.sweep`, got a dict"),
}  # fmt: skip

PLOTS = {
    "a figure in place of axes": Row(lambda w: plots.training_curves(w.history, ax=3),
        TypeError, "ax", "must be matplotlib axes...got an int"),
    "a namespace in place of a history": Row(
        lambda w: plots.training_curves(SimpleNamespace()), TypeError, "history",
        "must be the result of `fit`, or a mapping from names to one number per epoch, got a SimpleNamespace"),
    "a history without epochs": Row(lambda w: plots.training_curves({"elbo": []}), ValueError, "history",
        "must be the result of `fit`, or a mapping from names to one number per epoch, got no number for 'elbo'"),
    "unknown terms": Row(lambda w: plots.training_curves(w.history, terms=["loss"]),
        ValueError, "terms", "must be one or more of ['elbo', 'distortion', 'rate'], got ['loss']"),
    "a rate of NaN": Row(lambda w: plots.rate_distortion({"a": (math.nan, 1.0)}),
        ValueError, "rate of models['a']", "must be a finite number, got nan"),
    "a tensor in place of evidence": Row(lambda w: plots.khat(w.x),
        TypeError, "evidence", "must be a result of `pv.log_evidence`, got a torch.float32 tensor of shape (6, 2)"),
    "a dictionary in place of a table": Row(lambda w: plots.evidence_comparison({}),
        TypeError, "table", "must be a result of `pv.compare_evidence`, got a dict"),
    "a dictionary in place of a comparison": Row(lambda w: plots.bias_variance({}),
        TypeError, "comparison", "must be a result of `gradients.compare`, got a dict"),
    "a VAE in place of a calibration": Row(lambda w: plots.calibration(w.vae),
        TypeError, "result", "must be a result of `pv.calibrate`, got a VAE"),
    "an array of codes": Row(lambda w: plots.latent_map(np.zeros((6, 2)), w.labels),
        TypeError, "z", "must be a tensor (N, D) of codes, such as `vae.encode(x).mean`, got an ndarray"),
    "codes of no variable": Row(lambda w: plots.latent_map(torch.zeros(6, 0), w.labels),
        ValueError, "z", "must be a tensor (N, D) of codes, such as `vae.encode(x).mean`, got shape (6, 0)"),
    "codes that are not finite": Row(lambda w: plots.latent_map(torch.full((6, 2), math.inf), w.labels),
        ValueError, "z", "must hold finite numbers, got inf at (0, 0)"),
    "fewer names than codes": Row(lambda w: plots.latent_map(w.x, ["a", "b"]),
        ValueError, "labels", "must be one name for each of the 6 data, got 2 names"),
    "labels of other codes": Row(lambda w: plots.latent_map(w.x, w.labels[:3]),
        ValueError, "labels", "must be whole numbers...got shape (3,)"),
    "several data where one is drawn": Row(lambda w: plots.posterior(*w.pair, w.x),
        ValueError, "datum", "must have one row, such as `x[:1]`, got 6 rows"),
    "bytes as images, which would be black": Row(lambda w: plots.image_grid(w.dark),
        ValueError, "images", "must have values in [0, 1], such as `x / 255`, got torch.uint8 up to 200"),
    "flat images": Row(lambda w: plots.image_grid(w.x),
        ValueError, "images", "must be a tensor (N, height, width), or (N, 3, height, width)...got shape (6, 2)"),
    "images of two channels": Row(lambda w: plots.image_grid(torch.zeros(4, 2, 8, 8)),
        ValueError, "images", "must be a tensor (N, height, width), or (N, 3, height, width)...got shape (4, 2, 8, 8)"),
    "two channels in a shape": Row(lambda w: plots.samples(lambda count: torch.zeros(count, 128), (2, 8, 8)),
        ValueError, "shape", "must be height and width of an image...or (3, 32, 32) in colour, got (2, 8, 8)"),
    "no columns of images": positive_int(lambda w: plots.image_grid(torch.zeros(4, 8, 8), columns=0), "columns", 0),
    "a VAE in place of its decoder": Row(lambda w: plots.manifold(w.vae, (8, 8)),
        TypeError, "decode", "must be a function...got a VAE"),
    "one number for height and width": Row(lambda w: plots.manifold(grey_image, 8),
        ValueError, "shape", "must be height and width of an image...got 8"),
    "images of another size than the decoder's": Row(lambda w: plots.manifold(grey_image, (7, 7), size=2),
        ValueError, "decode", "must return images (4, 49), of 7 by 7 pixels, got shape (4, 64)"),
    "a coordinate that is not there": Row(
        lambda w: plots.traversals(grey_image, torch.zeros(2), (8, 8), coordinates=[5]),
        ValueError, "coordinates", "must be one or more integers from 0 to 1, got [5]"),
    "one coordinate in place of a list": Row(
        lambda w: plots.traversals(grey_image, torch.zeros(2), (8, 8), coordinates=1),
        TypeError, "coordinates", "must be integers from 0 to 1, got an int"),
    "fewer images than asked for": Row(lambda w: plots.samples(lambda count: torch.zeros(3, 64), (8, 8)),
        ValueError, "generate", "must return images (50, 64), of 8 by 8 pixels, got shape (3, 64)"),
    "a VAE as a model to draw": Row(lambda w: plots.plate_diagram(w.vae, None, w.x),
        TypeError, "model", "must be one Pyro function, `vae.model`, got a VAE, a pair of functions"),
}  # fmt: skip

TABLES = {
    "models": MODELS,
    "parts": PARTS,
    "networks": NETWORKS,
    "data": DATA,
    "pairs": PAIRS,
    "numbers": NUMBERS,
    "training": TRAINING,
    "exports": EXPORTS,
    "sweeps": SWEEPS,
    "plots": PLOTS,
}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def state(w, random_states):
    """Everything that a refused call must leave unchanged."""
    models = [one for one in vars(w).values() if isinstance(one, nn.Module)]
    return (
        random_states(),
        sorted(pyro.get_param_store().keys()),
        [(name, tensor.tolist()) for model in models for name, tensor in model.state_dict().items()],
        [module.training for model in models for module in model.modules()],
        sorted(path.name for path in w.folder.iterdir()),
    )


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_wrong_call_raises_before_any_work_naming_argument_expected_and_got(row, tmp_path, random_states):
    w = make_inputs(tmp_path)
    before = state(w, random_states)
    with pytest.raises(row.error) as caught:
        row.call(w)
    assert caught.type is row.error
    expected = ".*".join(map(re.escape, row.says.split("...")))
    if not re.search(rf"\b{re.escape(row.argument)}\W+{expected}", str(caught.value)):
        pytest.fail(f"{row.says!r} is not what follows {row.argument!r} in {str(caught.value)!r}")
    ours = [
        one
        for one in chain(caught.value)
        if PACKAGE in Path(traceback.extract_tb(one.__traceback__)[-1].filename).parents
    ]
    assert any(row.argument in str(one) for one in ours), "no error of the package itself names the argument"
    assert state(w, random_states) == before


def test_the_table_is_complete_and_has_no_call_twice():
    assert len(ROWS) >= 286
    assert len({row.call for row in ROWS.values()}) == len(ROWS)


HEAVY = {"fit", "sweep", "plots.sweep", "inspect", "report", "inference_gap", "calibrate", "reference",
         "annealed_log_evidence", "particle_log_evidence", "save_draws", "to_datatree", "gradients.compare",
         "plots.calibration", "plots.posterior", "exact.kl", "exact.elbo", "exact.log_evidence",
         "exact.posterior"}  # fmt: skip
ALWAYS_WRONG = ["object()", "set()", "nan", "10**30", "complex numbers", "an array of objects", "b''"]


def assert_wrong_values_are_named(name, folder, count):
    """Each call succeeds, or raises an error that names an argument in backticks, as the user wrote it.

    Of each argument ``count`` wrong values are tried, of a function that takes long fewer, which never succeed.
    """
    (call, good), chance = GOOD[name], random.Random(name)
    w = make_inputs(folder)
    for parameter in good(w):
        labels = (
            chance.sample(ALWAYS_WRONG, 2) if name in HEAVY and count < len(POOL) else chance.sample([*POOL], count)
        )
        for label in labels:
            if (parameter, label) == ("compile", "True"):  # takes half a minute
                continue
            w = make_inputs(folder) if name == "fit" else w  # it may have spoiled the parameters
            arguments = good(w)
            try:
                call_with(call, {**arguments, parameter: POOL[label]})
            except FloatingPointError:  # with a learning rate of 10**30 the run diverges
                pass
            except (TypeError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: of all runs of a sweep
                names = "|".join(map(re.escape, {"x", "model", "guide", *arguments}))
                if not re.search(rf"`({names})\b|the context of ", str(error)):
                    pytest.fail(f"{name}({parameter}={label}) raises {error!r}")
            pyro.clear_param_store()
            plt.close("all")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GOOD)
def test_no_wrong_value_of_an_argument_ends_in_an_error_without_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some wrong values are paths
    call, good = GOOD[name]
    if name not in HEAVY:
        call_with(call, good(make_inputs(tmp_path)))
    assert_wrong_values_are_named(name, tmp_path, count=8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", GOOD)
def test_no_wrong_value_of_all_ends_in_an_error_without_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, good = GOOD[name]
    call_with(call, good(make_inputs(tmp_path)))
    assert_wrong_values_are_named(name, tmp_path, count=len(POOL))


def test_every_public_function_and_class_is_called_wrongly():
    modules = [priors, guides, likelihoods, networks, objectives, baselines, schedules, datasets, plots, distributions,
               families, gradients, handlers, exact, missing, spatial, sweeps, tables, tabular]  # fmt: skip
    public = {name for name in dir(pv) if not name.startswith("_") and callable(getattr(pv, name))}
    for module in modules:
        short = module.__name__.rpartition(".")[2]
        public |= {f"{short}.{name}" for name in module.__all__ if callable(getattr(module, name))}
    methods = {"likelihoods.Normal.mse", "tables.Table.from_frame"}
    assert public == (GOOD.keys() - methods) | {*" ".join(NOT_CALLED.values()).split()}


def test_a_folder_in_which_nothing_can_be_written_is_refused_before_any_draw(tmp_path, monkeypatch):
    w = make_inputs(tmp_path)

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for call in (lambda: save(w, tmp_path / "draws.nc"), lambda: page(w)):
        with pytest.raises(PermissionError, match="`path` must be in a folder that can be written to: nothing can"):
            call()


@pytest.mark.parametrize("value", [torch.tensor([True, False]), torch.tensor([1 + 0j, 0j])])
def test_a_bernoulli_refuses_what_is_no_real_number(value):
    with pytest.raises(TypeError, match=r"`value` must be 0s and 1s .*, got torch\.(bool|complex64)"):
        Bernoulli(logits=torch.zeros(2)).log_prob(value)
