"""
Combinatorial explosion
=======================

A model of n binary latents has 2^n states, and exact inference sums over all of them. Here n grows, on scikit-learn's
digits: at each n a VAE is trained briefly, and then the sum over states stands beside what takes its place. First, log
p(x): by enumeration, by naive Monte Carlo from the prior, and by as many draws from the trained guide, in time and in
error. Second, one step of the gradient: by enumeration, and by estimators whose cost does not grow with the states.
Where enumeration stops on this machine is said at the end.
"""

import options

if __name__ == "__main__":  # before the imports below, so that --help answers at once
    parser = options.parser(__doc__, "explosion", epochs=60, unit="passes over the data of each VAE")
    options.add_training(parser, batch_size=100, lr=1e-2)
    parser.add_argument("--largest", type=options.count, default=64, help="the largest n of binary latents to go to")
    parser.add_argument(
        "--budget", type=options.positive, default=2.0, help="seconds that one sum over states may take"
    )
    parser.add_argument("--samples", type=options.count, default=100, help="draws of Monte Carlo for each digit")
    parser.add_argument("--test-images", type=options.count, default=100, help="held-out digits to judge on")
    args = parser.parse_args()

import argparse
import textwrap
import time
from collections.abc import Callable
from typing import Any

import images
import matplotlib.pyplot as plt
import pyro
import results
import runs
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pyro_vae import datasets, guides, likelihoods, networks, objectives, priors

SIZES = (1, 2, 4, 8, 10, 12, 14, 16, 20, 32, 64)
PIXELS = 64
MOST_BYTES = 2**29  # of the largest tensor of an enumerated step, which holds several of them
ENUMERATED = "enumeration"
LOOKS = {
    "exact, sum over states": ("black", "o", "-"),
    ENUMERATED: ("black", "o", "-"),
    "prior": ("tab:red", "s", "--"),
    "guide": ("tab:blue", "^", "-."),
    "relaxed, 1 draw": ("tab:red", "s", "--"),
    "leave-one-out, 2 draws": ("tab:blue", "^", "-."),
    "DisARM, 2 draws": ("tab:green", "v", ":"),
    "VIMCO, 4 draws": ("tab:purple", "D", "--"),
}

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def bernoulli_vae(n: int) -> pv.VAE:
    network = networks.mlp([64], activation=nn.Tanh)
    return pv.VAE(priors.Bernoulli(n), guides.Bernoulli(PIXELS, n, network), likelihoods.Bernoulli(n, PIXELS, network))


def relaxed_vae(n: int) -> pv.VAE:
    network = networks.mlp([64], activation=nn.Tanh)
    return pv.VAE(
        priors.RelaxedBernoulli(n, temperature=0.5),
        guides.RelaxedBernoulli(PIXELS, n, network, temperature=0.66),
        likelihoods.Bernoulli(n, PIXELS, network),
    )


def prior_as_guide(vae: pv.VAE) -> Callable[[Tensor], None]:
    """A guide that does not look at x: naive Monte Carlo."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.prior())

    return guide


def seconds_of(run: Callable[[], Any], least: float = 0.3) -> tuple[float, Any]:
    """The shortest time of a run, and what it gave: of one run if that is long, of a few if it is short."""
    times: list[float] = []
    while not times or (sum(times) < least and len(times) < 20):
        started = time.perf_counter()
        answer = run()
        times.append(time.perf_counter() - started)
    return min(times), answer  # what else the machine does only adds


class LargestTensor(TorchDispatchMode):
    """While it is on, the memory of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, min(tensor.nbytes, tensor.untyped_storage().nbytes()))
        return made


def foreseen(rows: list[dict[str, Any]], n: int, name: str) -> float:
    """What the last sizes that were measured say of this one: each latent more is a factor of two."""
    known = [row for row in rows if row["n"] < n and name in row]
    return known[-1][name] * 2.0 ** (n - known[-1]["n"]) if known else 0.0


