"""What a later decoder layer still sees of a sequence, and what it is given in the place of the whole."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tprl.lvlm.cut import Cut


@dataclass(frozen=True)
class Held(Cut):
    """How a batch is shortened for a layer: ``index`` ascends, and rows that hold fewer columns than the others are
    filled up with dropped ones, where ``mask`` is False and which nobody else may see."""

    @classmethod
    def of(cls, held: Tensor) -> "Held":
        """From bool ``(B, L)``."""
        count = int(held.sum(1).max())
        index = held.int().argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
        return cls(index, held.gather(1, index), held.shape[1])

    def gather(self, values: Tensor, dim: int = 1) -> Tensor:
        """Of ``values (B or 1, ..., L, ...)`` what is held, along ``dim``."""
        values = values.expand(len(self.index), *values.shape[1:])
        index = self.index.view(len(self.index), *[1] * (dim - 1), -1, *[1] * (values.ndim - dim - 1))
        return values.gather(dim, index.expand(*values.shape[:dim], -1, *values.shape[dim + 1 :]))

    def scatter(self, values: Tensor) -> Tensor:
        """``values (B, L', ...)`` at their places in the whole sequence, ``(B, L, ...)``, zero at dropped ones."""
        real = self.mask.view(*self.mask.shape, *[1] * (values.ndim - 2))
        index = self.index.view(real.shape).expand_as(values)
        whole = values.new_zeros(len(values), self.length, *values.shape[2:])
        return whole.scatter(1, index, values.masked_fill(~real, 0))

    def shorten(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a layer is given besides the hidden states, for the held columns."""
        short = {**kwargs, "attention_mask": self.attention_mask(kwargs["attention_mask"], self.length)}
        short["position_embeddings"] = tuple(self.gather(part) for part in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            short["position_ids"] = self.gather(kwargs["position_ids"])
        return short

    def attention_mask(self, mask: Tensor | None, queries: int) -> Tensor | None:
        """An attention mask ``(B or 1, H, Q, length)`` without the dropped columns, and rows unless ``queries`` are
        the tokens of a later step. None is a plain causal mask."""
        later = queries != self.length
        if mask is None:
            if bool(self.mask.all()):
                return None
            device = self.index.device
            mask = torch.ones(queries, self.length, dtype=torch.bool, device=device).tril(self.length - queries)
            mask = mask[None, None]
        elif mask.ndim != 4 or mask.shape[-1] != self.length:
            raise ValueError(
                f"the attention mask of a layer has shape {tuple(mask.shape)} where (B, 1, {queries}, {self.length}) "
                "is needed: pruning inside the model works with the attention implementations 'sdpa' and 'eager', and "
                "while the prompt and the answer fit into a sliding window"
            )
        mask = self.gather(mask, 3)
        hidden = ~self.mask[:, None, None]
        if not later:
            mask = self.gather(mask, 2)
            hidden = hidden & ~torch.eye(self.index.shape[1], dtype=torch.bool, device=mask.device)
        return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
