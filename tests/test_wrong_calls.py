"""Wrong calls, in one table: each is refused before any work, by an error that says which argument, what came, and what
is accepted."""

import math
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import (
    baselines,
    datasets,
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


def decoder(latent, features, likelihood=likelihoods.Normal):
    return likelihood(latent, features, DeterministicLinear)


def make_inputs(folder):
    """What the calls in the table are made with."""
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    torn = folder / "torn"
    torn.write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 2]))
    foreign = folder / "foreign.gz"
    foreign.write_bytes(b"no gzip")
    return SimpleNamespace(
        x=x,
        meta=x.to("meta"),
        nan=x.masked_fill(x > 1, math.nan),
        labels=torch.tensor([0, 1, 0, 1, 0, 1]),
        vae=pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, DeterministicLinear), decoder(1, 2)),
        curved=pv.VAE(
            priors.StandardNormal(1),
            guides.DiagonalNormal(2, 1, DeterministicLinear),
            likelihoods.Normal(1, 2, nonlinear_net),
        ),
        wide=pv.VAE(priors.StandardNormal(3), guides.DiagonalNormal(2, 3, DeterministicLinear), decoder(3, 2)),
        discrete=pv.VAE(priors.Bernoulli(2), guides.Bernoulli(2, 2, DeterministicLinear), decoder(2, 2)),
        binary=pv.VAE(
            priors.StandardNormal(1),
            guides.DiagonalNormal(2, 1, DeterministicLinear),
            decoder(1, 2, likelihoods.Bernoulli),
        ),
        folder=folder,
        torn=torn,
        foreign=foreign,
        dark=torch.full((4, 8, 8), 200, dtype=torch.uint8),
        history={"elbo": [-2.0], "distortion": [1.0], "rate": [1.0]},
    )


def nonlinear_net(in_features, out_features):
    return nn.Sequential(DeterministicLinear(in_features, 3), nn.Tanh(), DeterministicLinear(3, out_features))


def no_plate(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand([6, 2]).to_event(2), obs=x)


class Tensors(nn.Module):
    """A module that is no part: it returns a tensor."""

    def forward(self, context=None):
        return torch.zeros(3, 2)


def grey_image(z):
    return z.sigmoid()[:, :1].expand(-1, 64)


def fit(w, model=None, guide=None, data=None, **options):
    return pv.fit(model or w.vae.model, guide or w.vae.guide, w.x if data is None else data, **{"epochs": 1} | options)


def tree(w, **options):
    return pv.to_datatree(w.vae.model, w.vae.guide, w.x, draws=2, **options)


def save(w, path, **options):
    return pv.save_draws(path, w.vae.model, w.vae.guide, w.x, draws=2, **options)


def page(w, path="page.html", **options):
    return pv.report(path and w.folder / path, w.vae.model, w.vae.guide, w.x, **options)


def compare(w, estimators=None, **options):
    pair = gradients.Estimator(w.discrete.model, w.discrete.guide, objectives.LeaveOneOut())
    return gradients.compare({"loo": pair} if estimators is None else estimators, w.x, **{"repeats": 3} | options)


class Row(NamedTuple):
    """A wrong call, and what must be said of it: ``...`` stands for anything."""

    call: Callable[[Any], Any]
    error: type[Exception]
    argument: str
    says: str


INT, SHAPE = "must be a positive integer", "must be a positive integer or a tuple of them"
SEED = "must be an integer from 0 to 2^32 - 1"
TENSOR, REAL = "must be a tensor, such as", "must be a positive, finite number"

MODELS = {
    "the class of a part as the prior": Row(
        lambda w: pv.VAE(priors.StandardNormal, w.vae.encoder, w.vae.decoder),
        TypeError, "prior", "must be a module that returns a distribution...got the class StandardNormal",
    ),
    "a function as the prior": Row(
        lambda w: pv.VAE(lambda: dist.Normal(0.0, 1.0), w.vae.encoder, w.vae.decoder),
        TypeError, "prior", "must be a module that returns a distribution...got a function",
    ),
    "an encoder as the prior": Row(
        lambda w: pv.VAE(w.vae.encoder, w.vae.encoder, w.vae.decoder),
        TypeError, "prior", "guides.DiagonalNormal gives no p(z), without a context: ...needs a context",
    ),
    "a network as the decoder": Row(
        lambda w: pv.VAE(w.vae.prior, w.vae.encoder, DeterministicLinear(1, 2)),
        TypeError, "decoder", "must be a distribution...makes a torch.float32 tensor of shape (3, 2)",
    ),
    "a network as the encoder": Row(
        lambda w: pv.VAE(w.vae.prior, DeterministicLinear(2, 1), w.vae.decoder),
        TypeError, "encoder", "must be a distribution...makes a torch.float32 tensor of shape (3, 1)",
    ),
    "a decoder that does not fit the prior": Row(
        lambda w: pv.VAE(w.vae.prior, w.vae.encoder, w.wide.decoder),
        ValueError, "decoder", "does not take what the prior priors.StandardNormal gives, ...What would fit: latent=1",
    ),
    "an encoder that does not fit the decoder": Row(
        lambda w: pv.VAE(w.vae.prior, guides.DiagonalNormal(5, 1, DeterministicLinear), w.vae.decoder),
        ValueError, "encoder", "it was built for (5,). What would fit: in_features=2",
    ),
    "a discrete encoder for a continuous prior": Row(
        lambda w: pv.VAE(w.wide.prior, guides.Bernoulli(2, 3, DeterministicLinear), w.wide.decoder),
        ValueError, "encoder", "is a mass of shape (3,)... What would fit: guides.DiagonalNormal(latent=3",
    ),
    "a decoder of another precision": Row(
        lambda w: pv.VAE(w.vae.prior, w.vae.encoder, decoder(1, 2).double()),
        TypeError, "decoder", "must be torch.float64...got a context of torch.float32",
    ),
    "an encoder on another device": Row(
        lambda w: pv.VAE(w.vae.prior, guides.DiagonalNormal(2, 1, DeterministicLinear).to("meta"), w.vae.decoder),
        ValueError, "encoder", "must be meta, where its network is...got a context on cpu",
    ),
    "a number as the name": Row(
        lambda w: pv.VAE(w.vae.prior, w.vae.encoder, w.vae.decoder, name=3),
        TypeError, "name", "must be a string that is not empty...got 3",
    ),
    "an empty name": Row(
        lambda w: pv.VAE(w.vae.prior, w.vae.encoder, w.vae.decoder, name=""),
        TypeError, "name", "must be a string that is not empty...got ''",
    ),
    "lists where the model wants a tensor": Row(
        lambda w: w.vae.model([[0.0, 1.0]]), TypeError, "x", "must be a tensor, (N, 2)...got a list"
    ),
    "data of one dimension": Row(
        lambda w: w.vae.guide(w.x[:, 0]), ValueError, "x", "must be (N, 2)...got shape (6,)"
    ),
    "no rows for the model": Row(
        lambda w: w.vae.model(w.x[:0]),
        ValueError, "x", "must be (N, 2) with N >= 1...got shape (0, 2), without rows",
    ),
    "truth values as data": Row(
        lambda w: exact.log_evidence(w.vae.model, w.x > 0),
        TypeError, "x", "must be real numbers, `x.float()`...got a torch.bool tensor of shape (6, 2)",
    ),
    "a list where the decoder wants a tensor": Row(
        lambda w: w.vae.decode([0.0]), TypeError, "z", "must be a tensor of values of the site...got a list"
    ),
    "half a datum to generate": Row(
        lambda w: w.vae.generate(2.5), ValueError, "num_samples", f"got 2.5; {INT}"
    ),
    "more data to generate than there are numbers for": Row(
        lambda w: w.vae.generate(10**30),
        ValueError, "num_samples", "must be a positive integer below...got 1000000",
    ),
    "a word for a truth value": Row(
        lambda w: w.vae.generate(3, mean="no"), TypeError, "mean", "must be True and False...got 'no'"
    ),
    "no draws of what is missing": Row(
        lambda w: w.vae.impute(w.x, 0), ValueError, "num_samples", f"got 0; {INT}"
    ),
    "the twin of what is not relaxed": Row(
        lambda w: w.vae.discrete(), TypeError, "StandardNormal", "has no discrete twin; relaxed parts have one"
    ),
}  # fmt: skip

