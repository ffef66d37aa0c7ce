"""What holds for every selector, and the operations that they share."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from rows import alone, make, scattered
from torch import Tensor

from tprl.selectors import SELECTORS, make_selector
from tprl.selectors.base import cosine, evenly, in_parts, top, units
from tprl.types import Selection, VisualTokens

SIZES = [(6, 6), (3, 5), (1, 1), (8, 9)]
BUDGETS = [[1, 1, 1, 1], [7, 2, 1, 64], [30, 14, 1, 5], [36, 15, 1, 72]]
MERGING = {"visionzip", "prumerge+"}


@pytest.mark.parametrize(("name", "budget"), [*product(SELECTORS, BUDGETS)])
def test_exactly_the_budget_and_only_real_tokens(name: str, budget: list[int]) -> None:
    visual = make(SIZES)
    keep = make_selector(name).select(visual, torch.tensor(budget)).keep_mask
    assert keep.dtype == torch.bool
    assert keep.shape == visual.mask.shape
    assert keep.sum(1).tolist() == budget
    assert not (keep & ~visual.mask).any()


@pytest.mark.parametrize(("name", "budget", "filling"), [*product(SELECTORS, BUDGETS, [0.0, 1e4, torch.nan])])
def test_a_row_is_what_it_is_alone(name: str, budget: list[int], filling: float) -> None:
    visual = make(SIZES)
    wide, selector = scattered(visual, filling), make_selector(name)
    chosen = selector.select(wide, torch.tensor(budget))
    for row, count in enumerate(budget):
        expected = selector.select(alone(visual, row), torch.tensor([count]))
        assert torch.equal(chosen.keep_mask[row, wide.mask[row]], expected.keep_mask[0])
        assert (expected.tokens is not None) == (name in MERGING)
        if chosen.tokens is not None and expected.tokens is not None:
            torch.testing.assert_close(chosen.tokens[row, wide.mask[row]], expected.tokens[0])


@pytest.mark.parametrize("name", ["fastervlm", "visionzip", "vispruner", "prumerge+", "divprune", "cdpruner"])
def test_what_is_real_does_matter(name: str) -> None:
    visual, budget = make(SIZES), torch.tensor([9, 4, 1, 20])
    other = make(SIZES, seed=5)
    changed = replace(other, mask=visual.mask, coords=visual.coords)
    keep = [make_selector(name).select(v, budget).keep_mask for v in (visual, changed)]
    assert not torch.equal(*keep)


@pytest.mark.parametrize("name", ["visionzip", "vispruner", "prumerge+", "divprune", "cdpruner"])
def test_a_long_picture_takes_no_memory_for_every_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all tokens of a row are compared with each other, few rows are at a time, and choose as they did."""
    visual, budget = make([(9, 9), *[(2, 2)] * 6]), torch.tensor([20, 1, 2, 3, 1, 2, 3])
    selector, sizes, compared = make_selector(name), [], units
    whole = selector.select(visual, budget)

    def seen(vectors: Tensor, mask: Tensor) -> Tensor:
        sizes.append(len(vectors))
        return compared(vectors, mask)

    for module in ("base", "attention"):  # every comparison goes through ``units`` of the one or the other
        monkeypatch.setattr(f"tprl.selectors.{module}.units", seen)
    for rows, expected in ((3, [3, 3, 1]), (0, [1] * 7)):
        monkeypatch.setattr("tprl.selectors.base.PAIRS_AT_ONCE", rows * 81**2)
        torch.testing.assert_close(vars(selector.select(visual, budget)), vars(whole))
        assert sizes == expected
        sizes.clear()


def test_sizes_of_all_parts_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sized:
        name, needs = "sized", frozenset[str]()

        @in_parts
        def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
            return Selection(visual.mask, sizes=budget[:, None] * visual.mask.float())

    visual, budget = make(SIZES), torch.tensor([9, 4, 1, 20])
    monkeypatch.setattr("tprl.selectors.base.PAIRS_AT_ONCE", 0)
    selection = Sized().select(visual, budget)
    assert selection.tokens is None
    assert selection.sizes is not None
    assert torch.equal(selection.sizes, budget[:, None] * visual.mask.float())


@pytest.mark.parametrize("name", SELECTORS)
def test_nothing_given_is_changed(name: str) -> None:
    visual, copy = make(SIZES), make(SIZES)
    selection = make_selector(name).select(visual, torch.tensor([9, 4, 1, 20]))
    torch.testing.assert_close(vars(visual), vars(copy), rtol=0, atol=0)
    if selection.tokens is not None:
        untouched = ~selection.keep_mask
        assert torch.equal(selection.tokens[untouched], visual.tokens[untouched])
        assert not torch.equal(selection.tokens[~untouched], visual.tokens[~untouched])


