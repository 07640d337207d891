"""What is checked before training, so that a run that cannot end well does not begin."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceTailAdaptive_ELBO

from pyro_vae._utils.module_state import buffers_kept
from pyro_vae._utils.progress import check_progress
from pyro_vae._utils.rng import preserve_rng_state
from pyro_vae._utils.validation import optional_boolean, positive, positive_int
from pyro_vae.training.elbo_evaluator import ElboEvaluator
from pyro_vae.training.loop import Batches

__all__ = ["as_elbo", "check_has_loss", "check_options", "run_all_rows"]


def check_options(
    epochs: int,
    compile: bool | None,
    clip_norm: float | None,
    nonfinite: str,
    patience: int | None,
    callbacks: Any,
    progress: bool | None,
    validates: bool,
) -> None:
    """Raise for an option of :func:`pyro_vae.fit` that has no meaning."""
    positive_int(epochs, "epochs")
    optional_boolean(compile, "compile")
    check_progress(progress)
    if clip_norm is not None:
        positive(clip_norm, "clip_norm")
    if patience is not None:
        positive_int(patience, "patience")
        if not validates:
            raise ValueError("`patience` needs held-out data, `validation=`, got none")
    if not isinstance(nonfinite, str) or nonfinite not in ("stop", "skip"):
        raise ValueError(f"`nonfinite` must be 'stop' or 'skip', got {nonfinite!r}")
    if not isinstance(callbacks, Sequence) or not all(callable(call) for call in callbacks):
        raise TypeError(f"`callbacks` must be a sequence of functions of an Epoch, got {callbacks!r}")


def check_has_loss(elbo: ELBO, name: str) -> None:
    """Raise for an ELBO of Pyro that has gradients, but no loss."""
    if isinstance(elbo, TraceTailAdaptive_ELBO):
        raise ValueError(
            f"`{name}` must be an ELBO with a loss for each datum, got TraceTailAdaptive_ELBO, which computes none and "
            "weights draws of all data together; use pv.objectives.ImportanceWeighted or pyro.infer.RenyiELBO"
        )


def as_elbo(elbo: ELBO | None) -> ELBO:
    """Return an ELBO, ``Trace_ELBO()`` for ``None``; raise for what is none, or needs TorchScript."""
    if elbo is None:
        return Trace_ELBO()
    if not isinstance(elbo, ELBO):
        raise TypeError(f"`elbo` must be an instance of an ELBO, such as Trace_ELBO(), got {elbo!r}")
    if type(elbo).__name__.startswith("Jit"):
        raise ValueError(
            f"`elbo` must be the ELBO of the same name without Jit, got {type(elbo).__name__}, which needs "
            "TorchScript, deprecated in torch"
        )
    check_has_loss(elbo, "elbo")
    return elbo


@torch.no_grad()
def run_all_rows(evaluator: ElboEvaluator, batches: Batches) -> None:
    """Compute the loss on all rows with Pyro's validation, which a captured step does not have.

    Of a data set or a stream these are the rows of one batch, see :meth:`pyro_vae.training.loop.Batches.in_order`.
    Rows that are not finite pass: the step names or skips them.
    """
    with preserve_rng_state(), buffers_kept(evaluator.model, evaluator.guide):
        for inputs in batches.in_order():
            with batches.context(*inputs) as arguments:
                evaluator.validated_loss(*arguments)