PARTS = {
    "a latent of size zero": Row(lambda w: priors.StandardNormal(0), ValueError, "event_shape", f"got 0; {SHAPE}"),
    "a latent of half a size": Row(
        lambda w: priors.Normal((2, 1.5)),
        ValueError, "event_shape", f"got (2, 1.5); {SHAPE}",
    ),
    "a truth value as a size": Row(lambda w: priors.Laplace(True), ValueError, "event_shape", f"got True; {SHAPE}"),
    "a tensor as a shape": Row(
        lambda w: priors.StandardNormal(torch.tensor([2, 3])), ValueError, "event_shape", f"got tensor([2, 3]); {SHAPE}"
    ),
    "a latent that no tensor could hold": Row(
        lambda w: priors.StandardNormal((2**40, 2**40)),
        ValueError, "event_shape", "must be a size below 2^63...got (",
    ),
    "infinite degrees of freedom": Row(lambda w: priors.StudentT(1, df=math.inf), ValueError, "df", f"got inf; {REAL}"),
    "a probability of one": Row(
        lambda w: priors.Bernoulli(2, probs=1.0),
        ValueError, "probs", "must be probabilities strictly between...got 1.0",
    ),
    "complex probabilities": Row(
        lambda w: priors.Bernoulli(2, probs=torch.full((2,), 0.5 + 0j)),
        TypeError, "probs", "got a torch.complex64 tensor of shape (2,); ...of real numbers",
    ),
    "probabilities without values": Row(
        lambda w: priors.Bernoulli(2, probs=torch.full((2,), 0.5, device="meta")),
        ValueError, "probs", "must be a number or a tensor...on meta, which holds no values",
    ),
    "probabilities of another number of variables": Row(
        lambda w: priors.Bernoulli(2, probs=torch.full((3,), 0.5)),
        ValueError, "probs", "must be one that expands to (2,)...got shape (3,)",
    ),
    "no components": Row(lambda w: priors.MixtureOfNormals(2, 0), ValueError, "num_components", f"got 0; {INT}"),
    "a temperature of NaN": Row(
        lambda w: priors.RelaxedBernoulli(2, math.nan), ValueError, "temperature", f"got nan; {REAL}"
    ),
    "one class": Row(
        lambda w: priors.GumbelSoftmax((2, 1), 0.5), ValueError, "event_shape", "must be (n, k)...got (2, 1)"
    ),
    "an array of pseudo-data": Row(
        lambda w: priors.VampPrior(w.vae.encoder, w.x.numpy()),
        TypeError, "pseudo_data", "must be a tensor, such as x[:20]...got a ndarray",
    ),
    "infinite pseudo-data": Row(
        lambda w: priors.VampPrior(w.vae.encoder, w.x * math.inf),
        ValueError, "pseudo_data", "must be finite numbers...holds inf at row 0, column (0,)",
    ),
    "pseudo-data for a guide that is not amortized": Row(
        lambda w: priors.VampPrior(guides.PerDatum(families.Normal(1), 3), w.x),
        TypeError, "encoder", "must be an amortized guide...got a PerDatum",
    ),
    "a finished module where a factory is wanted": Row(
        lambda w: guides.DiagonalNormal(2, 1, DeterministicLinear(2, 2)),
        TypeError, "network", "must be a factory...got a Still, a finished module",
    ),
    "a part where a factory is wanted": Row(
        lambda w: guides.DiagonalNormal(2, 1, w.vae.prior),
        TypeError, "network", "must be a factory...got a StandardNormal, a finished module",
    ),
    "sizes where a factory is wanted": Row(
        lambda w: likelihoods.Normal(1, 2, [32]),
        TypeError, "network", "must be a factory...called with (1, 2), it says:",
    ),
    "a factory that makes a class": Row(
        lambda w: likelihoods.Normal(1, 2, lambda i, o: nn.Linear),
        TypeError, "network", "must be a factory...called with (1, 2), it returned <class",
    ),
    "a factory that makes a part": Row(
        lambda w: guides.DiagonalNormal(2, 1, lambda i, o: w.vae.encoder)(w.x),
        TypeError, "network", "must be a tensor, (*, 2)...gives a Independent",
    ),
    "a network that gives another number of outputs": Row(
        lambda w: guides.DiagonalNormal(2, 1, lambda i, o: DeterministicLinear(i, o + 1))(w.x),
        ValueError, "network", "must be 2...gives 3 outputs",
    ),
    "a network that mixes data": Row(
        lambda w: guides.DiagonalNormal(2, 1, lambda i, o: nn.Sequential(nn.Flatten(0), DeterministicLinear(12, o)))(w.x),
        ValueError, "network", "must be a network that leaves...of a context of shape (6, 2) it makes one of (2,)",
    ),
    "a rank above the size": Row(
        lambda w: guides.LowRankNormal(2, 2, DeterministicLinear, rank=3), ValueError, "rank", "must be 1 to 2...got 3"
    ),
    "a latent of two dimensions with all correlations": Row(
        lambda w: guides.FullRankNormal(2, (2, 3), DeterministicLinear), ValueError, "event_shape", "must be (D,)...got (2, 3)"
    ),
    "the class of a family": Row(
        lambda w: guides.PerDatum(families.Normal, 3),
        TypeError, "family", "must be a family, such as families.Normal(2)...got the class Normal",
    ),
    "raw outputs of NaN": Row(
        lambda w: guides.PerDatum(families.Normal(1), torch.full((3, 2), math.nan)),
        ValueError, "raw", "must be floats (N, 2)...holds nan",
    ),
    "raw outputs of no data": Row(
        lambda w: guides.PerDatum(families.Normal(1), torch.zeros(0, 2)),
        ValueError, "raw", "must be floats (N, 2)...got shape (0, 2)",
    ),
    "integers as raw outputs": Row(
        lambda w: guides.PerDatum(families.Normal(1), torch.zeros(3, 2, dtype=torch.long)),
        TypeError, "raw", "must be floats (N, 2)...got a torch.int64 tensor of shape (3, 2)",
    ),
    "refining on no data": Row(
        lambda w: guides.PerDatum.refining(w.vae.encoder, w.x[:0]),
        ValueError, "x", "must be (N, ...) with N >= 1...got shape (0, 2), without rows",
    ),
    "rows that a guide was not made for": Row(
        lambda w: guides.PerDatum(families.Normal(1), 3)(w.x),
        ValueError, "PerDatum", "must be the 3 data that it was made for...got 6 rows",
    ),
    "data on another device than the network": Row(
        lambda w: w.vae.encode(w.meta), ValueError, "DiagonalNormal", "must be cpu...got a context on meta"
    ),
    "infinite data for an encoder": Row(
        lambda w: w.vae.encode(w.x * math.inf),
        ValueError, "DiagonalNormal", "must be finite numbers...got a context with inf",
    ),
    "missing data for an encoder that cannot read them": Row(
        lambda w: w.vae.encode(w.nan),
        ValueError, "DiagonalNormal", "must be a network that...got a context with NaN,",
    ),
    "images that were flattened": Row(
        lambda w: guides.DiagonalNormal((1, 2, 3), 1, DeterministicLinear)(torch.zeros(5, 6)),
        ValueError, "DiagonalNormal", "must be (*, 1, 2, 3)...got a context of shape (5, 6)",
    ),
    "too many raw outputs, some of which would not be read": Row(
        lambda w: families.StudentT(2)(torch.zeros(3, 9)),
        ValueError, "raw", "must be (*, 4)...got a torch.float32 tensor of shape (3, 9)",
    ),
    "too few raw outputs": Row(
        lambda w: families.Bernoulli(3)(torch.zeros(5, 2)), ValueError, "raw", "must be (*, 3)...of shape (5, 2)"
    ),
    "raw outputs that make no covariance": Row(
        lambda w: LowRankNormal(2, 1)(torch.full((6,), math.nan)),
        ValueError, "raw", "has values that are no finite numbers",
    ),
    "free outputs of another size": Row(
        lambda w: base.Unconditional(families.Normal(2), torch.zeros(3)),
        ValueError, "raw", "must be floats (*, 4)...got shape (3,)",
    ),
    "a factory where a network is wanted": Row(
        lambda w: base.Conditional(families.Normal(2), 2, DeterministicLinear.__call__),
        TypeError, "network", "must be a module...got a function",
    ),
    "a scale that is none": Row(
        lambda w: likelihoods.Normal(1, 2, DeterministicLinear, scale="all"),
        ValueError, "scale", "must be 'network', 'shared', 'per_dimension' or a number...got 'all'",
    ),
    "a negative floor": Row(
        lambda w: likelihoods.Normal(1, 2, DeterministicLinear, min_scale=-1.0),
        ValueError, "min_scale", "must be a finite number, 0 or more...got -1.0",
    ),
    "a weight of zero": Row(
        lambda w: likelihoods.Normal.mse(1, 2, DeterministicLinear, kl_weight=0), ValueError, "kl_weight", f"got 0; {REAL}"
    ),
    "half a class": Row(
        lambda w: likelihoods.Categorical(1, 2, 2.5, DeterministicLinear), ValueError, "num_classes", f"got 2.5; {INT}"
    ),
    "a distribution whose entries cannot go missing": Row(
        lambda w: missing.with_missing(dist.MultivariateNormal(torch.zeros(2), torch.eye(2))),
        ValueError, "base_dist", "must be a distribution of single...got a MultivariateNormal of event shape (2,)",
    ),
    "no distribution at all": Row(
        lambda w: missing.with_missing(w.vae.decoder),
        TypeError, "distribution", "must be a distribution...got a Normal",
    ),
    "logits of no classes": Row(
        lambda w: LogRelaxedOneHotCategorical(0.5, torch.tensor(1.0)),
        ValueError, "logits", "must be a tensor (*, k)...got tensor(1.)",
    ),
    "components that do not match their weights": Row(
        lambda w: MixtureOfNormals(torch.zeros(3), torch.zeros(2, 2), torch.ones(2, 2)),
        ValueError, "logits, loc", "must be (*batch, K)...got shapes (3,) and (2, 2)",
    ),
}  # fmt: skip

