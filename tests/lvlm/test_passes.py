"""Rows that are read together."""

import pytest

from tprl.lvlm.passes import Passes

LENGTHS = [3 + 7 * row % 31 for row in range(40)]


def test_passes_hold_no_more_than_asked_and_little_padding() -> None:
    passes = Passes(100)
    groups = passes.group(LENGTHS)
    assert sorted(row for chosen in groups for row in chosen) == list(range(40))
    shown = slots = 0
    for chosen in groups:
        lengths = [LENGTHS[row] for row in chosen]
        assert len(chosen) == 1 or len(chosen) * max(lengths) <= 100
        assert sum(lengths) > 0.9 * len(chosen) * max(lengths)
        shown, slots = shown + sum(lengths), slots + len(chosen) * max(lengths)
    assert any(len(chosen) > 2 for chosen in groups)
    assert passes.padding_share() == pytest.approx(1 - shown / slots)
    assert 0 < shown < slots
    assert passes.padding_share() == 1


def test_a_row_longer_than_a_pass_gets_one_by_itself() -> None:
    assert Passes(10).group([5, 25, 5, 4]) == [[1], [0, 2], [3]]
