r"""Decomposition of the ELBO into distortion, mutual information and marginal KL, and detection of posterior collapse.

.. math:: \mathrm{ELBO} = -\mathrm{distortion} - \mathrm{rate}, \qquad
          \underbrace{\frac1N \sum_n \mathrm{KL}(q(z \mid x_n) \Vert p(z))}_{\text{rate}}
          = \underbrace{\frac1N \sum_n \mathrm{KL}(q(z \mid x_n) \Vert q(z))}_{\text{mutual information}}
          + \underbrace{\mathrm{KL}(q(z) \Vert p(z))}_{\text{marginal KL}},

with the aggregate posterior :math:`q(z) = \frac1N \sum_n q(z \mid x_n)`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae._utils.display import Result, Table, count_of
from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.progress import progress_bar
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import log_density
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.diagnostics.aggregate_posterior import AggregatePosterior, LogDensities
from pyro_vae.distributions.properties import conditional_mean
from pyro_vae.exact.guide_density import GuideDensity, Sites
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.model_guide import ModelGuide
from pyro_vae.objectives.elbo_terms import rate_by_variable

__all__ = ["COLLAPSE_NATS", "MAX_SUMMED", "Decomposition", "Estimate", "Units", "decompose", "units_table"]

MAX_SUMMED = 2**12
"""Discrete latents of up to this many joint states are summed over; larger ones are sampled."""
COLLAPSE_NATS = 0.01
"""A variable with this information or less, in nats, is collapsed; a unit with this activity or less is inactive."""


class Estimate(NamedTuple):
    """A number and its standard error, both in nats per datum."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.standard_error:.3f}"

    def __repr__(self) -> str:
        return f"Estimate({self})"


@dataclass(frozen=True, repr=False)
class Units(Result):
    r"""Activity, rate and information of each variable of a latent site, in the shape of the variables.

    Attributes:
        activity: :math:`\mathrm{Var}_x(\mathbb{E}_q[z_d])`; summed over the classes of a one-hot variable. The activity
            of a relaxed variable is that of its discrete twin.
        rate: the mean of :math:`\mathrm{KL}(q(z_d \mid x) \Vert p(z_d))`, nats per datum. ``None`` unless guide and
            prior are both products over the variables.
        information: the mutual information of :math:`z_d` and the index of the datum, nats per datum, at most the rate.
            ``None`` unless the guide is a product over the variables, given x.
    """

    activity: Tensor
    rate: Tensor | None
    information: Tensor | None

    @property
    def active(self) -> Tensor:
        """Which variables are active units: those with an activity above 0.01."""
        return self.activity > COLLAPSE_NATS

    @property
    def collapsed(self) -> Tensor:
        """Which variables are collapsed: information of at most 0.01 nats or, if that is unknown, inactive units."""
        return ~self.active if self.information is None else self.information <= COLLAPSE_NATS

    def _line(self) -> str:
        sums = {"rate": self.rate, "information": self.information}
        shown = [f"{name} {values.sum():.3f}" for name, values in sums.items() if values is not None]
        nats = f", {' and '.join(shown)} nats per datum in all" if shown else ""
        return f"{int(self.active.sum())} of {self.active.numel()} active, {int(self.collapsed.sum())} collapsed{nats}"

    def _table(self) -> Table:
        return units_table({"": self})