NETWORKS = {
    "hidden layers of size zero": Row(lambda w: networks.mlp([0]), ValueError, "hidden", "must be a list...got [0]"),
    "a finished activation": Row(
        lambda w: networks.mlp([3], activation=nn.ReLU()),
        TypeError, "activation", "must be what makes a module, such as nn.Tanh...got a ReLU",
    ),
    "the name of an activation": Row(
        lambda w: networks.convolutional((1, 2, 2), activation="relu"),
        TypeError, "activation", "got a str; accepted is",
    ),
    "a word for a bias": Row(
        lambda w: networks.linear(bias="no"), TypeError, "bias", "must be True and False...got 'no'"
    ),
    "a location of NaN": Row(
        lambda w: networks.standardized(DeterministicLinear, loc=math.nan), ValueError, "loc", "must be a finite number...got nan"
    ),
    "a scale of zero": Row(
        lambda w: networks.standardized(DeterministicLinear, scale=0.0), ValueError, "scale", "must be positive numbers...got 0.0"
    ),
    "locations of another number of features": Row(
        lambda w: networks.standardized(DeterministicLinear, loc=torch.zeros(3))(2, 1),
        ValueError, "loc", "must be 2...got 3 numbers",
    ),
    "an image of two sizes": Row(
        lambda w: networks.convolutional((8, 8))(64, 1),
        ValueError, "image", "must be (channels, height...got (8, 8)",
    ),
    "one number for an image": Row(
        lambda w: networks.deconvolutional(64)(1, 64),
        ValueError, "image", "must be (channels, height, width)...got 64",
    ),
    "an image of negative sizes": Row(
        lambda w: networks.convolutional((1, -8, -8))(64, 1),
        ValueError, "image", "must be (channels...got (1, -8, -8)",
    ),
    "one number of channels": Row(
        lambda w: networks.convolutional((1, 8, 8), 16)(64, 1),
        ValueError, "channels", "must be one or more...got 16",
    ),
    "one class to read": Row(
        lambda w: networks.one_hot(1, DeterministicLinear), ValueError, "num_classes", "must be an integer of 2 or more...got 1"
    ),
    "a baseline of no features": Row(
        lambda w: baselines.NeuralBaseline(0, DeterministicLinear), ValueError, "in_features", f"{INT}...got 0"
    ),
    "a baseline that forgets nothing": Row(
        lambda w: baselines.RunningAverage(decay=1.0),
        ValueError, "decay", "must be a number from 0 to below 1...got 1.0",
    ),
}  # fmt: skip

