"""Runs that are not finite, stop early, call back, are interrupted or repeated: the same eagerly and captured."""

import math
import os
import signal
import threading
import time
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import model_of
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors, schedules
from pyro_vae.handlers import SubsampleRows
from pyro_vae.training.loop import Loop
from pyro_vae.training.state import model_state, optimizer_state

EAGER_AND_CAPTURED = pytest.mark.parametrize("compile", [False, True])
EAGER_AND_SLOWLY_CAPTURED = pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
X = pv.datasets.two_gaussians(50, seed=1).x
HELD_OUT = pv.datasets.two_gaussians(30, seed=2).x


@pytest.fixture(autouse=True)
def _uncompiled(uncompiled):
    """Replay all graphs without compiling them."""


@pytest.fixture
def steps(monkeypatch):
    """The steps of each ``Loop``."""
    made = []
    init = Loop.__init__
    monkeypatch.setattr(Loop, "__init__", lambda self, step, *a, **k: made.append(step) or init(self, step, *a, **k))
    return made


def batch_norm(in_features, out_features):
    first, last = nn.Linear(in_features, 8, bias=False), nn.Linear(8, out_features)
    return nn.Sequential(first, nn.BatchNorm1d(8), nn.Tanh(), last)


MLP = networks.mlp([8])


def vae_of(network=MLP):
    torch.manual_seed(0)
    return pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(2, 2, MLP), likelihoods.Normal(2, 2, network))


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


SETTINGS = {"epochs": 6, "batch_size": 20, "lr": 1e-2, "seed": 4}


def run(vae, data=X, **options):
    pyro.clear_param_store()
    return pv.fit(vae.model, vae.guide, data, **SETTINGS | options)


def batches():
    """The rows of each step of :func:`run`, with its random numbers."""
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    order = torch.Generator().manual_seed(4)
    return [rows for _ in range(6) for rows in torch.randperm(50, generator=order).split(20)]


class NaNInjectingPair:
    """A pair whose loss, or whose gradient alone, is NaN in some steps, counted from 0."""

    def __init__(self, bad, where="loss"):
        self.vae = vae_of(batch_norm)
        self.bad, self.where = torch.tensor(bad, dtype=torch.float32), where
        self.step = torch.tensor(-1.0)
        self.watched = lambda step: None

    def model(self, x):
        pyro.module("vae", self.vae)
        hit = (self.step == self.bad).any()
        with pyro.plate("data", len(x)):
            x = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", self.vae.prior())
            loc = self.vae.decoder(z).mean
            if self.where == "loss":
                loc = torch.where(hit, math.nan, loc)
            else:  # the gradient of the root is NaN at zero
                loc = loc + torch.where(hit, 0.0 * loc, 1.0).sqrt() - torch.where(hit, 0.0, 1.0)
            pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("vae", self.vae)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.vae.encoder(pyro.subsample(x, event_dim=1)))

    def fit(self, **options):
        def number(step):
            self.watched(step)
            return float(step)

        return pv.fit(self.model, self.guide, X, **SETTINGS | {"schedules": {self.step: number}} | options)


@EAGER_AND_CAPTURED
@pytest.mark.parametrize(("where", "bad"), [("loss", 0), ("loss", 1), ("loss", 2), ("loss", 11), ("gradient", 4)])
def test_a_stop_names_step_site_and_rows_and_leaves_the_last_good_state_to_the_bit(compile, bad, where, steps):
    pair = NaNInjectingPair([bad], where)
    before = {}

    def state():
        return pair.vae.state_dict() | {f"optimizer {name}": t for name, t in optimizer_state(steps[0]).items()}

    pair.watched = lambda step: before or step < bad or before.update(copied(state()))
    # An epoch has batches of 20, 20 and 10 rows, hence two graphs.
    with pytest.raises(FloatingPointError) as error:
        pair.fit(compile=compile, callbacks=[lambda epoch: None])
    assert same(state(), before)
    message = str(error.value)
    if where == "gradient":
        assert f"step {bad + 1}: the gradient is not finite in vae.encoder.network.0.weight, " in message
        return
    rows = batches()[bad]
    shown = ", ".join(map(str, rows[:5].tolist()))
    where = f"at {len(rows)} of {len(rows)}, in rows {shown}, ... of the data"
    assert message.startswith(
        f"step {bad + 1}: the loss is nan; log_prob of site 'x' in the model is not finite {where}"
    )
    assert bad == 0 or pair.step == bad - 1