@dataclass(frozen=True, repr=False)
class Decomposition(Result):
    r"""The result of :func:`decompose`: nats per datum for the N given data, each with the standard error of its draws.

    ``elbo`` is ``-distortion - rate`` and ``rate`` is ``mutual_information + marginal_kl``, since the draws are shared.

    Attributes:
        elbo: the bound on log p(x).
        distortion: :math:`-\mathbb{E}_q[\log p(x \mid z)]`.
        rate: the mean of :math:`\mathrm{KL}(q(z \mid x_n) \Vert p(z))`.
        mutual_information: mutual information of z and the index n of a datum, at most log N. Its only error is that of
            the draws, since q(z) is the mixture over all N data.
        marginal_kl: :math:`\mathrm{KL}(q(z) \Vert p(z))` of the aggregate posterior from the prior.
        population_information: a lower and an upper bound, in expectation over data sets of size N, on the mutual
            information of z and x in the population, with standard errors over data and draws: ``mutual_information``,
            and the same with each datum left out of its own q(z). The rate is an upper bound, too.
        units: by latent site, the numbers of each variable.
        num_data: N.
        num_samples: draws of the latents of each datum; 0 if all states were summed over, without error.
    """

    elbo: Estimate
    distortion: Estimate
    rate: Estimate
    mutual_information: Estimate
    marginal_kl: Estimate
    population_information: tuple[Estimate, Estimate]
    units: dict[str, Units]
    num_data: int
    num_samples: int

    @property
    def collapse(self) -> tuple[str, ...]:
        """Descriptions of the latents, or the variables of a latent, that carry no information about x."""
        if self.mutual_information.value <= COLLAPSE_NATS:
            names, cost = " and ".join(self.units), "q(z|x) is the prior for every x"
            if self.rate.value > COLLAPSE_NATS:
                wasted = f"the rate of {self.rate.value:.2f} nats is wasted"
                cost = f"{wasted}: q(z|x) is the same for every x, not the prior"
            return (f"{names} carries nothing about x: {self.mutual_information.value:.3f} nats; {cost}",)
        return tuple(line for name, units in self.units.items() for line in _collapsed_variables(name, units))

    def _line(self) -> str:
        active = ", ".join(
            f"{int(units.active.sum())} of {units.active.numel()} in {n}" for n, units in self.units.items()
        )
        return (
            f"ELBO {self.elbo} nats per datum = - distortion {self.distortion} - rate {self.rate}, of it mutual "
            f"information {self.mutual_information}; active units: {active}; {count_of(self.num_data, 'datum', 'data')}"
        )

    def _table(self) -> Table:
        lower, upper = self.population_information
        rows = [
            ("ELBO = − distortion − rate", self.elbo),
            ("distortion, the expected −log p(x|z)", self.distortion),
            ("rate = mutual information + marginal KL", self.rate),
            ("mutual information of x and z", self.mutual_information),
            ("marginal KL, from the average q(z|x) to the prior", self.marginal_kl),
            ("mutual information in the population, lower bound", lower),
            ("mutual information in the population, upper bound", upper),
        ]
        count = self.num_data
        note = (
            f"In nats per datum, ± the standard error due to the draws. With {count} data the mutual information is at "
            f"most log {count} = {math.log(count):.2f} nats. The bounds for the population hold in expectation."
        )
        return Table(("quantity", "value"), rows, note)

    def __str__(self) -> str:
        lower, upper = self.population_information
        lines = [
            f"ELBO {self.elbo} nats per datum, of {self.num_data} data",
            f"  = - distortion {self.distortion}",
            f"    - rate {self.rate}",
            f"      = mutual information {self.mutual_information}, of at most log N = {math.log(self.num_data):.3f}",
            f"        (of the population: from {lower} to {upper}, in expectation)",
            f"      + marginal KL {self.marginal_kl}",
        ]
        active = {name: units.active for name, units in self.units.items()}
        lines += [f"active units of {name}: {int(units.sum())} of {units.numel()}" for name, units in active.items()]
        return "\n".join(lines + [f"collapse: {line}" for line in self.collapse])


def units_table(units: Mapping[str, Units]) -> Table:
    """Return a table with a row for each latent variable."""
    rows = []
    for name, site in units.items():
        for index in np.ndindex(*site.activity.shape):
            values = (site.rate, site.information, site.activity)
            shown = ("" if value is None else f"{value[index].item():.3f}" for value in values)
            active = "yes" if site.active[index].item() else "no"
            rows.append((f"{name}{list(index)}" if index else name, *shown, active))
    head = ("latent variable", "rate, nats", "mutual information, nats", "variance of its mean over data", "active")
    return Table(head, rows)


def _collapsed_variables(name: str, units: Units) -> Iterator[str]:
    collapsed = units.collapsed
    if not collapsed.any():
        return
    labels = [f"{name}{index}" if index else name for index in collapsed.nonzero().tolist()]
    shown = ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
    reason = f"less than {COLLAPSE_NATS} nats each"
    if units.information is None:
        reason = f"the mean of q varies by less than {COLLAPSE_NATS} over the data"
    yield f"{len(labels)} of {collapsed.numel()} variables of {name} carry nothing about x ({reason}): {shown}"
    if units.rate is not None and (wasted := units.rate[collapsed].sum().item()) > COLLAPSE_NATS:
        yield f"these variables of {name} still cost a rate of {wasted:.2f} nats: their q is not the prior"


