"""Selectors led by attention: that of the vision tower's [CLS] token, or that of the language model."""

import torch
from torch import Tensor

from tprl.selectors.base import check, cosine, evenly, in_parts, top, units
from tprl.types import Selection, VisualTokens


class FasterVLM:
    """The tokens that [CLS] attends to most (arXiv 2412.01818v1).

    ``s_j = mean over heads of softmax(q_cls k_j / sqrt(d))`` in the layer whose features are used; the top ``T``.
    """

    name = "fastervlm"
    needs = frozenset({"cls_attention"})

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        check(self, visual, budget)
        return Selection(top(visual.signals["cls_attention"], visual.mask, budget))


class TextAttention:
    """The tokens that any token behind the picture attends to most in the language model.

    What SparseVLM, PyramidDrop and their like look at (arXiv 2410.04417, 2410.17247), without their detours. It costs
    an unpruned prefill, so it serves as a demonstrator.
    """

    name = "text-attention"
    needs = frozenset({"text_attention"})

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        check(self, visual, budget)
        return Selection(top(visual.signals["text_attention"], visual.mask, budget))


class VisionZip:
    """Dominant tokens by [CLS] attention, contextual ones that absorb the rest (VisionZip, arXiv 2412.04467).

    Dominant: the highest ``s_j``, sum over heads of the [CLS] attention. Contextual: evenly spaced targets among the
    rest; every other token goes to the target with the highest cosine of head-mean keys, and a target becomes the
    mean of itself and the mean of what it absorbed. 5 of 32 tokens are contextual, as published: 162 + 30, 108 + 20
    and 54 + 10.

    Differences: tokens are merged after the projector, not before it, so the released code's sum of target and mean
    is halved to stay at the scale that the language model knows. [CLS], which that code counts as dominant, is not
    among the visual tokens of the language models here; one more patch takes its place.
    """

    name = "visionzip"
    needs = frozenset({"cls_attention", "tower_keys"})

    @in_parts
    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        contextual = budget * 5 // 32
        dominant = top(visual.signals["cls_attention"], visual.mask, budget - contextual)
        targets = _spaced(visual.mask & ~dominant, contextual)
        absorbed = visual.mask & ~dominant & ~targets
        similarity = cosine(visual.signals["tower_keys"], visual.mask)
        home = similarity.masked_fill(~targets[:, None], -torch.inf).argmax(2)
        guests = visual.tokens.float().masked_fill(~absorbed[..., None], 0)
        total = torch.zeros_like(guests).scatter_add(1, home[..., None].expand_as(guests), guests)
        count = torch.zeros_like(home).scatter_add(1, home, absorbed.long())[..., None]
        merged = (visual.tokens + total / count.clamp(min=1)) / 2
        changed = targets[..., None] & (count > 0)
        return Selection(dominant | targets, torch.where(changed, merged.to(visual.tokens.dtype), visual.tokens))


