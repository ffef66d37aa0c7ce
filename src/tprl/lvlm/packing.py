"""Laying out pictures and questions as one batch of token sequences.

A row is ``[before | a picture's kept visual tokens | block | block | ...]``: questions about one picture whose kept
tokens are the same share one row. A block (the rest of the prompt and an answer) sees the picture and itself, and
keeps the positions that it would have alone, after the *unpruned* picture. Rows of different length are padded
between picture and blocks and at the end; padding is never seen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Block:
    """A question's part of the sequence: ``ids`` of prompt and answer, the answer beginning at ``answer_start``."""

    ids: list[int]
    answer_start: int


@dataclass(frozen=True)
class Packed:
    """A batch of rows, the visual tokens' embeddings left out.

    Attributes:
        ids: int64 ``(B, L)``, 0 where a visual token or padding stands.
        positions: int64 ``(B, L)``.
        mask: bool ``(B, 1, L, L)``, True where a query may look at a key.
        targets: int64 ``(B, L)``, the next token where that belongs to an answer, else ``IGNORE``.
        owners: int64 ``(B, L)``, where ``targets`` is set the number of the question in reading order, else -1.
        visual: the slice of the sequence that visual tokens take.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    owners: Tensor
    visual: slice


def kept_indices(keep_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Raster-order indices of the kept tokens, padded with 0 to the longest row: int64 ``(B, K)``, and bool
    ``(B, K)``, True where real."""
    order = keep_mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(keep_mask.sum(1).max())]
    real = keep_mask.gather(1, order)
    return order * real, real


def pack(before: list[int], indices: Tensor, real: Tensor, total: int, rows: list[list[Block]]) -> Packed:
    """Lay out a batch.

    Args:
        before: token ids in front of the picture.
        indices: int64 ``(B, K)`` kept visual tokens of every row, in raster order.
        real: bool ``(B, K)``, False at padding.
        total: N, visual tokens of the unpruned picture; blocks start at position ``len(before) + N``.
        rows: the blocks of every row.
    """
    head, start = len(before), len(before) + indices.shape[1]
    length = start + max(sum(len(block.ids) for block in blocks) for blocks in rows)
    shape = (len(rows), length)
    ids, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    part = torch.full(shape, -1)  # 0 = prefix and picture, 1, 2, ... = blocks, -1 = padding
    targets, owners = torch.full(shape, IGNORE), torch.full(shape, -1)
    ids[:, :head] = torch.tensor(before)
    positions[:, :head] = torch.arange(head)
    positions[:, head:start] = head + indices
    part[:, :head] = 0
    part[:, head:start] = torch.where(real, 0, -1)
    question = 0
    for row, blocks in enumerate(rows):
        at = start
        for number, block in enumerate(blocks, 1):
            end = at + len(block.ids)
            ids[row, at:end] = torch.tensor(block.ids)
            positions[row, at:end] = torch.arange(head + total, head + total + len(block.ids))
            part[row, at:end] = number
            targets[row, at + block.answer_start - 1 : end - 1] = torch.tensor(block.ids[block.answer_start :])
            owners[row, at + block.answer_start - 1 : end - 1] = question
            at, question = end, question + 1
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (part[:, :, None] == part[:, None, :]) | ((part[:, :, None] > 0) & (part[:, None, :] == 0))
    return Packed(ids, positions, (visible & causal)[:, None], targets, owners, slice(head, start))