@torch.no_grad()
@any_arguments
@without_training
def decompose(
    model: Function,
    guide: Function,
    *data: Data,
    num_samples: int = 10,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
) -> Decomposition:
    r"""Decompose the ELBO into distortion and rate, and the rate into mutual information and marginal KL.

    .. math:: I_N = \frac1N \sum_n \mathbb{E}_{q(z \mid x_n)}\left[\log \frac{q(z \mid x_n)}
              {\frac1N \sum_m q(z \mid x_m)}\right], \qquad
              \mathbb{E}[I_N] \le I(x; z) \le \mathbb{E}\left[\frac1N \sum_n \mathbb{E}_{q(z \mid x_n)}
              \log \frac{q(z \mid x_n)}{\frac{1}{N-1} \sum_{m \ne n} q(z \mid x_m)}\right].

    :math:`I_N` is the mutual information for the N given data. As an estimate for the population it is biased downwards
    and cannot exceed log N. Leaving each datum out of its own mixture gives an upward bias: both by Jensen's inequality
    for the logarithm of a mean, of N terms, one of which is the known q(z | x_n) of the draw, or of the N - 1 others.

    Args:
        model: a Pyro model of one data plate, the rightmost dimension, that holds all its sites, with one prior p(z).
        guide: its guide, amortized or not, with latents that have a density or mass.
        data: arguments of both, of N rows, 2 or more. Cost grows as num_samples N²; memory is bounded.
        num_samples: K, draws of each datum, 2 or more. Discrete latents of at most 2^12 joint states are summed over.
        plate, seed: name of the data plate, and seed of the draws.
        progress: whether to show a progress bar; by default only on a terminal or in a notebook.

    Raises:
        ValueError: if model and guide are not of this form, or the likelihood is not normalised.

    Source: Hoffman and Johnson 2016, "ELBO surgery"; Poole, Ozair, van den Oord, Alemi and Tucker 2019, "On variational
    bounds of mutual information", on bounds where the conditional density is known; Burda, Grosse and Salakhutdinov
    2016, "Importance weighted autoencoders", section 5.2, on active units.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(2), guides.DiagonalNormal(3, 2, net), likelihoods.Normal(2, 3, net))
    >>> with torch.no_grad():
    ...     _ = vae.encoder.network.weight[1::2].zero_()  # the mean and the scale of z_1 are the same for every x
    >>> nats = decompose(vae.model, vae.guide, torch.randn(100, 3))
    >>> abs(nats.rate.value - nats.mutual_information.value - nats.marginal_kl.value) < 1e-6
    True
    >>> nats.collapse[0]
    '1 of 2 variables of z carry nothing about x (less than 0.01 nats each): z[1]'
    """
    if positive_int(num_samples, "num_samples") < 2:
        raise ValueError("`num_samples` must be 2 or more, for standard errors, got 1")
    with seeded(seed), progress_bar("decompose", progress, total=num_samples, unit="draw") as bar:
        p = ModelDensity(ModelGuide(model, guide, data, plate))
        q = GuideDensity(p)
        if p.num_data < 2:
            raise ValueError("`data` must have 2 rows or more, for a mutual information with their index, got 1 row")
        _check_prior(p)
        aggregate = AggregatePosterior(q)
        summed = _can_sum(p)
        accumulator = _Accumulator(aggregate)
        for first in range(0, num_samples, p.chunk):
            accumulator.add(min(p.chunk, num_samples - first), with_densities=not summed)
            bar.advance_to(min(first + p.chunk, num_samples))
        densities, information = aggregate.over_states() if summed else accumulator.densities()
    return _assemble(densities, accumulator.units(information), p.num_data, 0 if summed else num_samples)


def _can_sum(p: ModelDensity) -> bool:
    """Whether the joint states of the latents are few enough to sum over."""
    try:
        return p.is_discrete and p.num_states <= MAX_SUMMED
    except ValueError:  # the states of a product of many variables are too many to list
        return False


def _check_prior(p: ModelDensity) -> None:
    """Raise if the prior depends on the datum: there is then no single p(z) to compare q(z) with."""
    values = {name: site["value"][:8, None] for name, site in p.latents.items()}
    for name, log_p in p.log_probs(values).items():
        if name in p.latents and not torch.allclose(log_p, log_p[:, :1], rtol=1e-4, atol=1e-4):
            raise ValueError(f"`model` must have one prior p(z) for all data, got one that depends on x at {name!r}")


