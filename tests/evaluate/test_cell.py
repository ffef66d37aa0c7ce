"""The scores of all questions of a source, however many are looked at together."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluate.world import World, tiny_lvlm
from ragged import visual_tokens
from tprl.evaluate import cell
from tprl.evaluate.methods import Method, make_methods
from tprl.lvlm.cache import EncodedSamples
from tprl.types import Selection, VisualTokens


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


CONFIG = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=6))


class Ragged:
    """Two questions about a picture of 8 tokens and one about a picture of 4; an answer is as right as an eighth of
    the tokens that it is shown."""

    lvlm = SimpleNamespace(model=SimpleNamespace(config=CONFIG))

    def __len__(self) -> int:
        return 3

    def visual(self, indices: Sequence[int]) -> VisualTokens:
        return visual_tokens([(8, 8, 4)[index] for index in indices], [1] * len(indices), width=2)

    def in_turns(self, title: str) -> Iterator[tuple[VisualTokens, list[int], Tensor]]:
        yield visual_tokens([4, 8], [1, 1], width=2), [2, 0, 1], torch.tensor([0, 1, 1])

    def accuracy(self, indices: Sequence[int], tokens: Tensor, keep_mask: Tensor, *_: Any, **__: Any) -> Tensor:
        return keep_mask.sum(1) / 8


def test_pictures_of_different_sizes_count_their_own_tokens() -> None:
    encoded: Any = Ragged()
    uniform, fastv = make_methods(["uniform", "fastv"], [5], None, None, False, 0)
    for method, blind, kept in ((None, False, [8, 8, 4]), (None, True, [0, 0, 0]), (uniform, False, [5, 5, 4])):
        by_picture = cell.score_pictures(encoded, method, "", blind)
        assert (by_picture.kept, by_picture.scores) == (kept, [count / 8 for count in kept])
    within = cell.score_questions(encoded, fastv, "")
    assert within.kept == pytest.approx([(8 + 5 * 5) / 6, (8 + 5 * 5) / 6, 4]), "one layer of six sees all"
    assert within.scores == [1, 1, 0.5], "what enters the language model"


class Numbered:
    """Keeps all, each token as large as its picture has tokens."""

    name, needs = "numbered", frozenset[str]()

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        return Selection(visual.mask, sizes=visual.mask.sum(1, keepdim=True).expand(visual.mask.shape).float())


def test_sizes_are_those_of_each_questions_picture() -> None:
    told: list[list[float]] = []

    class Watched(Ragged):
        def accuracy(self, indices: Sequence[int], *given: Any, sizes: Tensor | None, **named: Any) -> Tensor:
            assert sizes is not None
            assert list(indices) in ([2, 0, 1], [0, 1, 2])
            told.append(sizes[:, 0][torch.tensor(indices).argsort()].tolist())
            return super().accuracy(indices, *given, **named)

    method, encoded = Method("numbered", Numbered(), 9), Watched()
    cell.score_pictures(encoded, method, "")  # type: ignore[arg-type]
    cell.score_questions(encoded, method, "")  # type: ignore[arg-type]
    assert told == [[8, 8, 4]] * 2