@pytest.mark.integration
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_stop_leaves_the_last_good_state_in_a_compiled_run(where, monkeypatch):
    monkeypatch.undo()
    pair = NaNInjectingPair([4], where)
    before = {}
    pair.watched = lambda step: before or step < 4 or before.update(copied(pair.vae.state_dict()))
    with pytest.raises(FloatingPointError, match=rf"^step 5: the {where} is "):
        pair.fit(compile=True)
    assert same(pair.vae.state_dict(), before)


@EAGER_AND_CAPTURED
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_skip_leaves_out_the_bad_steps_and_nothing_else(compile, where):
    """Compared with a loop of torch without the updates of these steps."""
    bad = [0, 3, 4, 13]
    pair = NaNInjectingPair(bad, where)
    fitted = pair.fit(compile=compile, nonfinite="skip")
    assert (fitted.skipped, fitted.steps) == (4, 18)
    assert all(math.isfinite(value) for values in fitted.history.values() for value in values)

    healthy = NaNInjectingPair([])
    twin = healthy.vae
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2)
    bounds = []
    for step, rows in enumerate(batches()):
        before = copied(twin.state_dict())
        with SubsampleRows("data", rows):
            loss = Trace_ELBO().differentiable_loss(healthy.model, healthy.guide, X)
        bounds.append(math.nan if step in bad else -loss.item() / 50)
        if step in bad:
            twin.load_state_dict(before)
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in pair.vae.state_dict().items():
        assert torch.allclose(tensor, twin.state_dict()[name], atol=2e-5), name
    assert np.allclose(fitted.history["elbo"], np.nanmean(np.reshape(bounds, (6, 3)), axis=1), rtol=1e-5)


@EAGER_AND_SLOWLY_CAPTURED
def test_a_hundred_skipped_steps_in_a_row_stop_the_run(compile):
    pair = NaNInjectingPair(list(range(7, 500)))
    with pytest.raises(FloatingPointError, match=r"step 107: it is the 100th in a row"):
        pair.fit(compile=compile, nonfinite="skip", epochs=100)
    pyro.clear_param_store()  # of the first pair's networks
    pair = NaNInjectingPair([step for step in range(500) if step % 100])
    assert pair.fit(compile=compile, nonfinite="skip", epochs=50).skipped == 148


def test_a_step_that_fails_in_validation_is_skipped():
    vae, calls = vae_of(), torch.zeros(())

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = vae.encoder(pyro.subsample(x, event_dim=1)).mean
            pyro.sample("z", dist.Normal(torch.where(calls == 1, math.nan, loc), 1.0).to_event(1))

    settings = {"epochs": 2, "batch_size": 25, "nonfinite": "skip", "schedules": {calls: float}}
    assert pv.fit(vae.model, guide, X, **settings).skipped == 1


def test_the_error_names_validation_data_whose_elbo_is_not_finite():
    vae, scale = vae_of(), torch.tensor(1.0)

    def likelihood(z):
        return dist.Normal(vae.decoder(z).mean / scale, 1.0, validate_args=False).to_event(1)

    def collapse(epoch):
        scale.fill_(0.0)

    model = model_of(vae.prior(), likelihood)
    with pytest.raises(FloatingPointError, match=r"validation: the loss is -?\w+; log_prob of site 'x'|step 2"):
        pv.fit(model, vae.guide, X, epochs=3, validation=HELD_OUT, callbacks=[collapse])
    with pytest.raises(FloatingPointError, match=r"data: the loss is"):
        pv.evaluate(model, vae.guide, X)


