"""pythae: its VAE with the same networks, trained by its trainer."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from inputs import Inputs
from plain_pyro import network
from problems import Problem
from pythae.data.datasets import BaseDataset
from pythae.models import BetaVAE, BetaVAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from reports import Report, of_module
from torch import Tensor


class Encoder(BaseEncoder):
    def __init__(self, problem: Problem, given: Inputs):
        super().__init__()
        self.layers = network(problem, given, "encoder")
        self.register_buffer("loc", torch.from_numpy(given.weights["encoder.loc"]))

    def forward(self, x: Tensor) -> ModelOutput:
        loc, log_scale = self.layers(x - self.loc).chunk(2, dim=-1)
        return ModelOutput(embedding=loc, log_covariance=2 * log_scale)


class Decoder(BaseDecoder):
    def __init__(self, problem: Problem, given: Inputs):
        super().__init__()
        self.layers = network(problem, given, "decoder")

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.layers(z).sigmoid())


class ResampledVAE(BetaVAE):
    """Its VAE with a weight of the KL, whose pixels are drawn again for each batch."""

    def forward(self, inputs: Any, **options: Any) -> ModelOutput:
        return super().forward({**inputs, "data": torch.bernoulli(inputs["data"])}, **options)


class Epochs(TrainingCallback):
    """Set the weight of the KL of each epoch, and report after it."""

    def __init__(self, problem: Problem, vae: ResampledVAE, report: Callable[[], None]):
        self.problem, self.vae, self.report = problem, vae, report

    def on_epoch_begin(self, training_config: BaseTrainerConfig, *, epoch: int, **state: Any) -> None:
        self.vae.beta = self.problem.kl_weight(epoch - 1)

    def on_epoch_end(self, training_config: BaseTrainerConfig, **state: Any) -> None:
        self.report()


def train(problem: Problem, given: Inputs, report: Report, *, epochs: int, seed: int) -> None:
    """Train, and report after each epoch."""
    if problem.guide != "normal" or not problem.binarized:
        raise NotImplementedError("train: its VAE has Gaussian latents and, as a mass, a Bernoulli likelihood")
    config = BetaVAEConfig(input_dim=(problem.features,), latent_dim=problem.latent[0], reconstruction_loss="bce")
    vae = ResampledVAE(config, Encoder(problem, given), Decoder(problem, given))
    with tempfile.TemporaryDirectory() as folder:
        options = BaseTrainerConfig(
            output_dir=folder, num_epochs=epochs, per_device_train_batch_size=problem.batch_size, seed=seed,
            learning_rate=problem.lr, optimizer_cls="Adam", scheduler_cls="LambdaLR", no_cuda=True,
            scheduler_params={"lr_lambda": lambda epoch: problem.rate(epoch) / problem.lr},
        )  # fmt: skip
        calls = Epochs(problem, vae, lambda: report(problem.steps_of_epoch, lambda: of_module(given, vae)))
        images = BaseDataset(torch.from_numpy(given.x)[: problem.rows] / 255, torch.zeros(problem.rows))
        BaseTrainer(vae, images, training_config=options, callbacks=[calls]).train()
