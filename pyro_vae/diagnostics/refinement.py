"""A guide refined for each datum on its own: free parameters in the place of what a network says."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_vae._utils.typing import Function
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import MAX_STATES, Values
from pyro_vae.parts.base import Conditional
from pyro_vae.training.schedules import decayed
from pyro_vae.vae import VAE

__all__ = ["refine"]


Build = Callable[[list[Tensor]], Any]


_FIXED = {"temperature", "total_count"}  # parameters that belong to the family, not to a datum


def refine(q: GuideDensity, steps: int, lr: float, num_particles: int) -> Function:
    """The guide with parameters of its own for each datum, each trained on its own ELBO from where the guide is.

    Draws from the current random stream; touches neither model nor guide.

    Raises:
        ValueError: if the guide is no product of latents whose distributions can be rebuilt with free parameters.
    """
    families = _families(q)
    parameters = {name: start for name, (start, _) in families.items()}
    free = [parameter.requires_grad_() for start in parameters.values() for parameter in start]
    # A slope of less than eps nats is not blown up to a step of lr: where q is the posterior, it stays.
    optimizer, schedule = torch.optim.Adam(free, lr=lr, eps=1e-3), decayed(lr, steps)
    averages = [torch.zeros_like(parameter) for parameter in free]
    counted = range(steps // 2, steps)  # whose mean is closer to where the gradient is zero than the last one
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule(step)
        with torch.enable_grad():
            fns = {name: build(parameters[name]) for name, (_, build) in families.items()}
            still = {name: build([p.detach() for p in parameters[name]]) for name, (_, build) in families.items()}
            loss = -_bound(q, fns, still, num_particles).sum()
            gradients = torch.autograd.grad(loss, free)
        for parameter, gradient in zip(free, gradients, strict=True):
            parameter.grad = gradient
        if not all(gradient.isfinite().all() for gradient in gradients):
            raise FloatingPointError(f"refinement, step {step + 1}: the gradient is not finite. Take a smaller lr")
        optimizer.step()
        if step in counted:
            for average, parameter in zip(averages, free, strict=True):
                average += parameter.detach() / len(counted)
    with torch.no_grad():
        remaining = iter(averages)
        fns = {name: build([next(remaining) for _ in start]) for name, (start, build) in families.items()}
    plate, num_data = q.p.plate, q.p.num_data

    def refined(*data: Tensor) -> None:
        with pyro.plate(plate, num_data, dim=-1):
            for name, fn in fns.items():
                pyro.sample(name, fn)

    return refined


def _bound(q: GuideDensity, fns: dict[str, Any], still: dict[str, Any], num_particles: int) -> Tensor:
    """The ELBO of each datum, ``(N,)``: draws of continuous latents, and the sum over all states of discrete ones.

    ``still`` are the same distributions without gradient in their parameters: the score has expectation zero, and
    without it the gradient has no variance left where q is the posterior.
    """
    problem = q.p
    discrete = [name for name in fns if fns[name].support.is_discrete]
    drawn = {name: fn.rsample(torch.Size([num_particles])) for name, fn in fns.items() if name not in discrete}
    count = num_particles if drawn else 1
    states = _states({name: fns[name] for name in discrete})
    num_states = len(next(iter(states.values()))) if states else 1
    values = {name: value.repeat_interleave(num_states, 0) for name, value in drawn.items()}
    values |= {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in states.items()}
    certain = problem.zeros().to(problem.dtype).expand(num_states, -1)
    log_mass = sum((fns[name].log_prob(states[name]) for name in states), certain)
    log_q = log_mass.repeat(count, 1) + sum(still[name].log_prob(values[name]) for name in drawn)
    terms = (problem.log_joint(values) - log_q).unflatten(0, (count, num_states))
    weight = log_mass.exp()
    return torch.where(weight > 0, weight * terms, 0.0).sum(1).mean(0)


def _states(fns: dict[str, Any]) -> Values:
    """All joint states, ``(S, 1, *event)``."""
    supports = [fn.enumerate_support(expand=False).reshape(-1, 1, *fn.event_shape) for fn in fns.values()]
    if not supports:
        return {}
    grid = torch.cartesian_prod(*(torch.arange(len(support), device=support.device) for support in supports))
    grid = grid.reshape(-1, len(supports))
    return {name: support[grid[:, place]] for place, (name, support) in enumerate(zip(fns, supports, strict=True))}


_REMEDY = (
    "Refine it yourself (for a VAE: guides.PerDatum.refining(encoder, x), fitted with a frozen decoder), and hand that "
    "guide over as `refined=`"
)


def _families(q: GuideDensity) -> dict[str, tuple[list[Tensor], Build]]:
    """Of each latent, unconstrained parameters to start from and the distribution that they make."""
    with torch.no_grad():
        factors = q.factors()
        if factors is None:
            raise ValueError(
                f"guide: its latents {list(q.sites)} hang on one another given x, and free parameters for each would "
                f"be another family. {_REMEDY}"
            )
        count = 1
        for name, fn in factors.items():
            if fn.support.is_discrete:
                try:
                    count *= len(fn.enumerate_support(expand=False))
                except (NotImplementedError, ValueError) as error:
                    raise ValueError(f"guide: its latent {name!r} does not enumerate: {error}. {_REMEDY}") from error
            elif not fn.has_rsample:
                raise ValueError(f"guide: its latent {name!r} is not drawn pathwise. {_REMEDY}")
        if count > MAX_STATES:
            raise ValueError(
                f"guide: its discrete latents have {count} states; at most {MAX_STATES} are summed over. {_REMEDY}"
            )
        encoder = _encoder(q)
        if encoder is not None:
            raw = encoder.raw_outputs(*q.p.data).clone()
            return {"z": ([raw], lambda parameters: encoder.family(parameters[0]))}
        return {name: _rebuilt(name, fn) for name, fn in factors.items()}


def _encoder(q: GuideDensity) -> Conditional | None:
    """The amortized guide of a VAE, whose raw outputs are its free parameters."""
    owner = getattr(q.guide, "__self__", None)
    if not isinstance(owner, VAE) or getattr(q.guide, "__func__", None) is not VAE.guide:
        return None
    return owner.encoder if isinstance(owner.encoder, Conditional) else None


def _rebuilt(name: str, fn: Any) -> tuple[list[Tensor], Build]:
    """The parameters of a distribution, unconstrained, and how to make it of them again."""
    if isinstance(fn, torch.distributions.Independent):
        start, inner = _rebuilt(name, fn.base_dist)
        wrapper, dims = type(fn), fn.reinterpreted_batch_ndims
        return start, lambda parameters: wrapper(inner(parameters), dims)
    kind = type(fn)
    given = {key: getattr(fn, key) for key in _names(fn)}
    free = [key for key in given if key not in _FIXED]
    transforms = {key: transform_to(fn.arg_constraints[key]) for key in free}

    def build(parameters: list[Tensor]) -> Any:
        values = {key: transforms[key](value) for key, value in zip(free, parameters, strict=True)}
        return kind(**{**given, **values})

    try:
        start = [transforms[key].inv(given[key]).detach().clone() for key in free]
        again = build(start)
        value = fn.sample()
        same = again.batch_shape == fn.batch_shape and torch.allclose(
            again.log_prob(value), fn.log_prob(value), rtol=1e-3, atol=1e-3
        )
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        same = False
    if not same or not free:
        raise ValueError(
            f"guide: its latent {name!r} is a {kind.__name__}, which does not rebuild from parameters. {_REMEDY}"
        )
    return start, build


def _names(fn: Any) -> list[str]:
    """The parameters that the distribution is made of: of several that say the same, one."""
    names = [key for key in fn.arg_constraints if key != "probs" or "logits" not in fn.arg_constraints]
    if "scale_tril" in names:
        names = [key for key in names if key not in ("covariance_matrix", "precision_matrix")]
    return names
