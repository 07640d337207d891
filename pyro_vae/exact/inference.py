r"""Exact log p(x), p(z | x), ELBO and KL(q || p(z | x)) of a Pyro model.

* Discrete latents: a sum over all states.
* Continuous latents of one or two dimensions, real (flows too), positive, in a box or relaxed: adaptive quadrature.
* Linear Gaussian models of any size: closed form.

Every function takes a Pyro model with one data plate, the rightmost dimension, that contains all latents.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae._utils.param_store import scoped_param_store
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import positive
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.linear_gaussian import linear_gaussian
from pyro_vae.exact.model_density import ModelDensity, Values
from pyro_vae.exact.quadrature import QuadratureRule, log_integral
from pyro_vae.model_guide import ModelGuide

__all__ = ["Posterior", "elbo", "kl", "log_evidence", "posterior"]


@torch.no_grad()
@scoped_param_store()
def log_evidence(model: Function, *data: Tensor, plate: str = "data", tolerance: float = 1e-4) -> Tensor:
    r"""Compute the log marginal likelihood of each datum, :math:`\log p(x_i) = \log \int p(x_i, z)\,dz`.

    Args:
        model, data: a Pyro model and its arguments, called as ``model(*data)``.
        plate: name of its data plate.
        tolerance: largest difference between two resolutions of a quadrature, in nats per datum.

    Returns:
        ``(N,)``, in nats. The error of a quadrature is judged by two resolutions: both can miss a feature of the
        decoder that is narrower than a hundredth of the prior.

    Raises:
        ValueError: if there is no exact answer, with the reason, for example the number of states.
        QuadratureError: if the quadrature does not converge, with the discrepancy.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.Bernoulli(1), guides.Bernoulli(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> log_evidence(vae.model, torch.randn(5, 2)).shape
    torch.Size([5])
    """
    positive(tolerance, "tolerance")
    p = ModelDensity(ModelGuide(model, None, data, plate))
    if p.is_discrete:
        return _summed_evidence(p).to(p.dtype)
    if (linear := linear_gaussian(p)) is not None:
        return linear.log_evidence().to(p.dtype)
    return _integrated_evidence(p, tolerance)[0].to(p.dtype)


@torch.no_grad()
@scoped_param_store()
def posterior(model: Function, *data: Tensor, plate: str = "data", tolerance: float = 1e-4) -> dist.TorchDistribution:
    r"""Compute the exact posterior :math:`p(z_i \mid x_i)`, a distribution of batch shape ``(N,)``.

    The result is a :class:`Posterior`, or a ``MultivariateNormal`` for a linear Gaussian model. Arguments and errors
    are those of :func:`log_evidence`. The model must have one latent site.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.mlp([8])
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> posterior(vae.model, torch.randn(100, 2)).sample((3,)).shape
    torch.Size([3, 100, 1])
    """
    positive(tolerance, "tolerance")
    p = ModelDensity(ModelGuide(model, None, data, plate))
    p.single_site()
    if p.is_discrete:
        return Posterior(p, _summed_evidence(p), None)
    if (linear := linear_gaussian(p)) is not None:
        return linear.posterior()
    return Posterior(p, *_integrated_evidence(p, tolerance))


@torch.no_grad()
@scoped_param_store()
def elbo(model: Function, guide: Function, *data: Tensor, plate: str = "data", tolerance: float = 1e-4) -> Tensor:
    r"""Compute the ELBO of each datum without Monte Carlo, :math:`\mathbb{E}_{q}[\log p(x_i, z) - \log q(z \mid x_i)]`.

    It is a sum over states, or a quadrature around q(z | x_i). All else is as in :func:`log_evidence`.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.mlp([8])
    >>> vae = VAE(priors.StandardNormal(1), guides.DiagonalNormal(2, 1, net), likelihoods.Normal(1, 2, net))
    >>> x = torch.randn(50, 2)
    >>> total = elbo(vae.model, vae.guide, x) + kl(vae.model, vae.guide, x)
    >>> torch.testing.assert_close(total, log_evidence(vae.model, x), atol=1e-3, rtol=0)
    """
    positive(tolerance, "tolerance")
    p = ModelDensity(ModelGuide(model, guide, data, plate))
    q = GuideDensity(p)

    def integrand(values: Values) -> Tensor:
        return p.log_joint(values) - q.log_prob(values)

    if p.is_discrete:
        return q.sum(integrand).to(p.dtype)
    return q.integral(integrand, q.integration_box(), tolerance).to(p.dtype)


@torch.no_grad()
@scoped_param_store()
def kl(model: Function, guide: Function, *data: Tensor, plate: str = "data", tolerance: float = 1e-4) -> Tensor:
    r"""Compute the inference gap :math:`\mathrm{KL}(q(z \mid x_i) \,\Vert\, p(z \mid x_i))` of each datum, in nats.

    It uses the normalised exact posterior. For a continuous latent, the quadrature is on a box around posterior and q;
    that of :func:`elbo` is around q alone. So their sum equals :func:`log_evidence` only if all three are right.
    Arguments and errors are those of :func:`log_evidence`.

    >>> from pyro_vae import VAE, guides, likelihoods, networks, priors
    >>> net = networks.linear()
    >>> vae = VAE(priors.Bernoulli(2), guides.Bernoulli(2, 2, net), likelihoods.Normal(2, 2, net))
    >>> bool((kl(vae.model, vae.guide, torch.randn(5, 2)) >= 0).all())
    True
    """
    positive(tolerance, "tolerance")
    p = ModelDensity(ModelGuide(model, guide, data, plate))
    q = GuideDensity(p)
    if p.is_discrete:
        evidence = _summed_evidence(p)
        return q.sum(lambda values: q.log_prob(values) - (p.log_joint(values) - evidence)).to(p.dtype)
    evidence, rule = _integrated_evidence(p, tolerance)

    def integrand(values: Values) -> Tensor:
        return q.log_prob(values) - (p.log_joint(values) - evidence)

    return q.integral(integrand, rule.box, tolerance).to(p.dtype)


class Posterior(dist.TorchDistribution):
    """An exact posterior p(z | x) of a discrete latent, or of a continuous one by quadrature.

    The batch shape is ``(N,)``, the event shape that of the latent site. ``log_prob`` runs the model. ``sample`` draws
    a state, or a quadrature cell and a uniform point in it.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, p: ModelDensity, evidence: Tensor, rule: QuadratureRule | None):
        self._p, self._rule, self.log_evidence = p, rule, evidence
        self._name, site = p.single_site()
        self._support = site["fn"].support
        super().__init__(torch.Size([p.num_data]), site["fn"].event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return self._support

    @torch.no_grad()
    def log_prob(self, value: Tensor) -> Tensor:
        """Compute log p(z | x) at ``(*, N, *event)`` or ``(*, 1, *event)``, as ``(*, N)``."""
        sample_shape = value.shape[: value.dim() - 1 - self.event_dim]
        flat = value.reshape(-1, *value.shape[len(sample_shape) :])
        log_joint = self._p.log_joint({self._name: flat}).double()
        return (log_joint - self.log_evidence).to(self._p.dtype).reshape(*sample_shape, -1)

    def _weighted(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over chunks of site values ``(C, 1, *event)`` and their log-masses ``(C, N)`` under the posterior."""
        p = self._p
        if self._rule is None:
            for states in p.states():
                yield states[self._name], p.log_joint(states).double() - self.log_evidence
        else:
            coordinates = p.coordinates()
            for nodes, log_weights, _ in self._rule.chunks(p.chunk):
                values = coordinates.to_site(nodes)
                log_mass = p.log_joint({self._name: values}).double() + log_weights + coordinates.log_jacobian(nodes)
                yield values, log_mass - self.log_evidence

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return self._rule is None

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return the states of a discrete latent, ``(S, N or 1, *event)``."""
        states = torch.cat([values[self._name] for values in self._p.states()])
        return states.expand(-1, *self.batch_shape, *self.event_shape) if expand else states

    @cached_property
    def mean(self) -> Tensor:
        """The posterior mean, ``(N, *event)``."""
        with torch.no_grad():
            total = self.log_evidence.new_zeros(*self.batch_shape, self.event_shape.numel())
            for values, log_mass in self._weighted():
                flat = values.double().reshape(*values.shape[:2], -1).expand(*log_mass.shape, -1)
                total += torch.einsum("cn,cne->ne", log_mass.exp(), flat)
        return total.reshape(self.batch_shape + self.event_shape).to(self._p.dtype)

    @cached_property
    def probs(self) -> Tensor:
        """The probability of each state of a discrete latent, ``(S, N)``, ordered as ``enumerate_support``."""
        if self._rule is not None:
            raise AttributeError("a continuous posterior has no `probs`, use `log_prob`")
        with torch.no_grad():
            return torch.cat([log_mass.exp() for _, log_mass in self._weighted()]).to(self._p.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:
        """Draw ``(*sample_shape, N, *event)`` by inverting the cumulated masses of states or nodes."""
        shape = torch.Size([*self.batch_shape, math.prod(sample_shape)])
        # The masses sum to one up to rounding, since log_evidence is their sum. The factor keeps every draw below it.
        uniform = torch.rand(shape, dtype=torch.float64, device=self.log_evidence.device) * (1 - 1e-9)
        chosen = torch.zeros_like(uniform, dtype=torch.long)
        reached = self.log_evidence.new_zeros(shape[0])
        first, states = 0, []
        for values, log_mass in self._weighted():
            cumulated = reached[:, None] + log_mass.exp().T.cumsum(1)
            index = torch.searchsorted(cumulated, uniform, right=True)
            here = (uniform >= reached[:, None]) & (index < len(values))
            chosen = torch.where(here, first + index, chosen)
            first, reached = first + len(values), cumulated[:, -1]
            if self._rule is None:
                states.append(values[:, 0])
        if self._rule is None:
            values = torch.cat(states)[chosen.T]
        else:
            values = self._p.coordinates().to_site(self._rule.draw(chosen.T))
        return values.to(self._p.dtype).reshape(*sample_shape, *self.batch_shape, *self.event_shape)


def _summed_evidence(p: ModelDensity) -> Tensor:
    return torch.stack([p.log_joint(values).double().logsumexp(0) for values in p.states()]).logsumexp(0)


def _integrated_evidence(p: ModelDensity, tolerance: float) -> tuple[Tensor, QuadratureRule]:
    name, site = p.single_site()
    if site["fn"].support.is_discrete:
        raise ValueError(
            f"`model` must have discrete latents with `enumerate_support`, got {name!r} without it; for independent "
            "variables, replace `base.to_event(num_dims)` by pyro_vae.distributions.product.Product(base, num_dims)"
        )
    coordinates = p.coordinates()
    box = coordinates.integration_box(site["fn"], p.num_data).union()

    def log_integrand(nodes: Tensor) -> Tensor:
        return p.log_joint({name: coordinates.to_site(nodes)}) + coordinates.log_jacobian(nodes)

    return log_integral(log_integrand, box, tolerance, p.chunk)
