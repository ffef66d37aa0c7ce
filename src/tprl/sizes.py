"""How many visual tokens a kept one stands for, so that the language model can attend to it as to that many.

Dropping tokens takes their share of the attention from what they show, such as the background, and hands it to all that
is left. Attention proportional to sizes (ToMe, arXiv 2210.09461, section 3) gives it to the kept tokens that show the
same: ``softmax(q k^T / sqrt(d) + log n)``. Ours, not TPRL's; ToMe counts the tokens that it merges into one, all alike.
"""

import torch
from torch import Tensor

from tprl.clock import phase
from tprl.selectors.base import units

ROWS = 1024
"""Tokens that are compared with the kept ones at once: bounds the memory that pictures of many tokens take."""
POWER = 4
"""Of the cosine: a dropped token counts as much as it is like the kept one."""


@phase("policy: sizes")
def sizes(tokens: Tensor, keep_mask: Tensor, mask: Tensor) -> Tensor:
    """``n_i = 1 + sum_j max(0, cos(x_i, x_j))^POWER`` over the dropped tokens ``j`` of which ``i`` is the nearest kept
    one, the first of equals; 1 at tokens that are not kept.

    Args:
        tokens: centred, ``(B, N, D)``.
        keep_mask: bool ``(B, N)``, True where a token is kept, of every row one at least.
        mask: bool ``(B, N)``, True where a token is real.

    Returns:
        float32 ``(B, N)``.
    """
    unit = units(tokens, mask)
    kept = keep_mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(keep_mask.sum(1).max())]
    others = unit.gather(1, kept[..., None].expand(-1, -1, unit.shape[2])).mT
    absent = ~keep_mask.gather(1, kept)[:, None]
    found = [(some @ others).masked_fill(absent, -1).max(2) for some in unit.split(ROWS, 1)]
    alike = torch.cat([part.values for part in found], 1).clamp(min=0) ** POWER
    nearest = kept.gather(1, torch.cat([part.indices for part in found], 1))
    counted = alike * (mask & ~keep_mask)
    return torch.ones_like(counted).scatter_add(1, nearest, counted)
