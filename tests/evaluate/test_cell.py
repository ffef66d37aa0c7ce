"""The scores of all questions of a source, however many are looked at together."""

from pathlib import Path

import pytest

from evaluate.world import World, tiny_lvlm
from tprl.evaluate import cell
from tprl.evaluate.methods import make_methods
from tprl.lvlm.cache import EncodedSamples


def test_many_turns_give_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking, blind = make_methods(["cdpruner", "uniform"], [5], None, None, False, 0)
    data = EncodedSamples(tiny_lvlm(), World(), tmp_path)

    def measured() -> list[cell.Cell]:
        return [cell.score_questions(data, asking, ""), cell.score_pictures(data, blind, "")]

    by_question, by_picture = whole = measured()
    monkeypatch.setattr("tprl.lvlm.cache.PICTURES_AT_ONCE", 4)
    monkeypatch.setattr(cell, "QUESTIONS_AT_ONCE", 10)
    assert measured() == whole
    assert sum(by_question.scores[10:]) > 0
    assert sum(by_picture.scores[16:]) > 0
