"""What a visual token shows that no likelier one shows, so that twins do not take each other's places in a budget.

Patches that are alike have logits that are alike, so that a ranking of each by itself takes all of them or none. Ours,
not the paper's.
"""

import torch
from torch import Tensor

from tprl.clock import phase
from tprl.selectors.base import ranks, units

ROWS = 1024
"""Tokens that are compared with all at once: bounds the memory that pictures of many tokens take."""


@phase("policy: novelty")
def novelty(logits: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
    """``log(1 - max_j cos(z_i, z_j)^2)`` over the tokens ``j`` of higher logit, float32 ``(B, N)``: 0 for the likeliest
    and for what is like none before it, at least ``log(1e-5)``; 0 at padding. Of equal logits the first counts as the
    higher, and a cosine below 0 as 0.

    Args:
        logits: ``(B, N)`` of keeping each token.
        latents: ``(B, N, L)``.
        mask: bool ``(B, N)``, True where a token is real.
    """
    unit = units(latents, mask)
    rank = ranks(logits, mask)
    nearest = [
        (some @ unit.mT).masked_fill(own[:, :, None] <= rank[:, None], 0).amax(2)
        for some, own in zip(unit.split(ROWS, 1), rank.split(ROWS, 1), strict=True)
    ]
    return (1 - torch.cat(nearest, 1).square()).clamp(min=1e-5).log()
