"""What is checked before training, so that a run that cannot end well does not begin."""

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vae._utils.module_state import buffers_kept
from pyro_vae._utils.rng import preserve_rng_state
from pyro_vae._utils.transform import Transform, transformed
from pyro_vae._utils.validation import boolean, data_tensors, positive, positive_int, rows_like, tqdm_disable
from pyro_vae.distributions.missing import check_missing, first_missing
from pyro_vae.model_guide import ModelGuide
from pyro_vae.training.elbo_evaluator import ElboEvaluator
from pyro_vae.training.loop import Batches

__all__ = ["check_elbo", "check_options", "check_pair", "check_validation_data", "run_all_rows", "to_tensors"]

Data = Tensor | Sequence[Tensor]


def to_tensors(data: Data, validation: Data | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Return data and held-out data as tensors with rows of one form."""
    tensors = data_tensors(data, "data")
    if validation is None:
        return tensors, None
    return tensors, rows_like(data_tensors(validation, "validation"), tensors, "validation")


def check_options(
    epochs: int,
    compile: bool,
    clip_norm: float | None,
    nonfinite: str,
    patience: int | None,
    callbacks: Any,
    progress: bool | None,
    validates: bool,
) -> None:
    """Raise for an option of :func:`pyro_vae.fit` that has no meaning."""
    positive_int(epochs, "epochs")
    boolean(compile, "compile")
    tqdm_disable(progress)
    if clip_norm is not None:
        positive(clip_norm, "clip_norm")
    if patience is not None:
        positive_int(patience, "patience")
        if not validates:
            raise ValueError("`patience` needs held-out data, `validation=`, got none")
    if nonfinite not in ("stop", "skip"):
        raise ValueError(f"`nonfinite` must be 'stop' or 'skip', got {nonfinite!r}")
    if not isinstance(callbacks, Sequence) or not all(callable(call) for call in callbacks):
        raise TypeError(f"`callbacks` must be a sequence of functions of an Epoch, got {callbacks!r}")


def check_elbo(elbo: ELBO | None) -> ELBO:
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
    return elbo


def check_pair(pair: ModelGuide, elbo: ELBO, data: tuple[Tensor, ...], transform: Transform | None) -> None:
    """Raise if a pair does not fit its ELBO or its data."""
    pair.check_elbo(elbo)
    if transform is not None:
        pair.set_plate_nesting(elbo)
    _check_missing_values(pair, data, transform, "data")


def _check_missing_values(pair: ModelGuide, data: tuple[Tensor, ...], transform: Transform | None, name: str) -> None:
    """Raise for NaN that the model does not accept, in data as their transform leaves them."""
    if first_missing(data) is not None:
        data = transformed(tuple(tensor.clone() for tensor in data), transform)
        check_missing(pair.observed.values(), data, name)


def check_validation_data(
    pair: ModelGuide, validation: tuple[Tensor, ...] | None, transform: Transform | None
) -> tuple[Tensor, ...] | None:
    """Return held-out data, transformed; raise if the guide has parameters for each training datum alone."""
    if validation is None:
        return None
    _check_missing_values(pair, validation, transform, "validation")
    validation = transformed(validation, transform)
    if not pair.is_amortized("guide", validation):
        raise ValueError(
            "`validation` needs an amortized guide, got one with parameters for each datum, which has none for data "
            "that it was not trained on"
        )
    return validation


@torch.no_grad()
def run_all_rows(evaluator: ElboEvaluator, batches: Batches) -> None:
    """Compute the loss on all rows with Pyro's validation, which a captured step does not have."""
    with preserve_rng_state(), buffers_kept(), pyro.validation_enabled():
        for rows in torch.arange(batches.num_data, device=batches.device).split(batches.batch_size):
            with batches.context(rows) as arguments:
                evaluator.loss(*arguments)
