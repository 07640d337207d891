r"""How long a step of data-parallel training takes on K ranks, in seconds.

.. math::

    T(K, B) = C(\lceil B/K \rceil) + A(n, K) + E(K) + O(n) + R(\lceil B/K \rceil)

with the global batch size B and n bytes of gradients. C is the computation of a rank's rows, A the sum of the gradients
over ranks, E the small exchange before it, O the optimizer and R the reading of data. Nothing overlaps, so that T is an
upper bound for a program whose sums overlap the backward pass.

A ring sums n bytes over K ranks in 2(K - 1) messages of n/K bytes, one after the other, each of latency α and bandwidth
β (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"):

.. math:: A(n, K) = 2(K - 1)\,α + 2\,\frac{K - 1}{K}\,\frac{n}{β}.

On several machines of g ranks each, every machine first sums in parts, then the ranks with the same part sum it over
the m machines, then every machine gathers the parts: a ring of g ranks, and a ring of m ranks for n/g bytes. The few
numbers of the exchange are collected by one rank, which sends their sums in a tree of log2(K) levels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Cluster", "Link", "Step", "Work", "all_reduce", "collected", "efficiency", "expected_maximum", "fitted_link",
    "fitted_work", "largest_useful", "ring", "simulate_ring", "simulate_training", "speed_up", "step",
]  # fmt: skip


@dataclass(frozen=True)
class Link:
    """A connection between two ranks."""

    latency: float  # α, seconds of a message without bytes
    bandwidth: float  # β, bytes a second, in each direction


@dataclass(frozen=True)
class Work:
    """What a rank computes in a step."""

    parameters: int  # numbers that are trained
    fixed: float  # seconds of a step that do not depend on its rows, such as starting operations
    per_row: float  # seconds of a row
    row_bytes: float = 0.0  # bytes of a row of data
    optimizer: float = 0.0  # seconds of the update of all parameters

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.parameters


@dataclass(frozen=True)
class Cluster:
    """Machines of some ranks each, their connections, and how fast they read data."""

    inside: Link  # between ranks of one machine
    between: Link  # between machines, for each rank
    ranks_per_machine: int
    exchange: Link | None = None  # of the exchange of errors and decisions, a few numbers
    read_rank: float = math.inf  # bytes a second that one rank can read
    read_machine: float = math.inf  # bytes a second that all ranks of a machine can read together


@dataclass(frozen=True)
class Step:
    """The seconds of the parts of a step."""

    compute: float
    all_reduce: float
    exchange: float
    optimizer: float
    reading: float

    @property
    def seconds(self) -> float:
        return self.compute + self.all_reduce + self.exchange + self.optimizer + self.reading


RECEIVE = 1e-5  # seconds of the first rank for each message that it collects, an assumption


def ring(size: float, ranks: int, link: Link) -> float:
    """Return the seconds of a sum of ``size`` bytes over ranks in a ring."""
    return 2 * (ranks - 1) * link.latency + 2 * (ranks - 1) / ranks * size / link.bandwidth


def collected(ranks: int, link: Link) -> float:
    """Return the seconds in which one rank collects a few numbers of all ranks, and sends their sums in a tree."""
    return (1 + math.ceil(math.log2(ranks))) * link.latency + (ranks - 1) * RECEIVE if ranks > 1 else 0.0


def all_reduce(size: float, ranks: int, cluster: Cluster) -> float:
    """Return the seconds of a sum of ``size`` bytes over ranks on one machine or several."""
    inside = min(ranks, cluster.ranks_per_machine)
    machines = math.ceil(ranks / cluster.ranks_per_machine)
    return ring(size, inside, cluster.inside) + ring(size / inside, machines, cluster.between)


def step(work: Work, cluster: Cluster, ranks: int, batch: int) -> Step:
    """Return the seconds of a step on ``batch`` rows of all ranks together."""
    rows = math.ceil(batch / ranks)
    sharing = min(ranks, cluster.ranks_per_machine)
    rate = min(cluster.read_rank, cluster.read_machine / sharing)
    exchange = 0.0 if cluster.exchange is None else collected(ranks, cluster.exchange)
    return Step(
        compute=work.fixed + rows * work.per_row,
        all_reduce=all_reduce(work.gradient_bytes, ranks, cluster),
        exchange=exchange,
        optimizer=work.optimizer,
        reading=rows * work.row_bytes / rate,
    )


def speed_up(work: Work, cluster: Cluster, ranks: int, batch: int, weak: bool = False) -> float:
    """Return how many times more rows a second K ranks train on than one rank does.

    The global batch is ``batch`` rows; in ``weak`` scaling each rank has ``batch`` rows.
    """
    alone = step(work, cluster, 1, batch).seconds / batch
    total = batch * ranks if weak else batch
    return alone * total / step(work, cluster, ranks, total).seconds


def efficiency(work: Work, cluster: Cluster, ranks: int, batch: int, weak: bool = False) -> float:
    """Return the speed-up of a rank: 1 if K ranks are K times as fast as one."""
    return speed_up(work, cluster, ranks, batch, weak) / ranks


def largest_useful(work: Work, cluster: Cluster, batch: int, most: int = 64, least: float = 0.5) -> int:
    """Return the largest power of two of ranks, up to ``most``, up to which each has an efficiency of ``least``."""
    found = 1
    while 2 * found <= most and efficiency(work, cluster, 2 * found, batch) >= least:
        found *= 2
    return found


# --- Fitted to measurements ------------------------------------------------------------------------------------------


def fitted_work(parameters: int, batches: Sequence[int], seconds: Sequence[float]) -> Work:
    """Fit the fixed time and the time of a row to steps of one rank, by least squares of relative errors."""
    weights = 1 / np.asarray(seconds)
    design = np.stack([np.ones(len(batches)), np.asarray(batches, float)], axis=1)
    (fixed, per_row), *_ = np.linalg.lstsq(design * weights[:, None], np.ones(len(batches)), rcond=None)
    return Work(parameters, max(float(fixed), 0.0), float(per_row))


def fitted_link(ranks: int, few: tuple[float, float], many: tuple[float, float]) -> Link:
    """Solve for latency and bandwidth of a ring, from two sums: bytes and seconds of each."""
    (small, short), (large, long) = few, many
    bandwidth = 2 * (ranks - 1) / ranks * (large - small) / (long - short)
    latency = (short - 2 * (ranks - 1) / ranks * small / bandwidth) / (2 * (ranks - 1))
    return Link(max(latency, 0.0), bandwidth)


# --- Stragglers ------------------------------------------------------------------------------------------------------


def expected_maximum(isf: Callable[[NDArray[np.float64]], NDArray[np.float64]], ranks: int) -> float:
    r"""Return the expected largest of K independent times with this inverse survival function, as SciPy's ``isf``.

    .. math:: E[\max_k T_k] = \int_0^1 Q(v^{1/K})\,dv,

    for the quantiles Q, by a Gauss-Legendre rule in s with v = 1 - exp(-s), which resolves the tail.
    """
    nodes, weights = np.polynomial.legendre.leggauss(400)
    longest = 36.0  # 1 - exp(-36) is 1 in double precision
    s = longest * (nodes + 1) / 2
    tail = -np.expm1(np.log(-np.expm1(-s)) / ranks)  # 1 - v^(1/K), without cancellation
    return float((longest / 2 * weights * np.exp(-s) * isf(tail)).sum())


def simulate_ring(ready: NDArray[np.float64], size: float, link: Link) -> NDArray[np.float64]:
    """Return when each rank has the sum of a ring, given when each is ready: message by message.

    A rank sends its next message when it has received the one before, and the rank after it can receive it.
    """
    time, message = ready.copy(), link.latency + size / len(ready) / link.bandwidth
    for _ in range(2 * (len(ready) - 1)):
        time = np.maximum(time, np.roll(time, 1)) + message
    return time


def simulate_training(
    work: Work, cluster: Cluster, ranks: int, batch: int, steps: int, variation: float, seed: int = 0
) -> float:
    """Return the mean seconds of a step of ranks whose own part of a step varies, by a simulation of each message.

    Its time is lognormal, with the mean of the model and the coefficient of ``variation``.
    """
    parts = step(work, cluster, ranks, batch)
    sigma = math.sqrt(math.log1p(variation**2))
    random, time = np.random.default_rng(seed), np.zeros(ranks)
    own = parts.seconds - parts.all_reduce
    for _ in range(steps):
        time = time + own * np.exp(sigma * random.standard_normal(ranks) - sigma**2 / 2)
        time = simulate_ring(time, work.gradient_bytes, cluster.inside) if ranks > 1 else time
    return float(time.max()) / steps
