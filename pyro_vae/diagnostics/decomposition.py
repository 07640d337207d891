r"""Decomposition of the ELBO into distortion, mutual information and marginal KL, and detection of posterior collapse.

.. math:: \mathrm{ELBO} = -\mathrm{distortion} - \mathrm{rate}, \qquad
          \underbrace{\frac1N \sum_n \mathrm{KL}(q(z \mid x_n) \Vert p(z))}_{\text{rate}}
          = \underbrace{\frac1N \sum_n \mathrm{KL}(q(z \mid x_n) \Vert q(z))}_{\text{mutual information}}
          + \underbrace{\mathrm{KL}(q(z) \Vert p(z))}_{\text{marginal KL}},

with the aggregate posterior :math:`q(z) = \frac1N \sum_n q(z \mid x_n)`.

Distortion and rate exist for any model and guide: for each datum where all latents are local to it, for each cell of
the plates that all sites share, or for all data together. The second line needs latents of each datum and one prior.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae._utils.chunks import in_chunks
from pyro_vae._utils.display import Result, Table, count_of, per_cell
from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.progress import Progress, progress_bar
from pyro_vae._utils.ranks import ranks
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.traces import log_density
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.diagnostics.aggregate_posterior import AggregatePosterior, log_densities
from pyro_vae.distributions.properties import conditional_mean
from pyro_vae.draws import Results
from pyro_vae.evidence.importance_sampling import cell_densities, cell_plates
from pyro_vae.exact.guide_density import GuideDensity, Sites
from pyro_vae.exact.model_density import ConditionedRuns, ModelDensity, Values, plus
from pyro_vae.model_guide import ModelGuide, RowBatches
from pyro_vae.objectives.elbo_terms import rate_by_variable

__all__ = ["COLLAPSE_NATS", "MAX_SUMMED", "Decomposition", "Estimate", "Units", "decompose", "units_table"]

_Result = TypeVar("_Result")

MAX_SUMMED = 2**12
"""Discrete latents of up to this many joint states are summed over; larger ones are sampled."""
COLLAPSE_NATS = 0.01
"""A variable with this information or less, in nats, is collapsed; a unit with this activity or less is inactive."""

_MAX_PAIRS = 2**26  # of data, of which one has the draws, and the other one is in the mixture q(z)
_MIN_COMPARED = 1000  # data whose draws are compared with q(z), however many there are


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
    Where a datum has no latents of its own, all numbers are those of a cell of ``plates``, or of all data together.

    Attributes:
        elbo: the bound on log p(x).
        distortion: :math:`-\mathbb{E}_q[\log p(x \mid z)]`.
        rate: the mean of :math:`\mathrm{KL}(q(z \mid x_n) \Vert p(z))`.
        rates: by latent site, its part of the rate,
            :math:`\mathbb{E}_q[\log q(z_i \mid z_{<i}, x) - \log p(z_i \mid z_{<i})]`. It is empty where q(z | x) is no
            product over sites, as of ``AutoMultivariateNormal``, or discrete latents are summed out.
        mutual_information: mutual information of z and the index n of a datum, at most log N. q(z) is the mixture over
            all N data, so that the only error is that of the draws, and of the choice of the data that are compared
            with it, see :attr:`num_compared`. ``None`` where it has no meaning.
        marginal_kl: :math:`\mathrm{KL}(q(z) \Vert p(z))` of the aggregate posterior from the prior, or ``None``.
        population_information: a lower and an upper bound, in expectation over data sets of size N, on the mutual
            information of z and x in the population, with standard errors over data and draws: ``mutual_information``,
            and the same with each datum left out of its own q(z). The rate is an upper bound, too. ``None`` where they
            have no meaning.
        units: by latent site, the numbers of each variable; empty where they have no meaning.
        num_data: N, the number of data or cells; 1 for all data together.
        num_samples: draws of the latents of each datum; 0 if all states were summed over, without error.
        num_compared: the number of data whose draws were compared with q(z); 0 without mutual information.
        plates: the names of the plates whose cells the numbers are of; ``None`` for data, ``()`` for all data together.
        why_no_information: why there is no mutual information; empty if there is one.
    """

    elbo: Estimate
    distortion: Estimate
    rate: Estimate
    rates: dict[str, Estimate]
    mutual_information: Estimate | None
    marginal_kl: Estimate | None
    population_information: tuple[Estimate, Estimate] | None
    units: dict[str, Units]
    num_data: int
    num_samples: int
    num_compared: int = 0
    plates: tuple[str, ...] | None = None
    why_no_information: str = ""

    @property
    def is_collapsed(self) -> bool:
        """Whether the latents together carry nothing about x; false where that is not known."""
        return self.mutual_information is not None and self.mutual_information.value <= COLLAPSE_NATS

    @property
    def collapse(self) -> tuple[str, ...]:
        """Descriptions of the latents, or the variables of a latent, that carry no information about x."""
        if self.mutual_information is not None and self.is_collapsed:
            names, cost = " and ".join(self.units), "q(z|x) is the prior for every x"
            if self.rate.value > COLLAPSE_NATS:
                wasted = f"the rate of {self.rate.value:.2f} nats is wasted"
                cost = f"{wasted}: q(z|x) is the same for every x, not the prior"
            return (f"{names} carries nothing about x: {self.mutual_information.value:.3f} nats; {cost}",)
        return tuple(line for name, units in self.units.items() for line in _collapsed_variables(name, units))

    @property
    def _over(self) -> str:
        """How many data or cells there are."""
        return count_of(self.num_data, "datum", "data") if self.plates is None else count_of(self.num_data, "cell")

    def _line(self) -> str:
        terms = f"ELBO {self.elbo} nats {per_cell(self.plates)} = - distortion {self.distortion} - rate {self.rate}"
        if self.mutual_information is None:
            by_site = ", ".join(f"{name} {rate}" for name, rate in self.rates.items() if len(self.rates) > 1)
            return terms + (f", of it {by_site}" if by_site else "") + (f"; {self._over}" if self.plates != () else "")
        active = ", ".join(
            f"{int(units.active.sum())} of {units.active.numel()} in {n}" for n, units in self.units.items()
        )
        return f"{terms}, of it mutual information {self.mutual_information}; active units: {active}; {self._over}"

    def _table(self) -> Table:
        rows: list[tuple[str, object]] = [
            ("ELBO = − distortion − rate", self.elbo),
            ("distortion, the expected −log p(x|z)", self.distortion),
        ]
        of = f"In nats {per_cell(self.plates)}, ± the standard error due to the draws."
        by_site = [(f"rate of {name}", rate) for name, rate in self.rates.items() if len(self.rates) > 1]
        if self.population_information is None:
            note = f"{of} There is no mutual information of x and z: {self.why_no_information}."
            return Table(
                ("quantity", "value"), [*rows, ("rate, KL from q(z|x) to the prior", self.rate), *by_site], note
            )
        lower, upper = self.population_information
        rows += [
            ("rate = mutual information + marginal KL", self.rate),
            *by_site,
            ("mutual information of x and z", self.mutual_information),
            ("marginal KL, from the average q(z|x) to the prior", self.marginal_kl),
            ("mutual information in the population, lower bound", lower),
            ("mutual information in the population, upper bound", upper),
        ]
        count = self.num_data
        note = (
            f"{of} With {count} data the mutual information is at "
            f"most log {count} = {math.log(count):.2f} nats. The bounds for the population hold in expectation."
        )
        if self.num_compared < count:
            note += f" The draws of {self.num_compared} data were compared with q(z) of all data."
        return Table(("quantity", "value"), rows, note)

    def __str__(self) -> str:
        over = "" if self.plates == () else f", of {self._over}"
        lines = [
            f"ELBO {self.elbo} nats {per_cell(self.plates)}{over}",
            f"  = - distortion {self.distortion}",
            f"    - rate {self.rate}",
        ]
        if self.population_information is None:
            lines += [f"      of {name} {rate}" for name, rate in self.rates.items() if len(self.rates) > 1]
            return "\n".join([*lines, f"no mutual information of x and z: {self.why_no_information}"])
        lower, upper = self.population_information
        lines += [
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


@report_of_ranks("decompose")
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

    These three exist where every latent is local to the rows of one data plate, and has one prior for all of them.
    Otherwise :attr:`Decomposition.why_no_information` is the reason, and the result has the ELBO, the distortion and
    the rate of each site alone: for each cell of the plates that all sites share, or for all data together, as where a
    latent is global. Discrete latents that the guide leaves out are summed out, and belong to the likelihood of the
    others.

    Args:
        model: a Pyro model.
        guide: its guide, amortized or not, with latents that have a density or mass.
        data: arguments of both. Draws are compared with the mixture q(z) of all N data: up to 8192 data, those of all
            data; above, those of 2^26 / N or 1000 of them, chosen at random, so that the time is linear in N. Then the
            mutual information is that of all data by its regression on the rate, with the error of the choice.
        num_samples: K, draws of each datum, 2 or more. Discrete latents of at most 2^12 joint states are summed over.
        plate, seed: name of the data plate, and seed of the draws.
        progress: whether to show a progress bar; by default only on a terminal or in a notebook.

    Raises:
        ValueError: if the guide has a point for a latent, or the likelihood is not normalised.

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
    batches = ModelGuide.in_batches(model, guide, data, plate)
    total = batches.num_data * num_samples
    with seeded(seed), progress_bar("decompose", progress, total=total, unit="draw", unit_scale=True) as bar:
        try:
            return _with_information(batches, num_samples, seed, bar)
        except _NoInformation as reason:
            return _without_information(batches, str(reason), num_samples, seed, bar)


def _in_chunks(batches: RowBatches, compute: Callable[[int], _Result], seed: int) -> list[_Result]:
    """Compute something with random numbers for each batch of rows, by its number.

    The first batch of several has other random numbers than the choice of rows to compare.
    """
    chunks, device = range(len(batches)), batches.first.data[0].device
    return in_chunks("decompose", chunks, compute, device, seed, first=int(len(batches) > 1))


class _NoInformation(Exception):
    """Why x and z of a datum have no mutual information."""


class _Densities:
    """log p(x, z) and log q(z | x) on batches of rows; raise :class:`_NoInformation` where a row has none.

    Attributes:
        p, q: of the first batch.
    """

    def __init__(self, batches: RowBatches):
        self.batches = batches
        self.p, self.q = cell_densities(batches.first)
        self._check_form()
        # Values of each latent, at which the log-density of its prior is the same for all rows.
        self._values = {name: site["value"][:8, None] for name, site in self.p.latents.items()}
        self._expected = {name: log_p[:, :1] for name, log_p in self._log_priors(self.p).items()}

    def __getitem__(self, index: int) -> tuple[ModelDensity, GuideDensity, int]:
        """Return the densities of a batch, with the number of its first row."""
        pair = self.batches[index]
        p, q = (self.p, self.q) if pair is self.batches.first else cell_densities(pair)
        for name, log_p in self._log_priors(p).items():
            if not torch.allclose(log_p, self._expected[name], rtol=1e-4, atol=1e-4):
                raise _NoInformation(f"there is no single prior p(z), since that of {name!r} depends on x")
        return p, q, pair.data.first_row

    def add_to(self, aggregate: AggregatePosterior) -> None:
        """Add all batches to the mixture, of which ranks share the values."""

        def add(part: AggregatePosterior) -> Any:
            for index in range(len(self.batches)):
                _, q, first_row = self[index]
                part.add(q, first_row)
            return part.sums()

        parts = aggregate.parts(ranks().size)
        aggregate.join(_without_reasons(in_chunks("decompose", parts, _or_reason(add), self.p.data[0].device)))

    def sums(self, add: "Callable[[_Sums, ModelDensity, GuideDensity, int], None]", num_samples: int, seed: int) -> Any:
        """Return the sums over all batches, of each of which ``add`` adds those of its rows."""

        def of_batch(index: int) -> _Sums:
            found = _Sums(num_samples)
            add(found, *self[index])
            return found

        total = _Sums(num_samples)
        for found in _without_reasons(_in_chunks(self.batches, _or_reason(of_batch), seed)):
            total.add(found)
        return total

    def _log_priors(self, p: ModelDensity) -> Values:
        return {name: log_p for name, log_p in p.log_probs(self._values).items() if name in p.latents}

    def _check_form(self) -> None:
        p = self.p
        if p.pair.eliminated:
            raise _NoInformation(f"the guide leaves out {p.pair.eliminated}, which are summed out")
        if not p.latents:
            raise _NoInformation("the model has no latents")
        if not p.by_rows:
            if outside := [name for name in p.latents if not p.pair.is_local(p.latents[name])]:
                raise _NoInformation(f"a datum has no latents of its own, since {outside} are those of many data")
            if cell_plates(p) is not None:
                raise _NoInformation(
                    "a datum has no q(z|x) of its own, since the guide draws the latents of all data together"
                )
            raise _NoInformation("the latents of a datum lie in further plates, or are masked")
        if self.batches.num_data < 2:
            raise _NoInformation("one datum has none with its index")


def _or_reason(compute: Callable[[Any], _Result]) -> "Callable[[Any], _Result | _NoInformation]":
    """Return a function that returns the reason why there is no information, which all ranks must know."""

    def run(chunk: Any) -> _Result | _NoInformation:
        try:
            return compute(chunk)
        except _NoInformation as reason:
            return reason

    return run


def _without_reasons(found: "Iterable[_Result | _NoInformation]") -> list[_Result]:
    """Return the results, or raise the first reason."""
    results: list[_Result] = []
    for result in found:
        if isinstance(result, _NoInformation):
            raise result
        results.append(result)
    return results


def _with_information(batches: RowBatches, num_samples: int, seed: int, bar: Progress) -> Decomposition:
    """The decomposition with the mutual information, in two passes: over the draws, and over the mixture q(z)."""
    densities, num_data = _Densities(batches), batches.num_data
    if _can_sum(densities.p):
        return _over_states(densities, num_data, num_samples, seed, bar)
    rows = _compared_rows(num_data, densities.p.data[0].device)
    sums = densities.sums(lambda sums, *batch: sums.add_draws(*batch, bar, rows), num_samples, seed)
    values, log_prior = sums.drawn()
    aggregate = AggregatePosterior(values, rows.repeat(num_samples), num_data)
    densities.add_to(aggregate)
    own, mixed, others = (
        each.unflatten(0, (num_samples, len(rows)))
        for each in (aggregate.log_q, aggregate.log_aggregate, aggregate.log_others)
    )
    rate = sums.means["rate"].estimate(num_samples)
    of_all = partial(_by_regression, rates=own - log_prior, rate=rate, num_data=num_data)
    mutual_information = of_all(own - mixed)
    return Decomposition(
        elbo=sums.means["elbo"].estimate(num_samples),
        distortion=sums.means["distortion"].estimate(num_samples),
        rate=rate,
        rates={name: mean.estimate(num_samples) for name, mean in sums.rates.items()},
        mutual_information=mutual_information,
        marginal_kl=Estimate(rate.value - mutual_information.value, of_all(mixed - log_prior).standard_error),
        population_information=(of_all(own - mixed, population=True), of_all(own - others, population=True)),
        units=sums.units(aggregate.information()),
        num_data=num_data,
        num_samples=num_samples,
        num_compared=len(rows),
    )


def _over_states(densities: _Densities, num_data: int, num_samples: int, seed: int, bar: Progress) -> Decomposition:
    """The decomposition by sums over all states of discrete latents, without error; draws are those of the units."""
    chunks = list(densities.p.states())
    states = {name: torch.cat([values[name] for values in chunks]) for name in densities.p.latents}
    aggregate = AggregatePosterior(states, None, num_data)
    densities.add_to(aggregate)

    def add(sums: _Sums, p: ModelDensity, q: GuideDensity, first_row: int) -> None:
        sums.add_expectations(p, q, aggregate)
        sums.add_draws(p, q, first_row, bar)

    sums = densities.sums(add, num_samples, seed)
    mean = {name: mean.estimate(0) for name, mean in sums.means.items()}
    population = (sums.means[name].of_population() for name in ("mutual information", "upper bound"))
    return Decomposition(
        elbo=mean["elbo"],
        distortion=mean["distortion"],
        rate=mean["rate"],
        rates={name: mean.estimate(0) for name, mean in sums.rates.items()},
        mutual_information=mean["mutual information"],
        marginal_kl=Estimate(mean["rate"].value - mean["mutual information"].value, 0.0),
        population_information=(next(population), next(population)),
        units=sums.units({name: total / num_data for name, total in sums.information.items()}),
        num_data=num_data,
        num_samples=0,
        num_compared=num_data,
    )


def _compared_rows(num_data: int, device: torch.device) -> Tensor:
    """The numbers of the rows whose draws are compared with q(z): all, or so many that the time is linear in N."""
    most = max(_MIN_COMPARED, _MAX_PAIRS // num_data)
    if most >= num_data:
        return torch.arange(num_data, device=device)
    return torch.randperm(num_data, device=device)[:most].sort().values


def _by_regression(values: Tensor, rates: Tensor, rate: Estimate, num_data: int, population: bool = False) -> Estimate:
    """The mean over all rows of ``values`` at draws of M rows, ``(K, M)``, by their regression on the rate.

    The mean ``rate`` of all rows is known, and that of these draws is that of ``rates``. The error is that of the draws
    and of the choice of M rows; with ``population``, also that of the N data.

    Source: Cochran 1977, "Sampling techniques", chapter 7, on the linear regression estimator.
    """
    count, num_rows = values.shape
    row, row_rate = values.mean(0), rates.mean(0)
    if num_rows == num_data:
        squared = row.var() if population else values.var(0).mean() / count
        return Estimate(row.mean().item(), (squared / num_data).sqrt().item())
    centred = row_rate - row_rate.mean()
    slope = (centred @ row / centred.square().sum().clamp(min=torch.finfo(row.dtype).tiny)).item()
    value = row.mean().item() + slope * (rate.value - row_rate.mean().item())
    chosen = (row - slope * row_rate).var().item() / num_rows + (slope * rate.standard_error) ** 2
    of_data = row.var().item() / num_data if population else 0.0
    return Estimate(value, math.sqrt(chosen + of_data))


def _without_information(
    batches: RowBatches, why_not: str, num_samples: int, seed: int, bar: Progress
) -> Decomposition:
    """Average ELBO, distortion and rate over draws of the guide; without latents of its own they are exact."""
    p, q = cell_densities(batches.first)
    num_samples = num_samples if q.sites else 0
    splits = not batches.first.eliminated and q.splits_by_site

    def means(index: int) -> dict[str, _Mean]:
        densities = (p, q) if index == 0 else cell_densities(batches[index])
        return {name: _Mean.of(term) for name, term in _terms(*densities, splits, num_samples, bar).items()}

    sums: dict[str, _Mean] = defaultdict(_Mean)
    for found in _in_chunks(batches, means, seed):
        for name, each in found.items():
            sums[name].add(each)
    mean = {name: each.estimate(num_samples) for name, each in sums.items()}
    return Decomposition(
        elbo=mean["elbo"],
        distortion=mean["distortion"],
        rate=mean["rate"],
        rates={name: mean[f"rate of {name}"] for name in q.sites if splits},
        mutual_information=None,
        marginal_kl=None,
        population_information=None,
        units={},
        num_data=batches.num_data if len(batches) > 1 else p.num_data,
        num_samples=num_samples,
        plates=cell_plates(p),
        why_no_information=why_not,
    )


def _terms(p: ModelDensity, q: GuideDensity, splits: bool, num_samples: int, bar: Progress) -> dict[str, Tensor]:
    """ELBO, distortion, rate, and that of each site, of each cell at draws of the guide, ``(K, N)``."""
    prior = _Prior(p) if p.pair.eliminated else None
    parts: dict[str, list[Tensor]] = {}
    for first in range(0, max(num_samples, 1), p.chunk):
        count = min(p.chunk, max(num_samples, 1) - first)
        values, log_q, by_site = _draw(q, count)
        log_joint = p.log_joint(values).double().expand(count, -1)
        log_p = {} if prior else {name: each for name, each in p.log_probs(values).items() if name in p.latents}
        log_prior = prior(values) if prior else p.zeros() + plus(each.double() for each in log_p.values())
        likelihood, rate = log_joint - log_prior, log_q.double() - log_prior
        found = {"elbo": likelihood - rate, "distortion": -likelihood, "rate": rate}
        found |= {f"rate of {name}": by_site[name].double() - log_p[name].double() for name in log_p if splits}
        for name, term in found.items():
            parts.setdefault(name, []).append(term.expand(count, p.num_data))
        bar.advance(count * p.num_data)
    return {name: torch.cat(part) for name, part in parts.items()}


def _draw(q: GuideDensity, count: int) -> tuple[Values, Tensor, dict[str, Tensor]]:
    """Draw values by site, and compute their log q(z | x), together and of each site, ``(count, N)``."""

    def read(sites: Sites) -> dict[Any, Tensor]:
        values = {("value", name): site["value"] for name, site in sites.items()}
        return values | {("log_q", name): q.runs.summed(log_density(site)) for name, site in sites.items()}

    results = q.sample_and_read(count, read)
    values = {name: q.layouts[name].to_cells(results.each(("value", name), count)) for name in q.sites}
    return values, results.each("log_q", count), {name: results.each(("log_q", name), count) for name in q.sites}


class _Prior:
    """log p(z) of the latents that the guide draws, in a model of which others are summed out, ``(C, N)``."""

    def __init__(self, p: ModelDensity):
        model, nesting = _WithoutLikelihood()(p.model), p.pair.max_plate_nesting
        self.p, self.runs = p, ConditionedRuns(model, p.layouts, p.units, p.pair.eliminated, nesting)

    def __call__(self, values: Values) -> Tensor:
        return self.runs.log_prob(values, self.p.data, self.p.num_data).double()


class _WithoutLikelihood(Messenger):
    """Leave the observed sites of a model out of its density."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            msg["mask"] = False


def _can_sum(p: ModelDensity) -> bool:
    """Whether the joint states of the latents are few enough to sum over."""
    try:
        return p.is_discrete and p.num_states <= MAX_SUMMED
    except ValueError:  # the states of a product of many variables are too many to list
        return False


class _Mean:
    """The mean of values over rows and draws, and its error, from batches of rows."""

    def __init__(self) -> None:
        self._rows, self._count = 0, 1
        self._mean = self._squares = self._within = 0.0

    @classmethod
    def of(cls, values: Tensor) -> "_Mean":
        """Return the mean of values ``(K, N)`` of K draws, or of exact ones, ``(1, N)``."""
        found, row = cls(), values.double().mean(0)
        found._rows, found._count, found._mean = values.shape[1], len(values), row.mean().item()
        found._squares = (row - found._mean).square().sum().item()
        found._within = values.double().var(0).sum().item() if len(values) > 1 else 0.0
        return found

    def add(self, other: "_Mean") -> None:
        """Add the mean of other rows."""
        rows, change = self._rows + other._rows, other._mean - self._mean
        share = other._rows / rows
        self._squares += other._squares + self._rows * share * change**2
        self._mean += share * change
        self._within += other._within
        self._rows, self._count = rows, other._count

    def estimate(self, num_samples: int) -> Estimate:
        """Return the mean, with the error of the draws; there is none without draws."""
        if num_samples == 1:
            return Estimate(self._mean, math.nan)
        return Estimate(self._mean, math.sqrt(self._within / self._count) / self._rows if num_samples else 0.0)

    def of_population(self) -> Estimate:
        """Return the mean, with the error of the data."""
        return Estimate(self._mean, math.sqrt(self._squares / (self._rows - 1) / self._rows))


class _Sums:
    """Sums over rows, those of a batch or of all.

    Args:
        num_samples: K, draws of each row.
    """

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        self.means: dict[str, _Mean] = defaultdict(_Mean)
        self.rates: dict[str, _Mean] = defaultdict(_Mean)  # of sites
        self.information: dict[str, Tensor] = {}
        self._activity: dict[str, _Activity] = defaultdict(_Activity)
        self._rate_by_variable: dict[str, Tensor | None] = {}
        self._classes: dict[str, bool] = {}
        self._values: dict[str, list[Tensor]] = {}  # of the rows that are kept
        self._log_prior: list[Tensor] = []

    def add(self, other: "_Sums") -> None:
        """Add the sums of other rows."""
        for ours, theirs in ((self.means, other.means), (self.rates, other.rates)):
            for name, mean in theirs.items():
                ours[name].add(mean)
        for name, gain in other.information.items():
            self.information[name] = self.information.get(name, torch.zeros_like(gain)) + gain
        for name, activity in other._activity.items():
            self._activity[name].add(activity)
        for name, summed in other._rate_by_variable.items():
            before = self._rate_by_variable.get(name)
            self._rate_by_variable[name] = summed if before is None or summed is None else before + summed
        self._classes |= other._classes
        for name, values in other._values.items():
            self._values.setdefault(name, []).extend(values)
        self._log_prior += other._log_prior

    def add_draws(
        self, p: ModelDensity, q: GuideDensity, first_row: int, bar: Progress, rows: Tensor | None = None
    ) -> None:
        """Add draws of the latents of each datum of a batch.

        ``rows`` are the numbers of the M rows whose draws are kept, in ascending order; ``None`` if no densities at
        draws are needed.
        """
        terms: dict[str, list[Tensor]] = {}
        sums: dict[str, Tensor] = {}
        kept = None if rows is None else _kept(rows, first_row, p.num_data)
        values: dict[str, list[Tensor]] = {}
        for first in range(0, self.num_samples, p.chunk):
            count = min(p.chunk, self.num_samples - first)
            results = q.sample_and_read(count, partial(self._read, p))
            for name in q.sites:
                mean = results.each(("mean", name), count).double()
                new = torch.stack([mean.sum(0), (mean**2).sum(0)])
                sums[name] = sums[name] + new if name in sums else new
                self._add_rate(name, results, count, p.num_data)
            for name, term in self._terms(p, q, results, count).items() if kept is not None else ():
                terms.setdefault(name, []).append(term)
            for name in q.sites if kept is not None else ():
                values.setdefault(name, []).append(results.each(("value", name), count)[:, kept])
            bar.advance(count * p.num_data)
        for name, (total, squares) in sums.items():
            mean = total / self.num_samples
            within = (squares / self.num_samples - mean**2).clamp(min=0) / (self.num_samples - 1)  # noise of the draws
            self._activity[name].add(_Activity.of(mean, within))
        if kept is not None:
            self._add_terms({name: torch.cat(parts) for name, parts in terms.items()}, kept)
            for name, parts in values.items():
                self._values.setdefault(name, []).append(torch.cat(parts))

    def _add_terms(self, terms: dict[str, Tensor], kept: Tensor) -> None:
        self._log_prior.append(terms["prior"][:, kept])
        likelihood, rate = terms["likelihood"], terms["log_q"] - terms["prior"]
        for name, term in (("elbo", likelihood - rate), ("distortion", -likelihood), ("rate", rate)):
            self.means[name].add(_Mean.of(term))
        for name, term in terms.items():
            if name.startswith("rate of "):
                self.rates[name.removeprefix("rate of ")].add(_Mean.of(term))

    def _add_rate(self, name: str, results: Results, count: int, num_data: int) -> None:
        """Add the rates of the variables of a site, where they are known."""
        known = ("rate", name) in results.tensors
        summed = results.each(("rate", name), count).double().mean(1).sum(0) * num_data if known else None
        before = self._rate_by_variable.get(name)
        self._rate_by_variable[name] = summed if before is None or summed is None else before + summed

    def _terms(self, p: ModelDensity, q: GuideDensity, results: Results, count: int) -> dict[str, Tensor]:
        """The log-densities at draws, ``(K, N)``, and the rate of each site."""
        log_probs = {name: results.each(("log_p", name), count) for name in p.sites}
        likelihood, prior = (part.expand(count, -1) for part in _model_terms(p, log_probs))
        log_q = results.each("log_q", count).double().expand(count, p.num_data)
        found = {"likelihood": likelihood, "prior": prior, "log_q": log_q}
        for name in q.sites if q.splits_by_site else ():
            found[f"rate of {name}"] = results.each(("log_q", name), count).double() - log_probs[name].double()
        return found

    def _read(self, p: ModelDensity, sites: Sites) -> dict[Any, Tensor]:
        """Read value, mean and rate of each latent of one draw, and the log-densities of the model."""
        found: dict[Any, Tensor] = {}
        model_sites = p.runs.sites({name: site["value"] for name, site in sites.items()}, p.data)
        for name, site in sites.items():
            known, self._classes[name] = conditional_mean(site["fn"])
            # the draw instead of a mean that is unknown or infinite
            known = site["value"] if known is None else known
            known = known if self._classes[name] else torch.where(known.isfinite(), known, site["value"])
            found["mean", name] = known
            found["value", name], found["log_q", name] = site["value"], log_density(site)
            if (rate := rate_by_variable(site, model_sites[name])) is not None:
                found["rate", name] = rate
        return found | {("log_p", name): log_density(site) for name, site in model_sites.items()}

    def add_expectations(self, p: ModelDensity, q: GuideDensity, aggregate: AggregatePosterior) -> None:
        """Add the expectations over all states of the discrete latents of a batch."""
        total = torch.stack([p.zeros()] * 5)
        rates = {name: p.zeros() for name in q.sites}
        factors, first = q.factors(), 0
        for values in p.states():
            log_q, by_variable = log_densities(q, factors, values)
            chunk = slice(first, first + len(log_q))
            log_sum = aggregate.log_sum[chunk, None].expand_as(log_q)
            others = log_sum + torch.log1p(-(log_q - log_sum).exp().clamp(max=1))
            log_probs, of_guide = p.log_probs(values), q.runs(values, p.data, p.num_data)
            likelihood, prior = (part.expand_as(log_q) for part in _model_terms(p, log_probs))
            mixed, others = log_sum - math.log(aggregate.num_data), others - math.log(aggregate.num_data - 1)
            weight = log_q.exp()
            rate = log_q - prior
            terms = torch.stack([likelihood - rate, -likelihood, rate, log_q - mixed, log_q - others])
            total = total + torch.where(weight > 0, weight * terms, 0.0).sum(1)
            for name in rates:
                gain = of_guide.each(name, len(log_q)).double() - log_probs[name].double()
                rates[name] = rates[name] + torch.where(weight > 0, weight * gain, 0.0).sum(0)
            for name, each in by_variable.items():
                gain = each - aggregate.log_aggregate_of(name)[chunk, None]
                gain = torch.where(weight[..., None] > 0, weight[..., None] * gain, 0.0).sum((0, 1))
                self.information[name] = self.information.get(name, torch.zeros_like(gain)) + gain
            first += len(log_q)
        names = ("elbo", "distortion", "rate", "mutual information", "upper bound")
        for name, term in zip(names, total, strict=True):
            self.means[name].add(_Mean.of(term[None]))
        for name, rate in rates.items():
            self.rates[name].add(_Mean.of(rate[None]))

    def drawn(self) -> tuple[Values, Tensor]:
        """Return the draws of the rows that are kept, ``(K M, 1, *event)``, and log p(z) there, ``(K, M)``."""
        values = {name: torch.cat(parts, 1).flatten(0, 1)[:, None] for name, parts in self._values.items()}
        return values, torch.cat(self._log_prior, 1)

    def units(self, information: dict[str, Tensor]) -> dict[str, Units]:
        """Return the units of each site, with their information if the variables are the factors of q."""
        result = {}
        for name, sums in self._activity.items():
            activity = sums.activity()
            activity = activity.sum(-1) if self._classes[name] else activity
            rate, known = self._rate_by_variable[name], information.get(name)
            rate = None if rate is None or rate.shape != activity.shape else rate / (self.num_samples * sums.num_rows)
            known = None if known is None or known.numel() != activity.numel() else known.reshape(activity.shape)
            result[name] = Units(activity, rate, known)
        return result


def _kept(rows: Tensor, first_row: int, count: int) -> Tensor:
    """The places, in a batch, of the rows whose draws are kept."""
    places = rows - first_row
    return places[(places >= 0) & (places < count)]


class _Activity:
    """The variance over rows of the means of variables, less the noise of the draws, from batches of rows."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._mean = self._squares = self._within = torch.zeros((), dtype=torch.float64, device="cpu")

    @classmethod
    def of(cls, mean: Tensor, within: Tensor) -> "_Activity":
        """Return that of rows with these means, ``(N, *variables)``, and the squares of their errors."""
        found = cls()
        found.num_rows, found._mean, found._within = len(mean), mean.mean(0), within.sum(0)
        found._squares = (mean - found._mean).square().sum(0)
        return found

    def add(self, other: "_Activity") -> None:
        """Add other rows."""
        rows, centre = self.num_rows + other.num_rows, other._mean
        change, share = centre - self._mean.to(centre.device), other.num_rows / rows
        self._squares = self._squares.to(centre.device) + other._squares + self.num_rows * share * change.square()
        self._mean = centre - (1 - share) * change
        self._within, self.num_rows = self._within.to(centre.device) + other._within, rows

    def activity(self) -> Tensor:
        """Return the variances, ``(*variables)``."""
        return (self._squares / (self.num_rows - 1) - self._within / self.num_rows).clamp(min=0)


def _model_terms(p: ModelDensity, log_probs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute log p(x | z) and log p(z) from the log-densities of the sites of the model."""
    likelihood, prior = p.zeros(), p.zeros()
    for name, log_prob in log_probs.items():
        if name in p.latents:
            prior = prior + log_prob.double()
        else:
            likelihood = likelihood + log_prob.double()
    return likelihood, prior
