"""
Gradient estimators of one Bernoulli variable
=============================================

The derivative of E[f(z)] in the logit of one Bernoulli variable z, estimated and exact. Thresholded uniform noise
gives zero, because its derivative is zero almost everywhere; a finite difference is rarely not zero, and then very
large. A relaxed draw has a bias and little variance. The score function has no bias, and a variance that depends on
its baseline.
"""

import argparse
from collections.abc import Callable
from typing import Any

import common
import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyro_vae as pv

LOGIT = 0.8  # of the Bernoulli variable
TEMPERATURES = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
STEPS = (1e-1, 1e-2, 1e-3, 1e-4)  # of the finite differences


def parse_args() -> argparse.Namespace:
    unit = "thousands of draws for each estimator"
    return common.make_parser(__doc__, "gradient_estimators", epochs=200, unit=unit).parse_args()


def f(z: Tensor) -> Tensor:
    """A function that is defined between 0 and 1 too, as relaxed draws need."""
    return 1 + (z - 0.3) ** 2


def exact_derivative() -> float:
    """Differentiate π f(1) + (1 - π) f(0) in the logit of π."""
    pi = torch.tensor(LOGIT).sigmoid()
    return float(pi * (1 - pi) * (f(torch.tensor(1.0)) - f(torch.tensor(0.0))))


def differentiate(draws: int, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Differentiate the value of each draw in a logit of its own, by automatic differentiation."""
    logits = torch.full((draws,), LOGIT, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(logits).sum(), logits)
    return gradient


def estimate(draws: int) -> dict[str, Tensor]:
    """Estimate the derivative of E[f(z)] in the logit by each draw of each estimator."""

    def thresholded(logits: Tensor) -> Tensor:
        return f((logits.sigmoid() - torch.rand(draws)).sign() / 2 + 0.5)  # 1 if u < π, else 0

    def relaxed(temperature: float) -> Callable[[Tensor], Tensor]:
        def value(logits: Tensor) -> Tensor:
            return f(pv.distributions.LogitRelaxedBernoulli(temperature, logits=logits).rsample().sigmoid())

        return value

    pi = torch.tensor(LOGIT).sigmoid()
    z, other = (torch.rand(2, draws) < pi).float()
    score = z - pi  # the derivative of log q(z) in the logit
    mean = pi * f(torch.tensor(1.0)) + (1 - pi) * f(torch.tensor(0.0))
    return {
        "thresholded noise": differentiate(draws, thresholded),
        **{f"relaxed, λ = {each:g}": differentiate(draws, relaxed(each)) for each in TEMPERATURES},
        "score, no baseline": f(z) * score,
        "score, b = f(another z)": (f(z) - f(other)) * score,
        "score, b = E f": (f(z) - mean) * score,
    }


def finite_differences(draws: int) -> dict[str, dict[str, Any]]:
    """Compute differences of thresholded draws over a step h of the logit, with the same uniform noise at both ends."""
    u = torch.rand(draws, dtype=torch.float64)

    def value(logit: float) -> Tensor:
        return f((u < torch.tensor(logit, dtype=torch.float64).sigmoid()).double())

    rows = {}
    for h in STEPS:
        difference = (value(LOGIT + h) - value(LOGIT)) / h
        crossed = int((difference != 0).sum())
        row = {"h": h, "not_zero": crossed, "share": crossed / draws, "largest": float(difference.abs().max())}
        rows[f"finite differences, h = {h:g}"] = row | moments(difference)
    return rows


def moments(gradient: Tensor) -> dict[str, float]:
    """Compute the mean, its standard error, its bias, and the standard deviation of one draw."""
    mean, sd = float(gradient.double().mean()), float(gradient.double().std())
    return {"mean": mean, "error": sd / len(gradient) ** 0.5, "bias": mean - exact_derivative(), "sd": sd}


def draw(rows: dict[str, dict[str, float]]) -> Figure:
    """Draw the bias of each estimator against its standard deviation."""
    figure, ax = plt.subplots(figsize=(8, 5.2), layout="constrained")
    ax.axvline(0, color="0.6", linewidth=1)
    for name, row in rows.items():
        look = pv.plots.colours.style({"relaxed": 0, "score": 1}.get(name.split(",")[0], 2))
        ax.plot(row["bias"], row["sd"], **look | {"linestyle": "none", "markersize": 8})
        ax.annotate(name, (row["bias"], row["sd"]), xytext=(8, 4), textcoords="offset points", fontsize=9)
    ax.set(xlabel="bias: mean - exact derivative", ylabel="standard deviation of one draw")
    ax.set_title("An average over draws reduces the standard deviation, but not the bias")
    ax.margins(x=0.3, y=0.1)
    return figure


COLUMNS = {name: f"{{{name}:.4f}}" for name in ("mean", "error", "bias", "sd")}
COLUMNS |= {"not zero": "{not_zero}", "largest": "{largest:.0f}"}


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    draws = 1000 * args.epochs
    # 1. Estimate the derivative many times with each estimator, and compare mean and spread with the exact one.
    gradients = {name: moments(gradient) for name, gradient in estimate(draws).items()}
    differences = finite_differences(draws)
    notes = f"""exact derivative: {exact_derivative():.4f}; error: standard error of the mean; sd: of one draw
not zero: the number of draws, of {draws}, that cross the threshold; largest: the largest difference"""
    text = common.table("", gradients | differences, COLUMNS, notes)
    print(text)
    found = {"draws": draws, "exact": exact_derivative(), "gradients": gradients, "differences": differences}
    common.save(args, found, {"gradients": draw(gradients)}, {}, text)


if __name__ == "__main__":
    main(parse_args())