DATA = {
    "a list of lists": Row(
        lambda w: exact.log_evidence(w.vae.model, [[0.0, 1.0]]), TypeError, "data", f"got a list; {TENSOR}"
    ),
    "an array": Row(
        lambda w: pv.log_evidence(w.vae.model, w.vae.guide, w.x.numpy()), TypeError, "data", f"got a ndarray; {TENSOR}"
    ),
    "a word": Row(lambda w: exact.posterior(w.vae.model, "x"), TypeError, "data", f"got a str; {TENSOR}"),
    "nothing": Row(lambda w: pv.log_evidence(w.vae.model, w.vae.guide), ValueError, "data", f"got no tensor; {TENSOR}"),
    "None": Row(lambda w: pv.decompose(w.vae.model, w.vae.guide, None), TypeError, "data", f"got a NoneType; {TENSOR}"),
    "a data set in place of its x": Row(
        lambda w: pv.inspect(w.vae.model, w.vae.guide, datasets.Dataset(w.x, w.labels)),
        TypeError, "data", f"got a Dataset; {TENSOR} `torch.as_tensor(array)` or `dataset.x`",
    ),
    "no rows": Row(
        lambda w: exact.elbo(w.vae.model, w.vae.guide, w.x[:0]),
        ValueError, "data", "got shape (0, 2), without rows; accepted",
    ),
    "no columns": Row(
        lambda w: exact.kl(w.vae.model, w.vae.guide, w.x[:, :0]),
        ValueError, "x", "must be (N, 2)...got shape (6, 0)",
    ),
    "one number": Row(
        lambda w: exact.log_evidence(w.vae.model, torch.tensor(1.0)),
        ValueError, "data", "got shape (), without rows; accepted",
    ),
    "one dimension": Row(
        lambda w: pv.calibrate(w.vae.model, w.vae.guide, w.x[:, 0]),
        ValueError, "x", "must be (N, 2)...got shape (6,)",
    ),
    "a dimension too many": Row(
        lambda w: pv.inference_gap(w.vae.model, w.vae.guide, w.x[None]),
        ValueError, "x", "got shape (1, 6, 2); accepted is",
    ),
    "a column too many": Row(
        lambda w: pv.reference(w.vae.model, torch.zeros(4, 3)), ValueError, "x", "must be (N, 2)...got shape (4, 3)"
    ),
    "double precision for a model of single": Row(
        lambda w: pv.log_evidence(w.vae.model, w.vae.guide, w.x.double()),
        TypeError, "DiagonalNormal", "must be torch.float32, that of its network...got a context of torch.float64",
    ),
    "double precision to calibrate on": Row(
        lambda w: pv.calibrate(w.vae.model, w.vae.guide, w.x.double()),
        TypeError, "DiagonalNormal", "must be torch.float32...got a context of torch.float64",
    ),
    "integers for an encoder": Row(
        lambda w: pv.to_datatree(w.vae.model, w.vae.guide, w.x.long(), draws=2),
        TypeError, "DiagonalNormal", "must be torch.float32...got a context of torch.int64",
    ),
    "integers where the model draws fractions": Row(
        lambda w: pv.calibrate(w.vae.model, w.vae.guide, w.x.long()),
        ValueError, "data",
        "got torch.int64 for 'x', of which the model draws torch.float32 with fractions; accepted are",
    ),
    "complex numbers": Row(
        lambda w: exact.log_evidence(w.vae.model, w.x + 0j),
        TypeError, "data", "must be a tensor...of real numbers...got a torch.complex64 tensor of shape (6, 2)",
    ),
    "sparse tensors": Row(
        lambda w: exact.log_evidence(w.vae.model, w.x.to_sparse()),
        TypeError, "data", "torch.sparse_coo; accepted...dense",
    ),
    "tensors without values": Row(
        lambda w: pv.log_evidence(w.vae.model, w.vae.guide, w.meta),
        ValueError, "data", "got a torch.float32 tensor of shape (6, 2) on meta, which holds no values; accepted",
    ),
    "NaN where nothing may be missing": Row(
        lambda w: pv.calibrate(w.vae.model, w.vae.guide, w.nan),
        ValueError, "data", "must be finite numbers, and NaN for what is missing where...holds nan at row",
    ),
    "infinity": Row(
        lambda w: pv.decompose(w.vae.model, w.vae.guide, -w.x * math.inf),
        ValueError, "data", "must be finite numbers...holds ...inf at row 0, column (0,)",
    ),
    "tensors of different numbers of rows": Row(
        lambda w: pv.log_evidence(w.vae.model, w.vae.guide, w.x, w.x[:3]),
        ValueError, "data", "must be one number...got tensors of 6 and 3 rows",
    ),
    "grey values for a Bernoulli likelihood": Row(
        lambda w: exact.log_evidence(w.binary.model, w.x.sigmoid()),
        ValueError, "data", "hold others, ...Ways out: threshold the data, `datasets.binarize(x)`",
    ),
    "bytes for a Bernoulli likelihood": Row(
        lambda w: exact.log_evidence(w.binary.model, torch.full((3, 2), 255, dtype=torch.uint8)),
        ValueError, "data", "hold others, 255 to 255. Bring them to [0, 1] first, such as `x / 255`",
    ),
    "a single row to tell codes apart by": Row(
        lambda w: pv.decompose(w.vae.model, w.vae.guide, w.x[:1]),
        ValueError, "data", "must be 2 or more...got 1 row",
    ),
    "a list of grey values": Row(
        lambda w: datasets.grey([0.5]), TypeError, "x", "must be bytes (torch.uint8), or grey values...got a list"
    ),
    "grey values above one": Row(
        lambda w: datasets.resample(torch.tensor([0.5, 2.0])),
        ValueError, "x",
        "must be bytes (torch.uint8), or grey values from 0 to 1...got torch.float32 from 0.5 to 2",
    ),
    "NaN as a grey value": Row(
        lambda w: datasets.resample(torch.tensor([0.5, math.nan])),
        ValueError, "x", "must be bytes (torch.uint8), or grey",
    ),
    "bytes that were divided already": Row(
        lambda w: datasets.grey(torch.tensor([0, 1], dtype=torch.uint8)),
        ValueError, "x", "got bytes that are 0 and 1, which are no grey values; they are binary as `x.float()`",
    ),
    "a threshold of NaN": Row(
        lambda w: datasets.binarize(torch.tensor([0.5]), threshold=math.nan),
        ValueError, "threshold", "must be a finite number...got nan",
    ),
    "points of one coordinate": Row(
        lambda w: datasets.two_gaussians(3).log_prob(torch.zeros(4, 1)),
        ValueError, "x", "must be points (*, 2)...of shape (4, 1)",
    ),
    "no points": Row(lambda w: datasets.two_gaussians(0), ValueError, "num_points", f"got 0; {INT}"),
    "a negative scale": Row(lambda w: datasets.two_gaussians(3, scale=-1.0), ValueError, "scale", f"got -1.0; {REAL}"),
    "an unknown split": Row(
        lambda w: datasets.digits("validation"),
        ValueError, "split", "must be 'train', 'test', 'all'...got 'validation'",
    ),
    "a list of splits": Row(
        lambda w: datasets.mnist(["train"]), ValueError, "split", "must be 'train', 'test'...got ['train']"
    ),
}  # fmt: skip

PAIRS = {
    "a VAE as the model": Row(
        lambda w: pv.log_evidence(w.vae, w.vae.guide, w.x),
        TypeError, "model", "must be one of them, `vae.model`...got a VAE, a pair of functions",
    ),
    "a VAE as the guide": Row(
        lambda w: pv.to_datatree(w.vae.model, w.vae, w.x),
        TypeError, "guide", "must be one of them, `vae.guide`...got a VAE, a pair of functions",
    ),
    "None as the model": Row(
        lambda w: exact.posterior(None, w.x), TypeError, "model", "must be a Pyro function, such as...got a NoneType"
    ),
    "a word as the model": Row(
        lambda w: pv.reference("model", w.x), TypeError, "model", "must be a Pyro function...got a str"
    ),
    "None as the guide": Row(
        lambda w: pv.calibrate(w.vae.model, None, w.x),
        TypeError, "guide", "must be a Pyro f...got a NoneType",
    ),
    "the class of an autoguide": Row(
        lambda w: exact.elbo(w.vae.model, pyro.infer.autoguide.AutoNormal, w.x),
        TypeError, "guide", "must be a Pyro function...got the class AutoNormal",
    ),
    "the model in place of the guide": Row(
        lambda w: pv.annealed_log_evidence(w.vae.model, w.vae.model, w.x),
        ValueError, "guide",
        "must be a function with latent sites...observes ['x'], whose densities are none of q(z | x)",
    ),
    "the model in place of the guide, to draw from": Row(
        lambda w: pv.to_datatree(w.vae.model, w.vae.model, w.x),
        ValueError, "guide",
        "must be a function with latent sites...observes ['x'], whose densities are none of q(z | x)",
    ),
    "the guide in place of the model": Row(
        lambda w: exact.log_evidence(w.vae.guide, w.x),
        ValueError, "model", "must have latent and observed sites...got the latents ['z'] and the observed sites []",
    ),
    "the guide of another model": Row(
        lambda w: exact.kl(w.vae.model, w.wide.guide, w.x),
        ValueError, "guide", "must have the event shape of the model at site 'z'...(1,), got (3,)",
    ),
    "the guide of another model, to draw from": Row(
        lambda w: pv.to_datatree(w.vae.model, w.wide.guide, w.x),
        ValueError, "guide",
        "must be a guide of...the model does not run on its draws of ['z'], of the event shapes [(3,)]",
    ),
    "a guide without latents": Row(
        lambda w: pv.log_evidence(w.vae.model, lambda x: None, w.x),
        ValueError, "guide", "must have the latents of the model, ['z'], got []",
    ),
    "a refined guide that is none": Row(
        lambda w: pv.inference_gap(w.vae.model, w.vae.guide, w.x, refined=3),
        TypeError, "refined", "must be a Pyro function...got a int",
    ),
    "a model without a plate": Row(
        lambda w: exact.log_evidence(no_plate, w.x),
        ValueError, "model", "must have every site in one plate, 'data'...got site 'z' in the plates []",
    ),
    "an unknown plate": Row(
        lambda w: pv.log_evidence(w.vae.model, w.vae.guide, w.x, plate="rows"),
        ValueError, "model", "must have every site in one plate, 'rows'...got site 'z' in the plates ['data']",
    ),
    "an unknown plate to calibrate on": Row(
        lambda w: pv.calibrate(w.vae.model, w.vae.guide, w.x, plate="rows"), ValueError, "model", "in one plate, 'rows'"
    ),
    "an unknown plate to name dimensions by": Row(
        lambda w: tree(w, plate="rows"), ValueError, "plate", "must be ['data']...got 'rows'"
    ),
    "too many dimensions for quadrature": Row(
        lambda w: plots.posterior(w.wide.model, w.wide.guide, w.x[:1]),
        ValueError, "model", "at most 2 dimensions for quadrature, got 3 at 'z'",
    ),
    "a discrete latent to anneal": Row(
        lambda w: pv.annealed_log_evidence(w.discrete.model, w.discrete.guide, w.x),
        ValueError, "model", "must have continuous latents, which annealing moves along gradients, got the discrete 'z'",
    ),
    "a discrete latent to walk": Row(
        lambda w: pv.reference(w.discrete.model, w.x),
        ValueError, "model", "must be cont...its latents ['z'] are discrete",
    ),
}  # fmt: skip

