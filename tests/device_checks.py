"""A program that uses pairs on the stand-in device, and prints the error of each check as JSON: see test_devices."""

import json
import sys
import tempfile
import time
import traceback
from functools import partial
from importlib import import_module
from pathlib import Path

import matplotlib as mpl
import pair_cases
import pyro
import torch
from pyro.infer import Trace_ELBO
from stand_in_device import stand_in_device
from torch import nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, plots, priors

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
    }


def run(checks):
    """The last lines of each check's error, or ``None``."""
    errors = {}
    for name, check in checks.items():
        pyro.clear_param_store()
        start = time.process_time()
        try:
            check()
            errors[name] = None
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/pyro_vae/" in f.filename]
            where = f" at {frames[-1].filename.rpartition('/pyro_vae/')[2]}:{frames[-1].lineno}" if frames else ""
            errors[name] = f"{type(error).__name__}: {error}{where}"
        print(f"{time.process_time() - start:.1f} s {name}: {errors[name]}", file=sys.stderr, flush=True)
    return errors


def mixtures(device):
    """What has to raise, with the type of the error."""
    x, vae = torch.zeros(3, 4), pair().to(device)
    wrong = {
        "an operation": lambda: x + x.to(device),
        "a generator": lambda: torch.randperm(3, generator=torch.Generator("cpu"), device=device),
        "a model and data": lambda: pv.evaluate(vae.model, vae.guide, x),
        "numpy": lambda: x.to(device).numpy(),
    }
    return {name: str(error).partition(":")[0] for name, error in run(wrong).items()}


def main(situation):
    with stand_in_device() as device:
        if situation == "model on the device":
            found = run(make_checks(device))
        elif situation == "another default device":  # data and a model are not there
            with device:
                found = run(make_checks(torch.device("cpu")))
        else:
            found = mixtures(device)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
