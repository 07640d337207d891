"""
Gumbel-max, Gumbel-softmax, and what passes a gradient
======================================================

Three pictures of how a discrete draw is made and differentiated, each with its numbers. First, the argmax of logits
plus Gumbel noise is a categorical draw, and that of logits plus Gaussian noise is not. Second, a softmax in the place
of the argmax pulls the draws off the corners of the simplex, and at no temperature changes which entry is the largest.
Third, gradient estimators of one Bernoulli variable against the exact derivative: thresholded noise gives zero, a
relaxed draw trades bias for noise, the score function has no bias and as much noise as its baseline leaves it.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "gumbel_max", epochs=200, unit="thousands of draws, of each way to draw")
    args = parser.parse_args()

import argparse
import math
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import pyro
import results
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Categorical, Gumbel, Normal

import pyro_vae as pv

CLASSES = torch.tensor([1.5, 0.5, 0.0, -1.0, -2.0])
CORNERS = torch.tensor([0.6, 0.0, -0.4])
PLACES = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])  # of the corners, in the picture
MARKERS = ("o", "s", "^")
LOGIT = 0.8  # of the Bernoulli variable whose derivative is asked for
TEMPERATURES = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
STEPS = (1e-1, 1e-2, 1e-3, 1e-4)  # of the finite differences


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Of Pearson's chi-square test that these counts are draws of these probabilities."""
    expected = counts.sum() * probs.double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(probs) - 1) / 2, dtype=torch.float64), statistic / 2))


def categorical(draws: int) -> dict[str, Any]:
    """How often each class is drawn, directly and as the argmax of logits and noise, and how well that fits."""
    shape = torch.Size([draws, len(CLASSES)])
    gumbel = Gumbel(torch.tensor(0.0), torch.tensor(1.0))
    ways = {
        "direct": Categorical(logits=CLASSES).sample(shape[:1]),
        "argmax, Gumbel": (CLASSES + gumbel.sample(shape)).argmax(-1),
        "argmax, Gaussian": (CLASSES + Normal(0.0, gumbel.stddev).sample(shape)).argmax(-1),  # of the same spread
    }
    counts = {name: torch.bincount(chosen, minlength=len(CLASSES)) for name, chosen in ways.items()}
    return {
        "softmax": CLASSES.softmax(-1).tolist(),
        "share": {name: (count / draws).tolist() for name, count in counts.items()},
        "p_value": {name: p_value(count, CLASSES.softmax(-1)) for name, count in counts.items()},
    }


def simplex(draws: int, seed: int) -> tuple[dict[str, Any], dict[float, Tensor]]:
    """At each temperature, of the same Gumbel noise: where relaxed draws lie, and which entry is the largest."""
    rows, points = [], {}
    for temperature in (0.1, 0.5, 1.0, 5.0):
        pyro.set_rng_seed(seed)
        relaxed = pv.distributions.LogRelaxedOneHotCategorical(torch.tensor(temperature), logits=CORNERS)
        y = relaxed.sample(torch.Size([draws]))
        count = torch.bincount(y.argmax(-1), minlength=len(CORNERS))
        rows.append(
            {
                "temperature": temperature,
                "argmax": (count / draws).tolist(),
                "p_value": p_value(count, CORNERS.softmax(-1)),
                "mean": y.exp().mean(0).tolist(),
                "largest": float(y.exp().amax(-1).mean()),
            }
        )
        points[temperature] = y[:600].exp()
    return {"softmax": CORNERS.softmax(-1).tolist(), "temperatures": rows}, points


def tree(points: dict[float, Tensor]) -> xr.DataTree:
    """The draws on the simplex, by temperature, as ArviZ reads them."""
    y = torch.stack(list(points.values()))  # (temperature, draw, category)
    dims = ("chain", "draw", "temperature", "category")
    coords = {"temperature": list(points), "category": range(y.shape[-1])}
    values = y.transpose(0, 1)[None].numpy()
    coords |= {"chain": [0], "draw": range(values.shape[1])}
    return xr.DataTree.from_dict({"prior": xr.Dataset({"y": (dims, values)}, coords=coords)})


def f(z: Tensor) -> Tensor:
    """What E[f(z)] is about: a function that is defined between 0 and 1 too, which the relaxed draws need."""
    return 1 + (z - 0.3) ** 2


def exact_derivative() -> float:
    """That of π f(1) + (1 - π) f(0) in the logit of π."""
    pi = torch.tensor(LOGIT).sigmoid()
    return float(pi * (1 - pi) * (f(torch.tensor(1.0)) - f(torch.tensor(0.0))))


def per_draw(draws: int, value: Callable[[Tensor], Tensor]) -> Tensor:
    """The derivative of each draw's value in a logit of its own, by automatic differentiation."""
    logits = torch.full((draws,), LOGIT, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(logits).sum(), logits)
    return gradient


