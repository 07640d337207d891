"""Good calls of all public functions and classes, from which tests make wrong ones."""

import inspect
import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae import (
    baselines,
    datasets,
    distributions,
    exact,
    families,
    gradients,
    guides,
    handlers,
    likelihoods,
    missing,
    networks,
    objectives,
    plots,
    priors,
    schedules,
    spatial,
    sweeps,
    tables,
    tabular,
)

POOL = {
    "None": None, "-1": -1, "0": 0, "1.5": 1.5, "nan": math.nan, "inf": math.inf, "True": True, "10**30": 10**30,
    "'x'": "x", "''": "", "b''": b"", "[]": [], "()": (), "{}": {}, "set()": set(), "['x']": ["x"],
    "{'x': 1}": {"x": 1},
    "object()": object(), "int": int, "lambda: None": lambda: None, "lambda *_: None": lambda *_: None,
    "an empty tensor": torch.zeros(0), "a scalar": torch.tensor(0.5), "a NaN": torch.tensor([math.nan]),
    "bools": torch.tensor([True, False]), "complex numbers": torch.zeros(3, 2) + 0j, "integers": torch.arange(4),
    "four dimensions": torch.zeros(2, 1, 2, 2), "on meta": torch.zeros(6, 2, device="meta"),
    "sparse": torch.eye(3).to_sparse(), "an array": np.zeros((6, 2)), "an array of objects": np.array([None, "x"]),
}  # fmt: skip


NET = nn.Linear


def call_with(call, arguments):
    """Call with arguments by name, those of ``*data`` by position."""
    positional, named = [], dict(arguments)
    parameters = inspect.signature(call).parameters.values()
    variable = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), None)
    if variable:
        for p in parameters:
            if p.kind == p.VAR_POSITIONAL:
                positional += named.pop(p.name) if isinstance(named[p.name], tuple) else [named.pop(p.name)]
                break
            positional.append(named.pop(p.name))
    return call(*positional, **named)


def pair(w):
    return {"model": w.vae.model, "guide": w.vae.guide, "data": w.x}


def two_steps(x):
    with pyro.plate("data", len(x)):
        for t in range(2):
            z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=pyro.subsample(x, event_dim=1)[:, t])


def music(w):
    path = w.folder / "music.json"
    path.write_text('{"train": [[[60, 64, 67]]]}')
    return path


def part(w, **more):
    return {"in_features": 2, "latent": 2, "network": NET} | more


def experts(w):
    return {"experts": [guides.DiagonalNormal(**part(w)), guides.DiagonalNormal(**part(w))], "prior": None}


def likelihood(w, **more):
    return {"latent": 2, "out_features": 2, "network": NET} | more


def sweep(w):
    return {
        "make": lambda lr: (w.vae, {"lr": lr}), "space": {"lr": [0.01, 0.02]}, "data": w.x, "validation": w.x,
        "folder": str(w.folder / "sweep"), "num_settings": 1, "seeds": 1, "engine": None, "workers": 1,
        "early_stopping": None, "search": None, "num_samples": 1, "retries": 0, "every_seconds": 60.0, "threads": 1,
        "resources": None, "seed": 0, "progress": False, "epochs": 1,
    }  # fmt: skip


def evidence(w):
    return pv.Evidence(torch.zeros(3), torch.ones(3), torch.zeros(3), 10)


