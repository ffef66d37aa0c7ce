"""Attention in proportion to how many tokens a kept one stands for, in models of transformers.

The attention masks that a model makes for itself get the logarithms of sizes added, by key. No module is changed: the
functions of transformers that make masks look for a bias, and make what they always did where there is none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

ATTENTIONS = ("sdpa", "eager")
"""Implementations of attention that take masks of numbers."""

Bias = Callable[[], Tensor | None]
_bias: ContextVar[Bias] = ContextVar("_bias", default=lambda: None)


@contextmanager
def proportional(bias: Bias) -> Iterator[None]:
    """While it is open, in this thread, masks get added what ``bias`` then tells: float ``(B, L)`` for the first ``L``
    keys of every row, or None."""
    _install()
    token = _bias.set(bias)
    try:
        yield
    finally:
        _bias.reset(token)


def additive(mask: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A mask, bool ``(B, 1, Q, K)``, as numbers that are added to the logits of attention, with ``bias (B, K)`` where
    a key may be looked at."""
    values = mask.new_zeros(1, dtype=dtype) if bias is None else bias[:, None, None].to(mask.device, dtype)
    return values.expand(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)


def check_attention(model: PreTrainedModel) -> None:
    """Raise ValueError unless the attention of the language model can be made proportional."""
    attention = model.config.get_text_config()._attn_implementation
    if attention not in ATTENTIONS:
        raise ValueError(
            f"the pruner wants attention in proportion to what kept tokens stand for, which {attention!r} cannot give; "
            f"load the model with attn_implementation={ATTENTIONS[0]!r}, or do without it, a TokenPruner by "
            "`pruner.config = dataclasses.replace(pruner.config, proportional=False)`"
        )


@cache
def _install() -> None:
    for name in ATTENTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, _biased(ALL_MASK_ATTENTION_FUNCTIONS[name]))


def _biased(make: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    @wraps(make)
    def masks(*args: Any, **kwargs: Any) -> Tensor | None:
        bias = _bias.get()()
        if bias is None:
            return make(*args, **kwargs)
        mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
        assert mask is not None
        first, end = int(kwargs["kv_offset"]), int(kwargs["kv_offset"]) + mask.shape[-1]
        own = nn.functional.pad(bias, (0, max(0, end - bias.shape[1])))[:, first:end]
        return additive(mask, own, kwargs["dtype"])

    return masks