NUMBERS = {
    "no draws for log p(x)": Row(
        lambda w: pv.log_evidence(w.vae.model, w.vae.guide, w.x, num_samples=0),
        ValueError, "num_samples", f"got 0; {INT}",
    ),
    "a truth value for a number of draws": Row(
        lambda w: pv.log_evidence(w.vae.model, w.vae.guide, w.x, num_samples=True),
        ValueError, "num_samples", f"got True; {INT}",
    ),
    "one draw for a standard error": Row(
        lambda w: pv.decompose(w.vae.model, w.vae.guide, w.x, num_samples=1),
        ValueError, "num_samples", "must be 2...got 1",
    ),
    "half a chain": Row(
        lambda w: pv.annealed_log_evidence(w.vae.model, w.vae.guide, w.x, num_chains=0.5),
        ValueError, "num_chains", f"got 0.5; {INT}",
    ),
    "no temperatures": Row(
        lambda w: pv.annealed_log_evidence(w.vae.model, w.vae.guide, w.x, num_temperatures=0),
        ValueError, "num_temperatures", f"got 0; {INT}",
    ),
    "a word for a number of steps": Row(
        lambda w: pv.inference_gap(w.vae.model, w.vae.guide, w.x, steps="many"),
        ValueError, "steps", f"got 'many'; {INT}",
    ),
    "an infinite learning rate": Row(
        lambda w: pv.inference_gap(w.vae.model, w.vae.guide, w.x, lr=math.inf), ValueError, "lr", f"got inf; {REAL}"
    ),
    "a tolerance of zero": Row(
        lambda w: exact.log_evidence(w.curved.model, w.x, tolerance=0.0), ValueError, "tolerance", f"got 0.0; {REAL}"
    ),
    "a tolerance of NaN": Row(
        lambda w: exact.elbo(w.vae.model, w.vae.guide, w.x, tolerance=math.nan),
        ValueError, "tolerance", f"got nan; {REAL}",
    ),
    "a word for a tolerance, which would not be used": Row(
        lambda w: pv.inference_gap(w.vae.model, w.vae.guide, w.x, tolerance="1e-4"),
        ValueError, "tolerance", f"got '1e-4'; {REAL}",
    ),
    "too few simulations": Row(
        lambda w: pv.calibrate(w.vae.model, w.vae.guide, w.x, num_simulations=5),
        ValueError, "num_simulations", "must be 10 or more...got 5",
    ),
    "a chance above one": Row(
        lambda w: pv.calibrate(w.vae.model, w.vae.guide, w.x, alpha=2.0),
        ValueError, "alpha", "must be a chance...got 2.0",
    ),
    "a negative number of rows": Row(
        lambda w: pv.inspect(w.vae.model, w.vae.guide, w.x, max_rows=-1), ValueError, "max_rows", f"got -1; {INT}"
    ),
    "no chains": Row(lambda w: pv.reference(w.vae.model, w.x, chains=0), ValueError, "chains", f"got 0; {INT}"),
    "a negative seed": Row(
        lambda w: pv.log_evidence(w.vae.model, w.vae.guide, w.x, seed=-1), ValueError, "seed", f"got -1; {SEED}"
    ),
    "a word for a seed": Row(lambda w: tree(w, seed="a"), ValueError, "seed", f"got 'a'; {SEED}"),
    "half a seed": Row(
        lambda w: pv.decompose(w.vae.model, w.vae.guide, w.x, seed=1.5), ValueError, "seed", f"got 1.5; {SEED}"
    ),
    "a seed that is too large": Row(lambda w: fit(w, seed=2**40), ValueError, "seed", f"got 1099511627776; {SEED}"),
    "no seed for data": Row(lambda w: datasets.two_gaussians(3, seed=None), ValueError, "seed", f"got None; {SEED}"),
    "a word for a progress bar": Row(
        lambda w: pv.log_evidence(w.vae.model, w.vae.guide, w.x, progress="no"),
        TypeError, "progress", "must be True and False...got 'no'",
    ),
    "no combinations of states": Row(
        lambda w: gradients.exact_gradient(w.discrete.model, w.discrete.guide, w.x, num_draws=0),
        ValueError, "num_draws", f"got 0; {INT}",
    ),
    "one repeat": Row(lambda w: compare(w, repeats=1), ValueError, "repeats", "must be 2 or more...got 1"),
    "fewer evaluations than an estimate takes": Row(
        lambda w: compare(w, evaluations=1), ValueError, "evaluations", "got 1; loo takes 2 for each estimate"
    ),
    "a list of estimators": Row(
        lambda w: compare(w, [Trace_ELBO()]),
        TypeError, "estimators", "must be a dict from names to Estimators...got [...]",
    ),
    "an estimator without an ELBO": Row(
        lambda w: gradients.Estimator(w.discrete.model, w.discrete.guide, Trace_ELBO),
        TypeError, "elbo", "must be an instance, such as Trace_ELBO()...got <class",
    ),
    "one particle that leaves itself out": Row(
        lambda w: objectives.LeaveOneOut(1), ValueError, "num_particles", "must be an integer, 2 or more...got 1"
    ),
    "an odd number of antithetic draws": Row(
        lambda w: objectives.DisARM(3), ValueError, "num_particles", "must be an even number...got 3"
    ),
    "an unknown gradient": Row(
        lambda w: objectives.ImportanceWeighted(2, gradient="stl"),
        ValueError, "gradient", "must be one of 'pathwise', 'sticking-the-landing'...got 'stl'",
    ),
    "free bits of NaN": Row(lambda w: objectives.FreeBits(math.nan), ValueError, "nats", f"{REAL}...got nan"),
    "the class of a baseline": Row(
        lambda w: objectives.ScoreFunction(baselines.RunningAverage),
        TypeError, "baseline", "must be a module such as baselines.RunningAverage()...got <class",
    ),
    "a number as the name of a baseline": Row(
        lambda w: objectives.ScoreFunction(baselines.RunningAverage(), name=3),
        TypeError, "name", "must be a string that is not empty...got 3",
    ),
    "a negative weight of the KL": Row(
        lambda w: handlers.WeightKL(-1), ValueError, "weight", "must be a finite number, 0 or more...got -1"
    ),
    "fractions as row numbers": Row(
        lambda w: handlers.SubsampleRows("data", torch.tensor([1.0])),
        TypeError, "rows", "must be row numbers, integers...got a torch.float32 tensor of shape (1,)",
    ),
    "no row numbers": Row(
        lambda w: handlers.SubsampleRows("data", torch.tensor([], dtype=torch.long)),
        ValueError, "rows", "must be one...got none",
    ),
    "weights of one dimension": Row(
        lambda w: pareto_shape(torch.zeros(100)), ValueError, "log_weights", "must be (S, N)...got shape (100,)"
    ),
    "weights that are integers": Row(
        lambda w: pareto_shape(torch.zeros(100, 2).long()),
        TypeError, "log_weights", "must be floats...got a torch.int64",
    ),
    "a schedule that begins below zero": Row(
        lambda w: schedules.exponential(-1.0, 0.1), ValueError, "start", f"got -1.0; {REAL}"
    ),
    "a schedule of no steps": Row(lambda w: schedules.linear(0.0, 1.0, 0), ValueError, "steps", f"got 0; {INT}"),
    "a schedule that never rises": Row(
        lambda w: schedules.cyclical(0.0, 1.0, 10, rise=0.0), ValueError, "rise", "got 0.0; accepted is"
    ),
    "a schedule that grows at its end": Row(
        lambda w: schedules.decayed(1.0, 10, end=2.0), ValueError, "hold, end", "must be shares...got 0.5 and 2.0"
    ),
    "a constant that is no number": Row(
        lambda w: schedules.constant("0.1"), ValueError, "value", "must be a finite number...got '0.1'"
    ),
}  # fmt: skip

