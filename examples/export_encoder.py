"""
Export an encoder for deployment
================================

A program that needs only the codes of new data needs no Pyro. `torch.export` writes the network of the encoder to a
file, for any number of rows, which torch alone loads and runs. The numbers are those of `vae.encode`.
"""

import argparse

import common
import pyro
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors


def parse_args() -> argparse.Namespace:
    return common.make_parser(__doc__, "export_encoder", epochs=60).parse_args()


# 1. A module from data to tensors: the mean and the standard deviation of q(z | x).
class Codes(nn.Module):
    """Mean and standard deviation of q(z | x)."""

    def __init__(self, vae: pv.VAE):
        super().__init__()
        self.encoder = vae.encoder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.encoder(x)
        return q.mean, q.stddev


def main(args: argparse.Namespace) -> None:
    pyro.set_rng_seed(args.seed)
    train, test, _ = common.load_binary_images("digits")
    network = networks.mlp([64])
    vae = pv.VAE(priors.StandardNormal(2), guides.DiagonalNormal(64, 2, network), likelihoods.Bernoulli(2, 64, network))
    pv.fit(vae.model, vae.guide, train.x, epochs=args.epochs, batch_size=100, lr=3e-3, seed=args.seed)
    # 2. Export it for any number of rows, without Pyro's checks of values, which are no part of the graph.
    path = args.out / "encoder.pt2"
    with torch.no_grad(), pyro.validation_enabled(False):
        rows = {"x": {0: torch.export.Dim("rows", min=1)}}
        torch.export.save(torch.export.export(Codes(vae).eval(), (train.x[:8],), dynamic_shapes=rows), path)
    # 3. Load it, as another program would, and compare.
    loaded = torch.export.load(path).module()
    with torch.no_grad():
        mean, scale = loaded(test.x)
        q = vae.encode(test.x)
    error = max(float((mean - q.mean).abs().max()), float((scale - q.stddev).abs().max()))
    print(f"{path.name}: codes of {len(test.x)} digits, which differ from those of the VAE by at most {error:.1g}")
    common.save(args, {"rows": len(test.x), "error": error, "bytes": path.stat().st_size}, {}, {})


if __name__ == "__main__":
    main(parse_args())