GOOD = {  # by name: the function or class, and its arguments by name
    "VAE": (pv.VAE, lambda w: {
        "prior": w.vae.prior, "encoder": w.vae.encoder, "decoder": w.vae.decoder, "name": "v", "context": None,
        "table": None}),
    "tables.Table.from_frame": (tables.Table.from_frame, lambda w: {
        "frame": pd.DataFrame({"a": [0.5, 1.5, 4.0], "b": ["x", "y", "x"]}), "kinds": {"a": "normal"}, "context": (),
        "offset": None, "index": None, "drop": ()}),
    "fit": (pv.fit, lambda w: pair(w) | {
        "epochs": 1, "batch_size": 3, "lr": 1e-3, "optimizer": torch.optim.AdamW, "elbo": Trace_ELBO(),
        "validation": w.x, "transform": None,
        "schedules": None, "plate": "data", "seed": 0, "progress": None, "compile": False, "precision": "bf16-mixed",
        "clip_norm": 1.0,
        "nonfinite": "stop", "patience": 1, "callbacks": (), "checkpoints": None,
        "num_data": None}),
    "evaluate": (pv.evaluate, lambda w: pair(w) | {
        "elbo": None, "num_samples": 1, "batch_size": 3, "plate": "data", "seed": 0}),
    "SVI": (pv.SVI, lambda w: {"model": w.vae.model, "guide": w.vae.guide, "optim": pyro.optim.Adam({}),
                               "loss": Trace_ELBO(), "compile": False, "precision": "bf16-mixed", "clip_norm": 1.0}),
    "Checkpoints": (pv.Checkpoints, lambda w: {"folder": w.folder / "c", "every_steps": 1, "every_seconds": 1.0}),
    "log_evidence": (pv.log_evidence, lambda w: pair(w) | {
        "num_samples": 5, "plate": "data", "seed": 0, "progress": None, "compile": False}),
    "annealed_log_evidence": (pv.annealed_log_evidence, lambda w: pair(w) | {
        "num_chains": 2, "num_temperatures": 2, "num_leapfrog_steps": 1, "plate": "data", "seed": 0, "progress": None}),
    "particle_log_evidence": (pv.particle_log_evidence, lambda w: {
        "model": two_steps, "guide": None, "data": w.x, "num_particles": 3, "num_filters": 2, "plate": "data",
        "seed": 0, "progress": None}),
    "typicality": (pv.typicality, lambda w: {
        "log_evidence": torch.zeros(6), "reference": evidence(w), "group_size": 2}),
    "auroc": (pv.auroc, lambda w: {"normal": torch.zeros(3), "anomalous": torch.ones(4)}),
    "compare_evidence": (pv.compare_evidence, lambda w: {"evidence": {"a": evidence(w)}}),
    "decompose": (pv.decompose, lambda w: pair(w) | {
        "num_samples": 2, "plate": "data", "seed": 0, "progress": None}),
    "disentanglement": (pv.disentanglement, lambda w: {
        "codes": torch.randn(40, 2), "factors": {"a": torch.arange(40) % 2, "b": torch.arange(40) // 20},
        "bins": 5, "seed": 0}),
    "inference_gap": (pv.inference_gap, lambda w: pair(w) | {
        "refined": None, "steps": 1, "lr": 1e-2, "num_particles": 2, "num_samples": 5, "plate": "data", "seed": 0,
        "tolerance": 1e-4, "progress": None}),
    "calibrate": (pv.calibrate, lambda w: pair(w) | {
        "num_simulations": 10, "num_draws": 10, "refit": {"epochs": 1}, "processes": 1, "latents": None,
        "tolerance": 1.4, "alpha": 0.001, "plate": "data", "seed": 0, "progress": None}),
    "inspect": (pv.inspect, lambda w: pair(w) | {
        "num_samples": 5, "num_simulations": 10, "max_rows": 3, "max_refined": 2, "refit": None, "processes": 1,
        "plate": "data", "seed": 0, "progress": None}),
    "report": (pv.report, lambda w: pair(w) | {
        "path": w.folder / "r.html", "title": "t", "history": {"elbo": [-1.0]}, "labels": w.labels,
        "image_shape": (1, 2),
        "pictures": None, "found": None, "plate": "data", "seed": 0, "progress": None,
        "num_samples": 5, "num_simulations": 10, "max_refined": 2}),
    "reference": (pv.reference, lambda w: {
        "model": w.vae.model, "data": w.x[:2], "draws": 1, "chains": 1, "warmup": 1, "seed": 0, "plate": "data",
        "dims": None, "coords": None, "local_draws": 5, "processes": 1}),
    "to_datatree": (pv.to_datatree, lambda w: pair(w) | {
        "draws": 2, "seed": 0, "plate": "data", "dims": None, "coords": None, "history": None, "constant_data": None,
        "parallel": False, "max_bytes": 10**9, "local_draws": 5, "predictions": None}),
    "save_draws": (pv.save_draws, lambda w: pair(w) | {
        "path": w.folder / "d.nc", "draws": 2, "seed": 0, "plate": "data", "dims": None, "coords": None,
        "history": None, "constant_data": None, "parallel": False, "chunk": 1, "progress": None,
        "local_draws": 5, "predictions": None}),
    "to_arviz": (pv.to_arviz, lambda w: {"tree": xr.DataTree()}),
    "exact.log_evidence": (exact.log_evidence, lambda w: {
        "model": w.vae.model, "data": w.x, "plate": "data", "tolerance": 1e-4, "progress": None}),
    "exact.posterior": (exact.posterior, lambda w: {
        "model": w.vae.model, "data": w.x, "plate": "data", "tolerance": 1e-4, "progress": None}),
    "exact.elbo": (exact.elbo, lambda w: pair(w) | {"plate": "data", "tolerance": 1e-4, "progress": None}),
    "exact.kl": (exact.kl, lambda w: pair(w) | {"plate": "data", "tolerance": 1e-4, "progress": None}),
    "priors.Bernoulli": (priors.Bernoulli, lambda w: {"latent": 2, "probs": 0.5, "learnable": False}),
    "priors.Gamma": (priors.Gamma, lambda w: {"latent": 2, "concentration": 1.0, "rate": 1.0, "learnable": False}),
    "priors.GumbelSoftmax": (priors.GumbelSoftmax, lambda w: {
        "latent": (2, 3), "temperature": 0.5, "probs": None, "learnable": False, "straight_through": False}),
    "priors.Laplace": (priors.Laplace, lambda w: {"latent": 2, "learnable": False}),
    "priors.MixtureOfNormals": (priors.MixtureOfNormals, lambda w: {"latent": 2, "num_components": 2}),
    "priors.Normal": (priors.Normal, lambda w: {"latent": 2}),
    "priors.NormalizingFlow": (priors.NormalizingFlow, lambda w: {
        "latent": 2, "transforms": 1, "hidden": [4], "kind": "affine"}),
    "priors.OneHotCategorical": (priors.OneHotCategorical, lambda w: {
        "latent": (2, 3), "probs": None, "learnable": False}),
    "priors.RelaxedBernoulli": (priors.RelaxedBernoulli, lambda w: {
        "latent": 2, "temperature": 0.5, "probs": 0.5, "learnable": False, "straight_through": False}),
    "priors.StandardNormal": (priors.StandardNormal, lambda w: {"latent": 2}),
    "priors.StudentT": (priors.StudentT, lambda w: {"latent": 2, "df": 4.0, "learnable": False}),
    "priors.Uniform": (priors.Uniform, lambda w: {"latent": 2, "low": 0.0, "high": 1.0}),
    "priors.VampPrior": (priors.VampPrior, lambda w: {"encoder": w.vae.encoder, "pseudo_data": w.x}),
    "guides.Bernoulli": (guides.Bernoulli, part),
    "guides.DiagonalNormal": (guides.DiagonalNormal, part),
    "guides.FullRankNormal": (guides.FullRankNormal, part),
    "guides.GumbelSoftmax": (guides.GumbelSoftmax, lambda w: part(w, latent=(2, 3), temperature=0.5)),
    "guides.InverseAutoregressiveFlow": (guides.InverseAutoregressiveFlow, lambda w: part(
        w, transforms=1, hidden=[4], context=2)),
    "guides.LogNormal": (guides.LogNormal, part),
    "guides.LogitNormal": (guides.LogitNormal, lambda w: part(w, low=0.0, high=1.0)),
    "guides.LowRankNormal": (guides.LowRankNormal, lambda w: part(w, rank=1)),
    "guides.MixtureOfExperts": (guides.MixtureOfExperts, experts),
    "guides.MixtureOfNormals": (guides.MixtureOfNormals, lambda w: part(w, num_components=2)),
    "guides.OneHotCategorical": (guides.OneHotCategorical, lambda w: part(w, latent=(2, 3))),
    "guides.PerDatum": (guides.PerDatum, lambda w: {"family": families.Normal(2), "raw": 3}),
    "guides.ProductOfExperts": (guides.ProductOfExperts, experts),
    "guides.RelaxedBernoulli": (guides.RelaxedBernoulli, lambda w: part(w, temperature=0.5)),
    "guides.SplineFlow": (guides.SplineFlow, lambda w: part(w, transforms=1, hidden=[4], context=2)),
    "likelihoods.Bernoulli": (likelihoods.Bernoulli, lambda w: likelihood(w, soft_targets=False, missing=False)),
    "likelihoods.Categorical": (likelihoods.Categorical, lambda w: likelihood(w, num_classes=3, missing=False)),
    "likelihoods.Columns": (likelihoods.Columns, lambda w: {
        "latent": 2, "columns": {"a": families.Normal(1), "b": families.Bernoulli(1)}, "network": NET,
        "missing": False}),
    "likelihoods.ContinuousBernoulli": (likelihoods.ContinuousBernoulli, lambda w: likelihood(w, missing=False)),
    "likelihoods.DiscretizedLogisticMixture": (likelihoods.DiscretizedLogisticMixture, lambda w: likelihood(
        w, num_levels=4, num_components=2, min_scale=0.1, missing=False)),
    "likelihoods.NegativeBinomial": (likelihoods.NegativeBinomial, lambda w: likelihood(
        w, dispersion="shared", missing=False)),
    "likelihoods.Normal": (likelihoods.Normal, lambda w: likelihood(w, scale="shared", min_scale=0.1, missing=False)),
    "likelihoods.Poisson": (likelihoods.Poisson, lambda w: likelihood(w, missing=False)),
    "likelihoods.StudentT": (likelihoods.StudentT, lambda w: likelihood(
        w, df="shared", scale="shared", min_scale=0.1, missing=False)),
    "likelihoods.LogNormal": (likelihoods.LogNormal, lambda w: likelihood(
        w, scale="shared", min_scale=0.1, missing=False)),
    "likelihoods.Ordinal": (likelihoods.Ordinal, lambda w: likelihood(w, num_levels=3, missing=False)),
    "likelihoods.ZeroInflatedNegativeBinomial": (likelihoods.ZeroInflatedNegativeBinomial, lambda w: likelihood(
        w, dispersion="shared", gate="shared", missing=False)),
    "likelihoods.ZeroInflatedPoisson": (likelihoods.ZeroInflatedPoisson, lambda w: likelihood(
        w, gate="shared", missing=False)),
    "likelihoods.Normal.mse": (likelihoods.Normal.mse, lambda w: likelihood(w, kl_weight=1.0, missing=False)),
    "families.Bernoulli": (families.Bernoulli, lambda w: {"event_shape": 2}),
    "families.Categorical": (families.Categorical, lambda w: {"event_shape": 2, "num_classes": 3}),
    "families.Columns": (families.Columns, lambda w: {"columns": [families.Normal(1), families.Bernoulli(1)]}),
    "families.ContinuousBernoulli": (families.ContinuousBernoulli, lambda w: {"event_shape": 2}),
    "families.DiscretizedLogisticMixture": (families.DiscretizedLogisticMixture, lambda w: {
        "event_shape": 2, "num_levels": 4, "num_components": 2, "min_scale": 0.1}),
    "families.Family": (families.Family, lambda w: {"event_shape": 2}),
    "families.Gamma": (families.Gamma, lambda w: {"event_shape": 2}),
    "families.Laplace": (families.Laplace, lambda w: {"event_shape": 2, "scale": 1.0, "min_scale": 0.1}),
    "families.LogNormal": (families.LogNormal, lambda w: {"event_shape": 2, "scale": 1.0, "min_scale": 0.1}),
    "families.LogitNormal": (families.LogitNormal, lambda w: {
        "event_shape": 2, "low": 0.0, "high": 1.0, "scale": 1.0, "min_scale": 0.1}),
    "families.NegativeBinomial": (families.NegativeBinomial, lambda w: {"event_shape": 2, "dispersion": "shared"}),
    "families.Normal": (families.Normal, lambda w: {"event_shape": 2, "scale": 1.0, "min_scale": 0.1}),
    "families.OneHotCategorical": (families.OneHotCategorical, lambda w: {"event_shape": (2, 3)}),
    "families.Ordinal": (families.Ordinal, lambda w: {"event_shape": 2, "num_levels": 3}),
    "families.Poisson": (families.Poisson, lambda w: {"event_shape": 2}),
    "families.Relaxed": (families.Relaxed, lambda w: {"event_shape": 2, "temperature": 0.5}),
    "families.RelaxedBernoulli": (families.RelaxedBernoulli, lambda w: {"event_shape": 2, "temperature": 0.5}),
    "families.RelaxedOneHotCategorical": (families.RelaxedOneHotCategorical, lambda w: {
        "event_shape": (2, 3), "temperature": 0.5}),
    "families.SoftTargetBernoulli": (families.SoftTargetBernoulli, lambda w: {"event_shape": 2}),
    "families.StudentT": (families.StudentT, lambda w: {"event_shape": 2, "df": 3.0, "scale": 1.0, "min_scale": 0.1}),
    "families.Uniform": (families.Uniform, lambda w: {"event_shape": 2, "low": 0.0, "high": 1.0}),
    "families.ZeroInflated": (families.ZeroInflated, lambda w: {"base": families.Poisson(2), "gate": 0.1}),
    "schedules.constant": (schedules.constant, lambda w: {"value": 1.0}),
    "schedules.cyclical": (schedules.cyclical, lambda w: {"start": 0.0, "end": 1.0, "period": 10, "rise": 0.5}),
    "schedules.decayed": (schedules.decayed, lambda w: {"start": 1.0, "steps": 10, "hold": 0.5, "end": 0.1}),
    "schedules.exponential": (schedules.exponential, lambda w: {"start": 1.0, "rate": 0.1, "floor": 0.1, "every": 1}),
    "schedules.linear": (schedules.linear, lambda w: {"start": 0.0, "end": 1.0, "steps": 10}),
    "schedules.on_plateau": (schedules.on_plateau, lambda w: {
        "start": 1e-3, "factor": 0.1, "patience": 10, "threshold": 1e-4, "floor": 0.0}),
    "schedules.from_torch": (schedules.from_torch, lambda w: {
        "make": lambda optim: torch.optim.lr_scheduler.ExponentialLR(optim, 0.9), "start": 0.1}),
    "datasets.two_gaussians": (datasets.two_gaussians, lambda w: {"num_points": 3, "scale": 0.1, "seed": 0}),
    "datasets.chord_progressions": (datasets.chord_progressions, lambda w: {"num_pieces": 2, "seed": 0}),
    "datasets.piano_rolls": (datasets.piano_rolls, lambda w: {"path": music(w), "split": "train"}),
    "datasets.pendulum": (datasets.pendulum, lambda w: {
        "num_sequences": 3, "num_frames": 4, "size": 5, "hold": 2, "gusts": 0.1, "camera": None, "seed": 0}),
    "datasets.Pendulum": (datasets.Pendulum, lambda w: {
        "gravity": 10.0, "damping": 0.1, "max_torque": 5.0, "interval": 0.1}),
    "datasets.sentences": (datasets.sentences, lambda w: {"num_sentences": 2, "seed": 0}),
    "datasets.sentence_pairs": (datasets.sentence_pairs, lambda w: {"num_pairs": 2, "seed": 0}),
    "datasets.binarize": (datasets.binarize, lambda w: {"x": w.x.sigmoid(), "threshold": 0.5}),
    "datasets.grey": (datasets.grey, lambda w: {"x": w.x.sigmoid()}),
    "datasets.hide_modalities": (datasets.hide_modalities, lambda w: {"modalities": (w.x, w.x), "share": 0.5}),
    "datasets.measure_images": (datasets.measure_images, lambda w: {"x": w.x.sigmoid(), "shape": (1, 2)}),
    "datasets.resample": (datasets.resample, lambda w: {"x": w.x.sigmoid()}),
    "datasets.digit_scenes": (datasets.digit_scenes, lambda w: {
        "digits": datasets.digits("test"), "num_scenes": 3, "size": 20, "sides": (8, 10), "max_digits": 2, "seed": 0}),
    "spatial.crop": (spatial.crop, lambda w: {"images": torch.zeros(2, 4, 4), "boxes": torch.ones(2, 3), "size": 2}),
    "spatial.place": (spatial.place, lambda w: {
        "objects": torch.zeros(2, 2, 2), "boxes": torch.ones(2, 3), "shape": (4, 4)}),
    "spatial.intersection_over_union": (spatial.intersection_over_union, lambda w: {
        "boxes": torch.ones(2, 3), "others": torch.ones(3)}),
    "sweep": (pv.sweep, lambda w: sweep(w)),
    "sweeps.uniform": (sweeps.uniform, lambda w: {"low": 0.0, "high": 1.0}),
    "sweeps.log_uniform": (sweeps.log_uniform, lambda w: {"low": 0.1, "high": 1.0}),
    "sweeps.integers": (sweeps.integers, lambda w: {"low": 1, "high": 9, "log": True}),
    "datasets.shapes": (datasets.shapes, lambda w: {"num_images": 2, "noise": 1.0, "seed": 0}),
    "datasets.photograph_patches": (datasets.photograph_patches, lambda w: {"split": "test", "stride": 32}),
    "datasets.shape_scenes": (datasets.shape_scenes, lambda w: {
        "num_scenes": 2, "size": 12, "counts": (1, 2), "seed": 0}),
    "datasets.digits": (datasets.digits, lambda w: {"split": "test"}),
    "datasets.pbmc": (datasets.pbmc, lambda w: {"split": "test"}),
    "networks.convolutional": (networks.convolutional, lambda w: {
        "image": (1, 8, 8), "channels": (2,), "activation": nn.Tanh}),
    "networks.deconvolutional": (networks.deconvolutional, lambda w: {
        "image": (1, 8, 8), "channels": (2,), "activation": nn.Tanh}),
    "networks.SlotAttention": (networks.SlotAttention, lambda w: {"num_slots": 2, "features": 3, "iterations": 1}),
    "networks.linear": (networks.linear, lambda w: {"bias": True}),
    "networks.mlp": (networks.mlp, lambda w: {"hidden": [3], "activation": nn.Tanh}),
    "networks.build": (networks.build, lambda w: {"network": NET, "in_features": 2, "out_features": 3}),
    "networks.one_hot": (networks.one_hot, lambda w: {"num_classes": 3, "network": NET}),
    "networks.reshaped": (networks.reshaped, lambda w: {"network": NET, "shape": (2, 1)}),
    "networks.spatial_broadcast": (networks.spatial_broadcast, lambda w: {
        "image": (1, 8, 8), "hidden": (2,), "activation": nn.Tanh}),
    "networks.standardized": (networks.standardized, lambda w: {"network": NET, "loc": 0.0, "scale": 1.0}),
    "networks.starting_at": (networks.starting_at, lambda w: {"network": NET, "outputs": 0.0}),
    "networks.with_missing": (networks.with_missing, lambda w: {"network": NET}),
    "objectives.ScoreFunction": (objectives.ScoreFunction, lambda w: {
        "baseline": baselines.RunningAverage(), "num_particles": 1, "name": "b"}),
    "baselines.RunningAverage": (baselines.RunningAverage, lambda w: {"decay": 0.9}),
    "baselines.NeuralBaseline": (baselines.NeuralBaseline, lambda w: {"in_features": 2, "network": NET}),
    "handlers.FixedSubsample": (handlers.FixedSubsample, lambda w: {"data": [w.x], "rows": [w.x[:2]]}),
    "handlers.MaskSites": (handlers.MaskSites, lambda w: {"masks": {"z": torch.tensor([True, False])}}),
    "handlers.SubsampleRows": (handlers.SubsampleRows, lambda w: {"plate": "data", "rows": torch.arange(2)}),
    "handlers.WeightKL": (handlers.WeightKL, lambda w: {"weight": 0.5}),
    "handlers.register": (handlers.register, lambda w: {"name": "net", "module": NET(1, 1)}),
    "gradients.Estimator": (gradients.Estimator, lambda w: {
        "model": w.discrete.model, "guide": w.discrete.guide, "elbo": objectives.LeaveOneOut(), "target": None}),
    "gradients.compare": (gradients.compare, lambda w: {
        "estimators": {"loo": gradients.Estimator(w.discrete.model, w.discrete.guide, objectives.LeaveOneOut())},
        "data": w.x, "evaluations": 2, "repeats": 2, "reference": None, "plate": "data", "seed": 0}),
    "gradients.exact_gradient": (gradients.exact_gradient, lambda w: {
        "model": w.discrete.model, "guide": w.discrete.guide, "data": w.x, "num_draws": 1, "plate": "data"}),
    "gradients.measure": (gradients.measure, lambda w: {"estimates": torch.randn(4, 3), "target": torch.zeros(3)}),
    "missing.with_missing": (missing.with_missing, lambda w: {
        "distribution": dist.Normal(torch.zeros(2), 1.0).to_event(1)}),
    "plots.training_curves": (plots.training_curves, lambda w: {
        "history": w.history, "ax": None, "terms": ["elbo"], "log_evidence": 0.0, "validation_log_evidence": None}),
    "plots.rate_distortion": (plots.rate_distortion, lambda w: {"models": {"a": (1.0, 2.0)}}),
    "plots.khat": (plots.khat, lambda w: {"evidence": evidence(w)}),
    "plots.evidence_comparison": (plots.evidence_comparison, lambda w: {
        "table": pv.compare_evidence({"a": evidence(w)})}),
    "plots.sweep": (plots.sweep, lambda w: {
        "result": pv.sweep(**sweep(w)), "most": 3, "ax": None}),
    "plots.latent_map": (plots.latent_map, lambda w: {"z": w.x, "labels": w.labels}),
    "plots.image_grid": (plots.image_grid, lambda w: {
        "images": torch.zeros(4, 2, 2), "columns": 2, "row_names": ["a", "b"], "column_names": None}),
    "plots.samples": (plots.samples, lambda w: {"generate": lambda n: torch.zeros(n, 4), "shape": (2, 2)}),
    "plots.manifold": (plots.manifold, lambda w: {
        "decode": lambda z: z.sigmoid()[:, :1].expand(-1, 4), "shape": (2, 2), "size": 2}),
    "plots.traversals": (plots.traversals, lambda w: {
        "decode": lambda z: z.sigmoid()[:, :1].expand(-1, 4),
        "z": torch.zeros(2), "shape": (2, 2), "values": [0.0, 1.0], "coordinates": [0]}),
    "plots.posterior": (plots.posterior, lambda w: {"model": w.vae.model, "guide": w.vae.guide, "datum": w.x[:1]}),
    "objectives.VIMCO": (objectives.VIMCO, lambda w: {"num_particles": 2}),
    "objectives.DisARM": (objectives.DisARM, lambda w: {"num_particles": 2}),
    "objectives.DiscreteKL": (objectives.DiscreteKL, lambda w: {"num_particles": 1}),
    "objectives.TotalCorrelation": (objectives.TotalCorrelation, lambda w: {"weight": 3.0, "num_particles": 1}),
    "objectives.FreeBits": (objectives.FreeBits, lambda w: {"nats": 0.1, "num_particles": 1}),
    "objectives.ImportanceWeighted": (objectives.ImportanceWeighted, lambda w: {
        "num_particles": 2, "gradient": "pathwise"}),
    "objectives.LeaveOneOut": (objectives.LeaveOneOut, lambda w: {"num_particles": 2}),
    "plots.reconstructions": (plots.reconstructions, lambda w: {
        "reconstruct": lambda x: x, "x": torch.zeros(3, 4), "shape": (2, 2), "columns": 2, "seed": 0}),
    "plots.plate_diagram": (plots.plate_diagram, lambda w: {"model": w.vae.model, "guide": w.vae.guide, "data": w.x}),
    "plots.bias_variance": (plots.bias_variance, lambda w: {
        "comparison": gradients.Comparison({"a": {"all": gradients.Measured(1.0, 0.1, 0.1, 1.0, 1.0, 2, 2, 9)}}, {}),
        "group": "all", "ax": None}),
    "plots.calibration": (plots.calibration, lambda w: {
        "result": pv.calibrate(*w.pair, w.x, num_simulations=10, num_draws=10)}),
    "distributions.Columns": (distributions.Columns, lambda w: {
        "columns": [dist.Normal(torch.zeros(1), 1.0).to_event(1)]}),
    "distributions.ContinuousBernoulli": (distributions.ContinuousBernoulli, lambda w: {"logits": torch.zeros(2)}),
    "distributions.DiscretizedLogisticMixture": (distributions.DiscretizedLogisticMixture, lambda w: {
        "logits": torch.zeros(2), "loc": torch.zeros(2), "scale": torch.ones(2), "num_levels": 4}),
    "distributions.LogRelaxedOneHotCategorical": (distributions.LogRelaxedOneHotCategorical, lambda w: {
        "temperature": 0.5, "logits": torch.zeros(2)}),
    "distributions.LogitRelaxedBernoulli": (distributions.LogitRelaxedBernoulli, lambda w: {
        "temperature": 0.5, "logits": torch.zeros(2)}),
    "distributions.LogitNormal": (distributions.LogitNormal, lambda w: {
        "loc": torch.zeros(2), "scale": torch.ones(2), "low": 0.0, "high": 1.0}),
    "distributions.SpatialMixture": (distributions.SpatialMixture, lambda w: {
        "logits": torch.zeros(2, 4), "loc": torch.zeros(2, 3, 4), "scale": 0.1}),
    "tabular.NegativeBinomial": (tabular.NegativeBinomial, lambda w: {"log_mean": torch.zeros(2), "dispersion": 0.5}),
    "tabular.Ordinal": (tabular.Ordinal, lambda w: {"loc": torch.zeros(2), "cuts": torch.arange(3.0)}),
    "tabular.ZeroInflated": (tabular.ZeroInflated, lambda w: {
        "base": tabular.Poisson(torch.zeros(2)), "gate_logits": torch.zeros(2)}),
    "tabular.Poisson": (tabular.Poisson, lambda w: {"log_rate": torch.zeros(2)}),
    "missing.WithMissing": (missing.WithMissing, lambda w: {"base_dist": dist.Normal(torch.zeros(2), 1.0)}),
}  # fmt: skip

NOT_CALLED = {
    "a class that its class method makes": "tables.Table",
    "what takes any values": "Arguments",
    "results, which the package makes": (
        "Calibration Decomposition Evidence Fitted InferenceGap Inspection datasets.Dataset datasets.DigitScenes "
        "datasets.CellCounts datasets.PendulumSequences datasets.PianoRolls datasets.SentencePairs "
        "datasets.Sentences datasets.Shapes datasets.TwoGaussians "
        "Disentanglement datasets.ShapeScenes "
        "gradients.Comparison gradients.Measured exact.DiscretePosterior exact.Posterior exact.QuadratureError "
        "distributions.Extent sweeps.Range sweeps.Sweep"
    ),
    "constructors and messages of torch": (
        "distributions.Bernoulli distributions.SoftTargetBernoulli distributions.Product "
        "distributions.AdditiveLogRatioTransform tabular.Categorical tabular.LogNormal tabular.StudentT"
    ),
    "what takes a distribution, and is for parts": (
        "distributions.base_distribution distributions.base_support distributions.discrete_twin "
        "distributions.find_extent distributions.is_normalized distributions.without_independent "
        "missing.accepts_missing missing.check_missing missing.first_missing tabular.log_of_bounded_exp"
    ),
    "without arguments, types, or checks themselves": (
        "handlers.ResampleObserved handlers.SubsampleStatements handlers.UnsizedPlates schedules.Schedule "
        "networks.NetworkFactory schedules.RunSchedule schedules.Decay schedules.Plateau schedules.PlateauRate "
        "schedules.TorchSchedule "
        "schedules.check_ends_of_ranks schedules.check_schedules schedules.checked_schedule schedules.described"
    ),
    "downloads, see the table of wrong calls": "datasets.mnist",
    "takes nothing": "datasets.penguins",
}
