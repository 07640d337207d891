"""The networks of a module with the interface of scvi-tools' VAE are a model and a guide with its densities."""

from types import SimpleNamespace

import pytest
import torch
from pyro import poutine
from scipy import stats
from scvi_peer import SETTINGS, as_pair
from torch import nn
from torch.distributions import Normal

import pyro_vae as pv

GENES, BATCHES = 3, 2


class Peer(nn.Module):
    """Counts whose shares depend on state and batch, in the words of ``scvi.module.VAE``."""

    n_latent = 2

    def __init__(self, zeros):
        super().__init__()
        self.zeros = zeros
        self.weight = nn.Parameter(torch.randn(self.n_latent, GENES))
        self.shift = nn.Parameter(torch.randn(BATCHES, GENES))

    def _compute_local_library_params(self, batch):
        return 3.0 + batch, torch.full(batch.shape, 0.25)

    def inference(self, x, batch):
        z = x[..., : self.n_latent].log1p() - 1
        return {"qz": Normal(z, 0.5), "ql": Normal(x.sum(-1, keepdim=True).log1p(), 0.3)}

    def generative(self, z, library, batch_index):
        share = (z @ self.weight + self.shift[batch_index.squeeze(-1)]).softmax(-1)
        found = {"mu": library.exp() * share, "theta": torch.tensor([1.0, 2.0, 3.0])}
        return {"px": SimpleNamespace(**found, **({"zi_logits": torch.tensor(-1.0)} if self.zeros else {}))}


@pytest.mark.parametrize("zeros", [False, True])
def test_the_densities_are_those_of_the_module(zeros):
    torch.manual_seed(0)
    peer = Peer(zeros)
    model, guide = as_pair(peer)
    x, batch = torch.tensor([[4.0, 0.0, 7.0], [0.0, 12.0, 1.0]]), torch.eye(2)
    q = poutine.trace(guide).get_trace(x, batch)
    z, size = q.nodes["z"]["value"], q.nodes["size"]["value"]
    log_joint = poutine.trace(poutine.replay(model, q)).get_trace(x, batch).log_prob_sum()
    share = (z @ peer.weight + peer.shift).softmax(-1)
    mean, theta = (size.exp() * share).detach().numpy(), torch.tensor([1.0, 2.0, 3.0]).numpy()
    mass = stats.nbinom(theta, theta / (theta + mean)).pmf(x.numpy())
    if zeros:
        gate = torch.tensor(-1.0).sigmoid().item()
        mass = gate * (x.numpy() == 0) + (1 - gate) * mass
    prior = Normal(0.0, 1.0).log_prob(z).sum() + Normal(torch.tensor([[3.0], [4.0]]), 0.5).log_prob(size).sum()
    assert log_joint.item() == pytest.approx(torch.tensor(mass).log().sum().item() + prior.item(), rel=1e-4)
    found = peer.inference(x, batch)
    expected = found["qz"].log_prob(z).sum() + found["ql"].log_prob(size).sum()
    assert q.log_prob_sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_evidence_of_the_pair_takes_the_batch_of_each_cell():
    torch.manual_seed(0)
    pair, x = as_pair(Peer(zeros=True)), torch.poisson(torch.full((6, 3), 8.0))
    first, second = (torch.eye(2)[[number] * 6] for number in (0, 1))
    mixed = torch.cat([first[:3], second[3:]])
    found = [pv.log_evidence(*pair, x, batch, num_samples=2000).log_evidence for batch in (first, second, mixed)]
    assert (found[0] - found[1]).abs().min() > 0.05
    assert torch.allclose(found[2], torch.cat([found[0][:3], found[1][3:]]), atol=0.1)


def test_settings_are_those_of_both_likelihoods():
    assert {options["gene_likelihood"] for _, options in SETTINGS.values()} == {"nb", "zinb"}
    assert "scvi-tools, zinb, batch norm, 400 epochs" in SETTINGS
