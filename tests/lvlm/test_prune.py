"""The pruned model against the untouched one, family by family.

The reference everywhere is the untouched model under a four-dimensional mask, built here from first principles, that
hides the dropped tokens. Each equality stands beside controls that must fail.
"""

import inspect
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from lvlm.tiny import IMAGE, NAMES, PAD, Prompt, Tiny, make
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from tprl.lvlm import prune as pruning_module
from tprl.lvlm.prune import HANDLE, Pruning, prune, unprune
from tprl.types import Selection, VisualTokens

BATCH: tuple[Prompt, ...] = ([2, "I", 4], [1, "I", 1, "I", 5], [6])
MODES = {"sdpa64": (torch.float64, "sdpa", 1e-9), "eager32": (torch.float32, "eager", 2e-4)}
FAR = 1e-2


class Norms:
    """Keeps the longest tokens, or those longer than average."""

    needs: frozenset[str] = frozenset()

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        norms = visual.tokens.norm(dim=-1).masked_fill(~visual.mask, -1)
        ranks = norms.argsort(dim=1, descending=True).argsort(dim=1)
        return Selection(ranks < budget[:, None])

    def select_above(self, visual: VisualTokens, threshold: float) -> Selection:
        norms = visual.tokens.norm(dim=-1)
        return Selection(visual.mask & (norms / norms.amax(1, keepdim=True) > threshold))


class Reversed(Norms):
    """As ``Norms``, but gives the kept tokens back in the wrong order."""

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        keep = super().select(visual, budget).keep_mask
        tokens = visual.tokens.clone()
        for row, kept in enumerate(keep):
            tokens[row, kept] = visual.tokens[row, kept].flip(0)
        return Selection(keep, tokens)


@pytest.fixture(scope="module", params=NAMES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return make(request.param)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with torch.no_grad():
        yield


def dropped(tiny: Tiny, pruning: Pruning, ids: Tensor) -> Tensor:
    """Which tokens of the whole prompt were dropped, from what the handle says was kept of each picture."""
    drop = torch.zeros_like(ids, dtype=torch.bool)
    for row, pictures in enumerate(pruning.kept):
        flags = []
        for kept in pictures:
            flag = torch.ones(kept.total, dtype=torch.bool)
            flag[kept.indices] = False
            flags.append(flag)
        if flags:
            drop[row, ids[row] == IMAGE] = torch.cat(flags)
    return drop


def reference(tiny: Tiny, inputs: dict[str, Tensor], hidden: Tensor, continuation: Tensor | None = None) -> Tensor:
    """Logits ``(B, L + T, V)`` of the untouched model over a prompt and its continuation, ``hidden (B, L)`` unseen."""
    model, ids, mask = tiny.model, inputs["input_ids"], inputs["attention_mask"].bool()
    batch, length = ids.shape
    positions = model._prepare_position_ids_for_generation(ids, dict(inputs))
    causal = torch.ones(length, length).tril().bool().expand(batch, -1, -1)
    if tiny.name == "gemma3":
        image = ids == IMAGE
        run = (image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]).cumsum(1) * image
        causal = causal | ((run[:, :, None] == run[:, None]) & image[:, None] & image[:, :, None])
    if tiny.name == "paligemma":
        causal = torch.ones_like(causal)
        positions = positions + 1
    more = 0 if continuation is None else continuation.shape[1]
    allowed = torch.ones(length + more, length + more).tril().bool().repeat(batch, 1, 1)
    allowed[:, :length, :length] = causal
    seen = torch.nn.functional.pad(mask & ~hidden, (0, more), value=True)
    allowed = (allowed & seen[:, None]) | torch.eye(length + more).bool()
    extra = dict(inputs)
    if continuation is not None:
        extra["input_ids"] = torch.cat([ids, continuation], 1)
        step = torch.arange(1, more + 1)
        positions = torch.cat([positions, positions[..., -1:] + step], -1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in extra:
                extra[name] = torch.nn.functional.pad(extra[name], (0, more))
    lowest = torch.finfo(model.dtype).min
    additive = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, lowest)[:, None]
    if tiny.name == "gemma3":
        extra.pop("token_type_ids")
        extra["attention_mask"] = {"full_attention": additive, "sliding_attention": additive}
    else:
        extra["attention_mask"] = additive
    return model(**{**extra, "position_ids": positions}, use_cache=False).logits