class _Accumulator:
    """Sums over the draws so far."""

    def __init__(self, aggregate: AggregatePosterior):
        self.aggregate, self.count = aggregate, 0
        self.parts: list[Tensor] = []
        self.information: dict[str, Tensor] = {}
        self.means: dict[str, list[Tensor]] = {}
        self.rates: dict[str, Tensor | None] = {}
        self.classes: dict[str, bool] = {}

    def add(self, count: int, with_densities: bool) -> None:
        """Add ``count`` draws of the latents of each datum."""
        results = self.aggregate.q.sample_and_read(count, self._read)
        self.count += count
        for name in self.aggregate.q.sites:
            mean = results.each(("mean", name), count).double()
            sums = torch.stack([mean.sum(0), (mean**2).sum(0)])
            self.means[name] = [old + new for old, new in zip(self.means.get(name, [0.0, 0.0]), sums, strict=True)]
            known = ("rate", name) in results.tensors
            summed = results.each(("rate", name), count).double().mean(1).sum(0) if known else None
            before = self.rates.get(name)
            self.rates[name] = summed if before is None or summed is None else before + summed
        if with_densities:
            log_probs = {name: results.each(("log_p", name), count) for name in self.aggregate.p.sites}
            likelihood, prior = (part.expand(count, -1) for part in self.aggregate.model_terms(log_probs))
            values = {name: results.each(("value", name), count) for name in self.aggregate.q.sites}
            densities, information = self.aggregate.at_draws(values)
            self.parts.append(torch.cat([torch.stack([likelihood, prior]), densities]))
            for name, summed in information.items():
                self.information[name] = self.information.get(name, 0.0) + summed

    def _read(self, sites: Sites) -> dict[Any, Tensor]:
        """Read value, mean and rate of each latent of one draw, and the log-densities of the model."""
        p, found = self.aggregate.p, {}
        values = {name: site["value"] for name, site in sites.items()}
        model_sites = p.runs.sites(values, p.data)
        for name, site in sites.items():
            known, self.classes[name] = conditional_mean(site["fn"])
            # the draw instead of a mean that is unknown or infinite
            known = site["value"] if known is None else known
            known = known if self.classes[name] else torch.where(known.isfinite(), known, site["value"])
            found["mean", name] = known
            found["value", name] = site["value"]
            if (rate := rate_by_variable(site, model_sites[name])) is not None:
                found["rate", name] = rate
        return found | {("log_p", name): log_density(site) for name, site in model_sites.items()}

    def densities(self) -> tuple[LogDensities, dict[str, Tensor]]:
        """Return the log-densities at all draws, and the information of each variable."""
        draws = self.count * self.aggregate.num_data
        information = {name: summed / draws for name, summed in self.information.items()}
        return LogDensities(*torch.cat(self.parts, 1)), information

    def units(self, information: dict[str, Tensor]) -> dict[str, Units]:
        """Return the units of each site, with their information if the variables are the factors of q."""
        result = {}
        for name, (total, squares) in self.means.items():
            mean = total / self.count
            within = (squares / self.count - mean**2).clamp(min=0) / (self.count - 1)  # noise of the draws
            activity = (mean.var(0) - within.mean(0)).clamp(min=0)
            activity = activity.sum(-1) if self.classes[name] else activity
            rate, known = self.rates[name], information.get(name)
            rate = None if rate is None or rate.shape != activity.shape else rate / self.count
            known = None if known is None or known.numel() != activity.numel() else known.reshape(activity.shape)
            result[name] = Units(activity, rate, known)
        return result


def _assemble(densities: LogDensities, units: dict[str, Units], num_data: int, num_samples: int) -> Decomposition:
    def estimate(values: Tensor) -> Estimate:
        error = values.var(0).mean().div(num_samples * num_data).sqrt().item() if num_samples else 0.0
        return Estimate(values.mean().item(), error)

    def population_estimate(values: Tensor) -> Estimate:
        return Estimate(values.mean().item(), values.mean(0).std().item() / math.sqrt(num_data))

    log_likelihood, log_prior, log_q, log_aggregate, log_others = densities
    return Decomposition(
        elbo=estimate(log_likelihood - log_q + log_prior),
        distortion=estimate(-log_likelihood),
        rate=estimate(log_q - log_prior),
        mutual_information=estimate(log_q - log_aggregate),
        marginal_kl=estimate(log_aggregate - log_prior),
        population_information=(population_estimate(log_q - log_aggregate), population_estimate(log_q - log_others)),
        units=units,
        num_data=num_data,
        num_samples=num_samples,
    )
