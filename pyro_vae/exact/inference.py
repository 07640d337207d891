r"""Exact log p(x), p(z | x), ELBO and KL(q || p(z | x)) of a Pyro model.

* Discrete latents: a sum over all states, in any plates, by variable elimination where there are several.
* Continuous latents of one or two dimensions, real (flows too), positive, in a box or relaxed: adaptive quadrature.
* Linear Gaussian models of any size and form (state space models, hierarchies, regressions): closed form.
* Conjugate latents: closed form.
* One or two latents, of any kind, next to linear Gaussian and conjugate ones: closed form inside, quadrature outside.

There is an answer for each cell of the plates that all sites share: each datum, each group, or all data together. A
model with continuous latents that is not linear Gaussian must have one data plate, the rightmost dimension, that
contains all latents.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae._utils.chunks import in_chunks
from pyro_vae._utils.display import Result, Table, count_of
from pyro_vae._utils.module_state import evaluation_mode
from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.progress import progress_bar
from pyro_vae._utils.rng import seeded
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.traces import log_density, summed_to
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import positive
from pyro_vae.arguments import any_arguments
from pyro_vae.compilation.cost import automatic
from pyro_vae.distributions.properties import base_support, is_point, without_independent
from pyro_vae.exact.discrete import DiscreteModel
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.linear_gaussian import linear_gaussian
from pyro_vae.exact.model_density import ModelDensity, check_site, few_rows
from pyro_vae.exact.quadrature import Box, QuadratureError, QuadratureRule, check_draws, integrate, rows_from
from pyro_vae.model_guide import ModelGuide, RowBatches

if TYPE_CHECKING:
    from pyro_vae.exact.collapsed import Collapsed
    from pyro_vae.exact.gaussian_elimination import GaussianPosterior

__all__ = ["Posterior", "elbo", "kl", "log_evidence", "posterior"]

_MAX_ROWS = {1: 2**18, 2: 2**15}  # of one quadrature, by dimensions: some 8 kB, or 64 kB, for each
_CANDIDATES = 9  # points of which a draw of a posterior is one
_CHUNKS = 100  # of points, about as many as a quadrature has


@report_of_ranks("exact.log_evidence")
@torch.no_grad()
@any_arguments
@without_training
def log_evidence(
    model: Function, *data: Data, plate: str = "data", tolerance: float = 1e-4, progress: bool | None = None
) -> Tensor:
    r"""Compute the log marginal likelihood of each datum, :math:`\log p(x_i) = \log \int p(x_i, z)\,dz`.

    Args:
        model, data: a Pyro model and its arguments, called as ``model(*data)``.
        plate: name of its data plate.
        tolerance: largest error of a quadrature, in nats per datum.
        progress: whether to show a progress bar; by default only on a terminal or in a notebook.

    Returns:
        ``(N,)``, in nats, for latents that are local to each datum. Several discrete latents, and those of linear
        Gaussian models, may lie in other plates: then it is ``(*sizes)`` of the plates that all sites share, ``()``
        where a latent is global. The error of a quadrature is judged by two resolutions, and by draws from the prior. A
        bump of the decoder is missed if it is narrower than 1/1000 of the prior, or 1/100 in two dimensions.

    Raises:
        ValueError: if there is no exact answer, with the reason, for example the number of states.
        QuadratureError: if the quadrature does not converge, with the discrepancy, or misses what draws find.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.Bernoulli(1), guides.Bernoulli(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> log_evidence(vae.model, torch.randn(5, 2)).shape
    torch.Size([5])
    """
    tolerance = positive(tolerance, "tolerance")
    batches = ModelGuide.in_batches(model, None, data, plate)
    return _by_rows("exact.log_evidence", progress, batches, lambda pair: _log_evidence(pair, tolerance, progress))


def _log_evidence(pair: ModelGuide, tolerance: float, progress: bool | None) -> Tensor:
    """The log marginal likelihood of each cell, of the rows of a pair."""
    if (discrete := _discrete_model(pair)) is not None:
        return discrete.log_evidence().to(discrete.dtype)
    if not pair.latents and pair.observed:
        return _own_density(pair)
    if (gaussian := _gaussian_posterior(pair)) is not None:
        return gaussian.log_evidence
    if (collapsed := _collapsed(pair)) is not None:
        return collapsed.by_cell(collapsed.log_evidence(tolerance))
    _check_local(pair, "at most two dimensions of latents that are neither linear Gaussian nor conjugate")
    p = ModelDensity(pair)
    if p.is_discrete:
        return _summed_evidence(p).to(p.dtype)
    if (linear := linear_gaussian(p)) is not None:
        return linear.log_evidence().to(p.dtype)
    found = _in_batches("exact.log_evidence", progress, p, lambda part: _integrated_evidence(part, tolerance)[0])
    return torch.cat(found).to(p.dtype)


def _by_rows(name: str, progress: bool | None, batches: RowBatches, compute: Callable[[ModelGuide], Tensor]) -> Tensor:
    """Compute the numbers of each row in batches of rows, so that the memory does not grow with what a run needs."""
    if len(batches) == 1:
        return compute(batches.first)
    with progress_bar(name, progress, total=batches.num_data, unit="datum") as bar:

        def run(index: int) -> Tensor:
            pair = batches[index]
            with rows_from(pair.data.first_row):
                found = compute(pair)
            bar.advance(pair.num_data)
            return found

        return torch.cat(in_chunks(name, range(len(batches)), run, batches.first.data[0].device))


@report_of_ranks("exact.posterior")
@torch.no_grad()
@any_arguments
@without_training
def posterior(
    model: Function, *data: Data, plate: str = "data", tolerance: float = 1e-4, progress: bool | None = None
) -> Any:
    r"""Compute the exact posterior :math:`p(z_i \mid x_i)`, a distribution of batch shape ``(N,)``.

    The result is a :class:`Posterior` of one latent. Of several discrete latents, in any plates, it is a
    :class:`~pyro_vae.exact.DiscretePosterior`. Of a linear Gaussian model it is a normal distribution if the latent is
    independent in each place of its batch, and else, also for several latents, a
    :class:`~pyro_vae.exact.gaussian_elimination.GaussianPosterior`. The last two have numbers by site. Arguments and
    errors are those of :func:`log_evidence`.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.mlp([8])
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> posterior(vae.model, torch.randn(100, 2)).sample((3,)).shape
    torch.Size([3, 100, 1])
    """
    tolerance = positive(tolerance, "tolerance")
    batches = ModelGuide.in_batches(model, None, data, plate)
    if (closed := _closed_form(batches.first)) is None:
        return _in_parts(batches, tolerance, progress)
    if len(batches) > 1:
        closed = _closed_form(batches.whole())
    return closed


def _closed_form(pair: ModelGuide) -> Any:
    """The posterior where it is a distribution, or the result of an elimination; else ``None``."""
    if (discrete := _discrete_model(pair)) is not None:
        return discrete.posterior()
    if (gaussian := _gaussian_posterior(pair)) is not None:
        return gaussian.single_marginal() or gaussian
    if (collapsed := _collapsed(pair)) is not None and (conjugate := collapsed.conjugate_posterior()) is not None:
        return conjugate
    _check_local(pair, "latents that are all linear Gaussian, or a single conjugate one")
    p = ModelDensity(pair)
    p.single_site()
    return None if p.is_discrete or (linear := linear_gaussian(p)) is None else linear.posterior()


def _in_parts(batches: RowBatches, tolerance: float, progress: bool | None) -> "Posterior":
    """The posterior by a sum or a quadrature."""
    kept: list[tuple[ModelDensity, QuadratureRule | None]] = []
    with progress_bar("exact.posterior", progress, total=batches.num_data, unit="datum") as bar:

        def run(index: int) -> Tensor:
            pair, evidence = batches[index], []
            with rows_from(pair.data.first_row):
                for part, log_p, rule in _solved(pair, tolerance):
                    evidence.append(log_p)
                    if len(batches) == 1:
                        kept.append((part, rule))
                    bar.advance(part.num_data)
            return torch.cat(evidence)

        if len(batches) == 1:
            return Posterior(ModelDensity(batches.first), run(0), kept)
        evidence = in_chunks("exact.posterior", range(len(batches)), run, batches.first.data[0].device)
    return Posterior(ModelDensity(batches.first), torch.cat(evidence), _Parts(batches, tolerance))


def _solved(pair: ModelGuide, tolerance: float) -> "Iterator[tuple[ModelDensity, Tensor, QuadratureRule | None]]":
    """Iterate over parts of the rows, with their log p(x), and the rule of a quadrature."""
    p = ModelDensity(pair)
    if p.is_discrete:
        yield p, _summed_evidence(p), None
        return
    for part in _batches(p):
        yield part, *_integrated_evidence(part, tolerance)


class _Parts:
    """A model on parts of its rows, with the rules of their quadratures, which are made whenever they are needed.

    A rule has some hundred numbers for each row, and the runs of a model on all rows may have as many.
    """

    def __init__(self, batches: RowBatches, tolerance: float):
        self._batches, self._tolerance = batches, tolerance

    def densities(self) -> Iterator[ModelDensity]:
        """Iterate over the densities."""
        for index in range(len(self._batches)):
            yield _reporting(self._batches, index, ModelDensity)

    def rules(self) -> Iterator[tuple[ModelDensity, Any]]:
        """Iterate over the densities with their rules; ``None`` of a discrete latent."""
        for index in range(len(self._batches)):
            found = _reporting(self._batches, index, lambda pair: list(_solved(pair, self._tolerance)))
            yield from ((part, rule) for part, _, rule in found)


class _KeptParts(_Parts):
    """Parts that are kept in memory."""

    def __init__(self, parts: "Sequence[tuple[ModelDensity, QuadratureRule | None]]"):
        self._kept = parts

    def densities(self) -> Iterator[ModelDensity]:
        return (part for part, _ in self._kept)

    def rules(self) -> Iterator[tuple[ModelDensity, Any]]:
        return iter(self._kept)


@torch.no_grad()
@without_training
def _reporting(batches: RowBatches, index: int, compute: Callable[[ModelGuide], Any]) -> Any:
    """Compute something from a batch of rows, after the call that made the batches."""
    return compute(batches[index])


@report_of_ranks("exact.elbo")
@torch.no_grad()
@any_arguments
@without_training
def elbo(
    model: Function,
    guide: Function,
    *data: Data,
    plate: str = "data",
    tolerance: float = 1e-4,
    progress: bool | None = None,
) -> Tensor:
    r"""Compute the ELBO of each datum without Monte Carlo, :math:`\mathbb{E}_{q}[\log p(x_i, z) - \log q(z \mid x_i)]`.

    It is a sum over states, or a quadrature around q(z | x_i). All else is as in :func:`log_evidence`.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.mlp([8])
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> x = torch.randn(50, 2)
    >>> total = elbo(vae.model, vae.guide, x) + kl(vae.model, vae.guide, x)
    >>> torch.testing.assert_close(total, log_evidence(vae.model, x), atol=1e-3, rtol=0)
    """
    tolerance = positive(tolerance, "tolerance")
    batches = ModelGuide.in_batches(model, guide, data, plate)
    return _by_rows("exact.elbo", progress, batches, lambda pair: _elbo(pair, tolerance, progress))


def _elbo(pair: ModelGuide, tolerance: float, progress: bool | None) -> Tensor:
    """The ELBO of each cell, of the rows of a pair."""
    if (discrete := _discrete_model(pair)) is not None:
        return discrete.elbo().to(discrete.dtype)
    if (gaussian := _gaussian_posterior(pair)) is not None and (gap := _gaussian_kl(pair, gaussian)) is not None:
        return gaussian.log_evidence - gap
    if (collapsed := _collapsed(pair)) is not None and (gap := collapsed.conjugate_kl()) is not None:
        return collapsed.by_cell(collapsed.log_evidence(tolerance)) - gap
    _check_local(pair, "latents that are all linear Gaussian, or a single conjugate one")
    p = ModelDensity(pair)
    q = GuideDensity(p)
    if p.is_discrete:
        return q.sum(lambda values: p.log_joint(values) - q.log_prob(values)).to(p.dtype)
    return torch.cat(_in_batches("exact.elbo", progress, p, lambda part: q.of_rows(part).elbo(tolerance))).to(p.dtype)


@report_of_ranks("exact.kl")
@torch.no_grad()
@any_arguments
@without_training
def kl(
    model: Function,
    guide: Function,
    *data: Data,
    plate: str = "data",
    tolerance: float = 1e-4,
    progress: bool | None = None,
) -> Tensor:
    r"""Compute the inference gap :math:`\mathrm{KL}(q(z \mid x_i) \,\Vert\, p(z \mid x_i))` of each datum, in nats.

    For a continuous latent it is log p(x) less an ELBO on other nodes than those of :func:`elbo`. So their sum equals
    :func:`log_evidence` only if all three are right. A negative difference is not returned: it raises.
    Arguments and errors are those of :func:`log_evidence`.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.Bernoulli(2), guides.Bernoulli(2, 2, net), likelihoods.Normal(2, 2, net))
    >>> bool((kl(vae.model, vae.guide, torch.randn(5, 2)) >= 0).all())
    True
    """
    tolerance = positive(tolerance, "tolerance")
    batches = ModelGuide.in_batches(model, guide, data, plate)
    return _by_rows("exact.kl", progress, batches, lambda pair: _kl(pair, tolerance, progress))


def _kl(pair: ModelGuide, tolerance: float, progress: bool | None) -> Tensor:
    """The KL of each cell, of the rows of a pair."""
    if (discrete := _discrete_model(pair)) is not None:
        return (discrete.log_evidence() - discrete.elbo()).to(discrete.dtype)
    if (gaussian := _gaussian_posterior(pair)) is not None and (gap := _gaussian_kl(pair, gaussian)) is not None:
        return gap
    if (collapsed := _collapsed(pair)) is not None and (gap := collapsed.conjugate_kl()) is not None:
        return gap
    _check_local(pair, "latents that are all linear Gaussian, or a single conjugate one")
    p = ModelDensity(pair)
    q = GuideDensity(p)
    if p.is_discrete:
        evidence = _summed_evidence(p)
        return q.sum(lambda values: q.log_prob(values) - (p.log_joint(values) - evidence)).to(p.dtype)

    def both(part: ModelDensity) -> tuple[Tensor, Tensor]:
        return _integrated_evidence(part, tolerance)[0], q.of_rows(part).elbo(tolerance, reach=1.25)

    evidence, bound = map(torch.cat, zip(*_in_batches("exact.kl", progress, p, both), strict=True))
    gap = evidence - bound
    rounding = 16 * torch.finfo(p.dtype).eps * (1 + evidence.abs())
    if (gap < -2 * tolerance - rounding).any():
        raise QuadratureError(
            f"quadrature did not converge: the KL of datum {{}} would be {float(gap.min()):.3g} nats, and no KL is "
            "negative; its log p(x) or its ELBO is wrong",
            int(gap.argmin()),
        )
    return gap.to(p.dtype)


def _discrete_model(pair: ModelGuide) -> DiscreteModel | None:
    """The model, if its latents are summed out by elimination."""
    finite = [name for name, site in pair.latents.items() if site["fn"].has_enumerate_support]
    others = [name for name, site in pair.latents.items() if name not in finite and not is_point(site["fn"])]
    if finite and others:
        raise ValueError(
            f"`model` must have latents that all have finitely many states, or none that has, got {finite} with such "
            f"states and {others} without; use pv.log_evidence with a guide of {others}, which sums over the others"
        )
    return DiscreteModel(pair) if DiscreteModel.fits(pair) else None


class Posterior(Result, dist.TorchDistribution):
    """An exact posterior p(z | x) of a discrete latent, or of a continuous one by quadrature.

    The batch shape is ``(N,)``, the event shape that of the latent site. ``log_prob`` and ``sample`` run the model, in
    evaluation mode. Of more rows than run together, the mean and draws solve each batch of rows again.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        p: ModelDensity,
        evidence: Tensor,
        rules: "Sequence[tuple[ModelDensity, QuadratureRule | None]] | _Parts | None" = None,
    ):
        self._p, self.log_evidence = _evaluated(p), evidence
        self._parts = rules if isinstance(rules, _Parts) else _KeptParts(rules or [(p, None)])
        self._name, site = p.single_site()
        self._support = site["fn"].support
        super().__init__(torch.Size([len(evidence)]), site["fn"].event_shape, validate_args=False)

    def _line(self) -> str:
        how = f"by a sum over {count_of(self._p.num_states, 'state')}" if self._p.is_discrete else "by quadrature"
        data, shape = count_of(len(self.log_evidence), "datum", "data"), tuple(self.event_shape)
        log_p = self.log_evidence.double().mean().item()
        return f"p({self._name} | x) of {data}, event shape {shape}, exact {how}; log p(x) {log_p:.3f} nats per datum"

    def _table(self) -> Table:
        rows = [
            ("latent site", self._name),
            ("data", f"{len(self.log_evidence):,}"),
            ("event shape", tuple(self.event_shape)),
            ("log p(x)", f"{self.log_evidence.double().mean().item():.3f}"),
        ]
        how = f"a sum over {count_of(self._p.num_states, 'state')}" if self._p.is_discrete else "quadrature"
        return Table(("property", "value"), rows, f"Exact, by {how}. log p(x) is in nats per datum.")

    @property
    def _rule(self) -> QuadratureRule | None:
        """The rule of the first batch of rows."""
        return next(self._parts.rules())[1]

    @property
    def support(self) -> constraints.Constraint:
        return self._support

    @torch.no_grad()
    def log_prob(self, value: Tensor) -> Tensor:
        """Compute log p(z | x) at ``(*, N, *event)`` or ``(*, 1, *event)``, as ``(*, N)``."""
        sample_shape = value.shape[: value.dim() - 1 - self.event_dim]
        flat = value.reshape(-1, *value.shape[len(sample_shape) :])
        parts = []
        for part, rows in self._numbered(self._parts.densities()):
            values = flat if flat.shape[1] == 1 else flat[:, rows]
            log_joint = torch.cat([part.log_joint({self._name: chunk}) for chunk in values.split(part.chunk)])
            parts.append((log_joint.double() - self.log_evidence[rows]).to(part.dtype))
        return torch.cat(parts, 1).reshape(*sample_shape, -1)

    def _numbered(self, parts: Iterable[ModelDensity]) -> Iterator[tuple[ModelDensity, slice]]:
        """Iterate over parts in evaluation mode, and their rows."""
        start = 0
        for part in parts:
            yield _evaluated(part), slice(start, start + part.num_data)
            start += part.num_data

    def _weighted(self) -> "Iterator[tuple[ModelDensity, Iterator[tuple[Tensor, Tensor]]]]":
        """Iterate over parts, with chunks of values ``(C, 1 or N, *event)`` and their log-masses ``(C, N)``.

        The values are all states, or the nodes of the quadrature.
        """
        if self._p.is_discrete:
            for part, rows in self._numbered(self._parts.densities()):
                yield part, _states(part, self._name, self.log_evidence[rows])
            return
        for part, rule in self._parts.rules():
            yield part, ((values, log_mass) for values, log_mass, _ in _nodes(_evaluated(part), rule))

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return self._p.is_discrete

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return the states of a discrete latent, ``(S, N or 1, *event)``."""
        states = torch.cat([values[self._name] for values in self._p.states()])
        return states.expand(-1, *self.batch_shape, *self.event_shape) if expand else states

    @cached_property
    def mean(self) -> Tensor:
        """The posterior mean, ``(N, *event)``."""
        with torch.no_grad():
            mean = torch.cat([_mean(weighted, part.zeros()) for part, weighted in self._weighted()])
        return mean.reshape(self.batch_shape + self.event_shape).to(self._p.dtype)

    @cached_property
    def probs(self) -> Tensor:
        """The probability of each state of a discrete latent, ``(S, N)``, ordered as ``enumerate_support``."""
        if not self._p.is_discrete:
            raise AttributeError("a continuous posterior has no `probs`, use `log_prob`")
        with torch.no_grad():
            found = [[log_mass.exp().to(self._p.dtype) for _, log_mass in states] for _, states in self._weighted()]
            return torch.cat([torch.cat(masses) for masses in found], 1)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw ``(*sample_shape, N, *event)``: states by their masses, or points by their density."""
        count = math.prod(sample_shape)
        if self._p.is_discrete:
            drawn = [_draw_states(part, states, count) for part, states in self._weighted()]
        else:
            drawn = [_draw(_evaluated(part), rule, count) for part, rule in self._parts.rules()]
        values = torch.cat(drawn, 1)
        return values.to(self._p.dtype).reshape(*sample_shape, *self.batch_shape, *self.event_shape)


