"""Methods inside the language model against slow re-statements, on a view that is made up here."""

from dataclasses import dataclass
from math import ceil, exp

import pytest
import torch
from torch import Tensor

from tprl.selectors import IN_MODEL, InModel, make_selector
from tprl.selectors.in_model import Dart, FastV, PyramidDrop, SparseVLM, density_peaks
from tprl.selectors.stages import Stage


@dataclass
class View:
    """Random attention, keys and hidden states of rows with text, a picture and text."""

    entered: Tensor
    hidden: Tensor
    visual: Tensor
    text: Tensor
    last: Tensor
    weights: Tensor
    rotated: Tensor
    scale: Tensor | float = 1.0

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
        entered = torch.randn(3, 30, 8, generator=random)
        scale = torch.rand(8, generator=random) ** 2
        return cls(entered, hidden, visual, text, torch.tensor(last), weights, keys, scale)

    def attention(self, places: Tensor) -> Tensor:
        return self.weights[torch.arange(len(places))[:, None], places]

    def keys(self) -> Tensor:
        return self.rotated

    def normed(self) -> Tensor:
        return self.hidden * self.scale


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
        assert indices == dart(list(view.hidden[row] * view.scale), norms, visual, behind, budgets[row])


def peaks(points: list[Tensor], count: int, neighbours: int) -> list[int]:
    """Density peaks, point by point: numbers of the centres."""
    everyone = range(len(points))
    apart = [[(a - b).norm().item() / len(a) ** 0.5 for b in points] for a in points]
    nearest = [sorted(apart[i][j] for j in everyone if j != i)[:neighbours] for i in everyone]
    rho = [exp(-sum(d * d for d in near) / max(1, len(near))) for near in nearest]
    farthest = max((max(row) for row in apart), default=0.0)
    score = []
    for i in everyone:
        denser = [apart[i][j] for j in everyone if (-rho[j], j) < (-rho[i], i)]
        score.append(rho[i] * min(denser, default=farthest))
    return sorted(everyone, key=lambda i: -score[i])[:count]


def sparsevlm(view: View, row: int, budget: int) -> tuple[list[int], dict[int, Tensor]]:
    """SparseVLM of one row, token by token: which tokens stay, and the new states of those that were merged."""
    visual = view.visual[row].nonzero()[:, 0].tolist()
    words = [place for place in view.text[row].nonzero()[:, 0].tolist() if place > max(visual)]
    entered, hidden = view.entered[row], view.hidden[row]
    likeness = [torch.stack([entered[j] @ entered[i] for i in words]).softmax(0) for j in visual]
    relevance = torch.stack(likeness).mean(0).tolist()
    raters = [word for word, value in zip(words, relevance, strict=True) if value >= sum(relevance) / len(words)]
    assert 0 < len(raters) < len(words) or len(words) == 1
    score = {place: sum(view.weights[row, rater, place].item() for rater in raters) for place in visual}
    ranked = sorted(visual, key=lambda place: -score[place])
    count = min(ceil(0.03 * (len(visual) - budget)), max(budget - 1, 0))
    stay, rest = ranked[: budget - count], ranked[budget - count :]
    recycled = sorted(rest[: ceil(len(rest) * 30 / 100)])
    centres = [recycled[i] for i in peaks([hidden[place] for place in recycled], count, 5)]
    clusters: dict[int, list[Tensor]] = {centre: [] for centre in centres}
    for place in recycled if centres else []:
        home = place if place in centres else min(centres, key=lambda c: (hidden[place] - hidden[c]).norm().item())
        clusters[home].append(hidden[place])
    return sorted(stay + centres), {centre: torch.stack(group).mean(0) for centre, group in clusters.items()}