TRAINING = {
    "a list of data": Row(lambda w: fit(w, data=[1.0]), TypeError, "data", f"got a float; {TENSOR}"),
    "data without values": Row(
        lambda w: fit(w, data=w.meta), ValueError, "data", "must be a tensor...on meta, which holds no values"
    ),
    "data on two devices": Row(
        lambda w: pv.evaluate(w.vae.model, w.vae.guide, (w.x, w.meta)),
        ValueError, "data", "on meta, which holds no values",
    ),
    "complex data": Row(lambda w: fit(w, data=w.x + 0j), TypeError, "data", "got a torch.complex64...of real numbers"),
    "data of another shape": Row(
        lambda w: fit(w, data=torch.zeros(4, 3)), ValueError, "x", "must be (N, 2)...got shape (4, 3)"
    ),
    "data with NaN": Row(lambda w: fit(w, data=w.nan), ValueError, "data", "must be finite...holds nan at row"),
    "validation data of another precision": Row(
        lambda w: fit(w, validation=w.x.double()),
        ValueError, "validation", "must be rows like those of...torch.float64",
    ),
    "validation data of another shape": Row(
        lambda w: fit(w, validation=w.x[:, :1]),
        ValueError, "validation", "must be rows like...got rows of shape (1,)",
    ),
    "no epochs": Row(lambda w: fit(w, epochs=0), ValueError, "epochs", f"got 0; {INT}"),
    "half an epoch": Row(lambda w: fit(w, epochs=0.5), ValueError, "epochs", f"got 0.5; {INT}"),
    "batches of no rows": Row(lambda w: fit(w, batch_size=0), ValueError, "batch_size", f"got 0; {INT}"),
    "a learning rate of NaN": Row(lambda w: fit(w, lr=math.nan), ValueError, "lr", f"got nan; {REAL}"),
    "a word for a learning rate": Row(lambda w: fit(w, lr="1e-3"), ValueError, "lr", f"got '1e-3'; {REAL}"),
    "the class of an ELBO": Row(
        lambda w: fit(w, elbo=TraceEnum_ELBO), TypeError, "elbo", "must be an instance...got <class"
    ),
    "a list of schedules": Row(
        lambda w: fit(w, schedules=[lambda step: 1.0]),
        TypeError, "schedules", "must be a dict from tensors...got a list",
    ),
    "a name as the key of a schedule": Row(
        lambda w: fit(w, schedules={"temperature": lambda step: 1.0}),
        ValueError, "schedules", "must be a 0-dim tensor...got 'temperature' as a key",
    ),
    "a vector as the key of a schedule": Row(
        lambda w: fit(w, schedules={torch.zeros(2): lambda step: 1.0}),
        ValueError, "schedules", "must be a 0-dim tensor...got '(2,), torch.float32' as a key",
    ),
    "a number as a schedule": Row(
        lambda w: fit(w, schedules={torch.zeros(()): 1.0}),
        TypeError, "schedules", "must be a function of the step...got 1.0",
    ),
    "a number as a transform": Row(
        lambda w: fit(w, transform=2),
        TypeError, "transform", "must be a function that makes a tensor of each...got 2",
    ),
    "a transform that loses rows": Row(
        lambda w: fit(w, transform=lambda x: x[:1]),
        ValueError, "transform", "must be one...it makes tensors of [1] rows",
    ),
    "no model": Row(
        lambda w: pv.fit(None, w.vae.guide, w.x, epochs=1), TypeError, "model", "must be a Pyro f...got a NoneType"
    ),
    "no guide": Row(
        lambda w: pv.fit(w.vae.model, None, w.x, epochs=1), TypeError, "guide", "must be a Pyro f...got a NoneType"
    ),
    "a VAE in the place of its model": Row(
        lambda w: pv.fit(w.vae, w.vae.guide, w.x, epochs=1), TypeError, "model", "must be one of them, `vae.model`"
    ),
    "a number as a model to evaluate": Row(
        lambda w: pv.evaluate(3, w.vae.guide, w.x), TypeError, "model", "must be a Pyro function...got a int"
    ),
    "an empty list of schedules": Row(
        lambda w: fit(w, schedules=[]), TypeError, "schedules", "must be a dict from tensors...got a list"
    ),
    "a word for progress": Row(lambda w: fit(w, progress="no"), TypeError, "progress", "got 'no'; accepted"),
    "a word for compile": Row(lambda w: fit(w, compile="yes"), TypeError, "compile", "must be True...got 'yes'"),
    "a number for compile": Row(
        lambda w: pv.log_evidence(w.vae.model, w.vae.guide, w.x, compile=1), TypeError, "compile", "got 1; accepted are"
    ),
    "gradients clipped to nothing": Row(lambda w: fit(w, clip_norm=0.0), ValueError, "clip_norm", f"got 0.0; {REAL}"),
    "patience without validation": Row(
        lambda w: fit(w, patience=3), ValueError, "patience", "must be `validation=`...no validation data"
    ),
    "no patience": Row(lambda w: fit(w, patience=0, validation=w.x), ValueError, "patience", f"got 0; {INT}"),
    "another way with what is not finite": Row(
        lambda w: fit(w, nonfinite="ignore"), ValueError, "nonfinite", "must be 'stop' and 'skip'...got 'ignore'"
    ),
    "a number as a callback": Row(
        lambda w: fit(w, callbacks=[3]), TypeError, "callbacks", "must be a sequence of functions...got [3]"
    ),
    "a file in the place of a folder of checkpoints": Row(
        lambda w: fit(w, checkpoints=__file__), ValueError, "folder", "must be a folder...is a file"
    ),
    "checkpoints at half steps": Row(
        lambda w: pv.Checkpoints("run", every_steps=0.5), ValueError, "every_steps", f"got 0.5; {INT}"
    ),
    "a scheduler in the place of an optimizer": Row(
        lambda w: pv.SVI(w.vae.model, w.vae.guide, "Adam", Trace_ELBO()),
        TypeError, "optim", "must be one of pyro.optim...got 'Adam'",
    ),
    "the guide of another model": Row(
        lambda w: pv.fit(w.vae.model, w.wide.guide, w.x, epochs=1),
        ValueError, "guide", "must be (6, 1), that of the model...its latent 'z' has shape (6, 3)",
    ),
    "the guide of another model, in batches": Row(
        lambda w: pv.fit(w.vae.model, w.wide.guide, w.x, epochs=1, batch_size=2),
        ValueError, "guide", "must be (6, 1), that of the model...its latent 'z' has shape (6, 3)",
    ),
    "the guide of another model to evaluate": Row(
        lambda w: pv.evaluate(w.vae.model, w.wide.guide, w.x),
        ValueError, "guide", "must be (6, 1), that of the model...its latent 'z' has shape (6, 3)",
    ),
    "another plate": Row(
        lambda w: fit(w, plate="rows"), ValueError, "plate", "must be the data plate...in ['data']...got 'rows'"
    ),
    "another plate to evaluate": Row(
        lambda w: pv.evaluate(w.vae.model, w.vae.guide, w.x, plate="rows"),
        ValueError, "plate", "must be the data plate...in ['data']...got 'rows'",
    ),
    "data of another precision": Row(
        lambda w: fit(w, data=w.x.double()),
        TypeError, "DiagonalNormal", "must be torch.float32, that of its network...got a context of torch.float64",
    ),
    "training on enumeration of what is not discrete": Row(
        lambda w: fit(w, elbo=TraceEnum_ELBO()), ValueError, "elbo", "found nothing to enumerate"
    ),
    "enumeration of what is not discrete": Row(
        lambda w: pv.evaluate(w.vae.model, w.vae.guide, w.x, elbo=TraceEnum_ELBO()),
        ValueError, "elbo", "found nothing to enumerate",
    ),
    "no draws to evaluate": Row(
        lambda w: pv.evaluate(w.vae.model, w.vae.guide, w.x, num_samples=0), ValueError, "num_samples", f"got 0; {INT}"
    ),
}  # fmt: skip

