"""Adam for a captured step: what depends on the number of the step lies ready in tensors before it."""

from typing import Any

import torch

__all__ = ["CapturableAdam"]


class CapturableAdam(torch.optim.Optimizer):
    r"""Adam,

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
              \theta \leftarrow \theta
              - \eta\,\frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon},

    the same numbers as ``torch.optim.Adam``. The corrections for step t are made in step t - 1: a compiler puts what it
    can into the loop over parameters, and powers would be taken for each of them.

    Args:
        params: parameters, or groups of them.
        lr: :math:`\eta`; kept in a tensor, whose value may change between steps.
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\epsilon`.

    Source: Kingma and Ba 2015, "Adam: a method for stochastic optimization", algorithm 1.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> optimizer = CapturableAdam([weight], lr=0.1)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight
    tensor([0.9000, 0.9000], requires_grad=True)
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Begin at step 1 with further parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            powers = torch.tensor(group["betas"], dtype=torch.float64, device=parameter.device)
            self.state[parameter] = {
                "mean": torch.zeros_like(parameter).detach(),
                "square": torch.zeros_like(parameter).detach(),
                "powers": powers,
                "mean_correction": 1 / (1 - powers[0]),
                "scale_correction": (1 - powers[1]).rsqrt(),
            }
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64, device=group["params"][0].device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state, gradient = self.state[parameter], parameter.grad
                    mean = state["mean"].lerp_(gradient, 1 - beta1)
                    square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                    scale = square.sqrt() * state["scale_correction"] + group["eps"]
                    parameter.sub_(group["lr"] * state["mean_correction"] * mean / scale)
                    powers = state["powers"].mul_(torch.tensor([beta1, beta2], dtype=torch.float64, device=mean.device))
                    state["mean_correction"].copy_(1 / (1 - powers[0]))
                    state["scale_correction"].copy_((1 - powers[1]).rsqrt())