class Explosion:
    """The sizes measured so far, and what was said where a sum over states was not done."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.rows: list[dict[str, Any]] = []
        self.steps: dict[str, list[dict[str, Any]]] = {}
        self.stops: dict[str, str] = {}

    def evidence(self, vae: pv.VAE, n: int, x: Tensor) -> None:
        """log p(x) exactly, if it can be, and by draws."""
        samples, seed = self.args.samples, self.args.seed
        row: dict[str, Any] = {"n": n, "states": 2**n, "bytes": 8 * 2**n * len(x)}
        row["rate"] = pv.evaluate(vae.model, vae.guide, x, num_samples=10, seed=seed)["rate"]
        exact = self._exact(vae, n, x)
        if exact is not None:
            row["exact_seconds"], log_p = exact
            row["exact"] = float(log_p.mean())
        for name, guide in (("prior", prior_as_guide(vae)), ("guide", vae.guide)):

            def estimated(guide: Callable[[Tensor], None] = guide) -> pv.Evidence:
                return pv.log_evidence(vae.model, guide, x, num_samples=samples, seed=seed)

            row[f"{name}_seconds"], estimate = seconds_of(estimated)
            row[name] = float(estimate.log_evidence.mean())
            row[f"{name}_ess"] = float(estimate.ess.median())
            if exact is not None:
                row[f"{name}_error"] = float((estimate.log_evidence - log_p).abs().mean())
        self.rows.append(row)

    def _exact(self, vae: pv.VAE, n: int, x: Tensor) -> tuple[float, Tensor] | None:
        expected = foreseen(self.rows, n, "exact_seconds")
        if 2**n <= pv.exact.MAX_STATES and expected > self.args.budget:
            said = f"n = {n} would take about {in_words(expected)}, over the budget of {self.args.budget:g} s."
            self.stops.setdefault("exact", said)
            return None
        try:
            return seconds_of(lambda: pv.exact.log_evidence(vae.model, x))
        except ValueError as error:  # too many states
            self.stops.setdefault("refused", f"n = {n} is refused: {error}")
            return None

    def step(self, vae: pv.VAE, n: int, x: Tensor) -> None:
        """What one step of the gradient costs, of a mini-batch."""
        relaxed = relaxed_vae(n)
        ways: dict[str, tuple[Pair, ELBO]] = {
            ENUMERATED: ((vae.model, config_enumerate(vae.guide)), TraceEnum_ELBO(max_plate_nesting=1)),
            "relaxed, 1 draw": ((relaxed.model, relaxed.guide), Trace_ELBO()),
            "leave-one-out, 2 draws": ((vae.model, vae.guide), objectives.LeaveOneOut(2)),
            "DisARM, 2 draws": ((vae.model, vae.guide), objectives.DisARM(2)),
            "VIMCO, 4 draws": ((vae.model, vae.guide), objectives.VIMCO(4)),
        }
        for name, (pair, elbo) in ways.items():
            rows = self.steps.setdefault(name, [])
            if name == ENUMERATED and self._too_large(rows, n):
                continue

            def run(elbo: Any = elbo, pair: Pair = pair) -> float:
                return elbo.loss_and_grads(*pair, x)

            with LargestTensor() as largest:
                run()
            rows.append({"n": n, "seconds": seconds_of(run)[0], "bytes": largest.bytes})

    def _too_large(self, rows: list[dict[str, Any]], n: int) -> bool:
        taken, largest = (foreseen(rows, n, name) for name in ("seconds", "bytes"))
        if taken <= self.args.budget and largest <= MOST_BYTES and 2**n <= pv.exact.MAX_STATES:
            return False
        said = f"n = {n} would take about {in_words(taken)}, and tensors of {memory(largest)}"
        self.stops.setdefault("step", said)
        return True

    def conclusion(self) -> str:
        """Where enumeration stopped on this machine, and what more would take."""
        last = [row for row in self.rows if "exact_seconds" in row][-1]
        enumerated = self.steps[ENUMERATED][-1]
        said = [
            f"log p(x) of {self.args.test_images} digits was summed exactly up to n = {last['n']}, {last['states']} "
            f"states, in {last['exact_seconds']:.3g} s."
        ]
        said += [f"Then: {self.stops[key]}" for key in ("exact", "refused") if key in self.stops]
        said += [
            f"A step was enumerated up to n = {enumerated['n']}, in {enumerated['seconds']:.3g} s, with "
            f"tensors of {memory(enumerated['bytes'])}."
        ]
        said += [f"Then: {self.stops['step']}."] if "step" in self.stops else []
        if last["n"] >= 10:  # below, the time is that of setting up
            more = " and ".join(
                f"{in_words(last['exact_seconds'] * 2.0 ** (n - last['n']))} for n = {n}" for n in (32, 64)
            )
            said += [f"Each latent more doubles time and memory: at this rate, log p(x) would take {more}."]
        drawn = self.rows[-1]
        said += [f"{self.args.samples} draws from the guide took {drawn['guide_seconds']:.2g} s for n = {drawn['n']}."]
        return "\n".join(textwrap.fill(sentence, 110, subsequent_indent="  ") for sentence in said)


def in_words(seconds: float) -> str:
    """A time in the unit that fits it."""
    for unit, size in (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):,.0f} {unit}"
    return f"{seconds:.2g} seconds"


def table(found: Explosion) -> str:
    short = {ENUMERATED: "sum", "leave-one-out": "LOO"}
    heads = [name.partition(",")[0] for name in found.steps]
    sums = f"{'log_joint':>12s}{'sum, s':>8s}{'draws, s':>10s}"
    lines = [
        f"{'':24s}{'log p(x) by':>18s}{'':7s}{'error of':>16s}  {'milliseconds of one step':>40s}",
        f"{'n':>3s}{'states':>9s}{sums}{'rate':>7s}{'prior':>8s}{'guide':>8s}  "
        + "".join(f"{short.get(head, head):>8s}" for head in heads),
    ]
    steps = [{row["n"]: f"{1000 * row['seconds']:.1f}" for row in rows} for rows in found.steps.values()]
    for row in found.rows:
        states = str(row["states"]) if row["n"] <= 20 else f"2^{row['n']}"
        taken, prior, guide = (
            f"{row[name]:.3f}" if name in row else "-" for name in ("exact_seconds", "prior_error", "guide_error")
        )
        line = f"{row['n']:3d}{states:>9s}{memory(row['bytes']):>12s}{taken:>8s}{row['guide_seconds']:10.3f}"
        line += f"{row['rate']:7.2f}{prior:>8s}{guide:>8s}  "
        lines.append(line + "".join(f"{one.get(row['n'], '-'):>8s}" for one in steps))
    lines += [
        "log_joint: what log p(x, z) of all states and digits takes as one tensor; pv.exact holds a part at a time",
        f"error: mean |estimate - exact log p(x)| in nats per digit, of {found.args.samples} draws from prior or guide",
        "rate: KL(q(z|x) || p(z)) in nats per digit; the prior needs about e^rate draws and more, not 2^n",
        f"step: gradient of a mini-batch of {found.args.batch_size} digits",
    ]
    return "\n".join(lines)


def memory(count: float) -> str:
    """An amount of memory in the unit that fits it."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.0f} ZiB"


