"""Annealed importance sampling: log p(x) of models with continuous latents, even if the guide is poor."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyro
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae._utils.param_store import without_training
from pyro_vae._utils.shared_calls import report_of_ranks
from pyro_vae._utils.traces import masked
from pyro_vae._utils.typing import Data, Function
from pyro_vae._utils.validation import positive_int
from pyro_vae.arguments import any_arguments
from pyro_vae.compilation.cost import automatic
from pyro_vae.evidence.importance_sampling import (
    Evidence,
    ReportProgress,
    WeightSampler,
    batched_estimate,
    densities,
    draws_at_once,
    log_evidence,
)
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import ModelDensity, Values

__all__ = ["annealed_log_evidence"]

_STEEPNESS = 4  # of the temperature schedule at its ends
_ACCEPTANCE = 0.8  # target of the step sizes
_PRELIMINARY_CHAINS = 8
_PRELIMINARY_MOVES = 2  # at each temperature


@report_of_ranks("annealed_log_evidence")
@torch.no_grad()
@any_arguments
@without_training
def annealed_log_evidence(
    model: Function,
    guide: Function,
    *data: Data,
    num_chains: int = 100,
    num_temperatures: int = 100,
    num_leapfrog_steps: int = 5,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
) -> Evidence:
    r"""Estimate the log marginal likelihood of each datum by annealed importance sampling, starting at the guide,

    .. math:: f_\beta(z) = q(z \mid x)^{1 - \beta}\, p(x, z)^\beta, \qquad
              \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log \frac{p(x, z_{t-1})}{q(z_{t-1} \mid x)},

    with :math:`0 = \beta_0 < \dots < \beta_T = 1` and :math:`z_0 \sim q`. Each :math:`z_t` is a move of Hamiltonian
    Monte Carlo from :math:`z_{t-1}` that leaves :math:`f_{\beta_t}` invariant. Each chain gives one weight. The mean is
    unbiased for p(x) for any length of the chains. So its logarithm is a lower bound in expectation, as that of
    :func:`pyro_vae.log_evidence`, which is the case T = 1. If a guide is too narrow, its weights have a large k̂ and a
    mean that is too low. Chains reach the values that it never draws, and as T grows their weights become equal.

    Each datum and temperature has its own step size. A preliminary pass of 8 chains finds the step sizes, which then
    stay fixed: the mean would be biased if moves adapted to the chains that they move. The temperatures are the
    sigmoidal ones of Wu et al., with small steps at both ends. Latents on a part of the real line move in unconstrained
    coordinates (``biject_to`` of their support).

    Wu et al. start at the prior, which covers the whole posterior but is far from it: pass a guide that draws from it,
    for a VAE ``pyro.sample("z", vae.prior())`` in the data plate.

    If all chains miss a mode of the posterior, its share of p(x) is missing, which neither k̂ nor the error shows.

    Args:
        model, guide: as for :func:`pyro_vae.log_evidence`; some latents are continuous, and densities have gradients in
            them. Discrete ones are summed out, of the guide, too.
        data: arguments of both.
        num_chains: K, weights of each datum. More than 20 have a k̂; up to some hundred, a prior pulls it to 1/2.
        num_temperatures: T. The error falls as T grows. The time is proportional to K × T × leapfrog steps.
        num_leapfrog_steps: of a move. Each computes a gradient of log p(x, z) and log q(z | x).
        plate: name of the data plate.
        seed: of the draws.
        progress: whether to show a progress bar; by default only on a terminal or in a notebook.

    Raises:
        ValueError: if model and guide are not of this form, a latent is discrete or has a support without unconstrained
            coordinates, or the likelihood is not normalised.

    Source: Neal 2001, "Annealed importance sampling"; Wu, Burda, Salakhutdinov and Grosse 2017, "On the quantitative
    analysis of decoder-based generative models".

    >>> from pyro_vae import VAE, exact, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> x = torch.randn(5, 2)
    >>> estimate = annealed_log_evidence(vae.model, vae.guide, x, num_chains=200, num_temperatures=30)
    >>> bool(((estimate.log_evidence - exact.log_evidence(vae.model, x)).abs() < 0.2).all())
    True
    """
    positive_int(num_chains, "num_chains")
    positive_int(num_temperatures, "num_temperatures")
    positive_int(num_leapfrog_steps, "num_leapfrog_steps")
    p, q = densities(model, guide, data, plate, continuous=True)
    if not p.latents:  # none is left to move: each chain has log p(x) itself for its weight
        return log_evidence(model, guide, *data, num_samples=num_chains, plate=plate, seed=seed, progress=progress)
    _Coordinates(p)  # raises for discrete latents
    betas = _temperatures(num_temperatures)

    def make_sampler(part: ModelDensity, report: ReportProgress) -> WeightSampler:
        chunks = -(-num_chains // draws_at_once(part))
        path = _Path(q.of_rows(part), num_leapfrog_steps, chunks * num_temperatures * num_leapfrog_steps)
        steps = path.step_sizes(betas)
        return lambda count: path.log_weights(count, betas, steps, report)

    with pyro.validation_enabled(False):  # a diverging trajectory is rejected, and is no error
        return batched_estimate("annealed_log_evidence", p, num_chains, make_sampler, seed, progress)


def _temperatures(count: int) -> list[float]:
    """The ``count + 1`` temperatures from 0 to 1, a logistic function of evenly spaced numbers."""
    curve = torch.linspace(-_STEEPNESS, _STEEPNESS, count + 1, dtype=torch.float64, device="cpu").sigmoid()
    return ((curve - curve[0]) / (curve[-1] - curve[0])).tolist()


class _Coordinates:
    """Unconstrained coordinates ``(C, N, D)`` of all latents of a model, in N cells."""

    def __init__(self, p: ModelDensity):
        self.transforms, self.shapes, self.latents, self.layouts = {}, {}, p.latents, p.layouts
        for name, site in p.latents.items():
            fn = site["fn"]
            if fn.support.is_discrete:
                must = "have continuous latents, which annealing moves along gradients"
                hint = "use pv.exact.log_evidence, which sums over states, or pv.log_evidence"
                raise ValueError(f"`model` must {must}, got the discrete {name!r}; {hint}")
            try:
                self.transforms[name] = biject_to(fn.support)
            except NotImplementedError as error:
                must = "have latents with unconstrained coordinates (torch.distributions.biject_to)"
                hint = "write it on the real line and transform it after the site, or use pv.log_evidence"
                raise ValueError(f"`model` must {must}, got {name!r} on {fn.support}; {hint}") from error
            value = p.layouts[name].to_cells(site["value"][None])
            self.shapes[name] = self.transforms[name].inverse_shape(value.shape[2:])

    def points(self, values: Values) -> Tensor:
        """Map values ``(C, N, *inner, *event)`` to coordinates."""
        parts = []
        for name, transform in self.transforms.items():
            layout = self.layouts[name]
            parts.append(_flat(layout.to_cells(transform.inv(layout.to_site(values[name])))))
        return torch.cat(parts, -1)

    def values(self, points: Tensor) -> tuple[Values, Tensor]:
        """Map coordinates to values, with the log-determinant of the Jacobian, ``(C, N)``."""
        values, volume = {}, points.new_zeros(points.shape[:2])
        parts = points.split([shape.numel() for shape in self.shapes.values()], -1)
        for (name, transform), part in zip(self.transforms.items(), parts, strict=True):
            layout, site = self.layouts[name], self.latents[name]
            coordinates = layout.to_site(part.reshape(*points.shape[:2], *self.shapes[name]))
            value = transform(coordinates)
            log_volume = transform.log_abs_det_jacobian(coordinates, value)
            num_batch = site["value"].dim() - site["fn"].event_dim
            log_volume = masked(sum_rightmost(log_volume, log_volume.dim() - 1 - num_batch), site)
            values[name] = layout.to_cells(value)
            volume = volume + _flat(layout.to_cells(log_volume)).sum(-1)
        return values, volume


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(*tensor.shape[:2], -1)


@dataclass(frozen=True)
class _State:
    """Positions of C chains for each of N data, with densities and gradients of guide and model, in this order."""

    point: Tensor  # (C, N, D)
    log_densities: Tensor  # (2, C, N)
    gradients: Tensor  # (2, C, N, D)

    def log_density(self, beta: float) -> Tensor:
        return (1 - beta) * self.log_densities[0] + beta * self.log_densities[1]

    def gradient(self, beta: float) -> Tensor:
        return (1 - beta) * self.gradients[0] + beta * self.gradients[1]

    @staticmethod
    def joined(states: "Sequence[_State]") -> "_State":
        """Return the states of several groups of chains as one."""
        return _State(
            torch.cat([state.point for state in states]),
            torch.cat([state.log_densities for state in states], 1),
            torch.cat([state.gradients for state in states], 1),
        )

    def replaced(self, where: Tensor, other: "_State") -> "_State":
        """Take the positions of ``other`` where ``where``, ``(C, N)``, is True."""
        return _State(
            torch.where(where[..., None], other.point, self.point),
            torch.where(where, other.log_densities, self.log_densities),
            torch.where(where[..., None], other.gradients, self.gradients),
        )


class _Path:
    """The distributions between q(z | x) and p(z | x), and moves that leave each of them invariant."""

    def __init__(self, q: GuideDensity, num_leapfrog_steps: int, calls: int):
        self.p, self.q, self.coordinates, self.num_leapfrog_steps = q.p, q, _Coordinates(q.p), num_leapfrog_steps
        self._differentiated = automatic(self._log_densities, calls)

    def start(self, count: int) -> _State:
        """Start chains at draws of the guide."""
        return self.at(self.coordinates.points(self.q.sample(count)[0]))

    def at(self, point: Tensor) -> _State:
        """Compute densities and gradients; a point where a matrix of the model is singular has no density."""
        try:
            return _State(point.detach(), *self._differentiated(point.detach()))
        except torch.linalg.LinAlgError:
            if len(point) == 1:
                nowhere = torch.full((2, *point.shape[:2]), -torch.inf, dtype=point.dtype, device=point.device)
                return _State(point, nowhere, torch.zeros_like(point).expand(2, *point.shape))
            return _State.joined([self.at(chain) for chain in point.split(1)])

    def _log_densities(self, point: Tensor) -> list[Tensor]:
        """The log-densities of guide and model, ``(2, C, N)``, and their gradients, ``(2, C, N, D)``."""
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            values, volume = self.coordinates.values(point)
            densities = self.q.log_prob(values) + volume, self.p.log_joint(values) + volume
            gradients = [torch.autograd.grad(density.sum(), point, retain_graph=True)[0] for density in densities]
        return [torch.stack(densities).detach(), torch.stack(gradients)]

    def move(self, state: _State, beta: float, step: Tensor) -> tuple[_State, Tensor]:
        """Move the chains with steps ``(N,)``; return their state, and the acceptance probabilities ``(C, N)``."""
        # Step sizes vary at random by a fifth, so that no trajectory is periodic.
        sizes = (step * (0.8 + 0.4 * torch.rand_like(state.log_densities[0])))[..., None].to(state.point.dtype)
        momentum = torch.randn_like(state.point)
        energy = state.log_density(beta) - momentum.square().sum(-1) / 2
        proposal = state
        for _ in range(self.num_leapfrog_steps):
            momentum = momentum + sizes / 2 * proposal.gradient(beta)
            proposal = self.at(proposal.point + sizes * momentum)
            momentum = momentum + sizes / 2 * proposal.gradient(beta)
        change = proposal.log_density(beta) - momentum.square().sum(-1) / 2 - energy
        probability = change.clamp(max=0).exp().nan_to_num(0.0)
        return state.replaced(torch.rand_like(probability) < probability, proposal), probability

    def step_sizes(self, betas: list[float]) -> list[Tensor]:
        """Find step sizes ``(N,)`` for each temperature between the first and the last, with preliminary chains."""
        state, steps = self.start(_PRELIMINARY_CHAINS), []
        step = state.point.std(0).mean(-1).clamp(min=1e-6) * state.point.shape[-1] ** -0.25
        for beta in betas[1:-1]:
            for _ in range(_PRELIMINARY_MOVES):
                state, probability = self.move(state, beta, step)
                step = step * (probability.mean(0) - _ACCEPTANCE).exp()
            steps.append(step)
        return steps

    def log_weights(self, count: int, betas: list[float], steps: list[Tensor], report: ReportProgress) -> Tensor:
        """Compute the log-weights of new chains, ``(count, N)``."""
        state = self.start(count)
        log_weight = torch.zeros_like(state.log_densities[0])
        for index in range(1, len(betas)):
            log_weight = log_weight + (betas[index] - betas[index - 1]) * state.log_densities.diff(dim=0)[0]
            if index < len(betas) - 1:
                state, _ = self.move(state, betas[index], steps[index - 1])
            report(log_weight.numel() / (len(betas) - 1))
        return log_weight