def _states(p: ModelDensity, name: str, log_evidence: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over chunks of states ``(C, 1, *event)`` and their log-masses ``(C, N)`` under the posterior."""
    for states in p.states():
        yield states[name], p.log_joint(states).double() - log_evidence


def _draw_states(p: ModelDensity, states: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Draw from states and their log-masses, ``(count, N, *event)``."""
    uniform = _uniform(p.num_data, count, p.data[0])
    (values,) = _invert(((mass, [state]) for state, mass in states), uniform)
    return values


def _mean(weighted: Iterable[tuple[Tensor, Tensor]], zeros: Tensor) -> Tensor:
    """The mean ``(N, E)`` of values ``(C, 1 or N, *event)`` under log-masses ``(C, N)``."""
    total: Tensor | None = None
    for values, log_mass in weighted:
        flat = values.double().flatten(2) if values.dim() > 2 else values.double()[..., None]
        part = torch.einsum("cn,cne->ne", log_mass.exp(), flat.expand(*log_mass.shape, -1))
        total = part if total is None else total + part
    return zeros if total is None else total


def _invert(masses: Iterable[tuple[Tensor, list[Tensor]]], uniform: Tensor) -> list[Tensor]:
    """Choose items by inverting their cumulated masses.

    Args:
        masses: chunks of log-masses ``(C, N)`` that sum to one, and of what to choose, ``(C, 1 or N, ...)`` each.
        uniform: numbers in [0, 1), ``(N, S)``.

    Returns:
        The choices, ``(S, N, ...)`` each.
    """
    chosen: list[Tensor] = []
    reached = torch.zeros_like(uniform[:, 0])
    for log_mass, items in masses:
        cumulated = reached[:, None] + log_mass.exp().T.cumsum(1)
        index = torch.searchsorted(cumulated, uniform, right=True)
        here = ((uniform >= reached[:, None]) & (index < len(log_mass))).T
        index = index.T.clamp(max=len(log_mass) - 1)
        reached = cumulated[:, -1]
        rows = torch.arange(len(uniform), device=uniform.device)
        for place, item in enumerate(items):
            picked = item.expand(-1, len(uniform), *item.shape[2:])[index, rows]
            if place == len(chosen):
                chosen.append(picked)
            mask = here.reshape(*here.shape, *[1] * (item.dim() - 2))
            chosen[place] = torch.where(mask, picked, chosen[place])
    return chosen


def _uniform(num_data: int, count: int, like: Tensor) -> Tensor:
    # Masses sum to one up to rounding. The factor keeps every number below their sum.
    return torch.rand(num_data, count, dtype=torch.float64, device=like.device) * (1 - 1e-9)


def _nodes(p: ModelDensity, rule: QuadratureRule) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Iterate over values at nodes, log-masses ``(C, N)``, and starts, widths and log-densities of their cells."""
    joint = _Joint(p)
    log_evidence = torch.stack([log_mass.logsumexp(0) for _, log_mass in rule.blocks]).logsumexp(0)
    for nodes, log_weights, cells in rule.chunks(p.chunk):
        log_density = joint(nodes)[0].double() - log_evidence
        yield joint.coordinates.to_site(nodes), log_density + log_weights, [cells.low, cells.width, log_density]


def _draw(p: ModelDensity, rule: QuadratureRule, count: int) -> Tensor:
    """Draw from the density, ``(count, N, *event)``.

    A node is drawn by its mass, and a point uniformly from the cell around it. Of each ``_CANDIDATES`` such points one
    is taken, by an independence sampler of Metropolis and Hastings: the points follow a density q that is constant in
    cells, and after n steps at most (1 - 1/w)^n of the draws still do, for w the largest p/q.

    Source: Liu 1996, "Metropolized independent sampling", theorem 2.1.
    """
    joint = _Joint(p)
    uniform = _uniform(p.num_data, count * _CANDIDATES, p.data[0])
    low, width, log_q = _invert(((mass, cells) for _, mass, cells in _nodes(p, rule)), uniform)
    points = low + torch.rand(low.shape, dtype=low.dtype, device=low.device) * width
    log_p = torch.cat([joint(part)[0].double() for part in points.split(p.chunk)])
    points, ratio = (part.unflatten(0, (_CANDIDATES, count)) for part in (points, log_p - log_q))
    current, at = points[0], ratio[0]
    for proposed, proposed_ratio in zip(points[1:], ratio[1:], strict=True):
        accepted = torch.rand_like(at).log() < proposed_ratio - at
        current, at = torch.where(accepted[..., None], proposed, current), torch.where(accepted, proposed_ratio, at)
    return joint.coordinates.to_site(current)


def _evaluated(p: ModelDensity) -> ModelDensity:
    """A copy that runs the model in evaluation mode whenever it is run."""
    copied = copy(p)
    copied.log_joint = evaluation_mode(p.model)(p.log_joint)  # type: ignore[method-assign]
    return copied


def _gaussian_posterior(pair: ModelGuide) -> "GaussianPosterior | None":
    from pyro_vae.exact.gaussian_elimination import gaussian_elimination  # scipy.sparse is slow to import

    return gaussian_elimination(pair)


def _gaussian_kl(pair: ModelGuide, posterior: "GaussianPosterior") -> Tensor | None:
    from pyro_vae.exact.gaussian_elimination import gaussian_kl

    return gaussian_kl(pair, posterior)


def _collapsed(pair: ModelGuide) -> "Collapsed | None":
    """The model with all latents but one or two integrated in closed form.

    A single latent of each row has a quadrature of its own, which runs rows in batches.
    """
    from pyro_vae.exact.collapsed import collapsed_density

    found = collapsed_density(pair)
    alone = len(pair.latents) == 1 and [frame.name for frame in pair.units] == [pair.plate]
    return None if found is not None and found.given and alone else found


def _check_local(pair: ModelGuide, must: str) -> None:
    """Raise if latents are global, where only some structures have an exact answer."""
    if pair.latents and pair.observed and pair.global_latents:
        ModelDensity(pair, by_rows=False)  # raises first if there is no p(x, z)
        raise ValueError(
            f"`model` must have {must} for an exact answer where latents are global, got the latents "
            f"{list(pair.latents)}, of which {pair.global_latents} are outside of the data plate {pair.plate!r}; "
            "pv.log_evidence estimates log p(x) with a guide, and pv.reference draws from p(z | x)"
        )


def _own_density(pair: ModelGuide) -> Tensor:
    """The log-density of the data of a model without latents, for each cell of the plates that all sites share."""
    pair.check_likelihood()
    for name, site in pair.observed.items():
        check_site("model", name, site)
    terms = [summed_to(log_density(site), pair.units) for site in pair.observed.values()]
    return torch.stack(terms).sum(0)


def _summed_evidence(p: ModelDensity) -> Tensor:
    return torch.stack([p.log_joint(values).double().logsumexp(0) for values in p.states()]).logsumexp(0)


def _batches(p: ModelDensity) -> list[ModelDensity]:
    """Batches of rows for quadrature, whose memory grows with them, if they do not depend on each other."""
    name, site = p.single_site()
    if site["fn"].support.is_discrete:
        raise ValueError(
            f"`model` must have discrete latents with `enumerate_support`, got {name!r} without it; for independent "
            "variables, replace `base.to_event(num_dims)` by pyro_vae.distributions.product.Product(base, num_dims)"
        )
    dims = p.coordinates().dims
    size = max(16, p.num_data * p.chunk_size(2**42) // 2**20 // 8**dims)
    if size < p.num_data and p.has_independent_rows():
        return list(p.batches(size))
    if p.num_data > (most := _MAX_ROWS[dims]):
        raise ValueError(
            f"`data` must have at most {most} rows where rows differ by their places, as by parameters for each datum, "
            f"so that all share one quadrature, got {p.num_data}, which would take about {2 * p.num_data / most:.2g} "
            "GiB of memory"
        )
    return [p]


def _in_batches(name: str, progress: bool | None, p: ModelDensity, compute: Callable[[ModelDensity], Any]) -> list[Any]:
    """Compute something for each batch of rows under a progress bar."""
    with progress_bar(name, progress, total=p.num_data, unit="datum") as bar:

        def run(part: ModelDensity) -> Any:
            found = compute(part)
            bar.advance(part.num_data)
            return found

        return in_chunks(name, _batches(p), run, p.data[0].device)


class _Joint:
    """log p(x, z) at coordinates of the latent."""

    def __init__(self, p: ModelDensity, box: Box | None = None):
        self.p, self.box, self.coordinates = p, box, p.coordinates()
        self.num_data, self.chunk = p.num_data, p.chunk
        self.rounding = 8 * torch.finfo(p.dtype).eps
        self._run = automatic(self._log_joint, _CHUNKS)

    def _log_joint(self, points: Tensor) -> list[Tensor]:
        with pyro.validation_enabled(False):
            log_joint = self.p.log_joint({self.coordinates.name: self.coordinates.to_site(points)}).double()
        return [(log_joint + self.coordinates.log_jacobian(points)).expand(len(points), self.num_data)]

    def __call__(self, points: Tensor) -> tuple[Tensor, None]:
        (log_joint,) = self._run(points)
        if self.box is not None and log_joint.isnan().any():  # a number has overflowed, far out in the prior
            outside = ((points < self.box.low) | (points > self.box.high)).any(-1)
            log_joint = log_joint.masked_fill(outside & log_joint.isnan(), -torch.inf)
        return log_joint, None

    def few_rows(self, count: int) -> "tuple[_Joint, Tensor] | None":
        rows = few_rows(self.p, count)
        return None if rows is None else (_Joint(self.p.of_rows(rows), self.box), rows)


def _integrated_evidence(p: ModelDensity, tolerance: float) -> tuple[Tensor, QuadratureRule]:
    with rows_from(int(p.rows[0])):
        return _integrated(p, tolerance)


def _integrated(p: ModelDensity, tolerance: float) -> tuple[Tensor, QuadratureRule]:
    box = p.integration_box(p.single_site()[1]["fn"]).union()
    evidence, _, rule = integrate(_Joint(p, box), box, tolerance)
    _compare_with_draws(p, evidence, tolerance)
    _check_digits(p, rule, tolerance)
    return evidence, rule


def _check_digits(p: ModelDensity, rule: QuadratureRule, tolerance: float) -> None:
    """Raise if the numbers of x have too few digits for log p(x | z), as data with an offset far above the noise."""
    peaks, heights = [], []
    for cells, log_mass in rule.blocks:
        top, place = log_mass.max(0)
        centre = (cells.low + cells.width / 2).expand(-1, p.num_data, -1)
        peaks.append(centre[place, torch.arange(p.num_data, device=place.device)])
        heights.append(top)
    best = torch.stack(heights).argmax(0)
    z = torch.stack(peaks)[best, torch.arange(p.num_data, device=best.device)]
    coordinates = p.coordinates()
    sites = p.runs.sites({coordinates.name: coordinates.to_site(z[None])[0]}, p.data)
    lost = p.zeros()
    for name in p.observed:
        fn, x = without_independent(sites[name]["fn"]), sites[name]["value"]
        if x.is_floating_point() and base_support(fn) is torch.distributions.constraints.real and not fn.event_shape:
            rounded = torch.nextafter(x, torch.full_like(x, torch.inf))
            change = (fn.log_prob(rounded) - fn.log_prob(x)).double().nan_to_num(0.0) ** 2
            lost = lost + change.expand(1, p.num_data, *x.shape[1:]).reshape(p.num_data, -1).sum(1) / 12
    if (lost.sqrt() > 0.01 + 10 * tolerance).any():
        datum = int(lost.argmax())
        raise QuadratureError(
            f"quadrature did not converge: the last digit of the data in {str(p.dtype).removeprefix('torch.')} changes "
            f"log p(x, z) of datum {{}} by {float(lost[datum].sqrt()):.2g} nats; subtract an offset that is far above "
            "the noise, or compute in float64: `vae.double()`, `x.double()`",
            datum,
        )


def _compare_with_draws(p: ModelDensity, evidence: Tensor, tolerance: float) -> None:
    """Raise if importance sampling from the prior finds more than the quadrature: mass that it has missed."""
    name, site = p.single_site()
    count = max(128, min(4096, 2**15 // p.num_data))
    with seeded(0), pyro.validation_enabled(False):
        values = site["fn"].sample((count,))[:, p.rows[:1]]
        log_prior = site["fn"].log_prob(values)[:, p.rows[:1]]
        chunks = zip(values.split(p.chunk), log_prior.split(p.chunk), strict=True)
        log_weight = torch.cat([(p.log_joint({name: z}) - prior).double() for z, prior in chunks]) - evidence
    check_draws(log_weight, "datum", tolerance)
