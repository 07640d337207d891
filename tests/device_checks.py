"""A program that uses the package on the stand-in device: see test_devices.

It prints as JSON the error of each check that has one, and the public functions that no check runs.
"""

import json
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path

import matplotlib as mpl
import pair_cases
import public_functions
import pyro
import pytest
import stand_in_cuda_graphs
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.ops.indexing import Vindex
from stand_in_device import stand_in_device
from torch import nn

import pyro_vae as pv
from pyro_vae import (
    baselines,
    distributions,
    families,
    gradients,
    guides,
    handlers,
    likelihoods,
    missing,
    networks,
    objectives,
    parallel,
    plots,
    priors,
    schedules,
    spatial,
    tabular,
)
from pyro_vae._utils.rng import torch_random_states

mpl.use("Agg")
FEW = {"num_samples": 30, "progress": False}
NET = networks.mlp([8], nn.Tanh)


def pair(latent=1, encoder=guides.DiagonalNormal, prior=priors.StandardNormal, **options):
    torch.manual_seed(0)
    return pv.VAE(prior(latent, **options), encoder(4, latent, NET), likelihoods.Normal(latent, 4, NET))


def make_checks(device):
    """Functions by name; each uses a model and data on ``device``."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    vae, two = pair().to(device), pair(2).to(device)
    discrete = pv.VAE(priors.Bernoulli(2), guides.Bernoulli(4, 2, NET), likelihoods.Normal(2, 4, NET)).to(device)
    binary = (x > 0).float()
    images = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(4, 2, NET), likelihoods.Bernoulli(2, 4, NET))
    images.to(device)
    labels, shape = torch.arange(12).to(device) % 3, (2, 2)

    def fit(vae=vae, **options):
        fitted = pv.fit(vae.model, vae.guide, x, epochs=2, batch_size=5, compile=False, progress=False, **options)
        assert all(torch.tensor(fitted.history["elbo"], device="cpu").isfinite())

    def report():
        inspect = import_module("pyro_vae.inspection.inspect")
        inspect.inference_gap = partial(pv.inference_gap, steps=2)  # 1000 steps would take half a minute
        with tempfile.TemporaryDirectory() as folder:
            options = {"num_simulations": 20, "max_refined": 2, "labels": labels, "image_shape": shape, **FEW}
            found = pv.report(Path(folder) / "page.html", images.model, images.guide, binary, **options)
        assert not found.skipped, found.skipped

    def save():
        with tempfile.TemporaryDirectory() as folder:
            vae.save(Path(folder) / "vae.pt")
            loaded = pv.VAE.load(Path(folder) / "vae.pt").to(device)
        assert loaded.encode(x).mean.device == device

    def checkpoints():
        with tempfile.TemporaryDirectory() as folder:
            fit(checkpoints=Path(folder) / "run")
            pv.fit(vae.model, vae.guide, x, epochs=3, batch_size=5, compile=False, checkpoints=Path(folder) / "run")

    def evidence_plots():
        plots.khat(pv.log_evidence(vae.model, vae.guide, x, **FEW))
        estimates = {name: pv.log_evidence(p.model, p.guide, x, **FEW) for name, p in (("one", vae), ("two", two))}
        plots.evidence_comparison(pv.compare_evidence(estimates | {"exact": pv.exact.log_evidence(vae.model, x)}))
        plots.training_curves({"elbo": [-9.0]}, log_evidence=estimates["one"])
        plots.rate_distortion({"one": pv.evaluate(vae.model, vae.guide, x)})

    def image_plots():
        plots.manifold(lambda z: images.decode(z.to(device)).mean, shape, size=3)
        plots.traversals(lambda z: images.decode(z).mean, torch.zeros(2).to(device), shape)
        plots.reconstructions(images.reconstruct, binary, shape)
        plots.samples(images.generate, shape, count=4)
        plots.image_grid(binary.reshape(-1, 2, 2), columns=4)
        plots.latent_map(images.encode(binary).mean, labels)

    def exact(vae):
        few = x[:2]  # no more operations than for all rows
        total = pv.exact.elbo(vae.model, vae.guide, few) + pv.exact.kl(vae.model, vae.guide, few)
        assert torch.allclose(pv.exact.log_evidence(vae.model, few), total, atol=1e-3)
        pv.exact.posterior(vae.model, few).sample((3,))

    def every_part(prior, guide, likelihood="Normal", objective="Trace_ELBO"):
        vae, data = pair_cases.vae_of(prior, guide, likelihood)
        vae, elbo = vae.to(device), pair_cases.OBJECTIVES[objective][1]()
        if isinstance(getattr(elbo, "baseline", None), nn.Module):
            elbo.baseline.to(device)
        guide = pair_cases.guide_for(vae, objective)
        pv.fit(vae.model, guide, data.to(device), epochs=1, elbo=elbo, compile=False)
        pv.log_evidence(vae.model, vae.guide, data.to(device), num_samples=2)

    def every(name, fitting):
        return {f"{name} {one}": partial(every_part, *case) for one, case in fitting.items()}

    pairs = pair_cases.PAIRS
    of_likelihoods = {name: ("StandardNormal", "DiagonalNormal", name) for name in pair_cases.LIKELIHOODS}
    of_objectives = {
        name: (*next(pair for pair in pairs if pair_cases.takes(name, *pair)), "Normal", name)
        for name in pair_cases.OBJECTIVES
    }
    parts = every("prior", {pair[0]: pair for pair in pairs}) | every("guide", {pair[1]: pair for pair in pairs})
    parts |= every("likelihood", of_likelihoods) | every("objective", of_objectives)

    def missing():
        net, holes = networks.with_missing(NET), x.clone()
        holes[0, 0] = torch.nan
        likelihood = likelihoods.Normal(1, 4, NET, missing=True)
        vae = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(4, 1, net), likelihood).to(device)
        pv.fit(vae.model, vae.guide, holes, epochs=1, compile=False)
        pv.calibrate(vae.model, vae.guide, holes, num_simulations=10, num_draws=10)

    def draws():
        with tempfile.TemporaryDirectory() as folder:
            pv.save_draws(Path(folder) / "draws.nc", two.model, two.guide, x, draws=5)
        pv.reference(vae.model, x[:2], draws=3, warmup=2, chains=1)

    return parts | {
        "missing entries": missing,
        "draws in files, and a reference": draws,
        "fit": fit,
        "fit of two variables": lambda: fit(two, validation=x, patience=3),
        "fit of a discrete latent": lambda: fit(discrete, elbo=Trace_ELBO()),
        "evaluate": lambda: pv.evaluate(two.model, two.guide, x),
        "log_evidence": lambda: pv.log_evidence(two.model, two.guide, x, **FEW),
        "annealed": lambda: pv.annealed_log_evidence(
            two.model, two.guide, x, num_chains=5, num_temperatures=4, progress=False
        ),
        "exact of one variable": lambda: exact(vae),
        "exact of two variables": lambda: exact(two),
        "exact of a discrete latent": lambda: exact(discrete),
        "decompose": lambda: pv.decompose(two.model, two.guide, x, num_samples=10),
        "inference_gap": lambda: pv.inference_gap(two.model, two.guide, x[:3], steps=3, num_samples=20),
        "calibrate": lambda: str(pv.calibrate(two.model, two.guide, x, num_simulations=20, num_draws=20)),
        "plot of calibration": lambda: plots.calibration(
            pv.calibrate(vae.model, vae.guide, x, num_simulations=20, num_draws=20)
        ),
        "report": report,
        "plots of evidence": evidence_plots,
        "plots of images": image_plots,
        "posterior of one variable": lambda: plots.posterior(vae.model, vae.guide, x[:1]),
        "posterior of two variables": lambda: plots.posterior(two.model, two.guide, x[:1]),
        "posterior of a discrete latent": lambda: plots.posterior(discrete.model, discrete.guide, x[:1]),
        "plate diagram": lambda: plots.plate_diagram(vae.model, vae.guide, x),
        "to_datatree": lambda: pv.to_datatree(two.model, two.guide, x, draws=25),
        "save": save,
        "checkpoints": checkpoints,
        "full rank": lambda: fit(pair(3, guides.FullRankNormal).to(device)),
        "datasets": lambda: pv.datasets.two_gaussians(5, seed=0).log_prob(torch.zeros(1, 2, device="cpu")),
        "low rank": lambda: fit(pair(3, lambda *sizes: guides.LowRankNormal(*sizes, rank=1)).to(device)),
        "mixture": lambda: fit(
            pair(
                2, lambda *s: guides.MixtureOfNormals(*s, num_components=2), priors.MixtureOfNormals, num_components=3
            ).to(device)
        ),
        **training_checks(x, two),
        **part_checks(x, two, discrete),
        **answer_checks(x, two, discrete),
        **table_checks(device),
    }


def training_checks(x, vae):
    """Checks of runs, of their random numbers, and of what a run can be given."""

    def fit(vae=vae, **options):
        fitted = pv.fit(vae.model, vae.guide, x, progress=False, **{"epochs": 2, "batch_size": 5} | options)
        assert all(torch.tensor(fitted.history["elbo"], device="cpu").isfinite())
        return fitted

    def replayed():
        weight = torch.ones((), device="cpu")  # a number that changes, which each replay copies to the device
        beta, found = handlers.WeightKL(weight), []
        options = {"epochs": 50, "clip_norm": 1.0, "schedules": {weight: schedules.linear(0.0, 1.0, 50)}}
        for start in (nullcontext, lambda: stand_in_cuda_graphs.cuda_graphs(x.device)):
            pyro.clear_param_store()
            fresh = pair(2).to(x.device)
            with start():
                found.append(pv.fit(beta(fresh.model), beta(fresh.guide), x, progress=False, **options))
        assert found[0].engine.startswith("replayed"), found[0].engine
        assert found[1].engine.startswith("replayed as CUDA graphs"), found[1].engine
        assert found[0].history == found[1].history

    def resumed():
        found, device = [], x.device
        for epochs in ([6], [2, 6]):
            fresh = pair(2).to(device)
            with tempfile.TemporaryDirectory() as folder:
                for last in epochs:
                    torch.manual_seed(1 if last == epochs[0] else 9)  # what a checkpoint restores
                    fit(fresh, epochs=last, checkpoints=Path(folder) / "run", validation=x)
                saved = pv.Checkpoints(Path(folder) / "run")
                assert saved.load() is not None
                assert saved.load_best(fresh) <= 6
                fit(fresh, epochs=7, checkpoints=Path(folder) / "run", validation=x)
            found.append([tensor.cpu() for tensor in fresh.state_dict().values()])
        assert all(map(torch.equal, *found)), "a resumed run has other numbers"

    def seeded():
        before = torch_random_states()
        options = {"num_samples": 20, "progress": False}
        draws = [pv.log_evidence(vae.model, vae.guide, x, **options).log_evidence for _ in range(2)]
        pv.calibrate(vae.model, vae.guide, x, num_simulations=10, num_draws=10)
        assert torch.equal(*draws), "the same seed has other numbers"
        after = torch_random_states()
        assert all(torch.equal(before[name], after[name]) for name in before), "a random stream has changed"

    def svi():
        svi = pv.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        assert torch.tensor([svi.step(x), svi.evaluate_loss(x)], device="cpu").isfinite().all()
        assert svi.optimizer.param_groups

    def learning_rates():
        decay = schedules.from_torch(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1), start=1e-3)
        for lr in (schedules.on_plateau(1e-3, patience=1), decay, schedules.decayed(1e-3), schedules.constant(1e-3)):
            fit(lr=lr, **{"validation": x} if isinstance(lr, schedules.Plateau) else {})

    def temperatures():
        prior, encoder = priors.RelaxedBernoulli(2, 0.5), guides.RelaxedBernoulli(4, 2, NET, 0.66)
        relaxed = pv.VAE(prior, encoder, likelihoods.Normal(2, 4, NET)).to(x.device)
        several = (schedules.exponential(1.0, 1e-2), schedules.linear(1.0, 0.5, 9), schedules.cyclical(0.5, 1.0, 3))
        for schedule in several:
            with tempfile.TemporaryDirectory() as folder:  # which has a description of the schedule
                options = {"schedules": {encoder.family.temperature: schedule}, "checkpoints": Path(folder) / "run"}
                assert fit(relaxed, **options).unit == "nats per datum"
        twin = relaxed.discrete()
        pv.evaluate(twin.model, twin.guide, x)

    def arguments():
        def model(rows, scale):
            with pyro.plate("data", len(rows)):
                z = pyro.sample("z", vae.prior())
                pyro.sample("x", pyro.distributions.Normal(vae.decode(z).mean, scale).to_event(1), obs=rows)

        def guide(rows, scale):
            with pyro.plate("data", len(rows)):
                pyro.sample("z", vae.encode(rows))

        pv.fit(model, guide, pv.Arguments(x, scale=x.new_ones(())), epochs=2, batch_size=5, progress=False)

    def sweep():
        def make(latent, lr, weight):
            return pair(latent).to(x.device), {"lr": lr}

        space = {"latent": pv.sweeps.integers(1, 2), "lr": pv.sweeps.log_uniform(1e-3, 1e-2)}
        space |= {"weight": pv.sweeps.uniform(0.0, 1.0)}
        with tempfile.TemporaryDirectory() as folder:
            options = {"folder": folder, "num_settings": 2, "epochs": 1, "engine": None, "num_samples": 5}
            found = pv.sweep(make, space, x[:8], validation=x[8:], progress=False, **options)
            assert found.load().steps == 1
        assert len(found.table) == 2
        assert found.best
        assert found.to_datatree()
        plots.sweep(found)

    def ranks():
        with parallel.one_process():
            assert (parallel.rank(), parallel.num_ranks()) == (0, 1)
            fit(callbacks=[parallel.on_every_rank(lambda epoch: None)])

    return {
        "steps that are replayed, one by one and as CUDA graphs": replayed,
        "ranks": ranks,
        "a sweep": sweep,
        "a resumed run": resumed,
        "random states": seeded,
        "SVI": svi,
        "learning rates": learning_rates,
        "temperatures": temperatures,
        "arguments": arguments,
    }


def part_checks(x, vae, discrete):
    """Checks of distributions, parts, networks and handlers."""

    def moments():
        logits = x.new_tensor([[0.3, -0.2, 1.0]])
        counts = tabular.NegativeBinomial(logits, logits.exp())
        classes = tabular.Categorical(logits=logits)
        levels = distributions.DiscretizedLogisticMixture(logits, logits, logits.exp(), num_levels=20)
        assert levels.enumerate_support().device == x.device
        some = [
            counts, tabular.ZeroInflated(tabular.Poisson(logits), logits), tabular.StudentT(logits.exp() + 2, logits),
            levels, missing.with_missing(pyro.distributions.Normal(logits, 1.0)),
        ]  # fmt: skip
        for one in some:
            assert one.mean.device == one.variance.device == one.log_prob(one.sample()).device == x.device
        assert distributions.ContinuousBernoulli(logits).mean.device == x.device
        assert classes.mean.device == classes.variance.device == x.device
        assert classes.mode.device == x.device
        assert (classes.enumerate_support()[:, 0].cpu() == torch.arange(3, device="cpu")).all()
        holed = missing.with_missing(pyro.distributions.Bernoulli(logits=logits))
        assert holed.has_enumerate_support
        assert holed.enumerate_support().device == x.device

    def columns():
        mixed, data = pair_cases.vae_of("StandardNormal", "DiagonalNormal", "Columns")
        mixed, data = mixed.to(x.device), data.to(x.device)
        pv.fit(mixed.model, mixed.guide, data, epochs=1, progress=False)
        assert repr(mixed)
        assert mixed.generate(3).device == x.device
        rows = mixed.decode(mixed.encode(data).mean)
        assert rows.mean.device == rows.variance.device == rows.log_prob(data).device == x.device
        normal = distributions.Columns({name: pyro.distributions.Normal(x[:, :1], 1.0).to_event(1) for name in "ab"})
        assert normal.rsample().device == normal.with_missing().log_prob(x[:, :2]).device == x.device
        assert not normal.accepts_missing
        family = families.Columns({"a": families.Normal(1)}).to(x.device)
        assert family.start(3).shape == (3, 2)
        assert repr(family)
        outside = data.clone()
        outside[1, 1] = 0.5  # a binary column
        with pytest.raises(ValueError, match="sex"):
            pv.evaluate(mixed.model, mixed.guide, outside)

    def relaxed():
        spreads = [
            distributions.LogitRelaxedBernoulli(x.new_tensor(0.5), logits=x[:1, :2]),
            distributions.LogRelaxedOneHotCategorical(x.new_tensor(0.5), logits=x[:1, :2]),
            distributions.LogitNormal(x[:1, :2], x.new_ones(()), x.new_tensor(-1.0), x.new_tensor(2.0)),
        ]
        for one in spreads:
            assert distributions.find_extent(one) is not None
            assert distributions.discrete_twin(one) is None or distributions.discrete_twin(one).sample().device
        to_reals = torch.distributions.biject_to(spreads[1].support)
        values = spreads[1].sample()
        reals = to_reals.inv(values)
        assert to_reals.log_abs_det_jacobian(reals, values).device == x.device
        assert to_reals.forward_shape(reals.shape) == values.shape
        assert to_reals.inverse_shape(values.shape) == reals.shape
        for family in (families.RelaxedBernoulli(2, 0.5), families.RelaxedOneHotCategorical((1, 2), 0.5)):
            family = family.to(x.device)
            raw = x[:, :2]
            for one in (family.soft, family.hard):
                assert one(family(raw).sample()).device == x.device
            assert family.discrete().to(x.device)(raw).sample().device == x.device
        assert (
            families.SoftTargetBernoulli(2).to(x.device)(x[:, :2]).log_prob((x[:, 2:] > 0).float()).device == x.device
        )

    def free_posteriors():
        free = guides.PerDatum.refining(vae.encoder, x)
        refined = pv.VAE(vae.prior, free, vae.decoder)
        pv.fit(refined.model, refined.guide, x, epochs=2, batch_size=5, progress=False)
        prior, free_bits = priors.RelaxedBernoulli(2, 0.5), guides.PerDatum(families.RelaxedBernoulli(2, 0.5), 12)
        bits = pv.VAE(prior.to(x.device), free_bits.to(x.device), discrete.decoder)
        assert repr(free)
        assert bits.discrete().encode(x).sample().device == x.device
        vamp = priors.VampPrior(vae.encoder, x[:3]).to(x.device)
        assert repr(vamp)
        assert vamp().sample().device == x.device
        assert repr(baselines.RunningAverage().to(x.device))

    def all_networks():
        images = x.reshape(12, 1, 2, 2).repeat(1, 1, 4, 4).flatten(1)
        holes = x.clone()
        holes[0, 0] = torch.nan
        cases = [
            (networks.linear()(4, 2), x),
            (networks.mlp([3])(4, 2), x),
            (networks.standardized(networks.linear(), x.mean(0), x.std(0))(4, 2), x),
            (networks.starting_at(networks.linear(), x.mean(0)[:2])(4, 2), x),
            (networks.one_hot(3, networks.linear())(4, 2), (x > 0).float()),
            (networks.with_missing(networks.linear())(4, 2), holes),
            (networks.convolutional((1, 8, 8))(64, 2), images),
            (networks.deconvolutional((1, 8, 8))(4, 64), x),
            (networks.spatial_broadcast((1, 8, 8))(4, 64), x),
            (networks.reshaped(lambda _, out: nn.Sequential(nn.Flatten(), nn.Linear(4, out)), (1, 2, 2))(4, 2), x),
        ]
        for network, rows in cases:
            assert network.to(x.device)(rows).isfinite().all()
        scene = distributions.SpatialMixture(x[:2], x[:2, None], 0.1)  # two slots, one channel
        assert scene.responsibilities(scene.sample()).device == scene.variance.device == x.device
        assert scene.log_prob(scene.mean).device == x.device
        slots, attention = networks.SlotAttention(2, 4).to(x.device)(x)
        assert slots.device == attention.device == x.device
        assert likelihoods.Normal.mse(2, 4, NET, kl_weight=1.0).to(x.device)(x[:, :2]).sample().device == x.device

    def experts():
        holes = x.clone()
        holes[:4, :2] = torch.nan  # rows without the first modality
        holes[0] = torch.nan  # a row without any
        for guide in (guides.MixtureOfExperts, guides.ProductOfExperts):
            q = guide([guides.DiagonalNormal(2, 3, NET), guides.DiagonalNormal(2, 3, NET)]).to(x.device)(holes)
            assert q.log_prob(q.rsample()).isfinite().all()

    def boxes():
        images, box = x.unflatten(1, (2, 2)), x.new_tensor([2.0, 1.0, 1.0])
        part = spatial.crop(images, box, 3)
        assert part.device == spatial.place(part, box, (4, 5)).device == x.device
        assert spatial.intersection_over_union(box, 2 * box).item() == 0.25

    def all_handlers():
        beta = handlers.WeightKL(x.new_tensor(0.5))
        pv.fit(beta(vae.model), beta(vae.guide), x, epochs=1, progress=False)
        with handlers.MaskSites({"z": x[:, 0] > 0}), handlers.UnsizedPlates() as plates, poutine.trace() as tracer:
            vae.guide(x)
        tracer.trace.compute_log_prob()
        assert tracer.trace.nodes["z"]["log_prob"].device == x.device
        assert not plates.names

    def imputed():
        net, holes = networks.with_missing(NET), x.clone()
        holes[0, 0] = torch.nan
        likelihood = likelihoods.Normal(1, 4, NET, missing=True)
        filled = pv.VAE(priors.StandardNormal(1), guides.DiagonalNormal(4, 1, net), likelihood).to(x.device)
        assert filled.impute(holes, 5).isfinite().all()
        with pytest.raises(TypeError, match="not a function"):
            filled(holes)

    return {
        "moments": moments,
        "columns": columns,
        "relaxed distributions": relaxed,
        "posteriors of each datum": free_posteriors,
        "networks": all_networks,
        "experts of modalities": experts,
        "boxes of images": boxes,
        "handlers": all_handlers,
        "imputation": imputed,
    }


def answer_checks(x, vae, discrete):
    """Checks of exact answers, gradients, data sets and ArviZ."""

    def posteriors():
        found = pv.exact.posterior(vae.model, x[:1])
        assert found.mean.device == found.log_prob(found.sample()).device == x.device
        assert found.support is not None
        bits = pv.exact.posterior(discrete.model, x[:2])
        assert bits.has_enumerate_support
        assert bits.probs.device == x.device

    def hidden_states():
        def model(rows):
            probs, state = Vindex(x.new_tensor([[0.9, 0.1], [0.2, 0.8]])), 0
            with pyro.plate("data", len(rows)):
                for step in range(4):
                    state = pyro.sample(f"z{step}", pyro.distributions.Categorical(probs[state]))
                    pyro.sample(f"x{step}", pyro.distributions.Normal(2.0 * state - 1, 1.0), obs=rows[:, step])

        found = pv.exact.posterior(model, x[:3])
        assert found.log_prob(found.sample()).device == x.device
        assert {one.device for one in (*found.marginals.values(), *found.mode.values())} == {x.device}

    def estimators():
        hard = {"score function": Trace_ELBO(), "DisARM": objectives.DisARM(2), "VIMCO": objectives.VIMCO(2)}
        several = {name: gradients.Estimator(discrete.model, discrete.guide, elbo) for name, elbo in hard.items()}
        found = gradients.compare(several, x[:4], evaluations=2, repeats=3)
        assert len(found.table())
        assert gradients.exact_gradient(discrete.model, discrete.guide, x)
        plots.bias_variance(found)
        measured = gradients.measure(x, x.mean(0))
        assert measured.p_value > 0
        assert measured.signal_to_noise > 0
        elbo = objectives.ImportanceWeighted(2)
        assert gradients.Estimator(vae.model, vae.guide, elbo).num_draws == 2

    def data_sets():
        points = pv.datasets.two_gaussians(5, seed=0)
        assert points.to_data().device == torch.get_default_device()
        assert points.posterior(points.x).device
        assert pv.datasets.digits().x.device == torch.get_default_device()
        assert len(pv.datasets.penguins())
        assert pv.datasets.shape_scenes(2, size=12).masks.device == torch.get_default_device()
        grey = x.sigmoid()
        for change in (pv.datasets.binarize, pv.datasets.grey, pv.datasets.resample):
            assert change(grey).device == x.device
        assert pv.datasets.measure_images(grey, (2, 2)).device == x.device
        assert {one.device for one in pv.datasets.hide_modalities(x[:, :2], x[:, 2:])} == {x.device}

    def more_data_sets():
        text, pairs = pv.datasets.sentences(3), pv.datasets.sentence_pairs(3)
        assert len(text.to_text(text.x)) == 3
        assert text.num_words > 3
        cells, shapes = pv.datasets.pbmc("test"), pv.datasets.shapes(2, noise=1.0)
        patches = pv.datasets.photograph_patches("test", stride=32)
        scenes = pv.datasets.digit_scenes(pv.datasets.digits("test"), 3, size=20, sides=(8, 10))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "music.json"
            file.write_text("[[[60, 64, 67]], [[60], []]]")
            music = pv.datasets.piano_rolls(file)
        chords = pv.datasets.chord_progressions(2)
        found = [text.x, text.labels, text.log_prob, pairs.x, pairs.y, cells.x, cells.labels, cells.batches]
        found += [shapes.x, shapes.labels, *shapes.factors.values(), scenes.x, scenes.labels, scenes.digits]
        found += [scenes.boxes, patches.x, patches.labels, music.x, music.lengths, chords.x, chords.lengths]
        assert {one.device for one in found} == {torch.get_default_device()}
        assert all(map(repr, (text, pairs, cells, shapes, patches, scenes, music, chords)))

    def pendulums():
        data = pv.datasets.pendulum(2, 4, size=5, gusts=0.1)
        assert {one.device for one in (*data.to_data(), data.states)} == {torch.get_default_device()}
        world, start, torque = pv.datasets.Pendulum(), x[:, :2], x[:, 2]
        state = world.step(start, torque, x[:, 3])
        frames = world.render(state, 6).flatten(1)
        options = {"size": 6, "gusts": 0.1, "camera": pv.datasets.resample}
        film = world.run(lambda frames, _: world.angle(frames[:, -1]), start, 3, **options)
        found = (state, world.height(state), frames, world.angle(frames), *film.to_data(), film.states)
        assert {one.device for one in found} == {x.device}

    def anomalies():
        evidence = pv.log_evidence(vae.model, vae.guide, x, **FEW)
        scores = pv.typicality(evidence, evidence, group_size=2)
        assert scores.device == x.device
        assert pv.auroc(scores, scores + 1).value >= 0.5

    def particles():
        def model(rows):
            z = rows.new_zeros(len(rows))
            with pyro.plate("data", len(rows)):
                for step in range(4):
                    z = pyro.sample(f"z{step}", pyro.distributions.Normal(z, 1.0))
                    pyro.sample(f"x{step}", pyro.distributions.Normal(z, 0.1), obs=rows[:, step])

        def guide(rows):
            with pyro.plate("data", len(rows)):
                for step in range(4):
                    pyro.sample(f"z{step}", pyro.distributions.Normal(rows[:, step], 0.2))

        for proposal in (None, guide):
            options = {"num_particles": 5, "num_filters": 3, "progress": False}
            assert pv.particle_log_evidence(model, proposal, x, **options).log_evidence.device == x.device

    def codes():
        rows = torch.arange(48, device=x.device)
        found = pv.disentanglement(x.repeat(4, 1), {"parity": rows % 2, "half": rows // 24}, bins=5)
        assert str(found)
        tensors = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
        assert {one.device.type for one in tensors} == {"cpu"}

    def arviz():
        evidence = pv.log_evidence(vae.model, vae.guide, x, **FEW)
        assert evidence.bias_corrected.device == x.device
        with warnings.catch_warnings(action="ignore"):
            assert pv.to_arviz(pv.to_datatree(vae.model, vae.guide, x, draws=25)) is not None

    return {
        "exact posteriors": posteriors,
        "hidden states": hidden_states,
        "gradient estimators": estimators,
        "data sets": data_sets,
        "data sets of text, music, cells and colours": more_data_sets,
        "pendulums": pendulums,
        "anomalies": anomalies,
        "particle filters": particles,
        "disentanglement": codes,
        "ArviZ": arviz,
    }


def table_checks(device):
    """Checks of tables, whose numbers are on the device of the model."""

    def table():
        frame = pv.datasets.penguins().iloc[3::20].assign(days=2.0, eggs=range(18))
        table = pv.tables.Table.from_frame(frame, {"eggs": "poisson"}, context=["island"], offset="days")
        vae = table.vae(latent=2, hidden=[4]).to(device)
        pv.fit(vae.model, vae.guide, table, epochs=2, batch_size=5, progress=False)
        assert len(table.impute(vae, num_draws=3)) == len(frame)
        assert len(table.imputed_cells(vae, num_draws=3))
        assert table.kinds["eggs"] == "poisson"
        assert len(table.describe())
        assert table.log_scale.isfinite().all()
        assert table.to_datatree(vae, draws=25)["posterior"].sizes["draw"] == 25
        again = table.encode(frame.iloc[:3])
        pv.evaluate(vae.model, vae.guide, again)
        context = table.context[:3].to(device)
        assert list(table.without_rows().decode(vae.generate(3, context=context)).columns) == table.names

    return {"tables": table}


def run(checks):
    """The error of each check that has one, and where it was raised."""
    errors = {}
    for name, check in checks.items():
        pyro.clear_param_store()
        start = time.process_time()
        try:
            check()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "/pyro_vae/" in frame.filename or frame.filename == __file__]
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            errors[name] = f"{type(error).__name__}: {str(error)[:500]} at {where}"
        print(f"{time.process_time() - start:.1f} s {name}: {errors.get(name)}", file=sys.stderr, flush=True)
    return errors


def mixtures(device):
    """The errors of what has to raise."""
    x, vae = torch.zeros(3, 4), pair().to(device)
    wrong = {
        "an operation": lambda: x + x.to(device),
        "a generator": lambda: torch.randperm(3, generator=torch.Generator("cpu"), device=device),
        "a model and data": lambda: pv.evaluate(vae.model, vae.guide, x),
        "numpy": lambda: x.to(device).numpy(),
    }
    return run(wrong)


def main(situation):
    """Print the results of the checks; the program must have called ``public_functions.record_runs`` first."""
    with stand_in_device() as device:
        if situation == "a mixture of devices":
            found = mixtures(device)
        else:
            on_default, elsewhere = situation == "all on the default device", situation == "another default device"
            torch.set_default_device(device if on_default or elsewhere else None)
            found = run(make_checks(torch.device("cpu") if elsewhere else device))
            torch.set_default_device(None)
    unused = public_functions.public_functions().keys() - public_functions.functions_that_ran()
    json.dump({"errors": found, "not run": sorted(unused)}, sys.stdout)
