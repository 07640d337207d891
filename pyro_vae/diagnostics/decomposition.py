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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae._utils.display import Result, Table, count_of, per_cell
from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.progress import Progress, progress_bar
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import log_density
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.diagnostics.aggregate_posterior import AggregatePosterior, LogDensities
from pyro_vae.distributions.properties import conditional_mean
from pyro_vae.evidence.importance_sampling import cell_densities, cell_plates
from pyro_vae.exact.guide_density import GuideDensity, Sites
from pyro_vae.exact.model_density import ConditionedRuns, ModelDensity, Values, plus
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
    Where a datum has no latents of its own, all numbers are those of a cell of ``plates``, or of all data together.

    Attributes:
        elbo: the bound on log p(x).
        distortion: :math:`-\mathbb{E}_q[\log p(x \mid z)]`.
        rate: the mean of :math:`\mathrm{KL}(q(z \mid x_n) \Vert p(z))`.
        rates: by latent site, its part of the rate,
            :math:`\mathbb{E}_q[\log q(z_i \mid z_{<i}, x) - \log p(z_i \mid z_{<i})]`. It is empty where q(z | x) is no
            product over sites, as of ``AutoMultivariateNormal``, or discrete latents are summed out.
        mutual_information: mutual information of z and the index n of a datum, at most log N. Its only error is that of
            the draws, since q(z) is the mixture over all N data. ``None`` where it has no meaning.
        marginal_kl: :math:`\mathrm{KL}(q(z) \Vert p(z))` of the aggregate posterior from the prior, or ``None``.
        population_information: a lower and an upper bound, in expectation over data sets of size N, on the mutual
            information of z and x in the population, with standard errors over data and draws: ``mutual_information``,
            and the same with each datum left out of its own q(z). The rate is an upper bound, too. ``None`` where they
            have no meaning.
        units: by latent site, the numbers of each variable; empty where they have no meaning.
        num_data: N, the number of data or cells; 1 for all data together.
        num_samples: draws of the latents of each datum; 0 if all states were summed over, without error.
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
        data: arguments of both. For mutual information, cost grows as num_samples N²; memory is bounded.
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
    with seeded(seed), progress_bar("decompose", progress, total=num_samples, unit="draw") as bar:
        p, q = cell_densities(ModelGuide(model, guide, data, plate))
        if why_not := _why_no_information(p, q):
            return _without_information(p, q, why_not, num_samples, bar)
        aggregate = AggregatePosterior(q)
        summed = _can_sum(p)
        accumulator = _Accumulator(aggregate)
        for first in range(0, num_samples, p.chunk):
            accumulator.add(min(p.chunk, num_samples - first), with_densities=not summed)
            bar.advance_to(min(first + p.chunk, num_samples))
        densities, information, rates = aggregate.over_states() if summed else accumulator.densities()
    return _assemble(densities, rates, accumulator.units(information), p.num_data, 0 if summed else num_samples)


def _why_no_information(p: ModelDensity, q: GuideDensity) -> str:
    """Why x and z of a datum have no mutual information; empty if they have one."""
    if p.pair.eliminated:
        return f"the guide leaves out {p.pair.eliminated}, which are summed out"
    if not p.latents:
        return "the model has no latents"
    if not p.by_rows:
        if outside := [name for name in p.latents if not p.pair.is_local(p.latents[name])]:
            return f"a datum has no latents of its own, since {outside} are those of many data"
        if cell_plates(p) is not None:
            return "a datum has no q(z|x) of its own, since the guide draws the latents of all data together"
        return "the latents of a datum lie in further plates, or are masked"
    if p.num_data < 2:
        return "one datum has none with its index"
    values = {name: site["value"][:8, None] for name, site in p.latents.items()}
    for name, log_p in p.log_probs(values).items():
        if name in p.latents and not torch.allclose(log_p, log_p[:, :1], rtol=1e-4, atol=1e-4):
            return f"there is no single prior p(z), since that of {name!r} depends on x"
    return ""