@pytest.mark.parametrize("budgets", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_sparsevlm_slowly(seed: int, budgets: list[int]) -> None:
    view = View.make(seed)
    before = view.hidden.clone()
    selection = SparseVLM().select(0, view, torch.tensor(budgets))
    assert torch.equal(view.hidden, before)
    hidden = before if selection.tokens is None else selection.tokens
    for row, budget in enumerate(budgets):
        kept, merged = sparsevlm(view, row, budget)
        assert (selection.keep_mask & view.visual)[row].nonzero()[:, 0].tolist() == kept
        assert len(kept) == budget
        for place in range(30):
            torch.testing.assert_close(hidden[row, place], merged.get(place, before[row, place]))


@pytest.mark.parametrize("width", [8, 400])
def test_several_clusters_of_a_large_picture(width: int) -> None:
    """70 of 100 visual tokens go, so that 3 clusters of 22 recycled ones take 3 of the 30 places. However wide the
    states are, the distances that density is made of stay of one size."""
    random = torch.Generator().manual_seed(5)
    visual, text = torch.arange(110)[None] < 100, torch.arange(110)[None] >= 100
    entered, hidden = torch.randn(2, 1, 110, width, generator=random)
    weights = torch.rand(1, 110, 110, generator=random)
    view = View(entered, hidden, visual, text, torch.tensor([109]), weights, hidden)
    selection = SparseVLM().select(0, view, torch.tensor([30]))
    kept, merged = sparsevlm(view, 0, 30)
    assert len(merged) == 3
    assert selection.keep_mask[0].nonzero()[:, 0].tolist() == kept
    assert selection.tokens is not None
    for place, state in merged.items():
        torch.testing.assert_close(selection.tokens[0, place], state)


def test_clusters_of_tokens_that_are_all_alike_are_what_these_were() -> None:
    """Of 3 centres at one place each is in its own cluster, and none is left without a token."""
    visual, text = torch.arange(110)[None] < 100, torch.arange(110)[None] >= 100
    weights = torch.rand(1, 110, 110, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(1, 110, 8)
    selection = SparseVLM().select(
        0, View(hidden, hidden, visual, text, torch.tensor([109]), weights, hidden), torch.tensor([30])
    )
    assert (selection.keep_mask & visual).sum() == 30
    assert selection.tokens is not None
    torch.testing.assert_close(selection.tokens, hidden)


def test_sparsevlm_by_hand() -> None:
    """Tokens 0 to 5 are the picture, 6 and 7 the words. Word 6 looks like the picture and rates; 7 does not.

    Word 6 attends to tokens 5 and 4 most, 7 to tokens 0 and 1. Of 6 tokens 2 shall stay: one of these places goes to
    the cluster, the other to token 5. Of the five others two are recycled, 4 and 3. Both are equally dense, the first
    of them is the centre, and becomes their mean.
    """
    entered = torch.zeros(1, 8, 2)
    entered[0, :7, 0] = 1.0
    entered[0, 7, 1] = 1.0
    hidden = torch.arange(16.0).view(1, 8, 2)
    weights = torch.zeros(1, 8, 8)
    weights[0, 6, :6] = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    weights[0, 7, :6] = torch.tensor([9.0, 8.0, 0.0, 0.0, 0.0, 0.0])
    places = torch.arange(8)[None]
    view = View(entered, hidden, places < 6, places >= 6, torch.tensor([7]), weights, hidden)
    selection = SparseVLM().select(0, view, torch.tensor([2]))
    assert selection.keep_mask[0].nonzero()[:, 0].tolist() == [3, 5]
    assert selection.tokens is not None
    assert selection.tokens[0, 3].tolist() == [7.0, 8.0]  # of (6, 7) and (8, 9)
    assert torch.equal(selection.tokens[0, [0, 1, 2, 4, 5, 6, 7]], hidden[0, [0, 1, 2, 4, 5, 6, 7]])


def test_density_peaks_are_the_middles_of_two_heaps() -> None:
    heaps = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0, 50.0])
    distance = (heaps[:, None] - heaps).abs()[None] / 10
    among = torch.tensor([[True] * 6 + [False]])
    assert density_peaks(distance, among, torch.tensor([2]), 2)[0].nonzero()[:, 0].tolist() == [1, 4]
    assert density_peaks(distance, among, torch.tensor([0]), 2).sum() == 0


def test_published_schedules() -> None:
    assert FastV().layer_counts(32, 576, 192) == [576] * 2 + [192] * 30
    assert Dart().layer_counts(32, 576, 64) == [576] * 2 + [64] * 30
    assert PyramidDrop().layer_counts(32, 576, 72) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert PyramidDrop().stages(10) == [Stage(2, 2), Stage(5, 5), Stage(8, 8)]
    assert FastV(3).stages(4) == [Stage(2, 3)]
    assert [FastV().stages(layers)[0].drop for layers in (2, 8, 16, 40)] == [1, 1, 1, 2]
    assert Dart().stages(32) == [Stage(1, 2)]
    assert PyramidDrop().layer_counts(4, 0, 0) == [0] * 4
    assert SparseVLM().layer_counts(32, 576, 110) == [576] * 2 + [297] * 4 + [191] * 9 + [110] * 17
    assert SparseVLM().stages(8) == [Stage(1, 1), Stage(2, 2), Stage(4, 4)]


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
        method.stages(1)


def test_layers_that_are_not_allowed() -> None:
    for make in (FastV, Dart):
        with pytest.raises(ValueError, match="layer 0 is not allowed; at least 1"):
            make(0)
        with pytest.raises(ValueError, match="layer 4 is not allowed in a decoder of 4 layers; 1 to 3"):
            make(4).stages(4)
    for method in (PyramidDrop(), SparseVLM()):
        with pytest.raises(ValueError, match="this one has 3 layers, at least 4 needed"):
            method.stages(3)
