"""Ragged batches of visual tokens with the questions to them, as a language model would hand them over."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tprl.types import VisualTokens


def visual_tokens(counts: Sequence[int], asked: Sequence[int], width: int, seed: int = 0) -> VisualTokens:
    """Rows of ``counts`` random tokens, each in another place, and questions of ``asked`` random tokens."""
    random = torch.Generator().manual_seed(seed)

    def rows(lengths: Sequence[int], across: int) -> Tensor:
        return pad_sequence([torch.randn(length, across, generator=random) for length in lengths], True)

    def mask(lengths: Sequence[int]) -> Tensor:
        return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    places = pad_sequence([torch.rand(count, 2, generator=random) for count in counts], True)
    return VisualTokens(rows(counts, width), mask(counts), places, rows(asked, width), mask(asked))


def alone(visual: VisualTokens, row: int) -> VisualTokens:
    """One row without its padding."""
    real, asked = visual.mask[row], visual.query_mask[row]
    return VisualTokens(
        visual.tokens[row, real][None], real[real][None], visual.coords[row, real][None],
        visual.query[row, asked][None], asked[asked][None],
        {name: signal[row, real][None] for name, signal in visual.signals.items()},
    )  # fmt: skip