EXPORTS = {
    "no draws": Row(
        lambda w: pv.to_datatree(w.vae.model, w.vae.guide, w.x, draws=0), ValueError, "draws", f"got 0; {INT}"
    ),
    "more draws than the memory holds": Row(
        lambda w: pv.to_datatree(w.vae.model, w.vae.guide, w.x, draws=10**9),
        ValueError, "draws",
        "1000000000 draws of z, x from posterior and prior, ...; at most 4294967296 are kept in memory",
    ),
    "a word for a truth value": Row(
        lambda w: tree(w, parallel="no"), TypeError, "parallel", "must be True and False...got 'no'"
    ),
    "dimensions of an unknown site": Row(
        lambda w: tree(w, dims={"y": ["a"]}), ValueError, "dims", "names the sites ['y']; the model has ['x', 'z']"
    ),
    "a list of dimensions": Row(
        lambda w: tree(w, dims=["row"]), TypeError, "dims", "must be a mapping, such as {'x'...got a list"
    ),
    "numbers as names of dimensions": Row(
        lambda w: tree(w, dims={"x": [3]}),
        TypeError, "dims", "must be names, one for each dimension...got [3] for x",
    ),
    "a list of coordinates": Row(
        lambda w: tree(w, coords=[1]), TypeError, "coords", "must be a mapping, such as {'obs'...got a list"
    ),
    "coordinates of another size": Row(
        lambda w: tree(w, coords={"obs": [1, 2]}),
        ValueError, "coords", "must be {...'obs': 6...'obs' has 2 entries",
    ),
    "a number as the history": Row(
        lambda w: tree(w, history=3), TypeError, "history", "must be what `fit` returned, or its `history`...got 3"
    ),
    "constant data without names": Row(
        lambda w: tree(w, constant_data=[1]), TypeError, "constant_data", "must be a mapping...got a list"
    ),
    "constant data of rows of different lengths": Row(
        lambda w: tree(w, constant_data={"c": [[1], [1, 2]]}),
        ValueError, "constant_data", "must be rows of one length...'c' makes no array:",
    ),
    "a dictionary for ArviZ": Row(
        lambda w: pv.to_arviz({}), TypeError, "tree", "must be what pv.to_datatree returns...got a dict"
    ),
    "draws into a folder that is not there": Row(
        lambda w: save(w, w.folder / "gone" / "draws.nc"),
        FileNotFoundError, "path", "must be a path in one there is...there is no folder '...gone' for 'draws.nc'",
    ),
    "draws into a file of another format": Row(
        lambda w: save(w, w.folder / "draws.zarr"), ValueError, "path", "must be a netCDF file...got '...draws.zarr'"
    ),
    "draws over a folder": Row(
        lambda w: save(w, w.folder), ValueError, "path", "must be a file in one, such as 'draws.nc'...is a folder"
    ),
    "draws to nowhere": Row(
        lambda w: save(w, None), TypeError, "path", "must be a path, a string or a `pathlib.Path`...got None"
    ),
    "no draws at a time": Row(lambda w: save(w, w.folder / "d.nc", chunk=0), ValueError, "chunk", f"got 0; {INT}"),
    "a page in a folder that is not there": Row(
        lambda w: page(w, "gone/page.html"),
        FileNotFoundError, "path", "there is no folder '...gone' for 'page.html'; accepted",
    ),
    "a page in the place of a folder": Row(
        lambda w: page(w, "."), IsADirectoryError, "path", "must be that of a file in it...got '...', a folder"
    ),
    "a page nowhere": Row(lambda w: page(w, None), TypeError, "path", "must be a path, a string or...got None"),
    "labels of other data": Row(
        lambda w: page(w, labels=torch.zeros(3)),
        ValueError, "labels", "must be whole numbers, (6,)...got shape (3,)",
    ),
    "labels with fractions": Row(
        lambda w: page(w, labels=w.x[:, 0]), ValueError, "labels", "must be whole numbers, (6,)...got"
    ),
    "complex labels": Row(
        lambda w: page(w, labels=torch.zeros(6) + 0j),
        TypeError, "labels", "must be whole...got a torch.complex64",
    ),
    "images of another size": Row(
        lambda w: page(w, image_shape=(3, 3)),
        ValueError, "image_shape", "must be height and width of the...got (3, 3)",
    ),
    "a history of nothing that is known": Row(
        lambda w: page(w, history={"loss": [1.0]}),
        ValueError, "history", "must be `fitted.history`, ...of them one or more of ['elbo'...has ['loss']",
    ),
    "a list of pictures": Row(
        lambda w: page(w, pictures=[3]), TypeError, "pictures", "must be a mapping, such as...got a list"
    ),
    "a number as the title": Row(lambda w: page(w, title=3), TypeError, "title", "must be a string...got 3"),
    "a folder that is none": Row(
        lambda w: datasets.mnist(folder=w.folder / "gone"), FileNotFoundError, "folder", "'...gone' is no folder"
    ),
    "a folder without the files": Row(
        lambda w: datasets.mnist(folder=w.folder),
        FileNotFoundError, "folder", "holds neither train-images-idx3-ubyte.gz nor",
    ),
    "a number as a folder": Row(lambda w: datasets.mnist(folder=3), TypeError, "folder", "must be a path...got 3"),
    "one mirror in place of a list": Row(
        lambda w: datasets.mnist(mirrors="https://localhost"),
        ValueError, "mirrors", "must be a sequence of URLs...got 'https://localhost'",
    ),
    "a file that is not there": Row(
        lambda w: idx.read(w.folder / "gone"),
        FileNotFoundError, "path", "must be that of an...there is no file '...gone'",
    ),
    "a file that is cut off": Row(
        lambda w: idx.read(w.torn), ValueError, "torn", "holds 8 bytes; its header tells of 16, shape [2, 0, 0]"
    ),
    "a file of another kind": Row(
        lambda w: idx.read(w.foreign), ValueError, "foreign.gz", "is truncated or corrupted, and not used"
    ),
    "a comparison of no models": Row(
        lambda w: pv.compare_evidence({}), ValueError, "evidence", "must have one or more models, got none"
    ),
    "a list of evidence": Row(
        lambda w: pv.compare_evidence([w.x[:, 0]]),
        TypeError, "evidence", "must be a mapping from names...got a list",
    ),
    "evidence of different data": Row(
        lambda w: pv.compare_evidence({"a": w.x[:, 0], "b": w.x[:3, 0]}),
        ValueError, "evidence", "must have the same data...got {'a': 6, 'b': 3} data",
    ),
    "truth values as evidence": Row(
        lambda w: pv.compare_evidence({"a": w.x[:, 0] > 0}),
        TypeError, "evidence", "['a']` must be floats (N,)...got a torch.bool tensor of shape (6,)",
    ),
}  # fmt: skip

