"""Tensors that do not fit together are refused where they are put together."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from ragged import visual_tokens
from tprl.config import TrainConfig


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": torch.ones(2, 4).bool()}, r"mask has shape \(2, 4\), expected \(2, 5\)"),
        ({"mask": torch.ones(1, 5).bool()}, r"mask has shape \(1, 5\), expected \(2, 5\)"),
        ({"coords": torch.ones(2, 5)}, r"coords has shape \(2, 5\), expected \(2, 5, 2\)"),
        ({"query": torch.ones(2, 3, 7)}, r"query \(2, 3, 7\) and query_mask \(2, 3\) do not fit tokens \(2, 5, 8\)"),
        ({"query": torch.ones(3, 3, 8), "query_mask": torch.ones(3, 3).bool()}, r"query \(3, 3, 8\) .* do not fit"),
        ({"query": torch.ones(2, 8)}, r"query \(2, 8\) .* do not fit"),
        ({"query_mask": torch.ones(2, 2).bool()}, r"query_mask \(2, 2\) do not fit"),
    ],
)
def test_shapes_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(visual_tokens([5, 3], [3, 1], 8), **changed)


def test_length_and_moving() -> None:
    visual = visual_tokens([5, 3], [3, 1], 8)
    visual.signals["cls_attention"] = torch.ones(2, 5)
    moved = visual.to("meta")
    assert len(visual) == len(moved) == 2
    parts = [moved.tokens, moved.mask, moved.coords, moved.query, moved.query_mask, moved.signals["cls_attention"]]
    assert all(part.device.type == "meta" for part in parts)
    assert visual.tokens.device.type == "cpu"


def test_splitting() -> None:
    visual = visual_tokens([5, 3, 4], [3, 1, 2], 8)
    visual.signals["cls_attention"] = torch.arange(15.0).view(3, 5)
    parts = visual.split(2)
    assert [len(part) for part in parts] == [2, 1]
    for part, rows in zip(parts, (slice(0, 2), slice(2, 3)), strict=True):
        own = {name: values[rows] for name, values in vars(visual).items() if name != "signals"}
        assert part.signals.keys() == {"cls_attention"}
        own["signals"] = {"cls_attention": visual.signals["cls_attention"][rows]}
        torch.testing.assert_close(vars(part), own, rtol=0, atol=0)


def test_nothing_is_reassigned() -> None:
    visual = visual_tokens([5, 3], [3, 1], 8)
    with pytest.raises(FrozenInstanceError):
        visual.mask = visual.mask  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        TrainConfig().seed = 1  # type: ignore[misc]