class VisPruner:
    """Half of the budget by importance, half by removing duplicates (VisPruner, arXiv 2412.01818v2).

    Important: the ``T // 2`` highest [CLS] attentions. Diverse: the rest, in order of falling attention, is split
    into tokens at even and at odd places, and the 8 even ones with the highest cosine to any odd one are dropped.
    The remaining even ones, by falling similarity, and the odd ones after them are split again, until ``T - T // 2``
    are left. Half and half is the published setting; the order between rounds is that of the released code.

    Difference: similarity is that of projected tokens, the paper's that of the tower's features.
    """

    name = "vispruner"
    needs = frozenset({"cls_attention"})

    @in_parts
    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        attention = visual.signals["cls_attention"]
        important = top(attention, visual.mask, budget // 2)
        rest = visual.mask & ~important
        order = attention.masked_fill(~rest, -torch.inf).argsort(dim=1, descending=True, stable=True)
        distinct = _distinct(cosine(visual.tokens, visual.mask), order, rest.sum(1), budget - budget // 2)
        return Selection(important | distinct)


class PruMergePlus:
    """Attention outliers and spatial samples that absorb their neighbours (LLaVA-PruMerge+, arXiv 2403.15388).

    Outliers: [CLS] attention ``a_j > Q3 + 1.5 (Q3 - Q1)``. The rest of the budget: tokens spaced evenly among the
    others. Every kept token becomes ``x_i + sum of a_j x_j`` over its 32 nearest tokens by cosine of keys.

    Differences: the paper lets the number of outliers set the budget; here it is given, so the strongest outliers
    are kept where there are too many. Attention and keys are means over heads, tokens are merged after the projector,
    and the released code's extra token, a sum of all that was dropped, is left out as it has no place in the picture.
    """

    name = "prumerge+"
    needs = frozenset({"cls_attention", "tower_keys"})
    neighbours = 32

    @in_parts
    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        attention = visual.signals["cls_attention"].float().masked_fill(~visual.mask, 0)
        levels = attention.new_tensor([0.25, 0.75])
        first, third = attention.masked_fill(~visual.mask, torch.nan).nanquantile(levels, dim=1)[..., None]
        outliers = top(attention, visual.mask & (attention > third + 1.5 * (third - first)), budget)
        keep = outliers | _spaced(visual.mask & ~outliers, budget - outliers.sum(1))

        kept = keep.byte().argsort(dim=1, descending=True, stable=True)[:, : int(budget.max())]
        keys = units(visual.signals["tower_keys"], visual.mask)
        similarity = keys.gather(1, kept[..., None].expand(-1, -1, keys.shape[-1])) @ keys.mT
        similarity = similarity.masked_fill(~visual.mask[:, None], -torch.inf).scatter(2, kept[..., None], -torch.inf)
        closest, nearest = similarity.sort(dim=2, descending=True, stable=True)
        closest, nearest = closest[..., : self.neighbours], nearest[..., : self.neighbours]
        weights = attention[:, None].expand_as(similarity).gather(2, nearest).masked_fill(closest == -torch.inf, 0)
        weights = torch.zeros_like(similarity, dtype=weights.dtype).scatter(2, nearest, weights)
        tokens = visual.tokens.float().masked_fill(~visual.mask[..., None], 0)
        added = (weights @ tokens).float()  # autocast may have made it shorter
        gain = torch.zeros_like(tokens).scatter(1, kept[..., None].expand_as(added), added)
        merged = (tokens + gain).to(visual.tokens.dtype)
        return Selection(keep, torch.where(keep[..., None], merged, visual.tokens))


def _spaced(among: Tensor, count: Tensor) -> Tensor:
    """``count (B,)`` tokens evenly spaced in raster order among the candidates, bool ``(B, N)``."""
    return evenly(among.cumsum(1) - 1, among.sum(1), count) & among


def _distinct(similarity: Tensor, order: Tensor, size: Tensor, wanted: Tensor) -> Tensor:
    """Drop near-duplicates until ``wanted`` tokens are left.

    Args:
        similarity: ``(B, N, N)``.
        order: int64 ``(B, N)``, the candidates' indices first, then any others.
        size: int64 ``(B,)``, how many candidates a row has.
        wanted: int64 ``(B,)``, at least 1.

    Returns:
        bool ``(B, N)``.
    """
    rows = torch.arange(len(order), device=order.device)[:, None]
    chosen = torch.zeros_like(order, dtype=torch.bool)
    while True:
        order = order[:, : int(size.max())]
        alive = torch.arange(order.shape[1], device=order.device) < size[:, None]
        if bool((size <= wanted).all()):
            return chosen.scatter(1, order, alive)
        even, odd = order[:, ::2], order[:, 1::2]
        match = similarity[rows[..., None], even[..., None], odd[:, None]]
        match = match.masked_fill(~alive[:, None, 1::2], -torch.inf).amax(2)
        most = match.masked_fill(~alive[:, ::2], -torch.inf).argsort(dim=1, descending=True, stable=True)
        evens = alive[:, ::2].sum(1)
        dropped = (size - wanted).clamp(0, 8).minimum(evens)
        place = torch.arange(even.shape[1], device=order.device)
        stays = (place >= dropped[:, None]) & (place < evens[:, None])
        order = torch.cat([even.gather(1, most), odd], 1)
        stays = torch.cat([stays, alive[:, 1::2]], 1)
        order = order.gather(1, stays.byte().argsort(dim=1, descending=True, stable=True))
        size = size - dropped