def estimates(draws: int) -> dict[str, Tensor]:
    """The derivative of E[f(z)] in the logit as each draw estimates it, by estimator."""

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
        "thresholded noise": per_draw(draws, thresholded),
        **{f"relaxed, λ = {temperature:g}": per_draw(draws, relaxed(temperature)) for temperature in TEMPERATURES},
        "score, no baseline": f(z) * score,
        "score, b = f(another z)": (f(z) - f(other)) * score,
        "score, b = E f": (f(z) - mean) * score,
    }


def finite_differences(draws: int) -> list[dict[str, float]]:
    """Differences of thresholded draws over a step h of the logit, with the same uniform noise before and after."""
    u = torch.rand(draws, dtype=torch.float64)

    def value(logit: float) -> Tensor:
        return f((u < torch.tensor(logit, dtype=torch.float64).sigmoid()).double())

    rows = []
    for h in STEPS:
        difference = (value(LOGIT + h) - value(LOGIT)) / h
        rows.append({"h": h, "not_zero": int((difference != 0).sum()), **moments(difference)})
        rows[-1]["largest"] = float(difference.abs().max())
    return rows


def moments(gradient: Tensor) -> dict[str, float]:
    """Mean, its standard error, bias, and standard deviation of one draw."""
    mean, sd = float(gradient.double().mean()), float(gradient.double().std())
    return {"mean": mean, "error": sd / len(gradient) ** 0.5, "bias": mean - exact_derivative(), "sd": sd}


def in_words(p: float) -> str:
    """A p-value, which may be too small to be told from zero."""
    return f"{p:.2g}" if p > 1e-99 else "< 1e-99"


def table(found: dict[str, Any], draws: int) -> str:
    first, second, third, differences = (found[name] for name in ("categorical", "simplex", "gradients", "differences"))
    lines = [f"1. Shares of {draws} draws", f"{'':20s}" + "".join(f"  class {k + 1}" for k in range(len(CLASSES)))]
    lines[-1] += "   p-value of the fit"
    lines.append(f"{'softmax of logits':20s}" + "".join(f"{share:9.4f}" for share in first["softmax"]))
    for name, shares in first["share"].items():
        fit = in_words(first["p_value"][name])
        lines.append(f"{name:20s}" + "".join(f"{share:9.4f}" for share in shares) + f"{fit:>11s}")

    lines += ["", "2. Gumbel-softmax draws y of 3 classes, from the same noise at each temperature"]
    lines.append(f"{'':14s}{'share of the argmax':>27s}{'mean of y':>27s}{'largest entry':>19s}")
    lines.append(f"{'softmax':14s}" + "".join(f"{share:9.4f}" for share in second["softmax"]))
    for row in second["temperatures"]:
        shares = "".join(f"{share:9.4f}" for share in row["argmax"] + row["mean"])
        lines.append(f"λ = {row['temperature']:<10g}{shares}{row['largest']:19.3f}")
    lines.append(
        f"p-value of the fit of these argmaxes to the softmax: {in_words(second['temperatures'][0]['p_value'])}"
    )

    lines += ["", f"3. The derivative of E[f(z)] in the logit of one Bernoulli variable; exact: {found['exact']:.4f}"]
    lines.append(f"{'':26s}{'mean':>10s}{'error':>10s}{'bias':>10s}{'sd of one draw':>16s}")
    for name, row in third.items():
        lines.append(f"{name:26s}{row['mean']:10.4f}{row['error']:10.4f}{row['bias']:10.4f}{row['sd']:16.4f}")
    lines.append(f"{'finite differences, same u':26s}{'':36s}{'not zero':>10s}{'largest':>10s}")
    for row in differences:
        name = f"  h = {row['h']:g}"
        numbers = f"{row['mean']:10.4f}{row['error']:10.4f}{row['bias']:10.4f}{row['sd']:16.4f}"
        lines.append(f"{name:26s}{numbers}{row['not_zero']:10d}{row['largest']:10.0f}")
    lines.append("error: standard error of the mean; not zero: in how many draws the threshold was crossed")
    return "\n".join(lines)


def draw_categorical(found: dict[str, Any], draws: int) -> Figure:
    """Shares of the classes beside the probabilities they should have."""
    figure, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
    looks = {"direct": ("0.85", ""), "argmax, Gumbel": ("0.6", "//"), "argmax, Gaussian": ("white", "..")}
    for place, (name, shares) in enumerate(found["share"].items()):
        colour, hatch = looks[name]
        where = [k + 1 + 0.26 * (place - 1) for k in range(len(shares))]
        label = f"{name} noise" if place else "drawn directly"
        label += f": p-value {in_words(found['p_value'][name])}"
        ax.bar(where, shares, 0.26, color=colour, hatch=hatch, edgecolor="black", linewidth=0.8, label=label)
    places = torch.arange(1, len(CLASSES) + 1)
    ax.hlines(
        found["softmax"], places - 0.45, places + 0.45, color="tab:red", linewidth=2, label="softmax of the logits"
    )
    names = [f"{k + 1}\nlogit {logit:g}" for k, logit in enumerate(CLASSES.tolist())]
    ax.set(xlabel="class", ylabel=f"share of {draws} draws", xticks=range(1, len(CLASSES) + 1), xticklabels=names)
    ax.set_title("Gumbel noise makes the argmax a categorical draw; Gaussian noise does not")
    ax.legend(title="p-value: chi-square test of the counts")
    return figure


