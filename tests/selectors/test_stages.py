"""Budgets on average over the layers, against trying what every last stage would come to."""

import pytest
import torch

from tprl.selectors import IN_MODEL, ON_AVERAGE, InModel, make_selector
from tprl.selectors.in_model import Dart, FastV, PyramidDrop, SparseVLM
from tprl.selectors.stages import OnAverage


def test_schedules_of_budgets_on_average() -> None:
    assert OnAverage(FastV()).layer_counts(8, 576, 192) == [576] + [137] * 7  # (576 + 7 * 137) / 8 = 191.9
    assert OnAverage(Dart()).layer_counts(8, 576, 128) == [576] + [64] * 7  # exactly 128
    assert OnAverage(PyramidDrop()).layer_counts(32, 576, 270) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    published = [576] * 2 + [300] * 4 + [200] * 9 + [110] * 17  # for 192 tokens; their mean is 188
    counts = OnAverage(SparseVLM()).layer_counts(32, 576, sum(published) // 32)
    assert counts == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("name", ON_AVERAGE)
def test_a_budget_on_average_is_used_up(name: str) -> None:
    method = make_selector(name)
    assert isinstance(method, InModel)
    assert method.name == name
    inner = IN_MODEL[name.removesuffix("-mean")]()
    assert method.stages(8) == inner.stages(8)
    counts, budgets = torch.tensor([100, 100, 64, 0]), torch.tensor([40, 100, 33, 0])
    left = torch.stack(method.stage_budgets(8, counts, budgets), 1).tolist()
    for visual_tokens, budget, stages in zip(counts.tolist(), budgets.tolist(), left, strict=True):
        fits = [
            last
            for last in range(min(1, visual_tokens), visual_tokens + 1)
            if sum(inner.layer_counts(8, visual_tokens, last)) <= 8 * budget
        ]
        seen = inner.layer_counts(8, visual_tokens, max(fits))
        assert stages == [seen[stage.drop] for stage in method.stages(8)]
        assert method.layer_counts(8, visual_tokens, budget) == seen


def test_a_budget_on_average_that_the_first_layers_exceed() -> None:
    message = "fastv-mean cannot keep 72 of a prompt's 576 visual tokens a layer on average: the first 1 of 8 layers"
    with pytest.raises(ValueError, match=f"{message} see all of them, so at least 73 stay"):
        OnAverage(FastV()).layer_counts(8, 576, 72)
    assert OnAverage(FastV()).layer_counts(8, 576, 73) == [576] + [1] * 7
    with pytest.raises(ValueError, match=r"pyramiddrop-mean cannot keep 24 of a prompt's 99 .* at least 32 stay"):
        OnAverage(PyramidDrop()).stage_budgets(8, torch.tensor([80, 99]), torch.tensor([32, 24]))
    assert OnAverage(PyramidDrop()).layer_counts(8, 99, 32) == [99, 99, 21, 21, 5, 5, 1, 1]
