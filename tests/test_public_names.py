"""The public names and calls of the documentation, which are a contract."""

import importlib
import subprocess
import sys

import pytest
import torch
import xarray as xr
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors


def test_every_public_name_is_imported_on_demand_and_listed():
    assert set(pv.__all__) <= set(dir(pv))
    assert [name for name in pv.__all__ if getattr(pv, name, None) is None] == []


def test_a_gaussian_vae_is_trained_compared_with_the_exact_answer_and_exported():
    x = pv.datasets.two_gaussians(1000, seed=0).x
    assert x.shape == (1000, 2)
    vae = pv.VAE(
        prior=priors.StandardNormal(1),
        encoder=guides.DiagonalNormal(in_features=2, latent=1, network=networks.mlp([32])),
        decoder=likelihoods.Normal(latent=1, out_features=2, network=networks.mlp([32]), scale="shared"),
    )
    SVI(vae.model, vae.guide, Adam({"lr": 4e-3}), Trace_ELBO()).step(x)
    fitted = pv.fit(vae.model, vae.guide, x, epochs=1000, lr=4e-3, seed=0)
    lengths = {name: len(values) for name, values in fitted.history.items()}
    assert lengths == {"elbo": 1000, "distortion": 1000, "rate": 1000}
    evidence = pv.exact.log_evidence(vae.model, x)
    assert evidence.shape == (1000,)
    assert fitted.history["elbo"][-1] < evidence.mean()
    posterior = pv.exact.posterior(vae.model, x)
    assert posterior.log_prob(posterior.mean).shape == posterior.sample().shape[:1] == (1000,)
    tree = pv.to_datatree(vae.model, vae.guide, x, draws=1000)
    assert isinstance(tree, xr.DataTree)
    assert dict(tree["posterior"]["z"].sizes) == {"chain": 1, "draw": 1000, "obs": 1000, "latent": 1}


def test_a_discrete_and_a_relaxed_vae_differ_only_in_their_parts():
    x = pv.datasets.two_gaussians(1000, seed=0).x
    encoder = guides.Bernoulli(in_features=2, latent=1, network=networks.mlp([32]))
    decoder = likelihoods.Normal(latent=1, out_features=2, network=networks.linear())
    discrete = pv.VAE(prior=priors.Bernoulli(1), encoder=encoder, decoder=decoder)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    assert SVI(discrete.model, config_enumerate(discrete.guide), Adam({"lr": 1e-2}), elbo).step(x) > 0
    encoder = guides.RelaxedBernoulli(in_features=2, latent=1, network=networks.mlp([32]), temperature=0.66)
    relaxed = pv.VAE(prior=priors.RelaxedBernoulli(1, temperature=0.5), encoder=encoder, decoder=decoder)
    twin = relaxed.discrete()
    assert twin.prior().has_enumerate_support
    assert {id(parameter) for parameter in twin.parameters()} == {id(parameter) for parameter in relaxed.parameters()}
    assert torch.isfinite(pv.exact.log_evidence(twin.model, x)).all()


def test_public_modules_are_imported_by_the_names_that_users_type():
    code = """if True:
        from pyro_vae.priors import StandardNormal
        import pyro_vae.gradients as gradients, pyro_vae as pv, sys
        assert pv.priors.StandardNormal is StandardNormal
        assert pv.gradients is gradients is sys.modules["pyro_vae.diagnostics.gradients"]
        assert gradients.__spec__.name == gradients.__name__ == "pyro_vae.diagnostics.gradients"
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ModuleNotFoundError, match=r"pyro_vae\.fit"):
        importlib.import_module("pyro_vae.fit")


def test_importing_the_package_imports_no_heavy_library():
    code = "import pyro_vae, sys; print([name for name in ('torch', 'pyro', 'matplotlib') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