@EAGER_AND_CAPTURED
def test_gradients_are_clipped_as_torch_clips_them(compile):
    ours, theirs = vae_of().double(), vae_of().double()
    pv.fit(ours.model, ours.guide, X.double(), epochs=20, lr=1e-2, seed=3, clip_norm=2.0, compile=compile)
    pyro.set_rng_seed(3)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    norms = []
    for _ in range(20):
        optimizer.zero_grad()
        Trace_ELBO().differentiable_loss(theirs.model, theirs.guide, X.double()).backward()
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), 2.0))
        optimizer.step()
    assert max(norms) > 2.0
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@EAGER_AND_CAPTURED
@pytest.mark.parametrize("ends", ["patience", "epochs", "callback"])
def test_patience_ends_with_the_parameters_of_the_best_epoch_to_the_bit(compile, ends):
    vae = vae_of(batch_norm)
    states = []

    def keep(epoch):
        states.append(copied(vae.state_dict()))
        return ends == "callback" and epoch.number == 5

    epochs, patience = (200, 3) if ends == "patience" else (9, 100)
    options = {"lr": schedules.linear(2e-2, 0.3, 30), "validation": HELD_OUT, "patience": patience}
    fitted = run(vae, epochs=epochs, callbacks=[keep], compile=compile, **options)
    bounds = fitted.history["validation_elbo"]
    best = int(np.argmax(bounds))
    assert fitted.stopped == ends
    if ends == "patience":
        assert len(bounds) == best + 4
    assert same(vae.state_dict(), states[best])
    assert best < len(bounds) - 1


def test_validation_and_evaluation_add_to_the_history_and_change_nothing():
    ours, theirs = vae_of(batch_norm), vae_of(batch_norm)
    seen, unseen = run(ours, validation=HELD_OUT).history, run(theirs).history
    assert {name: seen[name] for name in unseen} == unseen
    assert set(seen) - set(unseen) == {"validation_elbo", "validation_distortion", "validation_rate"}
    assert all(len(values) == 6 for values in seen.values())
    pv.evaluate(ours.model, ours.guide, X)
    assert same(ours.state_dict(), theirs.state_dict())
    assert ours.decoder.network[1].num_batches_tracked == 18


@EAGER_AND_SLOWLY_CAPTURED
def test_callbacks_receive_each_epoch_and_may_end_the_run(compile):
    received = []

    def note(epoch):
        received.append((epoch.number, epoch.steps, epoch.record, {len(rows) for rows in epoch.history.values()}))
        torch.rand(3)  # must not change the run
        return epoch.number == 4

    ours, theirs = vae_of(), vae_of()
    fitted = run(ours, validation=HELD_OUT, callbacks=[note], compile=compile)
    assert (fitted.stopped, fitted.steps) == ("callback", 12)
    assert [row[:2] for row in received] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    for number, (_, _, record, lengths) in enumerate(received):
        assert record == {name: values[number] for name, values in fitted.history.items()}
        assert lengths == {number + 1}
    alone = run(theirs, epochs=4, validation=HELD_OUT, compile=compile)
    assert alone.history == fitted.history
    assert same(ours.state_dict(), theirs.state_dict())


