"""Selectors that look at no content: the floor that every method has to beat."""

import torch
from torch import Tensor

from tprl.selectors.base import check, evenly, top
from tprl.types import Selection, VisualTokens

_GOLDEN = -0x61C8864680B583EB


class Random:
    """Tokens drawn uniformly without replacement.

    The draw is a hash of the seed, the row's number of tokens, the bits of its question's embeddings and the token's
    rank among the real ones. So a row draws the same tokens whatever the batch, the padding or the device, and
    questions draw independently; the same question about two pictures of one size draws the same places.
    """

    name = "random"
    needs: frozenset[str] = frozenset()

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        check(self, visual, budget)
        places = visual.query_mask.cumsum(1)[..., None] * visual.query.shape[-1]
        places = places + torch.arange(visual.query.shape[-1], device=budget.device)
        bits = visual.query.float().contiguous().view(torch.int32).long()
        question = (bits * _mix(places)).masked_fill(~visual.query_mask[..., None], 0).sum((1, 2))
        count = visual.mask.sum(1)
        row = _mix(_mix(count + torch.full_like(count, self.seed) * _GOLDEN) + question)
        draw = _mix(row[:, None] + visual.mask.cumsum(1) * _GOLDEN)
        return Selection(top((draw & 0xFFFFFF).float(), visual.mask, budget))


class UniformGrid:
    """A lattice as regular as the budget allows.

    ``round(sqrt(budget))`` horizontal bands of equal height; the tokens band by band, column by column in each;
    evenly spaced ones of that sequence. Where band and spacing divide the picture's grid, as for 64 or 144 of
    24 x 24 tokens, this is the exact square lattice.
    """

    name = "uniform"
    needs: frozenset[str] = frozenset()

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        check(self, visual, budget)
        bands = budget.float().sqrt().round()
        band = (visual.coords[..., 0] * bands[:, None]).floor().masked_fill(~visual.mask, torch.inf)
        by_column = visual.coords[..., 1].argsort(dim=1, stable=True)
        order = by_column.gather(1, band.gather(1, by_column).argsort(dim=1, stable=True))
        rank = order.argsort(1)
        return Selection(evenly(rank, visual.mask.sum(1), budget) & visual.mask)


def _mix(number: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): int64 to well-scattered int64, wrapping."""
    number = (number ^ _shift(number, 30)) * -0x40A7B892E31B1A47
    number = (number ^ _shift(number, 27)) * -0x6B2FB644ECCEEE15
    return number ^ _shift(number, 31)


def _shift(number: Tensor, by: int) -> Tensor:
    """Right shift that fills with zeros; torch's own repeats the sign."""
    return (number >> by) & ((1 << (64 - by)) - 1)
