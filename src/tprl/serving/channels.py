"""Whole numbers as channels behind an embedding, in whatever dtype it has."""

import torch
from torch import Tensor

BASE = 256
"""bfloat16 holds whole numbers up to here alone."""


def to_channels(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 ``(N, K)`` from 0 to 65535 as ``(N, 2 K)``: multiples of ``BASE``, then rests."""
    return torch.cat([numbers // BASE, numbers % BASE], 1).to(dtype)


def from_channels(channels: Tensor) -> Tensor:
    """The inverse, int64 ``(N, K)``."""
    multiples, rests = channels.long().chunk(2, 1)
    return BASE * multiples + rests
