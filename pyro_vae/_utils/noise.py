"""Uniform noise for many numbers, from a counter-based generator in tensor operations.

Torch's generator on CPUs computes each number from the one before, on one thread. Here each number is a hash of a key
and of its index. All are independent of each other, so that an eager step computes them by vector instructions, and a
compiled one within the loops that use them. The key comes from torch's random state: ``torch.manual_seed`` fixes it.
"""

import torch
from torch import Tensor

__all__ = ["uniform_like"]

_MULTIPLIERS = (0xED5AD4BB - 2**32, 0xAC4C1B51 - 2**32, 0x31848BAB)  # as 32 bits with a sign
_SHIFTS = (17, 11, 15, 14)
_MOST = 2**31  # numbers of one call, which have an index of 32 bits


def uniform_like(x: Tensor) -> Tensor:
    """Draw a number in [0, 1) for each element of ``x``, a multiple of 2^-24 with equal probabilities, in float32.

    Numbers of ``x`` in float64 get noise in float64 by ``torch.rand_like``.

    Source: Wellons 2018, "Prospecting for hash functions", the function ``triple32``; here its first multiplication is
    followed by the second half of the key, as in Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    >>> with torch.random.fork_rng():
    ...     first = [torch.manual_seed(0), uniform_like(torch.zeros(3))][1]
    ...     again = [torch.manual_seed(0), uniform_like(torch.zeros(3))][1]
    >>> torch.equal(first, again)
    True
    """
    if x.dtype == torch.float64 or x.numel() > _MOST:
        return torch.rand_like(x)
    key = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=x.device)
    bits = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape) + key[0]
    for number, (shift, multiplier) in enumerate(zip(_SHIFTS, _MULTIPLIERS, strict=False)):
        bits ^= _shifted(bits, shift)
        bits *= multiplier
        if number == 0:
            bits ^= key[1]
    bits ^= _shifted(bits, _SHIFTS[-1])
    return _shifted(bits, 8).float().mul_(2.0**-24)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift to the right and fill with zeros: torch's own shift fills with the sign."""
    return (bits >> places).bitwise_and_(2 ** (32 - places) - 1)
