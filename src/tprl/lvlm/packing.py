"""Laying out pictures and questions as one batch of token sequences.

A row is ``[prefix without dropped visual tokens | block | block | ...]``: the prefix is the prompt up to the picture's
last visual token, and questions about one picture whose kept tokens are the same share one row. A block (the rest of
the prompt and an answer) sees the prefix and itself, and keeps the positions that it would have alone, after the
*unpruned* picture. Rows of different length are padded at the end; padding is never seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from tprl.lvlm.families import BothWays

IGNORE = -100


@dataclass(frozen=True)
class Block:
    """A question's part of the sequence: ``ids`` of prompt and answer, the answer beginning at ``answer_start``."""

    ids: list[int]
    answer_start: int


@dataclass(frozen=True)
class Prefix:
    """The beginnings of a batch of prompts, up to the last visual token of each one's picture.

    Attributes:
        ids: int64 ``(B, M)``, 0 where a visual token or padding stands.
        visual: bool ``(B, M)``, True where a visual token stands.
        real: bool ``(B, M)``, False at padding, which is on the right.
        positions: int64 ``(P, B, M)``; ``P`` is 3 where a family's positions are two-dimensional (M-RoPE), else 1.
        deep: ``(B, N, K, D)``, what is added to the visual tokens after each of the first ``K`` decoder layers.
        sizes: float32 ``(B, N)``, how many each visual token is attended to as, see ``tprl.types.Selection``.
    """

    ids: Tensor
    visual: Tensor
    real: Tensor
    positions: Tensor
    deep: Tensor | None = None
    sizes: Tensor | None = None

    def __getitem__(self, rows: Sequence[int]) -> "Prefix":
        deep = None if self.deep is None else self.deep[rows]
        sizes = None if self.sizes is None else self.sizes[rows]
        return Prefix(self.ids[rows], self.visual[rows], self.real[rows], self.positions[:, rows], deep, sizes)

    def opening(self) -> tuple[int, ...]:
        """The tokens of text that all rows begin with."""
        alike = (self.real & ~self.visual & (self.ids == self.ids[:1])).all(0)
        return tuple(self.ids[0, : int(alike.int().cumprod(0).sum())].tolist())

    def shown(self, keep_mask: Tensor) -> Tensor:
        """What is left of the prefixes if of their visual tokens ``keep_mask (B, N)`` is kept: bool ``(B, M)``."""
        counts = self.visual.sum(1, keepdim=True)
        present = torch.arange(keep_mask.shape[1], device=keep_mask.device) < counts
        shown = self.real.clone()
        shown[self.visual] = keep_mask[present]
        return shown


@dataclass(frozen=True)
class Packed:
    """A batch of rows, the visual tokens' embeddings left out.

    Attributes:
        ids: int64 ``(B, L)``, 0 where a visual token or padding stands.
        positions: int64 ``(P, B, L)``.
        places: int64 ``(B, L)``, how many tokens of its own question's sequence stand before a token.
        mask: bool ``(B, 1, L, L)``, True where a query may look at a key.
        targets: int64 ``(B, L)``, the next token where that belongs to an answer, else ``IGNORE``.
        owners: int64 ``(B, L)``, where ``targets`` is set the number of the question in reading order, else -1.
        visual: bool ``(B, L)``, True where a visual token stands.
        start: int64 ``(B,)`` on the CPU, where the first block of every row begins.
        bias: float32 ``(B, L)``, logarithms of the sizes of visual tokens, 0 at others; None where there are none.
    """

    ids: Tensor
    positions: Tensor
    places: Tensor
    mask: Tensor
    targets: Tensor
    owners: Tensor
    visual: Tensor
    start: Tensor
    bias: Tensor | None = None

    def to(self, device: torch.device) -> "Packed":
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "start"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def make_prefix(
    before: Sequence[Sequence[int]],
    image_id: int,
    runs: Sequence[Sequence[int]],
    places: Sequence[Tensor] | None = None,
    deep: Tensor | None = None,
) -> Prefix:
    """Put together what stands before the questions.

    Args:
        before: token ids of each row up to the picture's last visual token, each run of them as one ``image_id``.
        runs: the length of each run.
        places: int64 ``(n, 3)`` of each row, positions of the visual tokens counted from the first of them, where
            they are two-dimensional; None where they count tokens.
        deep: see ``Prefix``.
    """
    rows = [_expanded(ids, image_id, lengths) for ids, lengths in zip(before, runs, strict=True)]
    shape = (len(rows), max(len(row) for row in rows))
    ids, real = torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        real[number, : len(row)] = True
    visual = ids == image_id
    positions = torch.arange(shape[1]).repeat(1 if places is None else 3, len(rows), 1)
    for number, place in enumerate(places or []):
        positions[:, number, visual[number]] = len(before[number]) - 1 + place.T
    return Prefix(ids.masked_fill(visual | ~real, 0), visual, real, positions.masked_fill(~real, 0), deep)


