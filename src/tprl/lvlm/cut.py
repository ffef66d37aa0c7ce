"""Shortening prompts to the visual tokens that were chosen: what becomes of positions, masks and features."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tprl.lvlm.families import family_of

Positions = Literal["original", "compact"]

_ALIGNED = {"labels": -100, "shift_labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}
"""Inputs with one entry a token besides ids, mask and positions, and what stands for padding in them."""


@dataclass(frozen=True)
class Cut:
    """How a batch of prompts was shortened.

    Attributes:
        index: int64 ``(B, L')``, the column of the whole prompt that each column of the short one comes from.
        mask: bool ``(B, L')``, True where a column is not padding.
        length: ``L``, of the whole prompt.
        bias: float32 ``(B, L')`` or narrower, what is added to the logits of attention to the first columns: logarithms
            of the sizes of visual tokens, see ``tprl.types.Selection``; None where there are none.
    """

    index: Tensor
    mask: Tensor
    length: int
    bias: Tensor | None = None

    @property
    def source(self) -> Tensor:
        """``index`` with -1 where the short prompt is padding."""
        return self.index.masked_fill(~self.mask, -1)

    def extended(self, length: int) -> Self:
        """The cut of a longer prompt that begins with this one; nothing of its continuation is dropped."""
        more = self._columns(self.length, length)
        mask = torch.cat([self.mask, torch.ones_like(more).bool()], 1)
        return replace(self, index=torch.cat([self.index, more], 1), mask=mask, length=length)

    def cropped(self, length: int) -> Self:
        """The cut of the prompt's first ``length`` columns.

        Raises:
            ValueError: some of the others were dropped, or are padding.
        """
        if length >= self.length:
            return self
        behind = self._columns(length, self.length)
        left = self.index.shape[1] - behind.shape[1]
        if not torch.equal(self.index[:, left:], behind):
            raise ValueError(
                "a pruned model's cache can be cropped behind its pictures only, with prompts padded on the left; "
                "start again without it"
            )
        bias = None if self.bias is None else self.bias[:, :left]
        return replace(self, index=self.index[:, :left], mask=self.mask[:, :left], length=length, bias=bias)

    def repeated(self, times: int) -> Self:
        index, mask = self.index.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0)
        bias = None if self.bias is None else self.bias.repeat_interleave(times, 0)
        return replace(self, index=index, mask=mask, bias=bias)

    def _columns(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self.index.device).expand(len(self.index), -1)


@dataclass(frozen=True)
class Choice:
    """What to keep of the visual tokens of a batch, all pictures one after the other: bool ``keep (T,)``, their values
    ``(T, D)``, how many each sample has, and float32 ``sizes (T,)``, see ``tprl.types.Selection``."""

    keep: Tensor
    tokens: Tensor
    counts: list[int]
    sizes: Tensor | None = None


def cut_of(model: PreTrainedModel, inputs: Mapping[str, Any], choice: Choice, right: bool = False) -> Cut:
    """Kept tokens in their order, padded to the longest row on the left, or on the ``right``."""
    ids = inputs["input_ids"]
    visual = ids == model.config.image_token_id
    keep = torch.ones_like(visual)
    keep[visual] = choice.keep.to(ids.device)
    if (mask := inputs.get("attention_mask")) is not None:
        keep &= mask.bool()
    longest = int(keep.sum(1).max())
    if right:
        index = keep.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    else:
        index = keep.int().argsort(dim=1, stable=True)[:, -longest:]
    bias = None
    if choice.sizes is not None:
        bias = torch.zeros(ids.shape, device=ids.device).masked_scatter(visual, choice.sizes.log().to(ids.device))
        bias = bias.gather(1, index)
    return Cut(index, keep.gather(1, index), ids.shape[1], bias)


def shortened(model: PreTrainedModel, inputs: Mapping[str, Any], cut: Cut, positions: Positions) -> dict[str, Any]:
    """The inputs of the short prompt, without those that describe pictures."""
    short = {name: value for name, value in inputs.items() if name not in family_of(model).vision_inputs}
    pad = model.generation_config.pad_token_id or 0
    for name, filler in {**_ALIGNED, "input_ids": pad}.items():
        if isinstance(value := short.get(name), Tensor) and value.shape[1] == cut.length:
            short[name] = value.gather(1, cut.index).masked_fill(~cut.mask, filler)
    mask = short.get("attention_mask")
    attended = cut.mask if mask is None else mask.bool().gather(1, cut.index) & cut.mask
    short["attention_mask"] = attended.long() if mask is None else attended.to(mask.dtype)
    short["position_ids"] = _cut_positions(short["position_ids"], cut, positions)
    return short


def _cut_positions(position_ids: Tensor, cut: Cut, positions: Positions) -> Tensor:
    """Position ids ``(..., B, L)`` of the short prompt; where there are four rows the first is that of the text, which
    masks are made by, and never has gaps."""
    index = cut.index.expand(*position_ids.shape[:-2], -1, -1)
    gathered = position_ids.expand(*index.shape[:-1], -1).gather(-1, index)
    counted = cut.mask.long().cumsum(-1) - 1
    if positions == "compact":
        first = gathered.masked_fill(~cut.mask, gathered.max() + 1).amin(-1, keepdim=True)
        gathered = counted + first
    elif position_ids.ndim == 3 and len(position_ids) == 4:
        gathered = torch.cat([counted[None], gathered[1:]])
    return gathered.masked_fill(~cut.mask, 0)


def cut_features(output: Any, choice: Choice) -> dict[str, Any]:
    """The kept features, one entry a sample, and those of the deeper layers that some models add."""
    keep = choice.keep
    counts = [int(part.sum()) for part in torch.split(keep, choice.counts)]
    features: dict[str, Any] = {"pooler_output": list(torch.split(choice.tokens[keep], counts))}
    deep = output.get("deepstack_features")
    if deep is not None:
        features["deepstack_features"] = [list(torch.split(torch.cat(list(layer))[keep], counts)) for layer in deep]
    return features


def contained(model: PreTrainedModel, entries: list[Tensor]) -> Any:
    """One entry a sample, in the container that the model wants."""
    container = family_of(model).container
    return torch.cat(entries)[None] if container is Tensor else container(entries)
