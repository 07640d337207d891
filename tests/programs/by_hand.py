"""Answers in plain torch, which know nothing of the package: integrals on grids, filters, importance sampling."""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor


def normal(value: Tensor, loc: Any, scale: Any) -> Tensor:
    return torch.distributions.Normal(torch.as_tensor(loc), torch.as_tensor(scale)).log_prob(value)


def grid(*axes: Tensor) -> tuple[list[Tensor], Tensor]:
    """The points of a grid, one flat tensor for each axis, and the logarithm of the volume of a cell."""
    points = [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]
    return points, torch.stack([(axis[1] - axis[0]).log() for axis in axes]).sum()


def moments(log_joint: Tensor, volume: Tensor, **values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """log p(x), and posterior means, from log p(x, z) at the K points of a grid, ``(K,)``, or ``(K, N)`` for N data."""
    weights = log_joint.softmax(0)
    means = {name: torch.tensordot(weights, value, ([0], [0])) for name, value in values.items()}
    return log_joint.logsumexp(0) + volume, means


def leave_one_out(log_joint: Tensor, pointwise: Tensor) -> Tensor:
    """log p(x_i | all other x), from log p(x, z) at K points, and log p(x_i | all other x, z), ``(K, N)``."""
    return log_joint.logsumexp(0) - (log_joint[:, None] - pointwise).logsumexp(0)


def normal_leave_one_out(loc: Tensor, covariance: Tensor, value: Tensor) -> Tensor:
    """log p(x_i | all other x) of a multivariate normal, ``(..., N)``."""
    precision = torch.linalg.inv(covariance)
    variance = 1 / precision.diagonal(dim1=-2, dim2=-1)
    residual = variance * (precision @ (value - loc)[:, None])[..., 0]
    return normal(residual, 0.0, variance.sqrt())


def forward_algorithm(initial: Tensor, transition: Tensor, emission: Tensor) -> Tensor:
    """log p(x_1, ..., x_T) of a hidden Markov model, from log-probabilities; ``emission`` is ``(T, states)``."""
    alpha = initial + emission[0]
    for step in emission[1:]:
        alpha = (alpha[:, None] + transition).logsumexp(0) + step
    return alpha.logsumexp(0)


def log_joint(program: Any, values: Mapping[str, Tensor]) -> Tensor:
    """log p(x, z) by Pyro's own trace, with what is marked for enumeration summed out by Pyro's own ELBO."""
    model, keywords = poutine.condition(program.model, data=dict(values)), {**program.kwargs, **program.all_rows}
    trace = poutine.trace(model).get_trace(*program.args, **keywords)
    if not any(site["infer"].get("enumerate") for _, site in trace.iter_stochastic_nodes()):
        return trace.log_prob_sum()
    elbo = TraceEnum_ELBO(max_plate_nesting=program.elbo.max_plate_nesting)
    return -torch.as_tensor(elbo.loss(model, lambda *args, **kwargs: None, *program.args, **keywords))


def guide_trace(program: Any) -> Any:
    """A run of the guide, without plates and the sites that it observes for itself."""
    keywords = {**program.kwargs, **program.all_rows}
    trace = poutine.trace(program.guide).get_trace(*program.args, **keywords)
    for name, site in list(trace.nodes.items()):
        if site["type"] == "sample" and (site["is_observed"] or site_is_subsample(site)):
            trace.remove_node(name)
    return trace


@torch.no_grad()
def importance_sampling(program: Any, num: int) -> Tensor:
    """log p(x) of all data from draws of the guide, one after the other."""
    weights = []
    for _ in range(num):
        q = guide_trace(program)
        values = {name: site["value"] for name, site in q.iter_stochastic_nodes()}
        weights.append(log_joint(program, values) - q.log_prob_sum())
    return torch.stack(weights).logsumexp(0) - torch.tensor(float(num)).log()


def parameter(name: str) -> Tensor:
    return pyro.param(name).detach()