def _expanded(ids: Sequence[int], image_id: int, runs: Sequence[int]) -> Tensor:
    """``ids`` with every ``image_id`` repeated as often as its run is long."""
    row = torch.tensor(ids, dtype=torch.int64)
    repeats = torch.ones_like(row)
    repeats[row == image_id] = torch.tensor(runs, dtype=torch.int64)
    return row.repeat_interleave(repeats)


def kept_indices(keep_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Raster-order indices of the kept tokens, padded with 0 to the longest row: int64 ``(B, K)``, and bool
    ``(B, K)``, True where real."""
    order = keep_mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(keep_mask.sum(1).max())]
    real = keep_mask.gather(1, order)
    return order * real, real


def pack(prefix: Prefix, keep_mask: Tensor, rows: Sequence[Sequence[Block]], both_ways: BothWays = "nothing") -> Packed:
    """Lay out a batch.

    Args:
        prefix: what stands before the blocks of every row.
        keep_mask: bool ``(B, N)``, which of a row's visual tokens are kept.
        rows: the blocks of every row.
        both_ways: "pictures": visual tokens see each other in both directions; "prompts": all tokens but those of
            answers do, so that a row has to hold one block.
    """
    columns, real = kept_indices(prefix.shown(keep_mask))
    start, widest = real.sum(1), columns.shape[1]
    length = int((start + torch.tensor([sum(len(block.ids) for block in blocks) for blocks in rows])).max())
    shape = (len(rows), length)
    ids, places = torch.zeros(shape, dtype=torch.int64), torch.arange(length).repeat(len(rows), 1)
    positions = torch.zeros(len(prefix.positions), *shape, dtype=torch.int64)
    part = torch.full(shape, -1)  # 0 = prefix, 1, 2, ... = blocks, -1 = padding
    visual, prompt = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    targets, owners = torch.full(shape, IGNORE), torch.full(shape, -1)
    ids[:, :widest] = prefix.ids.gather(1, columns) * real
    positions[:, :, :widest] = prefix.positions.gather(2, columns.expand(len(positions), -1, -1)) * real
    part[:, :widest] = torch.where(real, 0, -1)
    visual[:, :widest] = prefix.visual.gather(1, columns) & real
    prompt[:, :widest] = real
    told = prefix.positions.masked_fill(~prefix.real, -1)
    nexts = (nn.functional.pad(told, (1, 0), value=-1).amax((0, 2)) + 1).tolist()
    question = 0
    for row, (blocks, before) in enumerate(zip(rows, start.tolist(), strict=True)):
        at = before
        for number, block in enumerate(blocks, 1):
            size = len(block.ids)
            end, answer = at + size, at + block.answer_start
            ids[row, at:end] = torch.tensor(block.ids)
            positions[:, row, at:end] = torch.arange(nexts[row], nexts[row] + size)
            places[row, at:end] = torch.arange(before, before + size)
            part[row, at:end] = number
            prompt[row, at:answer] = True
            targets[row, answer - 1 : end - 1] = torch.tensor(block.ids[block.answer_start :])
            owners[row, answer - 1 : end - 1] = question
            at, question = end, question + 1
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (part[:, :, None] == part[:, None, :]) | ((part[:, :, None] > 0) & (part[:, None, :] == 0))
    mask = visible & causal
    if both_ways != "nothing":
        together = visual if both_ways == "pictures" else prompt
        mask |= together[:, :, None] & together[:, None, :]
    bias = None
    if prefix.sizes is not None:
        bias = torch.zeros(shape).masked_scatter(visual, prefix.sizes.cpu()[keep_mask].log())
    return Packed(ids, positions, places, mask[:, None], targets, owners, visual, start, bias)
