"""Annealed importance sampling: log p(x) of continuous latents whose posterior the guide misses."""

from dataclasses import dataclass

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import positive_int
from pyro_vae.evidence.importance_sampling import Done, Evidence, Sampler, batched_estimate
from pyro_vae.exact.densities import ModelDensity, Values, sample_with_log_q
from pyro_vae.exact.guide_density import GuideDensity

__all__ = ["annealed_log_evidence"]

_STEEPNESS = 4  # of the schedule of temperatures at its ends


_ACCEPTED = 0.8  # share of the proposals that step sizes aim at


_PRELIMINARY_CHAINS = 8


_PRELIMINARY_MOVES = 2  # at each temperature


@torch.no_grad()
@scoped_param_store()
def annealed_log_evidence(
    model: Function,
    guide: Function,
    *data: Tensor,
    num_chains: int = 100,
    num_temperatures: int = 100,
    num_leapfrog_steps: int = 5,
    plate: str = "data",
    seed: int = 0,
    progress: bool | None = None,
) -> Evidence:
    r"""Estimate the log marginal likelihood of each datum by annealed importance sampling, from the guide on,

    .. math:: f_\beta(z) = q(z \mid x)^{1 - \beta}\, p(x, z)^\beta, \qquad
              \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log \frac{p(x, z_{t-1})}{q(z_{t-1} \mid x)},

    with :math:`0 = \beta_0 < \dots < \beta_T = 1` and :math:`z_0 \sim q`, and each :math:`z_t` a move of Hamiltonian
    Monte Carlo from :math:`z_{t-1}` that leaves :math:`f_{\beta_t}` as it is. Each chain gives one weight. Their mean
    is unbiased for p(x) however short the chains are, so that its logarithm is a lower bound in expectation, as that
    of :func:`pyro_vae.log_evidence`, which is the case of T = 1. Where a guide is too narrow, its weights' k̂ is large
    and their mean too low; chains walk to where it never draws, and as T grows their weights become equal.

    Step sizes are of each datum and temperature. They are found in a preliminary pass of 8 chains whose weights are
    thrown away, and then frozen: given them, the mean is unbiased, which it would not be if moves adapted to the chains
    that they move. Temperatures are the sigmoidal ones of Wu et al., close at both ends. Latents on a part of the real
    line move in unconstrained coordinates (``biject_to`` of their support).

    Wu et al. start from the prior, which misses no part of the posterior and is far from it. For that, the guide is a
    function that draws from the prior, as in the example; in one for a VAE, ``pyro.sample("z", vae.prior())``.

    Chains that never find a mode of the posterior that is far from the guide miss its share of p(x), and neither k̂ nor
    the standard error knows.

    Args:
        model: a Pyro model with one data plate, as the rightmost dimension, that holds all its sites; its latents are
            continuous, and its density has a gradient in them.
        guide: its guide.
        data: what both take.
        num_chains: K, weights of each datum. Above 20 they have a k̂, which up to some hundred is drawn to 1/2.
        num_temperatures: T. The error falls with it; the time is proportional to K × T × leapfrog steps.
        num_leapfrog_steps: of a move, each with a gradient of log p(x, z) and log q(z | x).
        plate: name of the data plate.
        seed: of the draws.
        progress: whether to show a progress bar; only on a terminal if left out.

    Raises:
        ValueError: if model and guide are not of this form, a latent is discrete or has a support without coordinates,
            or the likelihood is not normalised.

    Source: Neal 2001, "Annealed importance sampling"; Wu, Burda, Salakhutdinov and Grosse 2017, "On the quantitative
    analysis of decoder-based generative models".

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def prior(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> x = torch.tensor([0.0, 3.0])
    >>> estimate = annealed_log_evidence(model, prior, x, num_chains=200, num_temperatures=30)
    >>> bool(((estimate.log_evidence - dist.Normal(0.0, 2**0.5).log_prob(x)).abs() < 0.2).all())
    True
    """
    positive_int(num_chains, "num_chains")
    positive_int(num_temperatures, "num_temperatures")
    positive_int(num_leapfrog_steps, "num_leapfrog_steps")
    problem = ModelDensity(model, data, plate)
    GuideDensity(problem, guide).check_densities()
    _Coordinates(problem)
    betas = _temperatures(num_temperatures)

    def sampler(part: ModelDensity, guide: Function, done: Done) -> Sampler:
        path = _Path(part, guide, num_leapfrog_steps)
        steps = path.step_sizes(betas)
        return lambda count: path.log_weights(count, betas, steps, done)

    with pyro.validation_enabled(False):  # a trajectory that goes astray ends in a rejected move, not in an error
        return batched_estimate(problem, guide, num_chains, sampler, seed, progress)


def _temperatures(count: int) -> list[float]:
    """From 0 to 1, ``count + 1`` of them, evenly spaced before a logistic function."""
    curve = (torch.linspace(-_STEEPNESS, _STEEPNESS, count + 1, dtype=torch.float64)).sigmoid()
    return ((curve - curve[0]) / (curve[-1] - curve[0])).tolist()