@EAGER_AND_SLOWLY_CAPTURED
def test_callbacks_may_freeze_and_unfreeze(compile, steps):
    vae, twin = vae_of().double(), vae_of().double()
    states = []

    def freeze(one, epochs):
        one.encoder.requires_grad_(not 2 <= epochs < 4)
        one.decoder.family.log_scale.requires_grad_(epochs >= 3)

    def freeze_after(epoch):
        states.append(copied(vae.encoder.state_dict()))
        freeze(vae, epoch.number)

    freeze(vae, 0)
    rate = schedules.linear(1e-2, 3e-2, 10)
    run(vae, X.double(), lr=rate, callbacks=[freeze_after], compile=compile)
    assert [same(states[1], state) for state in states[2:5]] == [True, True, False]
    assert {"encoder.network.0.weight", "decoder.family.log_scale"} <= model_state(steps[0]).keys()

    optimizer = torch.optim.Adam(twin.parameters())
    for step, rows in enumerate(batches()):
        freeze(twin, step // 3)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        with SubsampleRows("data", rows):
            Trace_ELBO().differentiable_loss(twin.model, twin.guide, X.double()).backward()
        optimizer.step()
    for name, tensor in vae.state_dict().items():
        assert torch.allclose(tensor, twin.state_dict()[name], rtol=1e-7, atol=1e-9), name


@EAGER_AND_SLOWLY_CAPTURED
def test_callbacks_may_set_modules_to_evaluation_mode(compile):
    vae = vae_of(batch_norm)
    means = []

    def evaluating(epoch):
        means.append(vae.decoder.network[1].running_mean.clone())
        vae.decoder.train(epoch.number < 2)

    run(vae, epochs=4, callbacks=[evaluating], compile=compile)
    assert not torch.equal(means[0], means[1])
    assert torch.equal(means[1], means[3])


def test_an_error_in_a_callback_ends_the_run_and_restores_the_signal_handler():
    with pytest.raises(ZeroDivisionError):
        run(vae_of(), callbacks=[lambda epoch: 1 / 0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture(autouse=True)
def _default_handler():
    """A shell lets the processes in its background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c(times, begun=None, between=0.3):
    """Press Ctrl-C from a thread, some time after an event."""

    def press():
        if begun is not None:
            begun.wait()
        time.sleep(between)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(between)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


@EAGER_AND_SLOWLY_CAPTURED
def test_ctrl_c_ends_a_run_that_can_be_resumed(compile, tmp_path):
    vae, whole = vae_of(), vae_of()
    begun = threading.Event()
    thread = press_ctrl_c(1, begun, between=0.05)
    with pytest.warns(UserWarning, match=r"fit: interrupted after \d+ steps; the parameters are kept"):
        fitted = run(vae, epochs=10**6, compile=compile, checkpoints=tmp_path, callbacks=[lambda epoch: begun.set()])
    thread.join()
    assert fitted.stopped == "interrupted"
    assert {len(values) for values in fitted.history.values()} == {fitted.steps // 3}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    epochs = fitted.steps // 3 + 2
    resumed = run(vae, epochs=epochs, compile=compile, checkpoints=tmp_path)
    assert resumed.stopped == "epochs"
    assert run(whole, epochs=epochs, compile=compile).history == resumed.history
    assert same(vae.state_dict(), whole.state_dict())


def test_a_second_ctrl_c_ends_at_once():
    class Slow(Trace_ELBO):
        def loss_and_grads(self, *args):
            if started.is_set():
                time.sleep(10)
            started.set()
            return super().loss_and_grads(*args)

    started = threading.Event()
    thread = press_ctrl_c(2, started, between=1.1)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(vae_of(), epochs=100, elbo=Slow())
    thread.join()
    assert time.monotonic() - begun < 8
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_ctrl_c_that_comes_twice_ends_the_run_after_the_step():
    """As under torchrun, where it comes from the terminal and from the process that started this one."""
    with pytest.warns(UserWarning, match=r"fit: interrupted after 4 steps"):
        fitted = run(
            vae_of(), callbacks=[lambda epoch: [os.kill(os.getpid(), signal.SIGINT) for _ in range(3)] and None]
        )
    assert fitted.stopped == "interrupted"


def test_a_handler_of_the_user_stays():
    caught = []
    ours = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
    try:
        thread = press_ctrl_c(1)
        fitted = run(vae_of(), epochs=10**6, callbacks=[lambda epoch: bool(caught)])
        thread.join()
        assert fitted.stopped == "callback"
    finally:
        signal.signal(signal.SIGINT, ours)


@EAGER_AND_SLOWLY_CAPTURED
def test_a_run_in_another_thread_gives_the_same_numbers(compile):
    ours, theirs = vae_of(), vae_of()
    found = []
    thread = threading.Thread(target=lambda: found.append(run(ours, compile=compile)))
    thread.start()
    thread.join()
    assert run(theirs, compile=compile).history == found[0].history


@EAGER_AND_SLOWLY_CAPTURED
def test_a_seed_gives_the_same_run_twice_to_the_bit(compile):
    def noisy(x):
        return x + 0.1 * torch.randn_like(x)

    vaes = [vae_of(batch_norm) for _ in range(3)]
    options = {"compile": compile, "transform": noisy, "validation": HELD_OUT, "clip_norm": 10.0}
    first, second, other = (run(vae, seed=seed, **options) for vae, seed in zip(vaes, (4, 4, 5), strict=True))
    assert first.history == second.history != other.history
    assert same(vaes[0].state_dict(), vaes[1].state_dict())


@EAGER_AND_CAPTURED
@pytest.mark.parametrize("ends", ["well", "stop", "interrupt"])
def test_global_state_is_as_before(compile, ends, random_states):
    def interrupt(epoch):
        raise KeyboardInterrupt

    pyro.param("mine", torch.tensor(3.0))
    pair = NaNInjectingPair([5] if ends == "stop" else [])
    torch.rand(1)
    before = random_states()
    filters = list(warnings.filters)
    with pytest.raises((FloatingPointError, KeyboardInterrupt)) if ends != "well" else warnings.catch_warnings():
        pair.fit(compile=compile, callbacks=[interrupt] if ends == "interrupt" else [], validation=HELD_OUT)
        pv.evaluate(pair.model, pair.guide, X)
    assert random_states() == before
    assert warnings.filters == filters
    assert not nn.modules.module._global_forward_pre_hooks
    names = {f"vae$$${path}" for path, _ in pair.vae.named_parameters() if "decoder.family" not in path}
    assert {name for name in pyro.get_param_store() if "decoder.family" not in name} == {"mine"} | names
    assert pyro.param("mine") == 3.0


@pytest.mark.parametrize("answer", [True, np.True_, torch.tensor(True)])
def test_a_callback_ends_the_run_with_any_true(answer):
    assert run(vae_of(), callbacks=[lambda epoch: answer]).stopped == "callback"


@pytest.mark.parametrize("answer", [1, "stop", torch.zeros(2), np.float64(1.0)])
def test_a_callback_that_returns_no_answer_is_refused(answer):
    with pytest.raises(TypeError, match=r"`callbacks` must be functions that return True.*got one"):
        run(vae_of(), callbacks=[lambda epoch: answer])


@EAGER_AND_CAPTURED
@pytest.mark.parametrize(("row", "batch_size"), [(3, None), (45, 20)])
def test_an_outlier_has_one_answer_whatever_its_row_and_the_options(compile, row, batch_size):
    data = X.clone()
    data[row] = 1e30  # its q(z | x) has an infinite scale, which Pyro's validation refuses where it is on
    options = {"batch_size": batch_size, "epochs": 3, "compile": compile}
    with pytest.raises(FloatingPointError, match=rf"step \d: the loss is nan; .*site 'z' .* in rows {row} of the data"):
        run(vae_of(), data, **options)
    fitted = run(vae_of(), data, nonfinite="skip", **options)
    assert fitted.skipped == 3


@EAGER_AND_CAPTURED
def test_a_run_that_can_train_nothing_is_refused(compile):
    vae = vae_of().requires_grad_(False)
    with pytest.raises(ValueError, match=r"must have a parameter that can be trained, got none: all are frozen"):
        run(vae, compile=compile)


def test_a_captured_run_ends_with_validated_parameters():
    """A probability that has left its range has a finite log-density all the same."""

    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.5))

        def forward(self, z):
            return dist.Bernoulli(self.factor.expand(*z.shape[:-1], 3), validate_args=None).to_event(1)

    vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(3, 1, MLP), Growing())
    with pytest.raises(ValueError, match="Expected parameter probs"):
        pv.fit(vae.model, vae.guide, torch.ones(20, 3), epochs=20, lr=0.05, compile=True)
    assert vae.decoder.factor > 1