PLOTS = {
    "a figure in place of axes": Row(
        lambda w: plots.training_curves(w.history, ax=3), TypeError, "ax", "must be matplotlib's axes...got a int"
    ),
    "what fit returned in place of its history": Row(
        lambda w: plots.training_curves(SimpleNamespace()),
        TypeError, "history", "must be `fitted....got a SimpleNamespace",
    ),
    "a history without epochs": Row(
        lambda w: plots.training_curves({"elbo": []}),
        ValueError, "history", "must be `fitted.history`...got [] for 'elbo'",
    ),
    "unknown terms": Row(
        lambda w: plots.training_curves(w.history, terms=["loss"]),
        ValueError, "terms", "must be one or...got ['loss']",
    ),
    "a rate of NaN": Row(
        lambda w: plots.rate_distortion({"a": (math.nan, 1.0)}),
        ValueError, "models", "must be a finite number...got nan",
    ),
    "a tensor in place of evidence": Row(
        lambda w: plots.khat(w.x), TypeError, "evidence", "must be what pv.log_evidence returns...got a Tensor"
    ),
    "a dictionary in place of a table": Row(
        lambda w: plots.evidence_comparison({}),
        TypeError, "table", "must be what pv.compare_evidence returns...got a dict",
    ),
    "a dictionary in place of a comparison": Row(
        lambda w: plots.bias_variance({}),
        TypeError, "comparison", "must be what gradients.compare returns...got a dict",
    ),
    "a VAE in place of a calibration": Row(
        lambda w: plots.calibration(w.vae), TypeError, "result", "must be what pv.calibrate returns...got a VAE"
    ),
    "an array of codes": Row(
        lambda w: plots.latent_map(np.zeros((6, 2)), w.labels),
        TypeError, "z", "must be (N, 1) or (N, 2)...got a ndarray",
    ),
    "codes of three dimensions": Row(
        lambda w: plots.latent_map(torch.zeros(6, 3), w.labels),
        ValueError, "z", "must be (N, 1) or...got shape (6, 3)",
    ),
    "labels of other codes": Row(
        lambda w: plots.latent_map(w.x, w.labels[:3]),
        ValueError, "labels", "must be whole numbers, (6,)...got shape (3,)",
    ),
    "several data where one is drawn": Row(
        lambda w: plots.posterior(w.vae.model, w.vae.guide, w.x),
        ValueError, "datum", "must be one, `x[:1]`...got 6 rows",
    ),
    "bytes as images, which would be black": Row(
        lambda w: plots.image_grid(w.dark, 2),
        ValueError, "images", "must be values in [0, 1]...got torch.uint8 up to 200",
    ),
    "flat images": Row(
        lambda w: plots.image_grid(w.x, 2),
        ValueError, "images", "must be a tensor (N, height, width)...got shape (6, 2)",
    ),
    "no columns of images": Row(
        lambda w: plots.image_grid(torch.zeros(4, 8, 8), 0), ValueError, "columns", f"got 0; {INT}"
    ),
    "a VAE in place of its decoder": Row(
        lambda w: plots.manifold(w.vae, (8, 8)), TypeError, "decode", "must be a function, such as...got a VAE"
    ),
    "one number for height and width": Row(
        lambda w: plots.manifold(grey_image, 8), ValueError, "shape", "must be height and width of an image...got 8"
    ),
    "images of another size than the decoder's": Row(
        lambda w: plots.manifold(grey_image, (7, 7), size=2),
        ValueError, "decode", "must be images (4, 49), of 7 by 7 pixels...got shape (4, 64)",
    ),
    "a coordinate that is not there": Row(
        lambda w: plots.traversals(grey_image, torch.zeros(2), (8, 8), coordinates=[5]),
        ValueError, "coordinates", "must be one or more integers from 0 to 1...got [5]",
    ),
    "one coordinate in place of a list": Row(
        lambda w: plots.traversals(grey_image, torch.zeros(2), (8, 8), coordinates=1),
        TypeError, "coordinates", "must be integers from 0 to 1...got a int",
    ),
    "fewer images than asked for": Row(
        lambda w: plots.samples(lambda count: torch.zeros(3, 64), (8, 8)),
        ValueError, "generate", "must be images (50, 64)...got shape (3, 64)",
    ),
    "a VAE as a model to draw": Row(
        lambda w: plots.plate_diagram(w.vae, w.x),
        TypeError, "model", "must be one of...got a VAE, a pair of functions",
    ),
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
    "plots": PLOTS,
}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def state(w, random_states):
    """All that a refused call must leave as it was."""
    models = [one for one in vars(w).values() if isinstance(one, nn.Module)]
    return (
        random_states(),
        sorted(pyro.get_param_store().keys()),
        [(name, tensor.tolist()) for model in models for name, tensor in model.state_dict().items()],
        [module.training for model in models for module in model.modules()],
        sorted(path.name for path in w.folder.iterdir()),
    )


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_wrong_call_is_refused_before_any_work_naming_the_argument_and_what_is_accepted(row, tmp_path, random_states):
    w = make_inputs(tmp_path)
    before = state(w, random_states)
    with pytest.raises(row.error) as caught:
        row.call(w)
    assert caught.type is row.error
    message, place = str(caught.value), 0
    for piece in (row.argument, *row.says.split("...")):
        assert piece in message[place:], f"{piece!r} is not in {message!r}"
        place = message.index(piece, place) + len(piece)
    ours = [
        one
        for one in chain(caught.value)
        if PACKAGE in Path(traceback.extract_tb(one.__traceback__)[-1].filename).parents
    ]
    assert any(row.argument in str(one) for one in ours), "the error is not one of the package's own"
    assert state(w, random_states) == before


def test_the_table_is_as_long_as_it_is_said_to_be():
    assert len(ROWS) >= 200
    assert len({row.call for row in ROWS.values()}) == len(ROWS)


def test_a_folder_in_which_nothing_can_be_written_is_refused_before_any_draw(tmp_path, monkeypatch):
    w = make_inputs(tmp_path)

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for call in (lambda: save(w, tmp_path / "draws.nc"), lambda: page(w)):
        with pytest.raises(PermissionError, match=r"must be a path in a folder...path: nothing can be written in .*"):
            call()


@pytest.mark.parametrize("value", [torch.tensor([True, False]), torch.tensor([1 + 0j, 0j])])
def test_a_bernoulli_refuses_what_is_no_real_number(value):
    with pytest.raises(TypeError, match=r"must be 0s and 1s...value: got torch\..*"):
        Bernoulli(logits=torch.zeros(2)).log_prob(value)
