"""Methods inside the language model against slow re-statements, on a view that is made up here."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tprl.selectors import IN_MODEL, InModel, make_selector
from tprl.selectors.in_model import Dart, FastV, PyramidDrop, Stage


@dataclass
class View:
    """Random attention, keys and hidden states of rows with text, a picture and text."""

    hidden: Tensor
    visual: Tensor
    text: Tensor
    last: Tensor
    weights: Tensor
    rotated: Tensor

    @classmethod
    def make(cls, seed: int) -> "View":
        random = torch.Generator().manual_seed(seed)
        visual, text = torch.zeros(3, 30).bool(), torch.zeros(3, 30).bool()
        last = []
        for row, (start, stop, end) in enumerate([(2, 22, 30), (5, 14, 17), (1, 25, 26)]):
            visual[row, start:stop] = True
            text[row, :start], text[row, stop:end] = True, True
            last.append(end - 1)
        weights = torch.rand(3, 30, 30, generator=random)
        hidden, keys = torch.randn(3, 30, 8, generator=random), torch.randn(3, 30, 6, generator=random)
        return cls(hidden, visual, text, torch.tensor(last), weights, keys)

    def attention(self, places: Tensor) -> Tensor:
        return self.weights[torch.arange(3)[:, None], places]

    def keys(self) -> Tensor:
        return self.rotated


BUDGETS = ([12, 7, 10], [3, 1, 24], [20, 9, 4], [0, 2, 1])


def kept(method: InModel, view: View, budgets: list[int]) -> list[list[int]]:
    keep = method.select(0, view, torch.tensor(budgets)).keep_mask & view.visual
    assert keep.sum(1).tolist() == budgets
    return [row.nonzero()[:, 0].tolist() for row in keep]


@pytest.mark.parametrize("budgets", BUDGETS)
@pytest.mark.parametrize("method", [FastV(), PyramidDrop()], ids=["fastv", "pyramiddrop"])
def test_the_last_tokens_attention_decides(method: InModel, budgets: list[int]) -> None:
    view = View.make(0)
    for row, indices in enumerate(kept(method, view, budgets)):
        scores = view.weights[row, view.last[row]].tolist()
        places = view.visual[row].nonzero()[:, 0].tolist()
        assert indices == sorted(sorted(places, key=lambda place: -scores[place])[: budgets[row]])


def dart(hidden: list[Tensor], norms: list[float], visual: list[int], behind: list[int], budget: int) -> list[int]:
    """DART of one row, token by token."""
    pivots = sorted(visual, key=lambda place: -norms[place])[: min(4, budget)]
    chosen = list(pivots)
    pivots += sorted(behind, key=lambda place: -norms[place])[:4]
    rest = budget - len(chosen)
    for number, pivot in enumerate(pivots):
        share = rest // len(pivots) + (1 if number < rest % len(pivots) else 0)
        free = [place for place in visual if place not in chosen]
        free.sort(key=lambda place: torch.cosine_similarity(hidden[place], hidden[pivot], 0).item())
        chosen += free[:share]
    return sorted(chosen)


@pytest.mark.parametrize("budgets", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_dart_slowly(seed: int, budgets: list[int]) -> None:
    view = View.make(seed)
    for row, indices in enumerate(kept(Dart(), view, budgets)):
        visual = view.visual[row].nonzero()[:, 0].tolist()
        behind = [place for place in view.text[row].nonzero()[:, 0].tolist() if place > max(visual)]
        norms = [key.abs().sum().item() for key in view.rotated[row]]
        assert indices == dart(list(view.hidden[row]), norms, visual, behind, budgets[row])


def test_published_schedules() -> None:
    assert FastV().layer_counts(32, 576, 192) == [576] * 2 + [192] * 30
    assert Dart().layer_counts(32, 576, 64) == [576] * 2 + [64] * 30
    assert PyramidDrop().layer_counts(32, 576, 72) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert PyramidDrop().stages(10) == [Stage(2, 2), Stage(5, 5), Stage(8, 8)]
    assert FastV(3).stages(4) == [Stage(2, 3)]
    assert PyramidDrop().layer_counts(4, 0, 0) == [0] * 4


@pytest.mark.parametrize("name", IN_MODEL)
def test_schedules_fall_and_bad_ones_are_refused(name: str) -> None:
    method = make_selector(name)
    assert isinstance(method, InModel)
    assert method.name == name
    for layers in range(4, 41):
        stages = method.stages(layers)
        drops = [stage.drop for stage in stages]
        assert drops == sorted(set(drops))
        assert drops[0] >= 1
        assert drops[-1] < layers
        assert all(stage.watch in (stage.drop - 1, stage.drop) for stage in stages)
        counts = method.layer_counts(layers, 100, 17)
        assert counts == sorted(counts, reverse=True)
        assert len(counts) == layers
        assert (counts[0], counts[-1]) == (100, 17)
    with pytest.raises(ValueError, match="budget 101 is not allowed; 0 to the picture's 100"):
        method.layer_counts(10, 100, 101)
    with pytest.raises(ValueError, match="layer"):
        method.stages(2)


def test_layers_that_are_not_allowed() -> None:
    for make in (FastV, Dart):
        with pytest.raises(ValueError, match="layer 0 is not allowed; at least 1"):
            make(0)
        with pytest.raises(ValueError, match="layer 4 is not allowed in a decoder of 4 layers; 1 to 3"):
            make(4).stages(4)
    with pytest.raises(ValueError, match="this one has 3 layers, at least 4 needed"):
        PyramidDrop().stages(3)