@pytest.mark.parametrize("name", SELECTORS)
def test_half_precision(name: str) -> None:
    visual = make(SIZES)
    half = replace(visual, tokens=visual.tokens.bfloat16(), query=visual.query.bfloat16())
    selection = make_selector(name).select(half, torch.tensor([9, 4, 1, 20]))
    assert selection.keep_mask.sum(1).tolist() == [9, 4, 1, 20]
    assert selection.tokens is None or selection.tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SELECTORS)
def test_equal_tokens_still_give_the_budget(name: str) -> None:
    visual = make([(4, 4), (3, 3)])
    signals = {key: torch.ones_like(signal) for key, signal in visual.signals.items()}
    same = replace(visual, tokens=torch.ones_like(visual.tokens), signals=signals)
    assert make_selector(name).select(same, torch.tensor([11, 4])).keep_mask.sum(1).tolist() == [11, 4]


@pytest.mark.parametrize(("name", "budget"), [*product(SELECTORS, ([0, 1], [16, 10], [-1, 2], [3]))])
def test_budgets_out_of_range(name: str, budget: list[int]) -> None:
    with pytest.raises(ValueError, match=r"\[16, 9\], got"):
        make_selector(name).select(make([(4, 4), (3, 3)]), torch.tensor(budget))


@pytest.mark.parametrize("name", SELECTORS)
def test_only_the_signals_it_names(name: str) -> None:
    visual, selector = make([(4, 4)]), make_selector(name)
    given = {key: visual.signals[key] for key in selector.needs}
    assert selector.select(replace(visual, signals=given), torch.tensor([3])).keep_mask.sum() == 3
    for missing in selector.needs:
        less = replace(visual, signals={key: signal for key, signal in given.items() if key != missing})
        with pytest.raises(ValueError, match=rf"^{name.replace('+', '.')} needs .*'{missing}'. missing"):
            selector.select(less, torch.tensor([3]))


def test_names() -> None:
    assert list(SELECTORS) == [
        "random", "uniform", "fastervlm", "visionzip", "vispruner", "prumerge+", "divprune", "cdpruner"
    ]  # fmt: skip
    assert all(make_selector(name).name == name for name in SELECTORS)
    with pytest.raises(
        ValueError,
        match=r"unknown selector 'fastw'; known: random, uniform, .*, fastv, sparsevlm, pyramiddrop, dart, fastv-mean",
    ):
        make_selector("fastw")


def test_top() -> None:
    scores = torch.tensor([[3.0, 1, 3, 2, 9], [-5, -7, torch.nan, -5, -6]])
    among = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]]).bool()
    assert top(scores, among, torch.tensor([1, 3])).int().tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 1, 1]]
    assert top(scores, among, torch.tensor([0, 9])).int().tolist() == [[0, 0, 0, 0, 0], [1, 1, 0, 1, 1]]


def test_evenly() -> None:
    for total in range(1, 40):
        for count in range(total + 1):
            picked = evenly(torch.arange(total)[None], torch.tensor([total]), torch.tensor([count]))[0]
            places = picked.nonzero()[:, 0]
            assert len(places) == count
            gaps = (places[1:] - places[:-1]).tolist()
            assert set(gaps) <= {total // count if count else 0, -(-total // count) if count else 0}
            if count:
                before, after = int(places[0]), total - 1 - int(places[-1])
                assert abs(before - after) <= 1 + total % count
                assert 2 * before <= -(-total // count)
    assert evenly(torch.arange(9)[None], torch.tensor([9]), torch.tensor([3]))[0].nonzero()[:, 0].tolist() == [1, 4, 7]


def test_cosine() -> None:
    vectors = torch.tensor([[[3.0, 0], [2, 2], [0, -1], [torch.nan, 7]]])
    half = 0.5**0.5
    expected = torch.tensor([[[1, half, 0, 0], [half, 1, -half, 0], [0, -half, 1, 0], [0, 0, 0, 0]]])
    torch.testing.assert_close(cosine(vectors, torch.tensor([[True, True, True, False]])), expected)


def test_a_selector_is_given_ragged_rows() -> None:
    """The test of padding would say nothing if the rows it widens had none."""
    visual = make(SIZES)
    wide = scattered(visual, torch.nan)
    assert isinstance(wide, VisualTokens)
    assert wide.mask.sum(1).tolist() == visual.mask.sum(1).tolist()
    assert wide.tokens[~wide.mask].isnan().all()
    assert not wide.mask[0, : wide.mask[0].sum()].all()
