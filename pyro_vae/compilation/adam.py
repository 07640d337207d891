"""Optimizers for a captured step: Adam, and those of Pyro. Numbers that depend on the count of steps are tensors."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["CapturableAdagradRMSProp", "CapturableAdam", "CapturableClippedAdam"]


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
                self._update(group, parameter, self.state[parameter])
            for state in {id(self.state[one]["powers"]): self.state[one] for one in updated}.values():
                betas = torch.tensor([beta1, beta2], dtype=torch.float64, device=state["powers"].device)
                powers = state["powers"].mul_(betas)
                state["mean_correction"].copy_(1 / (1 - powers[0]))
                state["scale_correction"].copy_((1 - powers[1]).rsqrt())
        return loss

    def _update(self, group: dict[str, Any], parameter: Tensor, state: dict[str, Tensor]) -> None:
        (beta1, beta2), gradient = group["betas"], parameter.grad
        assert gradient is not None
        mean = state["mean"].lerp_(gradient, 1 - beta1)
        square = state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = square.sqrt() * state["scale_correction"] + group["eps"]
        parameter.sub_(group["lr"] * state["mean_correction"] * mean / scale)

    @staticmethod
    def accepts(settings: dict[str, Any]) -> bool:
        """Whether these settings of ``torch.optim.Adam`` are those of this optimizer."""
        return not any(settings.get(name) for name in ("weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"))

    def torch_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter as ``torch.optim.Adam`` has it."""
        state, number = self.state[parameter], torch.zeros((), dtype=torch.float64, device="cpu")
        for power, beta in zip(state["powers"].tolist(), group["betas"], strict=True):
            if 0 < beta < 1:  # a power that is too small for its number is that of a count without effect
                found = torch.tensor(math.log(max(power, 1e-300)) / math.log(beta), device="cpu")
                number = number.maximum(found.round() - 1)
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

    def set_torch_state(self, parameter: Tensor, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Set the state of a parameter, in place, to that of ``torch.optim.Adam``."""
        state = self.state[parameter]
        state["mean"].copy_(saved["exp_avg"])
        state["square"].copy_(saved["exp_avg_sq"])
        for name, value in _corrections(group, float(saved["step"])).items():
            state[name].copy_(value)

    def untie_frozen(self) -> None:
        """Give frozen parameters corrections of their own, before a capture: a captured step cannot do that."""
        for group in self.param_groups:
            trained, frozen = ([p for p in group["params"] if p.requires_grad is flag] for flag in (True, False))
            self._untie(trained, frozen)

    def untie(self, parameter: Tensor) -> None:
        """Give a parameter corrections of its own: another optimizer will update them."""
        self._untie(
            [other for group in self.param_groups for other in group["params"] if other is not parameter], [parameter]
        )

    def _untie(self, updated: list[Tensor], unchanged: list[Tensor]) -> None:
        """Give parameters that are not updated corrections of their own: their count of steps stands still."""
        shared = {id(self.state[parameter]["powers"]) for parameter in updated}
        for parameter in unchanged:
            state = self.state[parameter]
            if id(state["powers"]) in shared:
                state |= {name: state[name].clone() for name in ("powers", "mean_correction", "scale_correction")}


class CapturableClippedAdam(CapturableAdam):
    r"""Pyro's ``ClippedAdam``: Adam of gradients whose numbers are clipped to :math:`\pm c`, with a rate that decays,

    .. math:: \eta \leftarrow \eta\,\rho, \qquad
              \theta \leftarrow \theta
              - \eta\,\frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}\,\frac{m}{\sqrt{v} + \epsilon}.

    Args:
        params, lr, betas, eps: as for :class:`CapturableAdam`.
        weight_decay: a factor of the parameter, which is added to the clipped gradient.
        clip_norm: :math:`c`.
        lrd: :math:`\rho`.
        centered_variance: whether :math:`v` averages :math:`(g - m)^2`.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> optimizer = CapturableClippedAdam([weight], lr=0.1, lrd=0.5)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight, optimizer.param_groups[0]["lr"]
    (tensor([0.9500, 0.9500], requires_grad=True), tensor(0.0500, dtype=torch.float64))
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float = 10.0,
        lrd: float = 1.0,
        centered_variance: bool = False,
    ):
        further = {"weight_decay": weight_decay, "clip_norm": clip_norm, "lrd": lrd}
        settings = {"lr": lr, "betas": betas, "eps": eps, "centered_variance": centered_variance, **further}
        torch.optim.Optimizer.__init__(self, params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the rates decay, then update all parameters that have a gradient."""
        for group in self.param_groups:
            group["lr"].mul_(group["lrd"])
        return super().step(closure)

    def _update(self, group: dict[str, Any], parameter: Tensor, state: dict[str, Tensor]) -> None:
        (beta1, beta2), gradient = group["betas"], parameter.grad
        assert gradient is not None
        gradient = gradient.clamp(-group["clip_norm"], group["clip_norm"])
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        mean = state["mean"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        spread = gradient - mean if group["centered_variance"] else gradient
        square = state["square"].mul_(beta2).addcmul_(spread, spread, value=1 - beta2)
        rate = group["lr"] * state["mean_correction"] / state["scale_correction"]
        parameter.sub_(rate * mean / (square.sqrt() + group["eps"]))

    def torch_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter as ``pyro.optim.ClippedAdam`` has it, with a Python number of steps."""
        state = super().torch_state(parameter, group)
        return {**state, "step": int(state["step"])}


class CapturableAdagradRMSProp(torch.optim.Optimizer):
    r"""Pyro's ``AdagradRMSProp``, with :math:`s = g^2` after the first step,

    .. math:: s \leftarrow (1 - t)\,s + t\,g^2, \qquad
              \theta \leftarrow \theta - \eta\,n^{\delta - 1/2}\,\frac{g}{1 + \sqrt{s}} \quad \text{in step } n.

    Args:
        params: parameters, or groups of them.
        eta, delta, t: :math:`\eta, \delta, t`.

    Source: Kucukelbir et al. 2017, "Automatic differentiation variational inference", equations 10 and 11.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> optimizer = CapturableAdagradRMSProp([weight])
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight
    tensor([0.3333, 0.3333], requires_grad=True)
    """

    def __init__(self, params: Any, eta: float = 1.0, delta: float = 1e-16, t: float = 0.1):
        super().__init__(params, {"eta": eta, "delta": delta, "t": t})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their count of steps starts at zero."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            count = torch.zeros((), dtype=torch.float64, device=parameter.device)
            self.state[parameter] = {"step": count, "sum": torch.zeros_like(parameter).detach()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, after a call of ``closure``, if given, which computes them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in [parameter for parameter in group["params"] if parameter.grad is not None]:
                state, gradient = self.state[parameter], parameter.grad
                count = state["step"].add_(1)
                share = torch.where(count == 1, 1.0, group["t"])
                total = state["sum"].mul_(1 - share).add_(share * gradient * gradient)
                rate = group["eta"] * count ** (group["delta"] - 0.5)
                parameter.sub_(rate * gradient / (1 + total.sqrt()))
        return loss

    def torch_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter as ``pyro.optim.AdagradRMSProp`` has it, with a Python number of steps."""
        state = self.state[parameter]
        return {"step": int(state["step"]), "sum": state["sum"]}

    def set_torch_state(self, parameter: Tensor, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Set the state of a parameter, in place, to that of ``pyro.optim.AdagradRMSProp``."""
        self.state[parameter]["step"].fill_(saved["step"])
        self.state[parameter]["sum"].copy_(saved["sum"])

    def load_torch_states(self, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Set the states of parameters to those of ``pyro.optim.AdagradRMSProp``."""
        for parameter, saved in states.items():
            if saved:
                self.state[parameter]["step"].fill_(saved["step"])
                self.state[parameter]["sum"].copy_(saved["sum"])


def _corrections(group: dict[str, Any], number: float) -> dict[str, Tensor]:
    """The corrections of the step after this number of steps."""
    powers = torch.tensor(group["betas"], dtype=torch.float64, device=group["params"][0].device) ** (number + 1)
    return {"powers": powers, "mean_correction": 1 / (1 - powers[0]), "scale_correction": (1 - powers[1]).rsqrt()}
