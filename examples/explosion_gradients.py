"""
Combinatorial explosion of one training step
============================================

An enumerated training step of a model with n binary latents sums over 2^n states. Gradient estimators use a few draws
instead, at a cost that does not grow with the states: one relaxed draw, leave-one-out, DisARM and VIMCO. Here n
grows, on a mini-batch of scikit-learn's digits, and the time of a step and the memory of its largest tensor are
measured.
"""

import argparse
from collections.abc import Callable
from typing import Any

import common
import pyro
from explosion import PIXELS, SIZES, bernoulli_vae, extrapolate, in_words, measure_time
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, objectives, priors

MAX_BYTES = 2**29  # of the largest tensor of an enumerated step, which holds several of them
ENUMERATED = "enumeration"


def parse_args() -> argparse.Namespace:
    parser = common.make_parser(__doc__, "explosion_gradients", epochs=5, unit="passes over the data for each VAE")
    common.add_training(parser, batch_size=100, lr=1e-2)
    parser.add_argument(
        "--largest", type=common.positive_int, default=64, help="largest n, the number of binary latents"
    )
    parser.add_argument("--budget", type=common.positive_float, default=2.0, help="largest time of a step, in seconds")
    return parser.parse_args()


def relaxed_vae(n: int) -> pv.VAE:
    network = networks.mlp([64], activation=nn.Tanh)
    encoder = guides.RelaxedBernoulli(PIXELS, n, network, temperature=0.66)
    return pv.VAE(priors.RelaxedBernoulli(n, temperature=0.5), encoder, likelihoods.Bernoulli(n, PIXELS, network))


class LargestTensor(TorchDispatchMode):
    """Record the memory of the largest tensor that any operation inside the context creates."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, min(tensor.nbytes, tensor.untyped_storage().nbytes()))
        return made


def make_steps(vae: pv.VAE, relaxed: pv.VAE, x: Tensor) -> dict[str, Callable[[], float]]:
    """Make one function for each estimator that computes the loss and its gradients."""
    enum = TraceEnum_ELBO(max_plate_nesting=1)
    return {
        ENUMERATED: lambda: enum.loss_and_grads(vae.model, config_enumerate(vae.guide), x),
        "relaxed, 1 draw": lambda: Trace_ELBO().loss_and_grads(relaxed.model, relaxed.guide, x),
        "leave-one-out, 2 draws": lambda: objectives.LeaveOneOut(2).loss_and_grads(vae.model, vae.guide, x),
        "DisARM, 2 draws": lambda: objectives.DisARM(2).loss_and_grads(vae.model, vae.guide, x),
        "VIMCO, 4 draws": lambda: objectives.VIMCO(4).loss_and_grads(vae.model, vae.guide, x),
    }


def main(args: argparse.Namespace) -> None:
    train, _, _ = common.load_binary_images("digits")
    x = train.x[: args.batch_size].clone()
    steps: dict[str, list[dict[str, Any]]] = {}
    stop = ""
    # 1. Train a VAE with n bits, for a growing n, and time one step with each estimator.
    for n in (size for size in SIZES if size <= args.largest):
        pyro.set_rng_seed(args.seed)
        vae, relaxed = bernoulli_vae(n), relaxed_vae(n)
        options = common.training_options(args) | {"elbo": objectives.LeaveOneOut(2)}
        pv.fit(vae.model, vae.guide, train.x, **options)
        for name, step in make_steps(vae, relaxed, x).items():
            rows = steps.setdefault(name, [])
            if name == ENUMERATED:
                seconds, size = extrapolate(rows, n, "seconds"), extrapolate(rows, n, "bytes")
                if seconds > args.budget or size > MAX_BYTES or 2**n > pv.exact.MAX_STATES:
                    stop = stop or f"n = {n} would take about {in_words(seconds)} and tensors of {size / 2**20:.3g} MiB"
                    continue
            with LargestTensor() as largest:
                step()
            rows.append({"n": n, "seconds": measure_time(step)[0], "bytes": largest.bytes})
        print(f"n = {n}", flush=True)

    # 2. Print the milliseconds of a step, and draw time and memory.
    table: dict[str, dict[str, float]] = {}
    for name, rows in steps.items():
        for row in rows:
            table.setdefault(f"n = {row['n']}", {})[name] = 1000 * row["seconds"]
    columns = {name: f"{{{name}:.1f}}" for name in steps}
    note = f"milliseconds of the loss and its gradients on a mini-batch of {args.batch_size} digits"
    text = common.table(
        "", table, columns, note, f"Enumeration stopped: {stop}" if stop else "Enumeration did not stop"
    )
    print(text)
    figures = {}
    for key, label, unit in (("seconds", "seconds", 1), ("bytes", "MiB of the largest tensor", 2**20)):
        lines = {name: ([row["n"] for row in rows], [row[key] / unit for row in rows]) for name, rows in steps.items()}
        axis = {"yscale": "log", "xlabel": "n, number of binary latents: 2^n states", "ylabel": label}
        figures[key] = common.draw_lines(lines, title="One gradient step", **axis)
    common.save(args, {"steps": steps, "stop": stop}, figures, {}, text)


if __name__ == "__main__":
    main(parse_args())
