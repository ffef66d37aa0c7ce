"""What methods that prune inside the language model would keep, as selectors: one recorded prefill of what is held.

To know it, one has to pay for a prefill first, so it serves to demonstrate and not to prune.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.in_model import dropping
from tprl.selectors import InModel
from tprl.selectors.base import check
from tprl.types import Selection, VisualTokens

ROWS_AT_ONCE = 8


class Recorded:
    """The visual tokens that reach the last layer under a method inside the language model.

    Args:
        method: of ``tprl.selectors.IN_MODEL``.
        data: where the samples and the language model are.
        indices: of the samples that it will be asked about, one row each.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, method: InModel, data: EncodedSamples, indices: Sequence[int]) -> None:
        self.name, self.method, self.data, self.indices = method.name, method, data, indices

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        check(self, visual, budget)
        parts = torch.arange(len(self.indices)).split(ROWS_AT_ONCE)
        return Selection(torch.cat([self._kept(visual, budget, rows) for rows in parts]))

    @torch.no_grad()
    def _kept(self, visual: VisualTokens, budget: Tensor, rows: Tensor) -> Tensor:
        """Of some rows, bool ``(R, N)``."""
        reader, indices = self.data.scorer.reader, [self.indices[row] for row in rows.tolist()]
        held, blocks = visual.mask[rows], [self.data.block(index) for index in indices]
        packed, inputs = reader.prepare(
            self.data.prefix(indices), visual.tokens[rows][held], held, [[block] for block in blocks]
        )
        last = packed.start + torch.tensor([block.answer_start - 1 for block in blocks])
        decoder: Any = reader.language
        places = last.to(packed.visual.device)
        with dropping(decoder, self.method, visual=packed.visual, last=places, budgets=budget[rows]) as dropped:
            decoder(**inputs, use_cache=False)
        kept = torch.zeros_like(held)
        kept[held] = dropped.kept[-1][packed.visual]
        return kept
