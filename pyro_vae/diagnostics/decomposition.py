r"""Where the nats go: what a code says about its datum, what it costs, and which of its variables say nothing.

.. math:: \mathrm{ELBO} = -\mathrm{distortion} - \mathrm{rate}, \qquad
          \underbrace{\frac1N \sum_n \mathrm{KL}(q(z \mid x_n) \Vert p(z))}_{\text{rate}}
          = \underbrace{\frac1N \sum_n \mathrm{KL}(q(z \mid x_n) \Vert q(z))}_{\text{mutual information}}
          + \underbrace{\mathrm{KL}(q(z) \Vert p(z))}_{\text{marginal KL}},

with the aggregate posterior :math:`q(z) = \frac1N \sum_n q(z \mid x_n)`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.traces import log_density
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import positive_int
from pyro_vae.diagnostics.aggregate_posterior import Aggregate, Terms
from pyro_vae.distributions.properties import conditional_mean
from pyro_vae.exact.guide_density import GuideDensity, sample_sites
from pyro_vae.exact.model_density import ModelDensity
from pyro_vae.objectives.elbo_terms import rate_by_variable

__all__ = ["COLLAPSE_NATS", "MAX_SUMMED", "Decomposition", "Estimate", "Units", "decompose"]

MAX_SUMMED = 2**12
"""Discrete latents of at most so many joint states are summed over; of more, they are drawn."""


COLLAPSE_NATS = 0.01
"""Nats at which a variable is said to carry nothing; and the variance at which a unit is said to be inactive."""


class Estimate(NamedTuple):
    """A number and its standard error, both in nats per datum."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class Units:
    r"""What each variable of a latent site does, in the shape of the site's variables.

    Attributes:
        activity: :math:`\mathrm{Var}_x(\mathbb{E}_q[z_d])`. Of a one-hot variable it is summed over the classes; of a
            relaxed one it is that of its discrete twin.
        rate: the mean of :math:`\mathrm{KL}(q(z_d \mid x) \Vert p(z_d))`, nats per datum. ``None`` if guide and prior
            are not both products over the variables.
        information: the mutual information of :math:`z_d` and the number of the datum, nats per datum, at most the
            rate. ``None`` if the guide is no product over the variables, given x alone.
    """

    activity: Tensor
    rate: Tensor | None
    information: Tensor | None

    @property
    def active(self) -> Tensor:
        """Which variables are active units: those of an activity above 0.01."""
        return self.activity > COLLAPSE_NATS

    @property
    def collapsed(self) -> Tensor:
        """Which variables carry nothing: less than 0.01 nats or, where that is not known, inactive units."""
        return ~self.active if self.information is None else self.information <= COLLAPSE_NATS