def draw_simplex(found: dict[str, Any], points: dict[float, Tensor]) -> Figure:
    """Relaxed draws in the triangle of three classes, at each temperature."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.9), layout="constrained")
    for ax, row in zip(axes, found["temperatures"], strict=True):
        y = points[row["temperature"]]
        _triangle(ax)
        for k, marker in enumerate(MARKERS):
            at = y[y.argmax(-1) == k] @ PLACES
            shade = ("black", "tab:orange", "tab:blue")[k]
            ax.scatter(at[:, 0], at[:, 1], s=14, marker=marker, color=shade, alpha=0.5, linewidths=0)
        shares = " · ".join(f"{share:.3f}" for share in row["argmax"])
        ax.set_title(f"λ = {row['temperature']:g}\nargmax: {shares}", fontsize=11)
    softmax = " · ".join(f"{share:.3f}" for share in found["softmax"])
    figure.suptitle(
        "Gumbel-softmax draws of 3 classes, from the same noise: the temperature moves a draw within its third of the "
        f"triangle,\nand never out of it. Shares of the thirds beside the softmax of the logits, {softmax}"
    )
    return figure


def _triangle(ax: Axes) -> None:
    ax.fill(PLACES[:, 0], PLACES[:, 1], facecolor="none", edgecolor="black")
    centre = PLACES.mean(0)
    for k, corner in enumerate(PLACES):
        edge = (PLACES.sum(0) - corner) / 2
        ax.plot([centre[0], edge[0]], [centre[1], edge[1]], color="0.5", linestyle="--", linewidth=1)
        out = corner + 0.09 * (corner - centre) / (corner - centre).norm()
        ax.text(float(out[0]), float(out[1]), str(k + 1), ha="center", va="center", fontsize=12)
    ax.set(aspect="equal", xlim=(-0.14, 1.14), ylim=(-0.12, 1.02))
    ax.axis("off")


def draw_gradients(found: dict[str, Any]) -> Figure:
    """Bias against noise of each estimator, and what finite differences of thresholded noise are made of."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained", width_ratios=[1.35, 1])
    rows = found["gradients"]
    relaxed = [row for name, row in rows.items() if name.startswith("relaxed")]
    left.axvline(0, color="0.6", linewidth=1)
    left.plot([row["bias"] for row in relaxed], [row["sd"] for row in relaxed], ":", color="tab:blue")
    for name, row in rows.items():
        kind = name.partition(",")[0]
        marker, colour, offset, align = {
            "relaxed": ("o", "tab:blue", (10, -8), "left"),
            "score": ("s", "black", (-10, 2), "right"),
        }.get(kind, ("X", "tab:red", (-6, 10), "left"))
        left.plot(row["bias"], row["sd"], marker, color=colour, markersize=8)
        text = name.removeprefix("relaxed, ") + (f":\n0 for an exact {found['exact']:.3f}" if marker == "X" else "")
        at = (row["bias"], row["sd"])
        left.annotate(text, at, xytext=offset, textcoords="offset points", ha=align, fontsize=10)
    left.plot([], [], "o:", color="tab:blue", label="relaxed Bernoulli at temperature λ")
    left.plot([], [], "s", color="black", label="score function with baseline b")
    left.plot([], [], "X", color="tab:red", label="thresholded uniform noise")
    left.set(xlabel="bias: mean - exact derivative", ylabel="standard deviation of one draw")
    left.set_title("Averaging over draws takes the noise away, and never the bias")
    left.margins(x=0.15, y=0.1)
    left.legend(loc="upper left")

    h = [row["h"] for row in found["differences"]]
    right.set_xscale("log")
    right.set_yscale("log", nonpositive="mask")  # with few draws none may cross the threshold
    right.plot(h, [row["share"] for row in found["differences"]], "o-", color="black", label="share that is not zero")
    right.plot(h, [row["sd"] for row in found["differences"]], "s--", color="tab:red", label="sd of one difference")
    right.axhline(found["exact"], color="0.5", linestyle=":", label="exact derivative")
    right.set(xlabel="step h of the logit", ylabel="share, or change of f over h", xlim=(max(h) * 2, min(h) / 2))
    right.set_title("Thresholded noise, differences over a step h\nwith the same noise: ever rarer, ever larger")
    right.legend()
    return figure


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    draws = 1000 * args.epochs
    first = categorical(draws)
    second, points = simplex(draws, args.seed)
    found = {
        "draws": draws,
        "categorical": first,
        "simplex": second,
        "exact": exact_derivative(),
        "gradients": {name: moments(gradient) for name, gradient in estimates(draws).items()},
        "differences": [row | {"share": row["not_zero"] / draws} for row in finite_differences(draws)],
    }
    report = table(found, draws)
    print(report)
    figures = {
        "categorical": draw_categorical(first, draws),
        "simplex": draw_simplex(second, points),
        "gradients": draw_gradients(found),
    }
    results.save(args, found, figures, {"simplex": tree(points)}, report)


if __name__ == "__main__":
    main(args)
