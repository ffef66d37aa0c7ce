"""Shortened sequences against columns counted by hand."""

import pytest
import torch

from tprl.lvlm.cut import Cut
from tprl.lvlm.held import Held

HELD = Held.of(torch.tensor([[1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 1, 1]]).bool())


def test_shorter_rows_are_filled_up_with_dropped_columns() -> None:
    assert HELD.index.tolist() == [[0, 1, 3, 4, 5], [0, 1, 3, 4, 5]]
    assert HELD.mask.tolist() == [[True, False, True, True, True], [True] * 5]
    values = torch.arange(12.0).view(2, 6)
    assert HELD.gather(values).tolist() == [[0, 1, 3, 4, 5], [6, 7, 9, 10, 11]]
    assert HELD.scatter(HELD.gather(values)).tolist() == [[0, 0, 0, 3, 4, 5], [6, 7, 0, 9, 10, 11]]


def test_without_a_mask_tokens_see_what_is_held_before_them_and_fillers_at_least_themselves() -> None:
    held = Held.of(torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1]]).bool())
    assert held.index[0].tolist() == [0, 2, 3]
    longer = held.extended(6)
    for part, queries, first in ((held, 4, 0), (longer, 2, 4)):
        mask = part.attention_mask(None, queries)
        assert mask is not None
        columns, real = part.index.tolist(), part.mask.tolist()
        for row in range(2):
            asking = [place for place, column in enumerate(columns[row]) if column >= first]
            assert mask[row, 0].tolist() == [
                [
                    columns[row][key] <= columns[row][query] and (real[row][key] or key == query)
                    for key in range(len(columns[row]))
                ]
                for query in asking
            ]


def test_longer_and_back() -> None:
    longer = HELD.extended(8)
    assert isinstance(longer, Held)
    assert longer.index[:, -3:].tolist() == [[5, 6, 7]] * 2
    assert longer.mask[:, -2:].all()
    for length in (8, 9):
        assert longer.cropped(length) is longer
    for length, left in ((6, 5), (4, 3), (3, 2)):
        shorter = longer.cropped(length)
        assert torch.equal(shorter.index, HELD.index[:, :left])
        assert torch.equal(shorter.mask, HELD.mask[:, :left])
        assert shorter.length == length
    for length in (2, 1, 0):
        with pytest.raises(ValueError, match=r"cropped behind its pictures only, .* start again without it"):
            longer.cropped(length)


def test_copies_of_rows_stand_together() -> None:
    twice = Cut(torch.tensor([[0, 2], [1, 2]]), torch.tensor([[True, True], [False, True]]), 3).repeated(2)
    assert twice.source.tolist() == [[0, 2], [0, 2], [-1, 2], [-1, 2]]
    assert twice.length == 3
