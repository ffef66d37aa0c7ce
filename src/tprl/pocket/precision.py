"""In which precision this machine computes: bfloat16 where that is faster."""

import time
from functools import cache

import torch
from torch import nn


@cache
def fastest_dtype(device: str) -> torch.dtype:
    """bfloat16 where a linear layer of usual size runs at least 1.3 times as fast in it as in float32."""
    seconds = {dtype: _seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if seconds[torch.float32] > 1.3 * seconds[torch.bfloat16] else torch.float32


def _seconds(dtype: torch.dtype, device: str) -> float:
    layer = nn.Linear(576, 1536, device=device, dtype=dtype)
    rows = torch.randn(2048, 576, device=device, dtype=dtype)
    best = float("inf")
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            layer(rows).sum().item()
            best = min(best, time.perf_counter() - start)
    return best


def mixed_precision() -> torch.autocast:
    """Autocast to bfloat16 where the processor multiplies it faster, else nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fastest_dtype("cpu") == torch.bfloat16)


def fastest_attention() -> str:
    """The attention to train the tower with: PyTorch's fused one has a slow backward pass in bfloat16 on CPUs."""
    return "eager" if fastest_dtype("cpu") == torch.bfloat16 else "sdpa"