def _line(ax: Axes, name: str, sizes: list[int], values: list[float], label: str) -> None:
    colour, marker, style = LOOKS[name]
    ax.plot(sizes, values, marker=marker, linestyle=style, color=colour, label=label)


def _extrapolate(ax: Axes, n: int, value: float, label: str | None = None) -> None:
    """Doubling with each latent, from the last that was measured to off the picture."""
    sizes = [n, n + 40]
    ax.plot(sizes, [value, value * 2.0**40], ":", color="0.5", linewidth=1.5, label=label)


def _axes(ax: Axes, title: str, label: str, sizes: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ticks = [n for n in sizes if n not in (10, 14)]
    ax.set(
        xticks=ticks, xticklabels=ticks, xlabel="n, number of binary latents: $2^n$ states", ylabel=label, title=title
    )
    ax.minorticks_off()
    ax.grid(alpha=0.3)


def draw_cost(found: Explosion) -> Figure:
    """Time of log p(x), and time and memory of one step, as n grows."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 5.6), layout="constrained")
    sizes = [row["n"] for row in found.rows]
    summed = [row for row in found.rows if "exact_seconds" in row]
    _line(
        left, ENUMERATED, [row["n"] for row in summed], [row["exact_seconds"] for row in summed], "sum over all states"
    )
    if len(summed) < len(sizes):
        _extrapolate(left, summed[-1]["n"], summed[-1]["exact_seconds"], "doubled with each latent more")
    for name in ("prior", "guide"):
        label = f"{found.args.samples} draws from the {name}"
        _line(left, name, sizes, [row[f"{name}_seconds"] for row in found.rows], label)
    _axes(left, f"log p(x) of {found.args.test_images} digits", "seconds", sizes)
    for ax, key, scale, label in ((middle, "seconds", 1.0, "seconds"), (right, "bytes", 2.0**20, "MiB")):
        for name, rows in found.steps.items():
            _line(ax, name, [row["n"] for row in rows], [row[key] / scale for row in rows], name)
        last = found.steps[ENUMERATED][-1]
        if last["n"] < sizes[-1]:
            _extrapolate(ax, last["n"], last[key] / scale)
        _axes(
            ax,
            {"seconds": "One gradient step: time", "bytes": "One gradient step: its largest tensor"}[key],
            label,
            sizes,
        )
    for ax, top in ((left, 1e4), (middle, 1e2), (right, 1e5)):
        ax.set_yscale("log")
        ax.set_ylim(top=top)
    left.axhline(3600, color="0.7", linewidth=1)
    left.text(1, 3600, "an hour", va="bottom", fontsize=9)
    left.legend(loc="upper left", bbox_to_anchor=(0, 0.9))
    middle.legend(loc="upper left")
    figure.suptitle("Enumeration doubles with each latent; draws cost about what they did")
    return figure


def draw_errors(found: Explosion) -> Figure:
    """What draws lose of log p(x): against the exact answer, and where there is none against each other."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    known = [row for row in found.rows if "exact" in row]
    sizes = [row["n"] for row in found.rows]
    for name in ("prior", "guide"):
        label = f"{found.args.samples} draws from the {name}"
        _line(left, name, [row["n"] for row in known], [row[f"{name}_error"] for row in known], label)
        _line(right, name, sizes, [row[name] for row in found.rows], label)
    _line(right, ENUMERATED, [row["n"] for row in known], [row["exact"] for row in known], "exact, sum over all states")
    left.set_yscale("log")
    left.set_xlim(0.85, sizes[-1] * 1.2)
    _axes(left, "Error where the exact answer is known", "mean |estimate - exact log p(x)|, nats per digit", sizes)
    _axes(right, "log p(x) of the model of each n, exact and estimated", "nats per held-out digit", sizes)
    if len(known) < len(sizes):
        left.axvspan(known[-1]["n"] * 1.06, sizes[-1] * 1.2, color="0.9")
        left.text(
            (known[-1]["n"] * sizes[-1]) ** 0.5 * 1.1,
            0.5,
            "no exact answer",
            ha="center",
            transform=left.get_xaxis_transform(),
        )
    left.legend()
    right.legend()
    return figure


def main(args: argparse.Namespace) -> None:
    train, test, _ = images.load("digits")
    train_x, x = datasets.binarize(train.x), datasets.binarize(test.x[: args.test_images])
    found = Explosion(args)
    training: dict[int, float] = {}
    for n in (size for size in SIZES if size <= args.largest):
        pyro.set_rng_seed(args.seed)  # how often a step was timed has drawn more or fewer numbers
        vae = bernoulli_vae(n)
        fitted = runs.fit(args, vae.model, vae.guide, train_x, elbo=objectives.LeaveOneOut(2))
        training[n] = fitted.seconds
        found.evidence(vae, n, x)
        found.step(vae, n, train_x[: args.batch_size].clone())
        print(f"n = {n}: trained in {fitted.seconds:.1f} s", flush=True)
    report = table(found) + "\n\n" + found.conclusion()
    print(f"\n{report}\n")
    kept = {"evidence": found.rows, "steps": found.steps, "stops": found.stops, "training_seconds": training}
    tree = images.tree(vae, x[:20], test.labels[:20][: len(x)], draws=200, seed=args.seed)  # of the largest n
    results.save(args, kept, {"cost": draw_cost(found), "errors": draw_errors(found)}, {"explosion": tree}, report)


if __name__ == "__main__":
    main(args)
