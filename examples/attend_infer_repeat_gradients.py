"""
Gradients of a count: attend, infer, repeat
===========================================

How many objects are in a scene is a discrete latent n, whose draws pass no gradient to q(n | x). Eslami et al. 2016,
"Attend, Infer, Repeat", estimate it by the score function,

.. math:: \\nabla\\,\\mathbb{E}_q[f] = \\mathbb{E}_q[(f - b(x))\\,\\nabla \\log q(n \\mid x)],

with a baseline b(x) that a network learns. The scenes here have up to two objects, so that n can also be summed over,
which is exact in n. That is the reference: the other estimators are compared with it at the same parameters, early in
training, and by their counts after training. The model is that of attend_infer_repeat.py.

The score function without a baseline is the simple method here. The paper says that baselines are needed, and reports
no variance of a gradient.
"""

import argparse
import copy
from typing import Any

import common
import pyro
from attend_infer_repeat import AttendInferRepeat, make_scenes, parse_args, train
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import baselines, datasets, gradients, networks, objectives, plots

EXACT, TWO, LEARNED, PLAIN = "sum over n", "score, two draws", "score, learned baseline", "score, no baseline"


class Run:
    """A model that is trained with one estimator, its count accuracy after each epoch, and an early state."""

    def __init__(self, args: argparse.Namespace, name: str, scenes: datasets.DigitScenes, test: datasets.DigitScenes):
        pyro.set_rng_seed(args.seed)
        self.air = AttendInferRepeat(name, scenes.size, args.what, args.hidden)
        self.elbo = make_elbo(name, scenes.size**2, args.hidden)
        self.accuracy: list[float] = []
        self.early: list[dict[str, Tensor]] = []

        def after_epoch(epoch: Any) -> None:
            self.accuracy.append(common.accuracy(self.air.count(test.x), test.labels))
            if len(self.accuracy) == -(-2 * args.epochs // 5):  # q(n | x) is no longer that of the first steps
                self.early = [copy.deepcopy(module.state_dict()) for module in self.modules]

        guide = guide_of(self.air, name)
        self.fitted: pv.Fitted = train(args, self.air, scenes.x, guide=guide, elbo=self.elbo, callbacks=[after_epoch])

    @property
    def modules(self) -> list[nn.Module]:
        """The model, and the baseline if there is one."""
        return [self.air, *([self.elbo.baseline] if isinstance(self.elbo, objectives.ScoreFunction) else [])]


def make_elbo(name: str, pixels: int, hidden: int) -> ELBO:
    """Make the ELBO whose gradient is estimated in the way that is named."""
    if name == LEARNED:
        return objectives.ScoreFunction(baselines.NeuralBaseline(pixels, networks.mlp([hidden])))
    if name == TWO:
        return objectives.LeaveOneOut(2)
    return TraceEnum_ELBO(max_plate_nesting=1) if name == EXACT else Trace_ELBO()


def guide_of(air: AttendInferRepeat, name: str) -> Any:
    """Return the guide; where n is summed over, with a mark that says so."""
    return config_enumerate(air.guide) if name == EXACT else air.guide


def compare_gradients(run: Run, x: Tensor, args: argparse.Namespace) -> gradients.Comparison:
    """Compare the gradients of all estimators with that of the sum over n, at the early state of a run."""
    final = [copy.deepcopy(module.state_dict()) for module in run.modules]
    for module, state in zip(run.modules, run.early, strict=True):
        module.load_state_dict(state)
    order = (EXACT, LEARNED, PLAIN, TWO)  # that of the runs, so that both pictures have the same colours
    elbos = {name: run.elbo if name == LEARNED else make_elbo(name, x.shape[1], args.hidden) for name in order}
    model, guides = run.air.model, {name: guide_of(run.air, name) for name in elbos}
    estimators = {name: gradients.Estimator(model, guides[name], elbo) for name, elbo in elbos.items()}
    found = gradients.compare(estimators, x, repeats=args.samples, reference=EXACT, seed=args.seed)
    for module, state in zip(run.modules, final, strict=True):
        module.load_state_dict(state)
    return found


COLUMNS = {"right counts, %": "{accuracy:.2f}", "variance": "{variance:.3g}", "bias": "{bias:.3f} ± {bias_error:.3f}"}
COLUMNS |= {"p of no bias": "{p_value:.2f}", "length of the gradient": "{target_norm:.3f}", "ELBO": "{elbo:.1f}"}
EARLY = "Gradient of the network of q(n | x), n objects, early in training"
LEARNING = "Learning to count: exact sum against score function"
NOTES = """variance, bias and length: of the gradient in the network of q(n | x), in nats per scene, early in training
p of no bias: of the largest deviation of any weight, corrected for the number of weights
right counts: of held-out scenes, after training; ELBO: of the last epoch, in nats per scene"""


def main(args: argparse.Namespace) -> None:
    scenes, test = make_scenes(args)
    # 1. Train with the sum over n, and with the score function, with and without a learned baseline.
    runs = {name: Run(args, name, scenes, test) for name in (EXACT, LEARNED, PLAIN)}
    # 2. Compare the gradients of all estimators at the same parameters.
    comparison = compare_gradients(runs[LEARNED], scenes.x[: args.batch_size], args)
    rows: dict[str, dict[str, Any]] = {}
    for name, row in comparison.of("counter").items():
        rows[name] = vars(row) | {"p_value": row.p_value}
        if name in runs:
            rows[name] |= {"accuracy": runs[name].accuracy[-1], "elbo": runs[name].fitted.history["elbo"][-1]}
    print(text := common.table("gradient of n by", rows, COLUMNS, NOTES))
    # 3. Draw bias and variance, and how the count is learned.
    ax = plots.bias_variance(comparison, group="counter")
    epochs = range(1, args.epochs + 1)
    lines = {name: (epochs, run.accuracy) for name, run in runs.items()}
    labels = {"xlabel": "epoch", "ylabel": "right counts on held-out scenes, %", "title": LEARNING}
    figures = {"gradients": common.set_title(ax, EARLY)}
    figures["learning"] = common.draw_lines(lines, **labels)
    headline = common.headline(
        "variance of the gradient in q(n | x)", "nats² per scene²", rows[EXACT]["variance"], higher_is_better=False,
        baseline=rows[PLAIN]["variance"], baseline_name="score function, no baseline",
        published="no figure found; the paper says that the score function needs a learned baseline",
        differences="scenes of 20 × 20 pixels with up to two of scikit-learn's digits",
    )  # fmt: skip
    found = {"estimators": rows, "histories": {name: run.accuracy for name, run in runs.items()}}
    common.save(args, found, figures, {}, text, [headline])


if __name__ == "__main__":
    main(parse_args(__doc__, "attend_infer_repeat_gradients", epochs=14, data="digits", scenes=4000))