def aligned(short: Tensor, whole: Tensor, pruning: Pruning) -> tuple[Tensor, Tensor]:
    """Logits of the short prompt's real tokens, and those of the same tokens in the whole prompt."""
    assert pruning.cut is not None
    rows, columns = pruning.cut.mask.nonzero(as_tuple=True)
    return short[rows, columns], whole[rows, pruning.cut.source[rows, columns]]


def gap(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_prefill_equals_the_masked_model(name: str, mode: str, side: str) -> None:
    dtype, attention, close = MODES[mode]
    tiny = make(name, dtype, attention)
    inputs = tiny.batch(*BATCH, side=side)
    with prune(tiny.model, Norms(), keep_ratio=0.4) as pruning:
        logits = tiny.model(**inputs).logits
    assert logits.shape[1] < inputs["input_ids"].shape[1]
    hidden = dropped(tiny, pruning, inputs["input_ids"])
    assert hidden.sum() == sum(count - max(1, round(count * 0.4)) for count in tiny.counts)
    assert gap(*aligned(logits, reference(tiny, inputs, hidden), pruning)) < close

    assert gap(*aligned(logits, reference(tiny, inputs, torch.zeros_like(hidden)), pruning)) > FAR
    with prune(tiny.model, Norms(), keep_ratio=0.4, positions="compact") as pruning:
        compact = tiny.model(**inputs).logits
    assert gap(*aligned(compact, reference(tiny, inputs, hidden), pruning)) > FAR
    with prune(tiny.model, Reversed(), keep_ratio=0.4) as pruning:
        disordered = tiny.model(**inputs).logits
    assert gap(*aligned(disordered, reference(tiny, inputs, hidden), pruning)) > FAR


def generated(tiny: Tiny, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens ``(B, T)`` and their logits ``(B, T, V)``; the prompt must come back as it was."""
    result = tiny.model.generate(
        **inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_logits=True, **options
    )
    length = inputs["input_ids"].shape[1]
    assert torch.equal(result.sequences[:, :length], inputs["input_ids"])
    return result.sequences[:, length:], torch.stack(result.logits, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_the_masked_model(name: str, mode: str) -> None:
    dtype, attention, close = MODES[mode]
    tiny = make(name, dtype, attention)
    inputs = tiny.batch(*BATCH)
    with prune(tiny.model, Norms(), keep_ratio=0.4) as pruning:
        tokens, logits = generated(tiny, inputs)
        uncached = generated(tiny, inputs, use_cache=False)
        static = generated(tiny, inputs, cache_implementation="static")
    hidden = dropped(tiny, pruning, inputs["input_ids"])
    start = inputs["input_ids"].shape[1] - 1
    expected = reference(tiny, inputs, hidden, tokens[:, :-1])[:, start:].float()
    close = max(close, 1e-5)
    assert gap(logits, expected) < close
    for other_tokens, other_logits in (uncached, static):
        assert torch.equal(other_tokens, tokens)
        assert gap(other_logits, logits) < close

    unhidden = reference(tiny, inputs, torch.zeros_like(hidden), tokens[:, :-1])[:, start:].float()
    assert (logits - unhidden).abs().amax((0, 2)).min() > FAR
    with prune(tiny.model, Norms(), keep_ratio=0.4, positions="compact"):
        _, compact = generated(tiny, inputs)
    assert gap(compact[:, 0], expected[:, 0]) > FAR