@dataclass(frozen=True)
class Decomposition:
    r"""What :func:`decompose` returns: nats per datum, each with the standard error of its draws, given these N data.

    ``elbo`` is ``-distortion - rate`` and ``rate`` is ``mutual_information + marginal_kl``, for the draws are the same.

    Attributes:
        elbo: the bound on log p(x).
        distortion: :math:`-\mathbb{E}_q[\log p(x \mid z)]`.
        rate: the mean of :math:`\mathrm{KL}(q(z \mid x_n) \Vert p(z))`.
        mutual_information: of z and the number n of a datum, at most log N. Its only error is that of the draws: q(z)
            is the mixture over all N.
        marginal_kl: :math:`\mathrm{KL}(q(z) \Vert p(z))`, of the aggregate posterior from the prior.
        population_information: a lower and an upper bound, in expectation over data sets of N, on the mutual
            information of z and x in the population that the data are from. The lower is ``mutual_information``; the
            upper leaves each datum out of its own q(z). Their standard errors are over data as well as draws. Rate less
            these bounds is a bracket for the marginal KL of the population. The rate too is an upper bound.
        units: by latent site, what each of its variables does.
        num_data: N.
        num_samples: draws of each datum's latents; 0 if all states were summed over, without error.
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
        """What carries nothing, in words; empty if there is none."""
        if self.mutual_information.value <= COLLAPSE_NATS:
            names = " and ".join(self.units)
            cost = (
                "q(z|x) is the prior for every x"
                if self.rate.value <= COLLAPSE_NATS
                else f"the rate of {self.rate.value:.2f} nats buys nothing: q(z|x) is not the prior, and the same for "
                "every x"
            )
            return (f"{names} carries nothing about x: {self.mutual_information.value:.3f} nats; {cost}",)
        return tuple(line for name, units in self.units.items() for line in _collapse_threshold(name, units))

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
        for name, units in self.units.items():
            lines.append(f"active units of {name}: {int(units.active.sum())} of {units.active.numel()}")
        return "\n".join(lines + [f"collapse: {line}" for line in self.collapse])


def _collapse_threshold(name: str, units: Units) -> Iterator[str]:
    collapsed = units.collapsed
    if not collapsed.any():
        return
    which = collapsed.nonzero().tolist()
    spelled = [f"{name}{index}" if index else name for index in which]
    shown = ", ".join(spelled[:8]) + (f" and {len(spelled) - 8} more" if len(spelled) > 8 else "")
    least = f"less than {COLLAPSE_NATS} nats each"
    if units.information is None:
        least = f"the mean of q varies by less than {COLLAPSE_NATS} over the data"
    yield f"{len(which)} of {collapsed.numel()} variables of {name} carry nothing about x ({least}): {shown}"
    if units.rate is not None and (wasted := units.rate[collapsed].sum().item()) > COLLAPSE_NATS:
        yield f"what carries nothing in {name} still costs a rate of {wasted:.2f} nats: there q is not the prior"


@torch.no_grad()
def decompose(
    model: Function, guide: Function, *data: Tensor, num_samples: int = 10, plate: str = "data", seed: int = 0
) -> Decomposition:
    r"""Where the nats of the ELBO go: distortion and rate, the rate into mutual information and marginal KL.

    .. math:: I_N = \frac1N \sum_n \mathbb{E}_{q(z \mid x_n)}\left[\log \frac{q(z \mid x_n)}
              {\frac1N \sum_m q(z \mid x_m)}\right], \qquad
              \mathbb{E}[I_N] \le I(x; z) \le \mathbb{E}\left[\frac1N \sum_n \mathbb{E}_{q(z \mid x_n)}
              \log \frac{q(z \mid x_n)}{\frac{1}{N-1} \sum_{m \ne n} q(z \mid x_m)}\right].

    Of the data handed over :math:`I_N` is the mutual information itself, up to the error of the draws of z. Of the
    population it is biased downwards, and can't pass log N; leaving each datum out of its own mixture biases upwards.
    Both are given, as a bracket: with Jensen's inequality for the logarithm of a mean, that of the N terms under the
    known q(z | x_n) of the draw for the one, that of the N - 1 independent terms for the other.

    Args:
        model: a Pyro model with one data plate, as the rightmost dimension, that holds all its sites. Its prior must be
            the same for all data.
        guide: its guide, amortized or not, of any latents that have a density or mass.
        data: what both take, of N rows, 2 or more. Cost grows as num_samples N²; memory is bounded.
        num_samples: K, draws of each datum's latents, 2 or more. Discrete latents of at most 2^12 joint states are
            summed over, and the standard errors are 0.
        plate: name of the data plate.
        seed: of the draws.

    Raises:
        ValueError: if model and guide are not of this form, or the likelihood is not normalised.

    Source: Hoffman and Johnson 2016, "ELBO surgery"; Poole, Ozair, van den Oord, Alemi and Tucker 2019, "On variational
    bounds of mutual information", on bounds where the conditional density is known; Burda, Grosse and Salakhutdinov
    2016, "Importance weighted autoencoders", section 5.2, on active units.

    >>> import pyro_vae as pv
    >>> from pyro_vae import priors, guides, likelihoods, networks
    >>> vae = pv.VAE(
    ...     prior=priors.StandardNormal(2),
    ...     encoder=guides.DiagonalNormal(3, 2, networks.linear()),
    ...     decoder=likelihoods.Normal(2, 3, networks.linear()),
    ... )
    >>> with torch.no_grad():
    ...     _ = vae.encoder.network.weight[1].zero_()  # the mean and the scale of z_1 are the same for every x
    ...     _ = vae.encoder.network.weight[3].zero_()
    >>> nats = decompose(vae.model, vae.guide, torch.randn(100, 3))
    >>> abs(nats.rate.value - nats.mutual_information.value - nats.marginal_kl.value) < 1e-6
    True
    >>> nats.collapse[0]
    '1 of 2 variables of z carry nothing about x (less than 0.01 nats each): z[1]'
    """
    if positive_int(num_samples, "num_samples") < 2:
        raise ValueError("`num_samples` must be 2 or more: standard errors are from the spread of the draws, got 1")
    with scoped_param_store(), seeded(seed):
        problem = ModelDensity(model, data, plate)
        q = GuideDensity(problem, guide)
        q.check_densities()
        if problem.num_data < 2:
            raise ValueError("`data` must be 2 or more, among which a code can tell, got 1 row")
        _check_prior(problem)
        mixture = Aggregate(problem, q)
        summed = _are_few(problem)
        found = _Accumulator(mixture)
        for count in _counts(num_samples, problem.chunk):
            found.add(sample_sites(guide, problem.data, count), with_terms=not summed)
        terms, information = mixture.over_states() if summed else found.terms()
    return _assembled(terms, found.units(information), problem.num_data, 0 if summed else num_samples)


def _are_few(problem: ModelDensity) -> bool:
    """Whether the joint states of the latents are to be summed over."""
    if not problem.is_discrete:
        return False
    try:
        return problem.num_states <= MAX_SUMMED
    except ValueError:  # of a product of many variables, whose states are more than are ever listed
        return False


def _counts(total: int, chunk: int) -> list[int]:
    return [min(chunk, total - first) for first in range(0, total, chunk)]


def _check_prior(problem: ModelDensity) -> None:
    """Refuse a prior that depends on the datum: the aggregate posterior is then held against no one p(z)."""
    drawn = {name: site["value"][:8, None] for name, site in problem.latents.items()}
    for name, site in problem.sites(drawn).items():
        if name in problem.latents and not torch.allclose(
            log_density(site), log_density(site)[:, :1], rtol=1e-4, atol=1e-4
        ):
            raise ValueError(
                "`model` must be one p(z) for all, which the aggregate posterior can be held against: the prior of "
                f"its latent {name!r} is another for each datum"
            )


class _Accumulator:
    """What draws have told so far."""

    def __init__(self, mixture: Aggregate):
        self.mixture = mixture
        self.parts: list[Tensor] = []
        self.information: dict[str, Tensor] = {}
        self.means: dict[str, list[Tensor]] = {}
        self.rates: dict[str, Tensor | None] = {}
        self.count = 0
        self.classes: dict[str, bool] = {}

    def add(self, sites: dict[str, Any], with_terms: bool) -> None:
        """Draws ``(K, N, *event)``."""
        values = {name: site["value"] for name, site in sites.items()}
        model_sites = self.mixture.problem.sites(values)
        count = len(next(iter(values.values())))
        self.count += count
        for name, site in sites.items():
            known, self.classes[name] = conditional_mean(site["fn"])
            mean = (site["value"] if known is None else known).double()  # the draw in place of an unknown mean
            sums = torch.stack([mean.sum(0), (mean**2).sum(0)])
            self.means[name] = [old + new for old, new in zip(self.means.get(name, [0.0, 0.0]), sums, strict=True)]
            rate = rate_by_variable(site, model_sites[name])
            summed = None if rate is None else rate.double().mean(1).sum(0)
            before = self.rates.get(name)
            self.rates[name] = summed if before is None or summed is None else before + summed
        if with_terms:
            likelihood, prior = (part.expand(count, -1) for part in self.mixture.model_terms(model_sites))
            densities, information = self.mixture.at_draws(values)
            self.parts.append(torch.cat([torch.stack([likelihood, prior]), densities]))
            for name, found in information.items():
                self.information[name] = self.information.get(name, 0.0) + found

    def terms(self) -> tuple[Terms, dict[str, Tensor]]:
        """At all draws; and the information of each variable."""
        draws = self.count * self.mixture.problem.num_data
        return Terms(*torch.cat(self.parts, 1)), {name: found / draws for name, found in self.information.items()}

    def units(self, information: dict[str, Tensor]) -> dict[str, Units]:
        """Of each site, with the information of its variables where these are the factors of q."""
        result = {}
        for name, (total, squares) in self.means.items():
            mean = total / self.count
            within = (squares / self.count - mean**2).clamp(min=0) / (self.count - 1)  # the share of chance
            activity = (mean.var(0) - within.mean(0)).clamp(min=0)
            activity = activity.sum(-1) if self.classes[name] else activity
            rate = self.rates[name]
            rate = None if rate is None else rate / self.count
            known = information.get(name)
            known = None if known is None or known.numel() != activity.numel() else known.reshape(activity.shape)
            result[name] = Units(activity, rate if rate is None or rate.shape == activity.shape else None, known)
        return result


def _assembled(terms: Terms, units: dict[str, Units], num_data: int, num_samples: int) -> Decomposition:
    def of_data(values: Tensor) -> Estimate:
        spread = values.var(0).mean().div(num_samples * num_data).sqrt().item() if num_samples else 0.0
        return Estimate(values.mean().item(), spread)

    def of_population(values: Tensor) -> Estimate:
        return Estimate(values.mean().item(), values.mean(0).std().item() / math.sqrt(num_data))

    rate = terms.log_q - terms.log_prior
    information = terms.log_q - terms.log_mixture
    return Decomposition(
        elbo=of_data(terms.log_likelihood - rate),
        distortion=of_data(-terms.log_likelihood),
        rate=of_data(rate),
        mutual_information=of_data(information),
        marginal_kl=of_data(terms.log_mixture - terms.log_prior),
        population_information=(of_population(information), of_population(terms.log_q - terms.log_others)),
        units=units,
        num_data=num_data,
        num_samples=num_samples,
    )
