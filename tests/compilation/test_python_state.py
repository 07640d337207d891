"""The values that code can read are found where they stand, and others are left alone."""

import functools

import pytest
import torch
from torch import nn

from pyro_vae.compilation.python_state import PythonState

WEIGHT = 1.0


class Settings:
    beta = 0.5


class Trainer(nn.Module):
    """A model in the object of its training loop."""

    def __init__(self):
        super().__init__()
        self.settings, self.weights, self.dropout = Settings(), [1.0, 2.0], nn.Dropout(0.1)
        self.steps, self.losses, self.noise = 0, [], None

    @property
    def scale(self):
        return self.weights[0] + self.settings.beta

    def model(self, x):
        self.noise = torch.rand(3)
        return WEIGHT * self.scale * self.dropout(x)

    def train_on(self, data):
        self.steps += 1
        self.losses.append(0.0)


def set_global(trainer, monkeypatch):
    monkeypatch.setattr(f"{__name__}.WEIGHT", 2.0)


CHANGES = {
    "WEIGHT": set_global,
    "Trainer.settings.beta": lambda trainer, _: setattr(trainer.settings, "beta", 1.0),
    "Settings.beta": lambda trainer, monkeypatch: monkeypatch.setattr(Settings, "beta", 1.0),
    "Trainer.weights[0]": lambda trainer, _: trainer.weights.__setitem__(0, 3.0),
    "Trainer.weights[2]": lambda trainer, _: trainer.weights.append(3.0),
    "Trainer.dropout.p": lambda trainer, _: setattr(trainer.dropout, "p", 0.3),
}


@pytest.mark.parametrize("place", CHANGES)
@pytest.mark.parametrize("wrap", [lambda run: run, lambda run: functools.partial(run), lambda run: lambda x: run(x)])
def test_a_changed_value_is_found_with_its_place(place, wrap, monkeypatch):
    trainer = Trainer()
    state = PythonState(wrap(trainer.model))
    assert not state.has_changed()
    CHANGES[place](trainer, monkeypatch)
    assert state.has_changed()
    assert list(state.changes()) == [place]
    state.rebase()
    assert not state.has_changed()


def test_what_the_code_does_not_read_and_tensors_are_left_alone():
    trainer = Trainer()
    state = PythonState(trainer.model)
    trainer.train_on(None)
    trainer.model(torch.ones(3))
    assert not state.changes()


def test_a_closure_is_followed():
    beta = 1.0
    state = PythonState(lambda: beta)
    beta = 2.0
    assert state.changes() == {"beta": (1.0, 2.0)}