class _Coordinates:
    """Unconstrained coordinates ``(C, N, D)`` of all latents of a problem."""

    def __init__(self, problem: ModelDensity):
        self.transforms, self.shapes = {}, {}
        for name, site in problem.latents.items():
            fn = site["fn"]
            if fn.support.is_discrete:
                raise ValueError(
                    f"model: its latent {name!r} is discrete, and annealing moves latents along gradients. Use "
                    "pv.exact.log_evidence, which sums over states, or pv.log_evidence"
                )
            try:
                self.transforms[name] = biject_to(fn.support)
            except NotImplementedError as error:
                raise ValueError(
                    f"model: its latent {name!r} is on {fn.support}, of which `torch.distributions.biject_to` knows no "
                    "coordinates; write it on the real line and transform it after the site, or use pv.log_evidence"
                ) from error
            self.shapes[name] = self.transforms[name].inverse_shape(fn.event_shape)

    def points(self, values: Values) -> Tensor:
        """Of values ``(C, N, *event)``."""
        return torch.cat([_flat(self.transforms[name].inv(values[name])) for name in self.shapes], -1)

    def values(self, points: Tensor) -> tuple[Values, Tensor]:
        """The values at points, and the log-volume ``(C, N)`` that they take there."""
        values, volume = {}, points.new_zeros(points.shape[:2])
        parts = points.split([shape.numel() for shape in self.shapes.values()], -1)
        for (name, transform), part in zip(self.transforms.items(), parts, strict=True):
            coordinates = part.reshape(*points.shape[:2], *self.shapes[name])
            values[name] = transform(coordinates)
            volume = volume + _flat(transform.log_abs_det_jacobian(coordinates, values[name])).sum(-1)
        return values, volume


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(*tensor.shape[:2], -1)


@dataclass(frozen=True)
class _State:
    """Where C chains for each of N data are; densities and gradients are those of guide and model, in this order."""

    point: Tensor  # (C, N, D)
    log_densities: tuple[Tensor, Tensor]  # (C, N) each
    gradients: tuple[Tensor, Tensor]  # (C, N, D) each

    def log_density(self, beta: float) -> Tensor:
        return (1 - beta) * self.log_densities[0] + beta * self.log_densities[1]

    def gradient(self, beta: float) -> Tensor:
        return (1 - beta) * self.gradients[0] + beta * self.gradients[1]

    def log_ratio(self) -> Tensor:
        return self.log_densities[1] - self.log_densities[0]

    def replaced(self, where: Tensor, other: "_State") -> "_State":
        """With ``other`` where ``(C, N)`` says so."""

        def pair(theirs: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
            return torch.where(at, theirs[0], ours[0]), torch.where(at, theirs[1], ours[1])

        return _State(
            torch.where(where[..., None], other.point, self.point),
            pair(other.log_densities, self.log_densities, where),
            pair(other.gradients, self.gradients, where[..., None]),
        )


class _Path:
    """The distributions between q(z | x) and p(z | x), and moves that leave each as it is."""

    def __init__(self, problem: ModelDensity, guide: Function, num_leapfrog_steps: int):
        self.problem = problem
        self.guide = guide
        self.q = GuideDensity(problem, guide)
        self.coordinates = _Coordinates(problem)
        self.num_leapfrog_steps = num_leapfrog_steps

    def start(self, count: int) -> _State:
        """Draws of the guide."""
        return self.at(self.coordinates.points(sample_with_log_q(self.guide, self.problem.data, count)[0]))

    def at(self, point: Tensor) -> _State:
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            values, volume = self.coordinates.values(point)
            log_q, log_p = self.q.log_prob(values) + volume, self.problem.log_joint(values) + volume
            (of_q,) = torch.autograd.grad(log_q.sum(), point, retain_graph=True)
            (of_p,) = torch.autograd.grad(log_p.sum(), point)
        return _State(point.detach(), (log_q.detach(), log_p.detach()), (of_q, of_p))

    def move(self, state: _State, beta: float, step: Tensor) -> tuple[_State, Tensor]:
        """The state after a move, and the probability ``(C, N)`` with which its proposal was accepted.

        Step sizes, ``(N,)``, are varied by a fifth at random, so that no trajectory closes upon itself.
        """
        sizes = (step * (0.8 + 0.4 * torch.rand_like(state.log_densities[0])))[..., None]
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
        """Of each temperature between the first and the last, ``(N,)``, from chains of their own."""
        state = self.start(_PRELIMINARY_CHAINS)
        dims = state.point.shape[-1]
        step = state.point.std(0).mean(-1).clamp(min=1e-6) * dims**-0.25
        steps = []
        for beta in betas[1:-1]:
            for _ in range(_PRELIMINARY_MOVES):
                state, probability = self.move(state, beta, step)
                step = step * (probability.mean(0) - _ACCEPTED).exp()
            steps.append(step)
        return steps

    def log_weights(self, count: int, betas: list[float], steps: list[Tensor], done: Done) -> Tensor:
        """One of each chain, ``(count, N)``."""
        state = self.start(count)
        log_weight, share = torch.zeros_like(state.log_densities[0]), state.log_densities[0].numel() / (len(betas) - 1)
        for index in range(1, len(betas)):
            log_weight = log_weight + (betas[index] - betas[index - 1]) * state.log_ratio()
            if index < len(betas) - 1:
                state, _ = self.move(state, betas[index], steps[index - 1])
            done(share)
        return log_weight
