"""Adam for a captured step: the numbers that depend on the count of steps are kept in tensors."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["CapturableAdam"]


class CapturableAdam(torch.optim.Optimizer):
    r"""Adam,

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
              \theta \leftarrow \theta
              - \eta\,\frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon},

    the same numbers as ``torch.optim.Adam``. Step t - 1 computes the corrections :math:`1 / (1 - \beta^t)` for step t:
    otherwise a compiler would put them into its loop over the parameters, and compute the powers for each number.

    Args:
        params: parameters, or groups of them.
        lr: :math:`\eta`, kept in a tensor whose value may change between steps.
        betas, eps: :math:`\beta_1, \beta_2` and :math:`\epsilon`.

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
        """Add parameters; their count of steps starts at zero."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float64, device=group["params"][0].device)
        corrections = _corrections(group, 0.0)
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter).detach() for name in ("mean", "square")}
            self.state[parameter] = moments | corrections

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, after a call of ``closure``, if given, which computes them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            self._untie(updated, [parameter for parameter in group["params"] if parameter.grad is None])
            for parameter in updated:
                state, gradient = self.state[parameter], parameter.grad
                mean = state["mean"].lerp_(gradient, 1 - beta1)
                square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                scale = square.sqrt() * state["scale_correction"] + group["eps"]
                parameter.sub_(group["lr"] * state["mean_correction"] * mean / scale)
            for state in {id(self.state[one]["powers"]): self.state[one] for one in updated}.values():
                betas = torch.tensor([beta1, beta2], dtype=torch.float64, device=state["powers"].device)
                powers = state["powers"].mul_(betas)
                state["mean_correction"].copy_(1 / (1 - powers[0]))
                state["scale_correction"].copy_((1 - powers[1]).rsqrt())
        return loss

    @staticmethod
    def accepts(settings: dict[str, Any]) -> bool:
        """Whether these settings of ``torch.optim.Adam`` are those of this optimizer."""
        return not any(settings.get(name) for name in ("weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"))

    def torch_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter as ``torch.optim.Adam`` has it."""
        state, number = self.state[parameter], torch.zeros((), dtype=torch.float64)
        for power, beta in zip(state["powers"].tolist(), group["betas"], strict=True):
            if 0 < beta < 1:  # a power that is too small for its number is that of a count without effect
                number = number.maximum(torch.tensor(math.log(max(power, 1e-300)) / math.log(beta)).round() - 1)
        return {"step": number.float(), "exp_avg": state["mean"], "exp_avg_sq": state["square"]}

    def change_betas(self, group: dict[str, Any], before: tuple[float, float]) -> None:
        """Set the corrections to those of other betas, at the same counts of steps."""
        found: dict[int, dict[str, Tensor]] = {}  # by the tensor that parameters of one count share
        for parameter in group["params"]:
            state = self.state[parameter]
            if id(state["powers"]) not in found:
                number = self.torch_state(parameter, {"betas": before})["step"]
                found[id(state["powers"])] = _corrections(group, float(number))
            self.state[parameter] = state | found[id(state["powers"])]

    def load_torch_states(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Set the states of parameters to those of ``torch.optim.Adam``; parameters of one count share their powers."""
        for group in self.param_groups:
            shared: dict[float, dict[str, Tensor]] = {}
            for parameter in group["params"]:
                if saved := states.get(parameter):
                    number = float(saved["step"])
                    shared.setdefault(number, _corrections(group, number))
                    moments = {"mean": saved["exp_avg"], "square": saved["exp_avg_sq"]}
                    copies = {name: value.to(parameter, copy=True) for name, value in moments.items()}
                    self.state[parameter] = copies | shared[number]

    def untie_frozen(self) -> None:
        """Give frozen parameters corrections of their own, before a capture: a captured step cannot do that."""
        for group in self.param_groups:
            trained, frozen = ([p for p in group["params"] if p.requires_grad is flag] for flag in (True, False))
            self._untie(trained, frozen)

    def _untie(self, updated: list[Tensor], unchanged: list[Tensor]) -> None:
        """Give parameters that are not updated corrections of their own: their count of steps stands still."""
        shared = {id(self.state[parameter]["powers"]) for parameter in updated}
        for parameter in unchanged:
            state = self.state[parameter]
            if id(state["powers"]) in shared:
                state |= {name: state[name].clone() for name in ("powers", "mean_correction", "scale_correction")}


def _corrections(group: dict[str, Any], number: float) -> dict[str, Tensor]:
    """The corrections of the step after this number of steps."""
    powers = torch.tensor(group["betas"], dtype=torch.float64, device=group["params"][0].device) ** (number + 1)
    return {"powers": powers, "mean_correction": 1 / (1 - powers[0]), "scale_correction": (1 - powers[1]).rsqrt()}
