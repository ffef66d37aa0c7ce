"""Masks with sizes in them: which keys they meet, and that nobody else's change."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sliding_window_causal_mask_function

from lvlm.tiny import make
from tprl.lvlm.proportional import ATTENTIONS, check_attention, proportional

LOWEST = torch.finfo(torch.float32).min
BIAS = torch.tensor([[0.0, 1, 2, 3], [0, 4, 5, 6]])


def made(attention: str, **options: Any) -> Tensor | None:
    """The mask of a step that sees six keys before it, by a model of ``attention``."""
    given: dict[str, Any] = {"batch_size": 2, "q_length": 1, "kv_length": 7, "q_offset": 6, "kv_offset": 0}
    mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[attention](**given | {"dtype": torch.float32} | options)
    return mask


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_first_keys_have_the_bias_and_later_ones_have_none(attention: str) -> None:
    padded = torch.ones(2, 7, dtype=torch.bool)
    padded[1, 0] = False
    with proportional(lambda: BIAS):
        mask = made(attention, attention_mask=padded)
        causal = made(attention, q_length=3, kv_length=3, q_offset=0)
    assert mask is not None
    assert mask[:, 0, 0].tolist() == [[0, 1, 2, 3, 0, 0, 0], [LOWEST, 4, 5, 6, 0, 0, 0]]
    assert causal is not None
    assert causal[1, 0].tolist() == [[0, LOWEST, LOWEST], [0, 4, LOWEST], [0, 4, 5]]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_cache_that_forgot_its_first_keys_has_the_bias_of_the_others(attention: str) -> None:
    window = {"kv_length": 5, "kv_offset": 2, "mask_function": sliding_window_causal_mask_function(4)}
    with proportional(lambda: BIAS):
        mask = made(attention, **window)
        beyond = made(attention, **window | {"kv_offset": 4, "kv_length": 3})
    assert mask is not None
    assert mask[:, 0, 0].tolist() == [[LOWEST, 3, 0, 0, 0], [LOWEST, 6, 0, 0, 0]]
    assert beyond is not None
    assert beyond.tolist() == [[[[0, 0, 0]]]] * 2


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_without_a_bias_in_this_thread_masks_are_what_they_were(attention: str) -> None:
    before = made(attention)
    with proportional(lambda: None):
        assert _same(made(attention), before)
    with proportional(lambda: BIAS):
        assert not _same(made(attention), before)
        with ThreadPoolExecutor(1) as other:
            assert _same(other.submit(made, attention).result(), before)
        with proportional(lambda: None):
            assert _same(made(attention), before)
    assert _same(made(attention), before)
    assert (before is None) == (attention == "sdpa")  # which then needs none


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def test_attention_that_takes_no_numbers_is_refused() -> None:
    model = make("llava").model
    check_attention(model)
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' cannot give; load the model with attn_.*='sdpa'"):
        check_attention(model)
