"""Two models for GPUs, whose operations are counted: a convolutional VAE of images, and a VAE of a table of counts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cost_model import Cluster, Link, Work
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import pyro_vae as pv
from pyro_vae import guides, likelihoods, networks, priors

IMAGE = (3, 64, 64)
GENES = 2000


@dataclass(frozen=True)
class Counted:
    """What a step computes: counted, not guessed."""

    parameters: int
    flops: float  # in products and convolutions, forward and backward, of a row
    bytes: float  # that operations read and write, of a row
    fixed_bytes: float  # the same, of a step without rows: of the parameters
    operations: int  # of a step, views not counted


class Traffic(TorchDispatchMode):
    """Counts operations, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return found


def images() -> tuple[pv.VAE, Callable[[int], Tensor]]:
    """A VAE of 64 × 64 colour images, with four convolutions in the encoder and four in the decoder."""
    features, channels = 3 * 64 * 64, (32, 64, 128, 256)
    encode = networks.convolutional(IMAGE, channels)
    decode = networks.deconvolutional(IMAGE, channels[::-1])
    encoder = guides.DiagonalNormal(features, 64, encode)
    vae = pv.VAE(priors.StandardNormal(64), encoder, likelihoods.Normal(64, features, decode))
    return vae, lambda rows: torch.rand(rows, features)


def counts() -> tuple[pv.VAE, Callable[[int], Tensor]]:
    """A VAE of a table of counts, 2000 genes, with the sizes of scVI: 128 hidden units and 10 latents."""
    network = networks.mlp([128])
    encoder = guides.DiagonalNormal(GENES, 10, network)
    decoder = likelihoods.NegativeBinomial(10, GENES, network, dispersion="per_dimension")
    vae = pv.VAE(priors.StandardNormal(10), encoder, decoder)
    return vae, lambda rows: torch.poisson(torch.full((rows, GENES), 0.5))


WORKLOADS = {"images": images, "counts": counts}


def counted(name: str, rows: int = 16) -> Counted:
    """Count what loss and gradients of a workload compute for a row, from steps of ``rows`` and twice as many."""
    vae, draw = WORKLOADS[name]()
    (flops, once), (_, twice) = (_step(vae, draw(count)) for count in (rows, 2 * rows))
    per_row = (twice.bytes - once.bytes) / rows
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    return Counted(parameters, flops / rows, per_row, once.bytes - rows * per_row, once.operations)


def _step(vae: pv.VAE, x: Tensor) -> tuple[int, Traffic]:
    loss_of = Trace_ELBO()
    loss_of.differentiable_loss(vae.model, vae.guide, x).backward()  # gradients exist from here on
    with Traffic() as traffic, FlopCounterMode(display=False) as flops:
        loss_of.differentiable_loss(vae.model, vae.guide, x).backward()
    return flops.get_total_flops(), traffic


# --- On a GPU --------------------------------------------------------------------------------------------------------

FLOPS, TRAFFIC = 67e12, 3.35e12  # of an H100 SXM a second: float32 without tensor cores, and bytes of its memory
REACHED = {"flops": 0.4, "traffic": 0.7}  # the shares of them that a step is assumed to reach
START = {"one by one": 5e-6, "CUDA graph": 1e-6}  # seconds to start an operation
NVLINK = Link(latency=3.4e-6, bandwidth=450e9)  # 900 GB/s in both directions; latencies are those that NCCL assumes
INFINIBAND = {400: Link(latency=14e-6, bandwidth=50e9), 200: Link(latency=14e-6, bandwidth=25e9)}  # by Gbit/s, a GPU
TCP = Link(latency=50e-6, bandwidth=1e9)  # of gloo, through which ranks exchange errors; measured on one machine
PAGE_CACHE = 4.4e9  # bytes of random rows a second that a core gathers from memory, measured on an AMD EPYC
COLD = 80e-6  # seconds until an NVMe disk gives a row that is not in memory; a rank waits for one at a time


def on_gpu(found: Counted, start: str, row_bytes: float = 0.0) -> Work:
    """Return the work of a step on an H100: products and memory traffic one after the other, and Adam."""
    flops, traffic = FLOPS * REACHED["flops"], TRAFFIC * REACHED["traffic"]
    return Work(
        parameters=found.parameters,
        fixed=found.operations * START[start] + found.fixed_bytes / traffic,
        per_row=found.flops / flops + found.bytes / traffic,
        row_bytes=row_bytes,
        optimizer=7 * 4 * found.parameters / traffic,  # reads weight, gradient and two moments, and writes three
    )


def gpus(gbits: int = 400, read_rank: float = math.inf) -> Cluster:
    """Return machines of eight H100 with NVLink, and an InfiniBand adapter for each of them."""
    return Cluster(NVLINK, INFINIBAND[gbits], ranks_per_machine=8, exchange=TCP, read_rank=read_rank)
