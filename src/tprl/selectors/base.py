"""What a selector is, and the few operations that selectors share, each over a batch of rows with masks."""

from collections.abc import Callable
from functools import wraps
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from tprl.types import Selection, VisualTokens

PAIRS_AT_ONCE = 2**25
"""Pairs of tokens that are compared at once; a float32 for each is 128 MiB."""


class Selector(Protocol):
    """Decides which visual tokens the language model is shown.

    Attributes:
        name: as tables and the command line call it.
        needs: keys of ``tprl.types.SIGNALS`` that ``VisualTokens.signals`` must hold.

    One that asks what the question means says so by ``reads_question = True``, see ``tprl.prune``.
    """

    name: str
    needs: frozenset[str]

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        """Keep exactly ``budget`` real tokens of every row; tokens that are not real change nothing.

        Args:
            visual: real tokens may lie anywhere in a row.
            budget: int64 ``(B,)``, from 1 to the row's number of real tokens.

        Raises:
            ValueError: a budget is out of range, or a signal that the selector needs is missing.
        """
        ...


S = TypeVar("S", bound=Selector)


def check(selector: Selector, visual: VisualTokens, budget: Tensor) -> None:
    """Raise ValueError unless ``selector`` can keep ``budget`` tokens of ``visual``."""
    missing = selector.needs - visual.signals.keys()
    if missing:
        raise ValueError(
            f"{selector.name} needs the signals {sorted(selector.needs)}; {sorted(missing)} missing, "
            f"given: {sorted(visual.signals)}"
        )
    real = visual.mask.sum(1)
    if budget.shape != real.shape or bool(((budget < 1) | (budget > real)).any()):
        raise ValueError(
            f"budgets must be one a row and lie between 1 and the number of visual tokens {real.tolist()}, "
            f"got {budget.tolist()}"
        )


def in_parts(select: Callable[[S, VisualTokens, Tensor], Selection]) -> Callable[[S, VisualTokens, Tensor], Selection]:
    """For a ``select`` that compares all tokens of a row with each other: checked, and given as few rows at a time as
    ``PAIRS_AT_ONCE`` allows, since one long picture makes a batch wide, and square it would be large."""

    @wraps(select)
    def parted(self: S, visual: VisualTokens, budget: Tensor) -> Selection:
        check(self, visual, budget)
        rows = max(1, PAIRS_AT_ONCE // visual.mask.shape[1] ** 2)
        chosen = [select(self, part, own) for part, own in zip(visual.split(rows), budget.split(rows), strict=True)]
        keep_mask = torch.cat([selection.keep_mask for selection in chosen])
        changed = [selection.tokens for selection in chosen if selection.tokens is not None]
        sizes = [selection.sizes for selection in chosen if selection.sizes is not None]
        return Selection(keep_mask, torch.cat(changed) if changed else None, torch.cat(sizes) if sizes else None)

    return parted


def ranks(scores: Tensor, among: Tensor) -> Tensor:
    """The place of each of ``scores (B, N)`` in its row, int64: 0 for the highest ``among (B, N)``, which all precede
    the others; the first wins a tie."""
    return scores.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)


def top(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The ``count (B,)`` highest scores of every row, or all where there are fewer; the first wins a tie.

    Args:
        scores: float ``(B, N)``, finite where ``among``.
        among: bool ``(B, N)``, the candidates.

    Returns:
        bool ``(B, N)``.
    """
    return (ranks(scores, among) < count[:, None]) & among


def evenly(rank: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """Evenly spaced ranks: ``count`` of the ranks 0 to ``total - 1``, the middle one where ``count`` is 1.

    Args:
        rank: int64 ``(B, N)``.
        total: int64 ``(B,)``.
        count: int64 ``(B,)``, at most ``total``.

    Returns:
        bool ``(B, N)``, True where a rank is chosen; without meaning where a rank is out of range.
    """
    total, count = total[:, None].clamp(min=1), count[:, None]
    return ((rank + 1) * count + total // 2) // total > (rank * count + total // 2) // total


def cosine(vectors: Tensor, mask: Tensor) -> Tensor:
    """Cosine of every pair of ``vectors (B, N, K)``, float32 ``(B, N, N)``, 0 where one is not real."""
    unit = units(vectors, mask)
    return unit @ unit.mT


def units(vectors: Tensor, mask: Tensor) -> Tensor:
    """``vectors (B, N, K)`` in float32, of length 1, zero where not real."""
    return nn.functional.normalize(vectors.float().masked_fill(~mask[..., None], 0), dim=-1)
