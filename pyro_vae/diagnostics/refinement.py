"""Refinement of a guide: free parameters for each datum, in place of the outputs of a network."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import transform_to
from torch.overrides import TorchFunctionMode

from pyro_vae._utils.chunks import in_chunks
from pyro_vae._utils.progress import Progress, progress_bar
from pyro_vae._utils.ranks import share_of
from pyro_vae._utils.typing import Function
from pyro_vae._utils.validation import with_article
from pyro_vae.compilation.cost import automatic
from pyro_vae.exact.guide_density import GuideDensity
from pyro_vae.exact.model_density import MAX_STATES, Values
from pyro_vae.parts.base import Conditional
from pyro_vae.training.schedules import decayed
from pyro_vae.vae import VAE

__all__ = ["RefinementError", "refine"]

Build = Callable[[list[Tensor]], Any]
"""A function from parameters to a distribution."""
_FIXED = {"temperature", "total_count"}  # parameters that belong to the family, not to a datum
_CHUNK = 2**20  # numbers in the draws of the rows that are refined together
_BETAS = 0.8, 0.95  # of Adam: the gradients have little noise, and some tens of steps are few for longer averages


class RefinementError(ValueError):
    """A guide that has no free parameters for each datum."""


def refine(q: GuideDensity, steps: int, lr: float, num_particles: int, seed: int) -> Function:
    """Train free parameters for each datum on its ELBO, starting from the guide's, and return the refined guide.

    Many rows, where they are independent in the model, are refined in chunks, which ranks share: with random numbers of
    the seed, whose first ones are taken. Others come from the current random stream. Raise :class:`RefinementError` if
    the guide is no product of latents whose distributions can be rebuilt from free parameters, and
    ``FloatingPointError`` if a gradient is not finite.
    """
    families = _families(q)
    names = [name for name, (start, _) in families.items() for _ in start]
    first = [parameter for start, _ in families.values() for parameter in start]
    num_tensors, device = len(q.p.data), q.p.data[0].device

    def grouped(parameters: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        return {name: [each for of, each in zip(names, parameters, strict=True) if of == name] for name in families}

    def takes_rows() -> bool:
        """Whether rows of the parameters make distributions of these rows."""
        if any(parameter.shape[:1] != (q.p.num_data,) for parameter in first):
            return False
        of_first = _rebuilt(families, grouped([parameter[:1] for parameter in first]))
        return all(fn.batch_shape == (1,) for fn in of_first.values())

    chunks = _chunks(q, num_particles)
    if len(chunks) > 1 and not (q.p.by_rows and q.p.pair.is_amortized("model") and takes_rows()):
        chunks = [slice(0, q.p.num_data)]

    def gradients_at(*inputs: Tensor) -> Sequence[Tensor]:
        """The gradients for the parameters of some rows, from the data of these rows and the parameters."""
        of_rows, parameters = q.of_rows(q.p.on_data(inputs[:num_tensors])), inputs[num_tensors:]
        with torch.enable_grad():
            copies = [parameter.detach().requires_grad_() for parameter in parameters]
            fns, frozen = _rebuilt(families, grouped(copies)), _rebuilt(families, grouped(parameters))
            return torch.autograd.grad(-_elbo(of_rows, fns, frozen, num_particles).sum(), copies)

    differentiate = automatic(gradients_at, steps * len(chunks))

    def refine_rows(rows: slice) -> list[Tensor]:
        data = q.p.data if len(chunks) == 1 else q.p.of_rows(rows).data
        free = [parameter[rows].clone() if len(chunks) > 1 else parameter for parameter in first]
        return _minimized(lambda *free: differentiate(*data, *free), free, steps, lr, bar)

    with progress_bar("refine", None, total=steps * len(chunks), unit="step") as bar:
        if len(chunks) == 1:
            averages = refine_rows(chunks[0])
        else:
            parts = in_chunks("inference_gap", chunks, refine_rows, device, seed, first=1)
            averages = [torch.cat(list(of_rows)) for of_rows in zip(*parts, strict=True)]
    with torch.no_grad():
        fns = _rebuilt(families, grouped(averages))
    plate, num_data = q.p.plate, q.p.num_data

    def refined(*data: Tensor) -> None:
        with pyro.plate(plate, num_data, dim=-1):
            for name, fn in fns.items():
                pyro.sample(name, fn)

    return refined


def _chunks(q: GuideDensity, num_particles: int) -> list[slice]:
    """Split rows into chunks that have about a million numbers in their draws."""
    width = max(64, *(tensor[0].numel() for tensor in q.p.data))
    count = max(1, min(q.p.num_data, q.p.num_data * num_particles * width // _CHUNK))
    return [share_of(q.p.num_data, number, count) for number in range(count)]


def _minimized(
    differentiate: Callable[..., Sequence[Tensor]], free: list[Tensor], steps: int, lr: float, bar: Progress
) -> list[Tensor]:
    """Minimize a loss by its gradients, and return the parameters."""
    free = [parameter.requires_grad_() for parameter in free]
    # With this eps, Adam does not scale a tiny gradient up to a step of size lr: if q is exact, it stays exact.
    optimizer, schedule = torch.optim.Adam(free, lr=lr, betas=_BETAS, eps=1e-3), decayed(lr, steps)
    averages = [torch.zeros_like(parameter) for parameter in free]
    averaged = range(steps // 2, steps)  # the mean of these steps is closer to the optimum than the last step
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule(step)
        gradients = differentiate(*[parameter.detach() for parameter in free])
        if not all(gradient.isfinite().all() for gradient in gradients):
            where = f"refinement, step {step + 1}"
            raise FloatingPointError(f"{where}: the gradient is not finite. Take a smaller `lr`")
        for parameter, gradient in zip(free, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if step in averaged:
            for average, parameter in zip(averages, free, strict=True):
                average += parameter.detach() / len(averaged)
        bar.advance()
    return [average.detach() for average in averages]


def _rebuilt(families: dict[str, tuple[list[Tensor], Build]], parameters: dict[str, list[Tensor]]) -> dict[str, Any]:
    """The distribution of each latent from its unconstrained parameters."""
    try:
        return {name: build(parameters[name]) for name, (_, build) in families.items()}
    except ValueError as error:
        raise FloatingPointError(f"refinement: a parameter left its range. Take a smaller `lr`. {error}") from error


def _elbo(q: GuideDensity, fns: dict[str, Any], frozen: dict[str, Any], num_particles: int) -> Tensor:
    """The ELBO of each datum, ``(N,)``, from draws of continuous latents and sums over all states of discrete ones.

    ``frozen`` are the same distributions with detached parameters. They remove the score from the gradient: its
    expectation is zero, and without it the gradient has no variance if q is the posterior.
    """
    p = q.p
    discrete = [name for name in fns if fns[name].support.is_discrete]
    with _MatchedNormals(num_particles):
        drawn = {name: fn.rsample(torch.Size([num_particles])) for name, fn in fns.items() if name not in discrete}
    count = num_particles if drawn else 1
    states = _states({name: fns[name] for name in discrete})
    num_states = len(next(iter(states.values()))) if states else 1
    values = {name: value.repeat_interleave(num_states, 0) for name, value in drawn.items()}
    values |= {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in states.items()}
    zeros = p.zeros().to(p.dtype).expand(num_states, -1)
    log_mass = sum((fns[name].log_prob(states[name]) for name in states), zeros)
    log_q = log_mass.repeat(count, 1) + sum(frozen[name].log_prob(values[name]) for name in drawn)
    terms = (p.log_joint(values) - log_q).unflatten(0, (count, num_states))
    weight = log_mass.exp()
    return torch.where(weight > 0, weight * terms, 0.0).sum(1).mean(0)


class _MatchedNormals(TorchFunctionMode):
    r"""Draw standard normal numbers ``(K, N, ...)`` whose first two moments over K draws are those of the normal.

    They come in pairs :math:`\pm\epsilon`, and their covariance in each datum is the identity, if K is large enough;
    else their variances are 1. The mean of a quadratic function over the draws is then its expectation, without noise.
    """

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        standard = func is Tensor.normal_ and len(args) == 1 and not kwargs
        if not standard or self.count % 2 or found.dim() < 2 or len(found) != self.count:
            return found
        half = found[: self.count // 2].reshape(self.count // 2, found.shape[1], -1).movedim(0, 1)  # (N, K / 2, D)
        if half.shape[1] >= 1.5 * half.shape[2]:
            covariance = half.mT @ half / half.shape[1]
            half = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), half.mT, upper=False).mT
        elif half.shape[1] >= 4:
            half = half / half.square().mean(1, keepdim=True).sqrt()
        half = half.movedim(1, 0).reshape(-1, *found.shape[1:])
        return found.copy_(torch.cat([half, -half]))


def _states(fns: dict[str, Any]) -> Values:
    """All joint states, ``(S, 1, *event)``."""
    supports = [fn.enumerate_support(expand=False).reshape(-1, 1, *fn.event_shape) for fn in fns.values()]
    if not supports:
        return {}
    grid = torch.cartesian_prod(*(torch.arange(len(support), device=support.device) for support in supports))
    grid = grid.reshape(-1, len(supports))
    return {name: support[grid[:, place]] for place, (name, support) in enumerate(zip(fns, supports, strict=True))}


def _cannot_refine(expected: str, got: str) -> RefinementError:
    return RefinementError(
        f"`guide` must have {expected}, got {got}. Refine the guide yourself (for a VAE: "
        "guides.PerDatum.refining(encoder, x), fitted with a frozen decoder), and pass it as `refined`"
    )


def _families(q: GuideDensity) -> dict[str, tuple[list[Tensor], Build]]:
    """For each latent, unconstrained start values and the function from them to a distribution."""
    with torch.no_grad():
        factors = q.factors()
        if factors is None:
            raise _cannot_refine("latents that are independent given x", f"{list(q.sites)}, which are not")
        num_states = 1
        for name, fn in factors.items():
            if fn.support.is_discrete:
                try:
                    num_states *= len(fn.enumerate_support(expand=False))
                except (NotImplementedError, ValueError) as error:
                    raise _cannot_refine("discrete latents that can be enumerated", f"{name!r}: {error}") from error
            elif not fn.has_rsample:
                raise _cannot_refine(
                    "continuous latents with `rsample`", f"{with_article(type(fn).__name__)} for {name!r}"
                )
        if num_states > MAX_STATES:
            raise _cannot_refine(f"discrete latents of at most {MAX_STATES} states together", f"{num_states} states")
        vae = _amortized_vae(q)
        if vae is not None:
            encoder: Any = vae.encoder
            raw = encoder.raw_outputs(vae.encoder_input(*q.p.data)).clone()
            return {"z": ([raw], lambda parameters: encoder.family(parameters[0]))}
        return {name: _rebuildable(name, fn) for name, fn in factors.items()}


def _amortized_vae(q: GuideDensity) -> VAE | None:
    """The VAE of a guide whose raw outputs are its free parameters: those of its amortized encoder."""
    owner = getattr(q.guide, "__self__", None)
    if not isinstance(owner, VAE) or getattr(q.guide, "__func__", None) is not VAE.guide:
        return None
    return owner if isinstance(owner.encoder, Conditional) else None


def _rebuildable(name: str, fn: Any) -> tuple[list[Tensor], Build]:
    """The unconstrained parameters of a distribution, and the function that rebuilds it from them."""
    if isinstance(fn, torch.distributions.Independent):
        start, inner = _rebuildable(name, fn.base_dist)
        wrapper, dims = type(fn), fn.reinterpreted_batch_ndims
        return start, lambda parameters: wrapper(inner(parameters), dims)
    if hasattr(fn, "with_base"):  # of an autoguide
        start, inner = _rebuildable(name, fn.base_dist)
        return start, lambda parameters: fn.with_base(inner(parameters))
    kind = type(fn)
    given = {key: getattr(fn, key) for key in _names(fn)}
    free = [key for key in given if key not in _FIXED]
    transforms = {key: transform_to(fn.arg_constraints[key]) for key in free}

    def build(parameters: list[Tensor]) -> Any:
        values = {key: transforms[key](value) for key, value in zip(free, parameters, strict=True)}
        return kind(**{**given, **values})

    try:
        start = [transforms[key].inv(given[key]).detach().clone() for key in free]
        rebuilt = build(start)
        value = fn.sample()
        same = rebuilt.batch_shape == fn.batch_shape and torch.allclose(
            rebuilt.log_prob(value), fn.log_prob(value), rtol=1e-3, atol=1e-3
        )
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        same = False
    if not same or not free:
        raise _cannot_refine("distributions that can be rebuilt from parameters", f"a {kind.__name__} for {name!r}")
    return start, build


def _names(fn: Any) -> list[str]:
    """The names of the parameters of a distribution, one of each set of equivalent ones."""
    names = [key for key in fn.arg_constraints if key != "probs" or "logits" not in fn.arg_constraints]
    if "scale_tril" in names:
        names = [key for key in names if key not in ("covariance_matrix", "precision_matrix")]
    return names