def _without_information(
    p: ModelDensity, q: GuideDensity, why_not: str, num_samples: int, bar: Progress
) -> Decomposition:
    """Average ELBO, distortion and rate over draws of the guide; without latents of its own they are exact."""
    prior = _Prior(p) if p.pair.eliminated else None
    splits = not p.pair.eliminated and q.splits_by_site
    parts: dict[str, list[Tensor]] = {}
    num_samples = num_samples if q.sites else 0
    for first in range(0, max(num_samples, 1), p.chunk):
        count = min(p.chunk, max(num_samples, 1) - first)
        values, log_q, by_site = _draw(q, count)
        log_joint = p.log_joint(values).double().expand(count, -1)
        log_p = {} if prior else {name: each for name, each in p.log_probs(values).items() if name in p.latents}
        log_prior = prior(values) if prior else p.zeros() + plus(each.double() for each in log_p.values())
        found = {"likelihood": log_joint - log_prior, "rate": log_q.double() - log_prior}
        found |= {f"rate of {name}": by_site[name].double() - log_p[name].double() for name in log_p if splits}
        for name, term in found.items():
            parts.setdefault(name, []).append(term.expand(count, p.num_data))
        bar.advance_to(min(first + p.chunk, num_samples))
    terms = {name: torch.cat(part) for name, part in parts.items()}
    mean = partial(_estimate, num_samples=num_samples)
    return Decomposition(
        elbo=mean(terms["likelihood"] - terms["rate"]),
        distortion=mean(-terms["likelihood"]),
        rate=mean(terms["rate"]),
        rates={name: mean(terms[f"rate of {name}"]) for name in q.sites if splits},
        mutual_information=None,
        marginal_kl=None,
        population_information=None,
        units={},
        num_data=p.num_data,
        num_samples=num_samples,
        plates=cell_plates(p),
        why_no_information=why_not,
    )


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


class _Accumulator:
    """Sums over the draws so far."""

    def __init__(self, aggregate: AggregatePosterior):
        self.aggregate, self.count = aggregate, 0
        self.parts: list[Tensor] = []
        self.gains: dict[str, list[Tensor]] = {}  # log q - log p at the draws of a site
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
            for name in self.aggregate.q.sites if self.aggregate.q.splits_by_site else ():
                gain = results.each(("log_q", name), count).double() - log_probs[name].double()
                self.gains.setdefault(name, []).append(gain)

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
            found["value", name], found["log_q", name] = site["value"], log_density(site)
            if (rate := rate_by_variable(site, model_sites[name])) is not None:
                found["rate", name] = rate
        return found | {("log_p", name): log_density(site) for name, site in model_sites.items()}

    def densities(self) -> tuple[LogDensities, dict[str, Tensor], dict[str, Tensor]]:
        """Return the log-densities at all draws, the information of each variable, and the rate of each site."""
        draws = self.count * self.aggregate.num_data
        information = {name: summed / draws for name, summed in self.information.items()}
        rates = {name: torch.cat(gains) for name, gains in self.gains.items()}
        return LogDensities(*torch.cat(self.parts, 1)), information, rates

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


def _estimate(values: Tensor, num_samples: int) -> Estimate:
    """The mean of values ``(K, N)`` of K draws, or of exact ones, with the error of the draws."""
    error = values.var(0).mean().div(num_samples * values.shape[1]).sqrt().item() if num_samples else 0.0
    return Estimate(values.mean().item(), error)


def _assemble(
    densities: LogDensities, rates: dict[str, Tensor], units: dict[str, Units], num_data: int, num_samples: int
) -> Decomposition:
    estimate = partial(_estimate, num_samples=num_samples)

    def population_estimate(values: Tensor) -> Estimate:
        return Estimate(values.mean().item(), values.mean(0).std().item() / math.sqrt(num_data))

    log_likelihood, log_prior, log_q, log_aggregate, log_others = densities
    return Decomposition(
        elbo=estimate(log_likelihood - log_q + log_prior),
        distortion=estimate(-log_likelihood),
        rate=estimate(log_q - log_prior),
        rates={name: estimate(values) for name, values in rates.items()},
        mutual_information=estimate(log_q - log_aggregate),
        marginal_kl=estimate(log_aggregate - log_prior),
        population_information=(population_estimate(log_q - log_aggregate), population_estimate(log_q - log_others)),
        units=units,
        num_data=num_data,
        num_samples=num_samples,
    )
