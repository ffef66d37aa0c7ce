"""What a cache has to remember of the pruned prompt that filled it, and how calls go on from there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from tprl.lvlm.cut import Cut
from tprl.lvlm.handle import noted

_NOTE = "_tprl_past"


@dataclass(frozen=True)
class Past:
    """What stands in a cache: the cut of its prompt, and the position ids ``(..., B, 1)`` of the token behind it."""

    cut: Cut
    next_position: Tensor

    def resumed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a direct ``forward`` on a cache, with the positions and the mask of the short prompt."""
        tokens = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
        before, new = int(inputs["past_key_values"].get_seq_length()), tokens.shape[1]
        behind = before - self.cut.index.shape[1] + torch.arange(new, device=tokens.device)
        cut = self.cut.extended(self.cut.length + before - self.cut.index.shape[1] + new)
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = cut.mask.long()
        elif mask.shape[1] == cut.length:
            mask = (mask.bool().gather(1, cut.index) & cut.mask).to(mask.dtype)
        return {"position_ids": self.next_position + behind, **inputs, "attention_mask": mask}

    def positions(self, mask: Tensor) -> Tensor:
        """Position ids ``(..., B, L')`` of a short prompt that begins with what the cache holds, of which only those
        behind it matter; ``mask`` is ``(B, L')``."""
        held, attended = self.cut.index.shape[1], mask.long().cumsum(1)
        return self.next_position + attended - attended[:, held - 1 : held] - 1

    def cropped(self, columns: int) -> "Past":
        """What stands in the cache when ``columns`` are left of it."""
        removed = self.cut.index.shape[1] - columns
        return self if removed <= 0 else Past(self.cut.cropped(self.cut.length - removed), self.next_position - removed)

    def begins(self, prompt: Tensor, mask: Tensor | None) -> bool:
        """Whether ``prompt`` begins with what the cache holds, rather than being its continuation alone: then a mask is
        of its length, too."""
        return prompt.shape[1] >= self.cut.length and (mask is None or mask.shape[1] == prompt.shape[1])


def remember(cache: Cache, cut: Cut, position_ids: Tensor) -> None:
    """Note in a cache what a continuation has to know."""
    last = torch.where(cut.mask, torch.arange(cut.mask.shape[1], device=cut.mask.device), -1).amax(1)
    index = last[:, None].expand(*position_ids.shape[:-1], 1)
    setattr(cache, _NOTE, Past(cut, position_ids.gather(-1, index) + 1))


def past_of(inputs: Mapping[str, Any]) -> Past | None:
    """What was noted in the cache that a call continues, as far as it still stands there, for as many rows as the call
    has."""
    past: Past | None = noted(inputs, _NOTE)
    if past is None:
        return None
    past = past.cropped(int(inputs["past_key_values"].get_seq_length()))
    given = next((inputs[name] for name in ("input_ids", "inputs", "inputs_embeds") if name in inputs), None)
    if given is None or len(given) == (rows := len(past.cut.index)):
        return past
    times, rest = divmod(len(given), rows)
    if rest:
        raise ValueError(f"the cache was filled by {rows} prompts and cannot go on with {len(given)}")
    return Past(past.cut.repeated(times), past.next_position.repeat_interleave(times, -2))
