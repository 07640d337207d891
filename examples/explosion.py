"""
Combinatorial explosion of the exact sum
========================================

A model of n binary latents has 2^n states, and exact inference sums over all of them. Here n grows, on scikit-learn's
digits: for each n a VAE is trained briefly, and log p(x) is computed by enumeration, by naive Monte Carlo from the
prior, and by as many draws from the trained guide. Time and error are compared. The last lines say where enumeration
stopped on this machine. The example `explosion_gradients.py` does the same for one step of training.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import common
import pyro
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, objectives, priors

SIZES = (1, 2, 4, 8, 10, 12, 14, 16, 20, 32, 64)
PIXELS = 64


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "explosion", epochs=60, unit="passes over the data for each VAE")
    common.add_training(parser, batch_size=100, lr=1e-2)
    count = common.positive_int
    parser.add_argument("--largest", type=count, default=64, help="largest n, the number of binary latents")
    parser.add_argument("--budget", type=common.positive_float, default=2.0, help="largest time of one sum, in seconds")
    parser.add_argument("--samples", type=count, default=100, help="Monte Carlo draws for each digit")
    common.add_evaluation(parser, test_images=100)
    return parser.parse_args()


def bernoulli_vae(n: int) -> pv.VAE:
    network = networks.mlp([64], activation=nn.Tanh)
    return pv.VAE(priors.Bernoulli(n), guides.Bernoulli(PIXELS, n, network), likelihoods.Bernoulli(n, PIXELS, network))


def measure_time(function: Callable[[], Any], least: float = 0.3) -> tuple[float, Any]:
    """Return the shortest time of a few calls, or of one long call, and the result; other load only adds to a time."""
    times: list[float] = []
    while not times or (sum(times) < least and len(times) < 20):
        started = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - started)
    return min(times), result


def extrapolate(rows: list[dict[str, Any]], n: int, name: str) -> float:
    """Extrapolate the last measurement to n latents: each additional latent is a factor of two."""
    known = [row for row in rows if row["n"] < n and name in row]
    return known[-1][name] * 2.0 ** (n - known[-1]["n"]) if known else 0.0


def in_words(seconds: float) -> str:
    """Format a time in a suitable unit."""
    for unit, size in (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):,.0f} {unit}"
    return f"{seconds:.2g} seconds"


def evaluate(args: argparse.Namespace, vae: pv.VAE, n: int, x: Tensor, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute log p(x) exactly, if that is possible within the budget, and from draws; measure time and error."""
    row: dict[str, Any] = {"n": n, "states": 2**n, "bytes": 8 * 2**n * len(x)}
    row["rate"] = pv.evaluate(vae.model, vae.guide, x, num_samples=10, seed=args.seed)["rate"]
    exact = None
    if 2**n > pv.exact.MAX_STATES:
        row["stop"] = f"n = {n} has more than {pv.exact.MAX_STATES} states, the limit of pv.exact"
    elif (expected := extrapolate(rows, n, "exact_seconds")) > args.budget:
        row["stop"] = f"n = {n} would take about {in_words(expected)}, over the budget of {args.budget:g} s"
    else:
        row["exact_seconds"], exact = measure_time(lambda: pv.exact.log_evidence(vae.model, x))
        row["exact"] = float(exact.mean())
    for name, guide in (("prior", common.prior_as_guide(vae)), ("guide", vae.guide)):
        options = {"num_samples": args.samples, "seed": args.seed}
        row[f"{name}_seconds"], estimate = measure_time(lambda: pv.log_evidence(vae.model, guide, x, **options))  # noqa: B023
        row[name] = float(estimate.log_evidence.mean())
        row[f"{name}_ess"] = float(estimate.ess.median())
        if exact is not None:
            row[f"{name}_error"] = float((estimate.log_evidence - exact).abs().mean())
    return row


def conclude(rows: list[dict[str, Any]]) -> str:
    """Describe where enumeration stopped on this machine, and what larger sums would cost."""
    last = [row for row in rows if "exact_seconds" in row][-1]
    lines = [
        f"log p(x) was summed exactly up to n = {last['n']}, {last['states']} states, {last['exact_seconds']:.3g} s."
    ]
    lines += [f"{row['stop']}." for row in rows if "stop" in row][:1]
    if last["n"] >= 10:  # smaller sums take the time of their setup
        more = [f"{in_words(extrapolate(rows, n, 'exact_seconds'))} for n = {n}" for n in (32, 64)]
        lines += [f"Each additional latent doubles time and memory: log p(x) would take {' and '.join(more)}."]
    return "\n".join([*lines, f"Draws from the guide took {rows[-1]['guide_seconds']:.2g} s for n = {rows[-1]['n']}."])


COLUMNS = {"states": "{states:.3g}", "log_joint, MiB": "{mebibytes:.3g}", "sum, s": "{exact_seconds:.3f}"}
COLUMNS |= {"draws, s": "{guide_seconds:.3f}", "rate": "{rate:.2f}", "prior error": "{prior_error:.3f}"}
COLUMNS |= {"guide error": "{guide_error:.3f}"}
NOTES = """log_joint: the memory of log p(x, z) of all states and digits in one tensor; pv.exact sums in parts
error: mean |estimate - exact log p(x)| in nats per digit, with draws from prior or guide
rate: KL(q(z|x) || p(z)) in nats per digit; the prior needs about e^rate draws and more, not 2^n"""


def main(args: argparse.Namespace) -> None:
    train, test, _ = common.load_binary_images("digits", test_images=args.test_images)
    rows: list[dict[str, Any]] = []
    training: dict[int, float] = {}
    # 1. Train a VAE with n bits, for a growing n, and time log p(x): the sum over 2^n states, and two estimates.
    for n in (size for size in SIZES if size <= args.largest):
        pyro.set_rng_seed(args.seed)  # the number of timed calls differs, and so does the random state after them
        vae = bernoulli_vae(n)
        options = common.training_options(args) | {"elbo": objectives.LeaveOneOut(2)}
        training[n] = pv.fit(vae.model, vae.guide, train.x, **options).seconds
        rows.append(evaluate(args, vae, n, test.x, rows))
        print(f"n = {n}: trained in {training[n]:.1f} s", flush=True)
    # 2. Print where the sum stopped, and draw time and error.
    named = {f"n = {row['n']}": row | {"mebibytes": row["bytes"] / 2**20} for row in rows}
    text = f"{common.table('', named, COLUMNS, NOTES)}\n\n{conclude(rows)}"
    print(text)
    lines: dict[str, Any] = {
        name: tuple([row[key] for row in rows if f"{name}_seconds" in row] for key in ("n", f"{name}_seconds"))
        for name in ("exact", "prior", "guide")
    }
    axis = {"yscale": "log", "xlabel": "n, number of binary latents: 2^n states", "ylabel": "seconds"}
    title = "Time of log p(x), by a sum over all states, and by draws from prior or guide"
    figures = {"cost": common.draw_lines(lines, title=title, **axis)}
    errors: dict[str, Any] = {
        f"draws from the {name}": tuple([row[key] for row in rows if "exact" in row] for key in ("n", f"{name}_error"))
        for name in ("prior", "guide")
    }
    axis |= {"ylabel": "mean |estimate - exact log p(x)|, nats per digit", "title": "Error where the sum is known"}
    figures["errors"] = common.draw_lines(errors, **axis)
    tree = common.image_tree(vae, test.x[:20], test.labels[:20], args)  # of the largest n
    common.save(args, {"evidence": rows, "training_seconds": training}, figures, {"explosion": tree}, text)


if __name__ == "__main__":
    main(parse_args())
