"""Ragged batches for the selectors, rows taken out of them, and rows whose padding is scattered and full of rubbish."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ragged import alone as alone
from tprl.types import VisualTokens

WIDTH, KEYS = 24, 6


def grid(height: int, width: int) -> Tensor:
    """Centres of a raster of tokens, ``(height * width, 2)``."""
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)


def make(sizes: Sequence[tuple[int, int]], seed: int = 0, width: int = WIDTH) -> VisualTokens:
    """Random tokens of pictures of ``sizes``, padded at the end with zeros, and questions of 1, 2, 3 ... tokens."""
    random = torch.Generator().manual_seed(seed)
    batch, longest = len(sizes), max(height * across for height, across in sizes)
    tokens = torch.randn(batch, longest, width, generator=random)
    attention = torch.rand(batch, longest, generator=random) ** 6 / longest
    keys = torch.randn(batch, longest, KEYS, generator=random)
    query = torch.randn(batch, batch, width, generator=random)
    mask, coords = torch.zeros(batch, longest, dtype=torch.bool), torch.zeros(batch, longest, 2)
    for row, (height, across) in enumerate(sizes):
        mask[row, : height * across] = True
        coords[row, : height * across] = grid(height, across)
    query_mask = torch.ones(batch, batch).tril().bool()
    real = mask[..., None]
    return VisualTokens(
        tokens * real, mask, coords, query * query_mask[..., None], query_mask,
        {"cls_attention": attention * mask, "tower_keys": keys * real},
    )  # fmt: skip


def scattered(visual: VisualTokens, filling: float, seed: int = 1) -> VisualTokens:
    """The same rows, real tokens in the same order but anywhere in longer rows, and ``filling`` everywhere else."""
    random = torch.Generator().manual_seed(seed)
    lengths = visual.mask.shape[1] + 9, visual.query_mask.shape[1] + 3
    places = [torch.randperm(length, generator=random) for length in lengths]

    def spread(values: Tensor, mask: Tensor, place: Tensor, empty: float | bool) -> Tensor:
        wide = torch.full((len(mask), len(place), *values.shape[2:]), empty, dtype=values.dtype)
        for row, real in enumerate(mask):
            wide[row, place[: int(real.sum())].sort().values] = values[row, real]
        return wide

    mask, query_mask = visual.mask, visual.query_mask
    return VisualTokens(
        spread(visual.tokens, mask, places[0], filling),
        spread(mask, mask, places[0], False),
        spread(visual.coords, mask, places[0], filling),
        spread(visual.query, query_mask, places[1], filling),
        spread(query_mask, query_mask, places[1], False),
        {name: spread(signal, mask, places[0], filling) for name, signal in visual.signals.items()},
    )
