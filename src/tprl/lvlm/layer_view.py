"""What a decoder layer of transformers shows, at prefill, to whoever chooses tokens by it."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half


@dataclass(frozen=True)
class LayerView:
    """A decoder layer at prefill, see ``tprl.selectors.stages.LayerView``; attention is computed for the asked rows
    only."""

    layer: nn.Module
    entered: Tensor
    hidden: Tensor
    visual: Tensor
    last: Tensor
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None

    @property
    def text(self) -> Tensor:
        return self._visible(self.last[:, None])[:, 0] & ~self.visual

    def attention(self, places: Tensor) -> Tensor:
        attention = cast(Any, self.layer).self_attn
        rows = torch.arange(len(places), device=places.device)[:, None]
        asking = tuple(part.expand(len(places), -1, -1)[rows, places] for part in self.rotary)
        queries = self._heads("q", self.hidden[rows, places], asking)
        keys = self._heads("k", self.hidden, self.rotary)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        scores = queries.float() @ keys.mT.float() * attention.scaling
        scores = scores.masked_fill(~self._visible(places)[:, None], -torch.inf)
        return cast(Tensor, scores.softmax(-1).mean(1))

    def keys(self) -> Tensor:
        return self._heads("k", self.hidden, self.rotary).transpose(1, 2).flatten(2).float()

    def _heads(self, kind: str, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Queries or keys ``(B, heads, L, d)``, normalised where the family does so, and rotated."""
        layer = cast(Any, self.layer)
        attention = layer.self_attn
        states = attention.get_submodule(f"{kind}_proj")(layer.input_layernorm(hidden))
        states = states.unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, f"{kind}_norm"):
            states = attention.get_submodule(f"{kind}_norm")(states)
        states = states.transpose(1, 2)
        cos, sin = (part[:, None] for part in rotary)
        turned = rotate_half(states)
        return cast(Tensor, states * cos + turned * sin)

    def _visible(self, places: Tensor) -> Tensor:
        """Which tokens those at ``places (B, R)`` see, bool ``(B, R, L)``; without a mask, all up to themselves."""
        if self.mask is None:
            return torch.arange(self.hidden.shape[1], device=places.device) <= places[..., None]
        mask = self.mask.expand(len(places), *self.mask.shape[1:])[:, 0]
        mask = mask[torch.arange(len(places), device=places.device)[:, None], places]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@dataclass(frozen=True)
class CutView(LayerView):
    """The watched layer of a cut, see ``tprl.selectors.stages.LayerView``; ``norm`` is the decoder's final one."""

    cut: Tensor
    norm: nn.Module

    def normed(self) -> Tensor:
        return cast(Tensor, self.norm.forward(self.cut))  # past the hook, which is for the decoder's own call
