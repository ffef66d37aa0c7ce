"""The pruned model against the untouched one, family by family.

The reference everywhere is the untouched model under a four-dimensional mask, built here from first principles, that
hides the dropped tokens and, where the selector gives sizes, adds their logarithms. Each equality stands beside
controls that must fail.
"""

import inspect
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from lvlm.tiny import IMAGE, NAMES, PAD, VOCAB, Prompt, Tiny, make, state
from tprl.lvlm import prune as pruning_module
from tprl.lvlm.handle import HANDLE, unprune
from tprl.lvlm.prune import Pruning, prune
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


class Sized(Norms):
    """As ``Norms``, and says what the kept tokens stand for.

    Attributes:
        bias: logarithms of the sizes that were given last, all pictures one after the other.
    """

    bias: Tensor

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        sizes = 1 + 9 * visual.tokens[..., 0].float().sin().square()
        self.bias = sizes[visual.mask].log()
        return Selection(super().select(visual, budget).keep_mask, sizes=sizes)


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


def biases(ids: Tensor, selector: Any) -> Tensor:
    """What is added to attention to the columns of the whole prompt, ``(B, L)``."""
    bias = torch.zeros(ids.shape)
    return bias.masked_scatter(ids == IMAGE, selector.bias) if isinstance(selector, Sized) else bias


def reference(
    tiny: Tiny,
    inputs: dict[str, Tensor],
    hidden: Tensor,
    continuation: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
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
    additive = torch.zeros(allowed.shape, dtype=model.dtype)
    if bias is not None:
        additive[..., :length] += bias[:, None]
    additive = additive.masked_fill(~allowed, lowest)[:, None]
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
@pytest.mark.parametrize("selector", [Norms(), Sized()], ids=["kept", "sized"])
def test_prefill_equals_the_masked_model(selector: Norms, name: str, mode: str, side: str) -> None:
    dtype, attention, close = MODES[mode]
    tiny = make(name, dtype, attention)
    inputs = tiny.batch(*BATCH, side=side)
    with prune(tiny.model, selector, keep_ratio=0.4) as pruning:
        logits = tiny.model(**inputs).logits
    assert logits.shape[1] < inputs["input_ids"].shape[1]
    hidden, bias = dropped(tiny, pruning, inputs["input_ids"]), biases(inputs["input_ids"], selector)
    assert hidden.sum() == sum(count - max(1, round(count * 0.4)) for count in tiny.counts)
    assert gap(*aligned(logits, reference(tiny, inputs, hidden, bias=bias), pruning)) < close

    assert gap(*aligned(logits, reference(tiny, inputs, torch.zeros_like(hidden), bias=bias), pruning)) > FAR
    if isinstance(selector, Sized):
        assert gap(*aligned(logits, reference(tiny, inputs, hidden), pruning)) > FAR
    with prune(tiny.model, selector, keep_ratio=0.4, positions="compact") as pruning:
        compact = tiny.model(**inputs).logits
    assert gap(*aligned(compact, reference(tiny, inputs, hidden, bias=bias), pruning)) > FAR
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
@pytest.mark.parametrize("selector", [Norms(), Sized()], ids=["kept", "sized"])
def test_decoding_equals_the_masked_model(selector: Norms, name: str, mode: str) -> None:
    dtype, attention, close = MODES[mode]
    tiny = make(name, dtype, attention)
    inputs = tiny.batch(*BATCH)
    with prune(tiny.model, selector, keep_ratio=0.4) as pruning:
        tokens, logits = generated(tiny, inputs)
        uncached = generated(tiny, inputs, use_cache=False)
        static = generated(tiny, inputs, cache_implementation="static")
    hidden, bias = dropped(tiny, pruning, inputs["input_ids"]), biases(inputs["input_ids"], selector)
    start = inputs["input_ids"].shape[1] - 1
    expected = reference(tiny, inputs, hidden, tokens[:, :-1], bias)[:, start:].float()
    close = max(close, 1e-5)
    assert gap(logits, expected) < close
    for other_tokens, other_logits in (uncached, static):
        assert torch.equal(other_tokens, tokens)
        assert gap(other_logits, logits) < close

    unhidden = reference(tiny, inputs, torch.zeros_like(hidden), tokens[:, :-1], bias)[:, start:].float()
    assert (logits - unhidden).abs().amax((0, 2)).min() > FAR
    if isinstance(selector, Sized):
        unsized = reference(tiny, inputs, hidden, tokens[:, :-1])[:, start:].float()
        assert (logits - unsized).abs().amax((0, 2)).min() > FAR
    with prune(tiny.model, selector, keep_ratio=0.4, positions="compact"):
        _, compact = generated(tiny, inputs)
    assert gap(compact[:, 0], expected[:, 0]) > FAR


def test_keeping_all_changes_nothing(tiny: Tiny) -> None:
    for side in ("left", "right"):
        inputs = tiny.batch(*BATCH, side=side)
        plain = tiny.model(**inputs).logits
        with prune(tiny.model, Norms(), keep_ratio=1.0) as pruning:
            assert torch.equal(tiny.model(**inputs).logits, plain)
        assert pruning.cut is None
        assert [kept.count for kept in chain(*pruning.kept)] == tiny.counts
    inputs = tiny.batch(*BATCH)
    whole = generated(tiny, inputs)
    with prune(tiny.model, Norms(), keep_ratio=1.0):
        kept = generated(tiny, inputs)
    assert all(torch.equal(one, other) for one, other in zip(whole, kept, strict=True))
    with prune(tiny.model, Norms(), keep_ratio=0.5):
        assert gap(generated(tiny, inputs)[1], whole[1]) > FAR


def test_what_is_kept_whole_may_be_changed_all_the_same() -> None:
    tiny = make("llava")
    inputs = tiny.batch([2, "I", 4])
    ids, (features,) = inputs["input_ids"], tiny.model.model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds = tiny.model.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = features.flip(0)
    with prune(tiny.model, Reversed(), keep_ratio=1.0) as pruning:
        logits = tiny.model(**inputs).logits
    assert pruning.kept[0][0].count == 16
    assert gap(logits, tiny.model(inputs_embeds=embeds).logits) < 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_equals_each_sample_alone(tiny: Tiny, side: str) -> None:
    inputs = tiny.batch(*BATCH, side=side)
    with prune(tiny.model, Sized(), keep_ratio=0.4) as pruning:
        together = tiny.model(**inputs).logits
        mask = pruning.cut.mask if pruning.cut else None
        assert mask is not None
        assert not mask.all()
        decoded = generated(tiny, inputs)
        first = 0
        for row, prompt in enumerate(BATCH):
            alone = tiny.batch(prompt, skip=first)
            first += prompt.count("I")
            single = tiny.model(**alone).logits[0]
            assert gap(together[row, mask[row]], single) < 1e-9
            assert gap(together[row, mask[row]], single.roll(1, 0)) > FAR
            if side == "left":
                tokens, logits = generated(tiny, alone)
                assert torch.equal(decoded[0][row], tokens[0])
                assert gap(decoded[1][row], logits[0]) < 1e-5


@pytest.mark.parametrize(("side", "real"), [("left", -1), ("right", 0)])
def test_padding_stays_on_its_side(side: str, real: int) -> None:
    tiny = make("llava")
    with prune(tiny.model, Norms(), keep_ratio=0.4) as pruning:
        tiny.model(**tiny.batch(*BATCH, side=side))
    assert pruning.cut is not None
    assert pruning.cut.mask[:, real].all()
    assert not pruning.cut.mask.all()


def test_right_padding_is_decoded_rightly(tiny: Tiny) -> None:
    with prune(tiny.model, Sized(), keep_ratio=0.4):
        right, left = (generated(tiny, tiny.batch(*BATCH, side=side)) for side in ("right", "left"))
    assert torch.equal(right[0], left[0])
    assert gap(right[1], left[1]) < 1e-5


def test_beams_and_several_sequences_equal_each_sample_alone(tiny: Tiny) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 4}
    inputs = tiny.batch(*BATCH)
    length = inputs["input_ids"].shape[1]
    with prune(tiny.model, Sized(), keep_ratio=0.4):
        together = tiny.model.generate(**inputs, **options)
        assert torch.equal(together[:, :length], inputs["input_ids"].repeat_interleave(2, 0))
        first = 0
        for row, prompt in enumerate(BATCH):
            alone = tiny.batch(prompt, skip=first)
            first += prompt.count("I")
            expected = tiny.model.generate(**alone, **options)[:, alone["input_ids"].shape[1] :]
            assert torch.equal(together[2 * row : 2 * row + 2, length:], expected)
        sampled = tiny.model.generate(**inputs, do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=4)
        greedy = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert torch.equal(sampled, greedy.repeat_interleave(3, 0))


def second_turn(inputs: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    """The whole conversation so far and six more tokens, as a chat would send it: without the pictures."""
    more = torch.arange(5, 11).repeat(len(sequences), 1)
    ids = torch.cat([sequences, more], 1)
    grown = ids.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_second_turn_goes_on_from_the_cache(tiny: Tiny, positions: Any) -> None:
    """The second turn on the cache equals one call that is given the whole conversation."""
    inputs = tiny.batch(*BATCH)
    options = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    with prune(tiny.model, Sized(), keep_ratio=0.4, positions=positions) as pruning:
        first = tiny.model.generate(**inputs, **options)
        turn = second_turn(inputs, first.sequences)
        second = tiny.model.generate(**turn, past_key_values=deepcopy(first.past_key_values), **options)
        assert torch.equal(second.sequences[:, : turn["input_ids"].shape[1]], turn["input_ids"])
        short = {"input_ids": turn["input_ids"][:, -7:], "attention_mask": turn["attention_mask"]}
        brief = tiny.model.generate(**short, past_key_values=deepcopy(first.past_key_values), **options)
        third_turn = second_turn(turn, second.sequences)
        third = tiny.model.generate(**third_turn, past_key_values=second.past_key_values, **options)
        with pytest.raises(ValueError, match="new pictures on a filled cache"):
            tiny.model.generate(**inputs, past_key_values=first.past_key_values, max_new_tokens=1)
        with pytest.raises(ValueError, match="new pictures on a filled cache"):
            tiny.model(**inputs, past_key_values=first.past_key_values)
    new = turn["input_ids"].shape[1]
    assert torch.equal(brief.sequences[:, 7:], second.sequences[:, new:])
    if positions == "compact":
        return
    hidden = dropped(tiny, pruning, inputs["input_ids"])
    bias = biases(inputs["input_ids"], pruning.selector)
    whole = third_turn["input_ids"].shape[1]
    continuation = third.sequences[:, inputs["input_ids"].shape[1] : -1]
    expected = reference(tiny, inputs, hidden, continuation, bias).float()
    assert gap(torch.stack(second.logits, 1), expected[:, new - 1 : new + 3]) < 1e-5
    assert gap(torch.stack(third.logits, 1), expected[:, whole - 1 :]) < 1e-5
    unhidden = reference(tiny, inputs, torch.zeros_like(hidden), continuation, bias).float()
    assert gap(torch.stack(third.logits, 1), unhidden[:, whole - 1 :]) > FAR


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma"])
def test_text_that_a_later_turn_hides_is_not_counted_as_the_whole_model_does_not(name: str) -> None:
    tiny, seen = make(name), list[Tensor]()
    tiny.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    inputs, new = tiny.batch([3, "I", 4], [1, "I", 2]), {"do_sample": False, "max_new_tokens": 1}

    def places() -> Tensor:
        first = tiny.model.generate(**inputs, **new, return_dict_in_generate=True)
        turn = second_turn(inputs, first.sequences)
        turn["attention_mask"][0, 1] = 0
        seen.clear()
        tiny.model.generate(**turn, past_key_values=first.past_key_values, **new)
        return seen[0]

    whole = places()
    with prune(tiny.model, Norms(), budget=2):
        assert torch.equal(places(), whole)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_two_dimensional_positions_go_on_from_the_cache(name: str, positions: Any) -> None:
    """As in a hand-written step, with the token types of the whole conversation, and after another conversation."""
    tiny = make(name)
    inputs, other = tiny.batch([3, "I", "I", 1], [1, "I", 2], [2]), tiny.batch(*BATCH)
    options = {"do_sample": False, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    with prune(tiny.model, Norms(), keep_ratio=0.2, positions=positions):
        first = tiny.model.generate(**inputs, **{**options, "max_new_tokens": 4})
        turn = second_turn(inputs, first.sequences)
        turn["attention_mask"][0, -6] = 0

        def logits(**more: Any) -> Tensor:
            cache = deepcopy(first.past_key_values)
            return tiny.model.generate(**turn, **more, past_key_values=cache, **options).logits[0]

        mask, new = turn["attention_mask"], turn["input_ids"][:, -7:]
        behind = first.past_key_values._tprl_past.next_position + 3 + mask[:, -7:].cumsum(1) - 1
        step = {"input_ids": new, "attention_mask": mask, "position_ids": behind}
        wanted = tiny.model(**step, past_key_values=deepcopy(first.past_key_values)).logits[:, -1].float()
        grown = mask.shape[1] - inputs["input_ids"].shape[1]
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, grown))
        assert gap(logits(), wanted) < 1e-5
        assert gap(logits(mm_token_type_ids=types), wanted) < 1e-5
        tiny.model.generate(**other, **options)
        assert gap(logits(), wanted) < 1e-5
        assert gap(logits(position_ids=torch.arange(3, 3 + mask.shape[1]).expand(4, 3, -1)), wanted) > FAR


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_hand_written_loop_goes_on_from_the_cache(tiny: Tiny, side: str) -> None:
    inputs = tiny.batch(*BATCH, side=side)
    continuation = torch.randint(5, 39, (3, 3), generator=torch.Generator().manual_seed(1))
    with prune(tiny.model, Sized(), keep_ratio=0.4) as pruning:
        outputs = tiny.model(**inputs, use_cache=True)
        cache, mask, steps = outputs.past_key_values, inputs["attention_mask"], []
        for step in range(3):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            given = {"attention_mask": mask} if step != 1 else {}
            token = continuation[:, step : step + 1]
            steps.append(tiny.model(input_ids=token, past_key_values=cache, use_cache=True, **given).logits)
    left = tiny.batch(*BATCH)
    if side == "right":
        with prune(tiny.model, Sized(), keep_ratio=0.4) as pruning:
            tiny.model(**left)
    hidden = dropped(tiny, pruning, left["input_ids"])
    bias = biases(left["input_ids"], pruning.selector)
    expected = reference(tiny, left, hidden, continuation, bias)[:, -3:]
    assert gap(torch.cat(steps, 1), expected) < 1e-9
    unhidden = reference(tiny, left, torch.zeros_like(hidden), continuation, bias)[:, -3:]
    assert gap(torch.cat(steps, 1), unhidden) > FAR


def test_a_hand_written_step_goes_on_from_what_generate_left(tiny: Tiny) -> None:
    inputs = tiny.batch(*BATCH)
    length = inputs["input_ids"].shape[1]
    with prune(tiny.model, Sized(), keep_ratio=0.4) as pruning:
        answer = tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        cache, said = answer.past_key_values, answer.sequences[:, length:]
        logits = tiny.model(input_ids=said[:, -1:], past_key_values=cache).logits
    hidden = dropped(tiny, pruning, inputs["input_ids"])
    bias = biases(inputs["input_ids"], pruning.selector)
    assert gap(logits, reference(tiny, inputs, hidden, said, bias)[:, -1:]) < 1e-9


def test_labels_give_the_masked_models_loss(tiny: Tiny) -> None:
    inputs = tiny.batch(*BATCH)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    with prune(tiny.model, Sized(), keep_ratio=0.4) as pruning:
        loss = tiny.model(**inputs, labels=labels).loss
    hidden, bias = dropped(tiny, pruning, inputs["input_ids"]), biases(inputs["input_ids"], pruning.selector)
    logits = reference(tiny, inputs, hidden, bias=bias)[:, -4:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, -3:].flatten())
    assert gap(loss, expected) < 1e-5
    unhidden = reference(tiny, inputs, torch.zeros_like(hidden), bias=bias)[:, -4:-1].flatten(0, 1)
    assert gap(loss, torch.nn.functional.cross_entropy(unhidden, labels[:, -3:].flatten())) > 1e-3


class Nothing(Norms):
    def select_above(self, visual: VisualTokens, threshold: float) -> Selection:
        return Selection(torch.zeros_like(visual.mask))


def test_labels_that_are_shifted_already_are_those_of_the_kept_columns(tiny: Tiny) -> None:
    inputs = tiny.batch([2, "I", 4])
    shifted = torch.nn.functional.pad(inputs["input_ids"][:, 1:], (0, 1), value=-100)
    with prune(tiny.model, Norms(), keep_ratio=0.4) as pruning:
        output = tiny.model(**inputs, labels=shifted, shift_labels=shifted)
        assert pruning.cut is not None
        kept = shifted[0, pruning.cut.source[0]]
    assert len(kept) < shifted.shape[1]
    expected = torch.nn.functional.cross_entropy(output.logits[0], kept, ignore_index=-100)
    assert abs(output.loss - expected) < 1e-5


def test_a_threshold_may_drop_everything(tiny: Tiny) -> None:
    inputs = tiny.batch(*BATCH)
    with prune(tiny.model, Nothing(), threshold=0.5) as pruning:
        logits = tiny.model(**inputs).logits
        tokens, steps = generated(tiny, inputs)
        tiny.model.generate(**inputs, num_beams=2, max_new_tokens=2)
    assert [[kept.count for kept in row] for row in pruning.kept] == [[0], [0, 0], []]
    hidden = inputs["input_ids"] == IMAGE
    assert gap(*aligned(logits, reference(tiny, inputs, hidden), pruning)) < 1e-9
    expected = reference(tiny, inputs, hidden, tokens[:, :-1])[:, hidden.shape[1] - 1 :]
    assert gap(steps, expected.float()) < 1e-5


def test_a_threshold_keeps_what_is_above_it(tiny: Tiny) -> None:
    with prune(tiny.model, Norms(), threshold=0.7) as pruning:
        tiny.model(**tiny.batch(*BATCH))
    features = tiny.model.model.get_image_features(
        **{
            name: value
            for name, value in tiny.batch(*BATCH).items()
            if name in ("pixel_values", "image_sizes", "image_grid_thw")
        },
        return_dict=True,
    ).pooler_output
    pictures = torch.cat(list(features)).split(tiny.counts)
    for kept, picture in zip(chain(*pruning.kept), pictures, strict=True):
        norms = picture.norm(dim=-1)
        assert kept.indices.tolist() == [i for i, norm in enumerate(norms) if norm / norms.max() > 0.7]
        assert kept.total == len(picture)
        assert kept.coords.shape == (kept.count, 2)


def test_a_text_only_prompt_passes_through(tiny: Tiny) -> None:
    inputs = tiny.batch([5], [3])
    plain, sequences = tiny.model(**inputs).logits, tiny.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with prune(tiny.model, Norms(), budget=2):
        assert torch.equal(tiny.model(**inputs).logits, plain)
        assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=3, do_sample=False), sequences)


@torch.enable_grad()
def test_gradients_reach_the_tower_through_kept_tokens_only(tiny: Tiny) -> None:
    inputs = tiny.batch(*BATCH)
    pixels = inputs["pixel_values"].clone().requires_grad_()
    weight = tiny.model.get_output_embeddings().weight
    with prune(tiny.model, Norms(), keep_ratio=0.4):
        tiny.model(**{**inputs, "pixel_values": pixels}).logits.square().sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    assert weight.grad is not None
    tiny.model.zero_grad(set_to_none=True)
    pixels.grad = None
    with prune(tiny.model, Nothing(), threshold=0.5):
        tiny.model(**{**inputs, "pixel_values": pixels}).logits.square().sum().backward()
    assert pixels.grad is None or not pixels.grad.any()
    tiny.model.zero_grad(set_to_none=True)


def test_unpruning_leaves_the_model_as_it_was(tiny: Tiny) -> None:
    inputs = tiny.batch(*BATCH)
    tiny.model.generate(**inputs, max_new_tokens=2)
    before, kind = state(tiny.model), type(tiny.model)
    plain = tiny.model(**inputs).logits
    classes = {name: value for base in kind.__mro__ for name, value in base.__dict__.items()}
    prune(tiny.model, Norms(), budget=2)
    assert set(state(tiny.model)) - set(before) == {f".{name}" for name in (*pruning_module._REPLACEMENTS, HANDLE)}
    assert type(tiny.model) is kind
    assert classes == {name: value for base in kind.__mro__ for name, value in base.__dict__.items()}
    tiny.model.generate(**inputs, max_new_tokens=2)
    unprune(tiny.model)
    unprune(tiny.model)
    after = state(tiny.model)
    assert set(after) == set(before)
    for name, value in before.items():
        if not name.endswith("rope_deltas"):  # which Qwen writes in every call, pruned or not
            assert after[name] is value or after[name] == value, name
    assert torch.equal(tiny.model(**inputs).logits, plain)


def test_a_method_that_the_instance_had_before_comes_back() -> None:
    tiny = make("llava")
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(tiny.model).forward(tiny.model, *args, **kwargs)

    counted.__signature__ = inspect.signature(tiny.model.forward)  # type: ignore[attr-defined]
    tiny.model.forward = counted
    with prune(tiny.model, Norms(), budget=2):
        tiny.model.generate(**tiny.batch(*BATCH), max_new_tokens=3)
    assert len(calls) == 3
    assert tiny.model.forward is counted


def test_what_was_wrapped_since_pruning_is_not_lost() -> None:
    model = make("llava").model
    prune(model, Norms(), budget=2)
    pruned = model.forward
    model.forward = lambda *args, **kwargs: pruned(*args, **kwargs)
    with pytest.raises(ValueError, match="forward of the model, wrapped or replaced after it was pruned"):
        unprune(model)
    model.forward = pruned
    unprune(model)
    assert not model.__dict__.keys() & {"forward", HANDLE}


def test_a_copy_is_pruned_by_itself(tiny: Tiny) -> None:
    model, inputs = make(tiny.name).model, tiny.batch(*BATCH)
    with prune(model, Norms(), keep_ratio=0.4) as pruning:
        logits = model(**inputs).logits
        copy = deepcopy(model)
    cut, kept = pruning.cut, pruning.kept
    plain = model(**inputs).logits
    assert gap(copy(**inputs).logits, logits) == 0
    with torch.no_grad():
        copy.get_output_embeddings().weight.zero_()
    assert not copy(**inputs).logits.any()
    assert torch.equal(model(**inputs).logits, plain)
    assert pruning.cut is cut
    assert pruning.kept is kept
    unprune(copy)
    assert copy(**inputs).logits.shape == plain.shape


def test_a_pruned_model_is_not_pickled() -> None:
    """Where it is loaded its methods would be the model's own, and it would still say that it is pruned."""
    tiny = make("llava")
    with prune(tiny.model, Norms(), budget=2):
        with pytest.raises(ValueError, match="a pruned model cannot be pickled; unprune it first"):
            pickle.dumps(tiny.model)
        handle = deepcopy(tiny.model).__dict__[HANDLE]
        assert handle.attached
        assert handle.lock is not tiny.model.__dict__[HANDLE].lock


def test_saving_and_loading_a_pruned_model_gives_a_whole_one(tiny: Tiny, tmp_path: Any) -> None:
    inputs = tiny.batch(*BATCH)
    plain = tiny.model(**inputs).logits
    with prune(tiny.model, Norms(), budget=2):
        tiny.model.save_pretrained(tmp_path)
    loaded = type(tiny.model).from_pretrained(tmp_path, dtype=torch.float64)
    assert HANDLE not in loaded.__dict__
    assert all(map(torch.equal, loaded.state_dict().values(), tiny.model.state_dict().values()))
    assert gap(loaded(**inputs).logits, plain) < 1e-12
    with prune(loaded, Norms(), budget=2), prune(tiny.model, Norms(), budget=2):
        assert gap(loaded(**inputs).logits, tiny.model(**inputs).logits) < 1e-12


def test_compact_positions_count_the_short_prompt(tiny: Tiny) -> None:
    """The language model alone, on the kept embeddings and counted positions, says the same."""
    inputs = tiny.batch([2, "I", 4])
    seen: dict[str, Any] = {}
    language = tiny.model.get_decoder()
    hook = language.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with prune(tiny.model, Norms(), keep_ratio=0.4, positions="compact"):
        tiny.model(**inputs)
    hook.remove()
    length = seen["inputs_embeds"].shape[1]
    start = 1 if tiny.name == "paligemma" else 0
    expected = torch.arange(start, start + length)
    assert (seen["position_ids"] == expected).all()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_the_row_of_positions_that_masks_are_made_by_has_no_gaps(name: str) -> None:
    """Two-dimensional positions have one more row, that of the text, which counts what is left."""
    tiny = make(name)
    seen: dict[str, Any] = {}
    language = tiny.model.get_decoder()
    hook = language.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with prune(tiny.model, Norms(), keep_ratio=0.4) as pruning:
        tiny.model(**tiny.batch([2, "I", 4], [1, "I", 6]))
    hook.remove()
    assert pruning.cut is not None
    text, *rest = (positions[pruning.cut.mask].tolist() for positions in seen["position_ids"])
    assert text == [place for count in pruning.cut.mask.sum(1).tolist() for place in range(count)]
    assert len(rest) == 3
    assert text not in rest


@pytest.mark.parametrize("form", ["keyword", "config"])
def test_lengths_count_the_whole_prompt(form: str) -> None:
    tiny = make("llava")
    inputs = tiny.batch(*BATCH)
    length = inputs["input_ids"].shape[1]
    lengths = {"max_length": length + 3, "min_length": length + 3}
    if form == "config":
        config = deepcopy(tiny.model.generation_config)
        config.max_length, config.min_length = length + 3, length + 3
        lengths = {"generation_config": config}
    with prune(tiny.model, Norms(), budget=2):
        assert tiny.model.generate(**inputs, **lengths).shape[1] == length + 3
        assert tiny.model.generate(inputs.pop("input_ids"), **inputs).shape[1] == length + 20
    if form == "config":  # what a config leaves open is the model's own
        tiny.model.generation_config.max_length = length + 3
        inputs = tiny.batch(*BATCH)
        with prune(tiny.model, Norms(), budget=2):
            ids = tiny.model.generate(**inputs, generation_config=GenerationConfig(do_sample=False))
        assert ids.shape[1] == length + 3
    inputs = tiny.batch(*BATCH)
    with prune(tiny.model, Norms(), budget=2), pytest.raises(ValueError, match=f"max_length {length - 1} leaves no"):
        tiny.model.generate(**inputs, max_length=length - 1)


def test_none_undoes_what_the_models_generation_config_says() -> None:
    """By which every token ends an answer, and the third in any case."""
    tiny = make("llava")
    inputs = tiny.batch([3, "I", 9])
    length = inputs["input_ids"].shape[1]
    tiny.model.generation_config.update(eos_token_id=list(range(VOCAB)), max_new_tokens=3)
    unset = dict.fromkeys(("eos_token_id", "max_new_tokens", "generation_config", "stopping_criteria", "streamer"))
    with prune(tiny.model, Norms(), budget=2):
        assert tiny.model.generate(**inputs).shape[1] == length + 1
        assert tiny.model.generate(**inputs, eos_token_id=None).shape[1] == length + 3
        assert tiny.model.generate(**inputs, **unset, max_length=length + 5).shape[1] == length + 5


def test_an_answer_may_not_end_before_its_least_length() -> None:
    """All tokens but one end an answer, so it ends as soon as it may."""
    tiny = make("llava")
    inputs = tiny.batch([3, "I", 9])
    length, ends = inputs["input_ids"].shape[1], [token for token in range(VOCAB) if token != 8]
    for least in ({"min_length": length + 3}, {"min_new_tokens": 3}):
        options = {"do_sample": False, "max_length": length + 9, "eos_token_id": ends, **least}
        assert tiny.model.generate(**inputs, **options)[0, length:-1].tolist() == [8] * 3
        with prune(tiny.model, Norms(), budget=2):
            assert tiny.model.generate(**inputs, **options)[0, length:-1].tolist() == [8] * 3


def test_the_ends_of_a_static_cache_follow_the_short_prompt() -> None:
    tiny = make("llava")
    inputs = tiny.batch(*BATCH)
    caches = {}
    for name, cache in (("dynamic", DynamicCache()), ("static", StaticCache(tiny.model.config, max_cache_len=24))):
        with prune(tiny.model, Norms(), budget=2):
            tokens, logits = generated(tiny, inputs, past_key_values=cache)
        caches[name] = tokens, logits
    assert torch.equal(caches["dynamic"][0], caches["static"][0])
    assert gap(caches["dynamic"][1], caches["static"][1]) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of budget, keep_ratio and threshold; got none"),
        ({"budget": 3, "keep_ratio": 0.5}, "got budget, keep_ratio"),
        ({"budget": 0}, "budget 0 is not allowed; a whole number, at least 1"),
        ({"budget": 2.7}, "budget 2.7 is not allowed; a whole number"),
        ({"budget": True}, "budget True is not allowed; a whole number"),
        ({"budget": "4"}, "budget '4' is not allowed; a whole number"),
        ({"keep_ratio": 0.0}, "keep_ratio 0.0 is not allowed; a number more than 0 and at most 1"),
        ({"keep_ratio": 1.01}, "keep_ratio 1.01"),
        ({"keep_ratio": "0.3"}, "keep_ratio '0.3' is not allowed; a number"),
        ({"threshold": -0.1}, "threshold -0.1 is not allowed; a number from 0 to 1"),
        ({"threshold": 1.1}, "threshold 1.1"),
        ({"threshold": "0.3"}, "threshold '0.3' is not allowed; a number"),
        ({"budget": 1, "positions": "new"}, "positions 'new' is not allowed; 'original' or 'compact'"),
    ],
)
def test_values_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    model = make("llava").model
    with pytest.raises(ValueError, match=message):
        prune(model, Norms(), **options)
    assert HANDLE not in model.__dict__


def test_wrappers_and_models_without_a_head_are_refused_and_left_as_they_are() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.model, self.config = model, model.config

    tiny = make("llava")
    inputs = tiny.batch([3, "I", 2])
    before = tiny.model(**inputs).logits
    for model in (tiny.model.model, Wrapper(tiny.model)):
        with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be pruned; give the model of transf"):
            prune(model, Norms(), budget=2)
    assert torch.equal(tiny.model(**inputs).logits, before)


class Needy(Norms):
    needs = frozenset({"text_attention"})


class Padder(Norms):
    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        return Selection(torch.ones_like(visual.mask))


class WithoutThreshold:
    needs: frozenset[str] = frozenset()

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        return Norms().select(visual, budget)


def test_what_cannot_be_pruned() -> None:
    tiny = make("qwen2_vl")
    inputs = tiny.batch(*BATCH)
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    with pytest.raises(ValueError, match="unknown model family 'llama'; known: gemma3, idefics3, internvl, llava"):
        prune(LlamaForCausalLM(config), Norms(), budget=1)
    with pytest.raises(ValueError, match="text_attention"):
        prune(tiny.model, Needy(), budget=1)
    with pytest.raises(ValueError, match="threshold needs a selector with probabilities, which WithoutThreshold"):
        prune(tiny.model, WithoutThreshold(), threshold=0.5)
    with prune(tiny.model, Norms(), budget=5):
        with pytest.raises(ValueError, match="pruned already"):
            prune(tiny.model, Norms(), budget=1)
        with pytest.raises(ValueError, match="videos"):
            tiny.model(**inputs, pixel_values_videos=inputs["pixel_values"])
        for call in (tiny.model, tiny.model.generate):
            with pytest.raises(ValueError, match="videos"):
                call(input_ids=inputs["input_ids"], pixel_values_videos=inputs["pixel_values"])
        with pytest.raises(ValueError, match="shape"):
            tiny.model(**{**inputs, "attention_mask": inputs["attention_mask"][:, None, None]})
        for call in (tiny.model, tiny.model.generate):
            with pytest.raises(ValueError, match="mm_token_type_ids, which the processor returns, are missing"):
                call(**{name: value for name, value in inputs.items() if name != "mm_token_type_ids"})
        with pytest.raises(ValueError, match="logits_to_keep"):
            tiny.model(**inputs, logits_to_keep=torch.tensor([1]))
        embeds = tiny.model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="input_ids"):
            tiny.model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
        for call in (tiny.model, tiny.model.generate):
            with pytest.raises(ValueError, match="encoded already"):
                call(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": [embeds]})
            with pytest.raises(ValueError, match="encoded already"):
                call(**inputs, mm_encoder_outputs={"image": [embeds]})
    with prune(tiny.model, Padder(), budget=1), pytest.raises(ValueError, match="Padder keeps padding"):
        tiny.model(**inputs)


class Watcher(Norms):
    """Remembers what it was shown."""

    def __init__(self, needs: frozenset[str] = frozenset()) -> None:
        self.needs, self.seen = needs, []

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        self.seen.append(visual)
        return super().select(visual, budget)


def test_the_selector_sees_each_picture_with_its_samples_question(tiny: Tiny) -> None:
    inputs = tiny.batch(*BATCH)
    watcher = Watcher()
    template = frozenset(inputs["input_ids"][1][-2:].tolist())
    with prune(tiny.model, watcher, keep_ratio=0.4, template_ids=template):
        tiny.model(**inputs)
        tiny.model.generate(**inputs, max_new_tokens=1)
    forward, generate = watcher.seen
    assert forward.mask.sum(1).tolist() == tiny.counts
    table = tiny.model.get_input_embeddings()
    for number, row in enumerate([0, 1, 1]):
        ids = [i for i in inputs["input_ids"][row].tolist() if i not in {*template, IMAGE, PAD}]
        query = forward.query[number, forward.query_mask[number]]
        assert torch.equal(query, table(torch.tensor(ids)))
    for name in ("tokens", "mask", "coords", "query", "query_mask"):
        assert torch.equal(getattr(forward, name), getattr(generate, name)), name


SIGNALLING = ("llava", "llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm", "gemma3", "paligemma")


@pytest.mark.parametrize("name", SIGNALLING)
def test_signals_of_the_tower_are_those_of_the_pictures_alone(name: str) -> None:
    tiny = make(name)
    watcher = Watcher(frozenset({"cls_attention", "tower_keys"}))
    with prune(tiny.model, watcher, keep_ratio=0.4):
        tiny.model.generate(**tiny.batch(*BATCH), max_new_tokens=2, num_beams=2)
        assert tiny.model.config.vision_config._attn_implementation == "sdpa"
        for skip in range(3):
            tiny.model(**tiny.batch([3, "I", 2], skip=skip))
    together, *alone = watcher.seen
    for number, single in enumerate(alone):
        for signal in watcher.needs:
            expected = single.signals[signal][0]
            assert expected.std() > 0
            assert gap(together.signals[signal][number][: len(expected)], expected) < 1e-6


CANARIES: dict[str, tuple[str, ...]] = {
    "_prepare_position_ids_for_generation": ("inputs_tensor", "model_kwargs"),
    "_expand_inputs_for_generation": ("expand_size", "is_encoder_decoder", "input_ids", "model_kwargs"),
    "_merge_criteria_processor_list": ("default_list", "custom_list"),
    "_expand_multimodal_outputs": ("input_ids", "mm_encoder_output", "expand_size"),
    "_prepare_multimodal_encoder_kwargs_for_generation": ("model_kwargs",),
    "_update_model_kwargs_for_generation": ("outputs", "model_kwargs"),
    "_prefill": ("input_ids", "generation_config", "model_kwargs"),
}


@pytest.mark.parametrize("method", CANARIES)
def test_private_methods_of_transformers_are_where_they_were(method: str) -> None:
    """If this fails, transformers moved what ``tprl.lvlm.prune`` stands on; the name of the test says what."""
    assert hasattr(GenerationMixin, method), f"transformers has no GenerationMixin.{method} any more"
    parameters = inspect.signature(getattr(GenerationMixin, method)).parameters
    missing = [name for name in CANARIES[method] if name not in parameters]
    assert not missing, f"GenerationMixin.{method} lost {missing}; it has {list(parameters)}"


def test_the_models_still_take_encoded_pictures(tiny: Tiny) -> None:
    parameters = inspect.signature(tiny.model.forward).parameters
    assert "mm_encoder_outputs" in parameters, f"{type(tiny.model).__name__}.forward lost mm_encoder_outputs"
    with prune(tiny.model, Norms(), budget=1):
        assert inspect.signature(tiny.model.forward).parameters == parameters
    assert hasattr(tiny.model.base_model, "get_image_features")
    private = {"_expand_inputs_for_generation", "_merge_criteria_processor_list"}
    assert set(pruning_module._REPLACEMENTS) == {"forward", "generate", *private} <= {"forward", "generate", *CANARIES}


def test_of_a_picture_with_fewer_tokens_than_the_budget_all_are_kept() -> None:
    tiny = make("llava")
    inputs = tiny.batch([3, "I", 2])
    whole = tiny.model(**inputs).logits
    with prune(tiny.model, Norms(), budget=99) as pruning:
        assert torch.equal(tiny.model(**inputs).logits, whole)
        assert pruning.kept[0][0].count == pruning.kept[0][0].total == 16


GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


@pytest.mark.parametrize("new", [5, 27, 28, 60])
def test_a_new_turn_given_alone_may_be_longer_than_the_prompt_before_it(new: int) -> None:
    tiny = make("llava")
    prompt = tiny.batch([3, "I", 9])
    more = torch.randint(5, 39, (1, new), generator=torch.Generator().manual_seed(3))
    with prune(tiny.model, Sized(), keep_ratio=0.4):
        first = tiny.model.generate(**prompt, **GREEDY, return_dict_in_generate=True)
        whole = torch.cat([first.sequences, more], 1)
        mask, alone = torch.ones_like(whole), torch.cat([first.sequences[:, -1:], more], 1)
        caches = [deepcopy(first.past_key_values) for _ in range(2)]
        wanted = tiny.model.generate(whole, attention_mask=mask, past_key_values=caches[0], **GREEDY)
        found = tiny.model.generate(alone, attention_mask=mask, past_key_values=caches[1], **GREEDY)
    assert torch.equal(found, torch.cat([alone, wanted[:, whole.shape[1] :]], 1))


def test_a_continuation_may_give_its_own_positions(tiny: Tiny) -> None:
    """Position ids of the whole prompt are those that a cache goes on with, beside a mask of the whole prompt."""
    inputs = tiny.batch(*BATCH)
    with prune(tiny.model, Sized(), keep_ratio=0.4):
        cache = tiny.model(**inputs, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        more = {"input_ids": torch.tensor([[10], [11], [12]]), "attention_mask": mask}
        positions = cache._tprl_past.next_position
        wanted = tiny.model(**more, past_key_values=deepcopy(cache)).logits
        found = tiny.model(**more, past_key_values=deepcopy(cache), position_ids=positions).logits
        moved = tiny.model(**more, past_key_values=cache, position_ids=positions + 3).logits
    assert torch.equal(found, wanted)
    assert not torch.equal(moved, wanted)


def test_a_cache_goes_on_with_as_many_copies_of_its_prompts_as_it_has() -> None:
    tiny = make("llava")
    questions = torch.tensor([[7, 8, 9], [11, 12, 13]])
    with prune(tiny.model, Sized(), keep_ratio=0.4):
        cache = tiny.model(**tiny.batch([3, "I", 9]), use_cache=True).past_key_values
        alone = [tiny.model(input_ids=row[None], past_key_values=deepcopy(cache)).logits for row in questions]
        cache.batch_repeat_interleave(2)
        assert gap(tiny.model(input_ids=questions, past_key_values=cache).logits, torch.cat(alone)) < 1e-5
        two = tiny.model(**tiny.batch([3, "I", 9], [3, "I", 5]), use_cache=True).past_key_values
        two.batch_select_indices(torch.tensor([1]))
        with pytest.raises(ValueError, match="filled by 2 prompts and cannot go on with 1"):
            tiny.model(input_ids=questions[:1], past_key_values=two)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_copies_of_several_prompts_go_on_where_each_of_these_stands(name: str) -> None:
    tiny = make(name)
    more = torch.tensor([[7, 8, 9], [11, 12, 13], [7, 9, 8], [13, 12, 11]])
    with prune(tiny.model, Sized(), keep_ratio=0.4):
        cache = tiny.model(**tiny.batch([3, "I", 9], [1, "I", 2]), use_cache=True).past_key_values
        once = [tiny.model(input_ids=more[own], past_key_values=deepcopy(cache)).logits for own in ([0, 2], [1, 3])]
        cache.batch_repeat_interleave(2)
        found = tiny.model(input_ids=more, past_key_values=cache).logits
    assert gap(found, torch.stack(once, 1).flatten(0, 1)) < 1e-9


def test_a_cache_that_was_cropped_behind_its_picture_goes_on(tiny: Tiny) -> None:
    """Another end of the question, longer or shorter than the one that was cut off, alone and in a whole prompt."""
    inputs = tiny.batch([3, "I", 9], [1, "I", 9])
    length = inputs["input_ids"].shape[1] - 4
    start = {name: part[:, :length] if part.shape[:2] == (2, length + 4) else part for name, part in inputs.items()}
    with prune(tiny.model, Sized(), keep_ratio=0.4) as pruning:
        cache = tiny.model(**inputs, use_cache=True).past_key_values
        cache.crop(-4)
        answers = []
        for count in (1, 3, 4, 6):
            more = torch.randint(5, 39, (2, count), generator=torch.Generator().manual_seed(count))
            logits = tiny.model(input_ids=more, past_key_values=deepcopy(cache)).logits
            whole = torch.cat([start["input_ids"], more], 1)
            mask = torch.cat([start["attention_mask"], torch.ones_like(more)], 1)
            asked = {"input_ids": whole, "attention_mask": mask}
            options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
            answer = tiny.model.generate(**asked, past_key_values=deepcopy(cache), **options)
            assert torch.equal(answer.sequences[:, : length + count], whole)
            answers.append((answer.sequences[:, length:-1], logits, torch.stack(answer.logits, 1)))
        right = tiny.model(**tiny.batch([3, "I", 9], [1, "I", 9], side="right"), use_cache=True).past_key_values
        right.crop(-4)
        with pytest.raises(ValueError, match="with prompts padded on the left"):
            tiny.model(input_ids=more, past_key_values=right)
        cache.crop(3 - cache.get_seq_length())
        with pytest.raises(
            ValueError, match=r"cache can be cropped behind its pictures only, .* start again without it"
        ):
            tiny.model(input_ids=more, past_key_values=cache)
    hidden = dropped(tiny, pruning, inputs["input_ids"])[:, :length]
    bias = biases(start["input_ids"], pruning.selector)
    for continuation, logits, steps in answers:
        if tiny.name == "paligemma":
            continue  # what was cut off its question has been seen by what is left
        expected = reference(tiny, start, hidden, continuation, bias)[:, length:]
        assert gap(logits, expected[:, : logits.shape[1]]) < 1e-9
        assert gap(steps, expected[:, logits.shape[1] - 1 :].float()) < 1e-5


def test_a_cache_that_was_emptied_has_forgotten_its_prompt() -> None:
    tiny = make("llava")
    text = torch.randint(5, 39, (1, 40), generator=torch.Generator().manual_seed(0))
    wanted = tiny.model(input_ids=text).logits
    with prune(tiny.model, Norms(), budget=2):
        cache = StaticCache(tiny.model.config, max_cache_len=64)
        tiny.model.generate(**tiny.batch([3, "I", 9]), past_key_values=cache, **GREEDY)
        cache.reset()
        tiny.model(input_ids=text[:, :-2], past_key_values=cache)
        assert gap(tiny.model(input_ids=text[:, -2:], past_key_values=cache).logits, wanted[:, -2:]) < 1e-9


def test_the_callers_processors_and_criteria_take_precedence_as_in_any_model() -> None:
    tiny = make("llava")
    inputs = tiny.batch([3, "I", 9], [1, "I", 4])
    plain = tiny.model.generate(**inputs, **GREEDY)
    ends = StoppingCriteriaList([EosTokenCriteria(int(plain[0, -3]))])
    unchanged = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.0)])
    options: list[dict[str, Any]] = [{"stopping_criteria": ends}, {"stopping_criteria": ends, "eos_token_id": 7}]
    wanted = [tiny.model.generate(**inputs, **given, **GREEDY) for given in options]
    with prune(tiny.model, Norms(), keep_ratio=1.0):
        assert all(
            torch.equal(tiny.model.generate(**inputs, **given, **GREEDY), answer)
            for given, answer in zip(options, wanted, strict=True)
        )
    with prune(tiny.model, Norms(), keep_ratio=0.4):
        plain = tiny.model.generate(**inputs, **GREEDY)
        assert not torch.equal(tiny.model.generate(**inputs, repetition_penalty=5.0, **GREEDY), plain)
        found = tiny.model.generate(**inputs, repetition_penalty=5.0, logits_processor=unchanged, **GREEDY)
        assert torch.equal(found, plain)


def test_what_the_caller_gives_generate_sees_whole_sequences(tiny: Tiny) -> None:
    prompts = tiny.batch(*BATCH)
    length = prompts["input_ids"].shape[1]
    seen: dict[str, list[Tensor]] = {"criterion": [], "processor": [], "allowed": [], "streamer": []}

    class Third(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            seen["criterion"].append(input_ids)
            return torch.full((len(input_ids),), input_ids.shape[1] == length + 3)

    class Watching(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen["processor"].append(input_ids)
            return scores

    def allowed(row: int, ids: Tensor) -> list[int]:
        seen["allowed"].append(ids)
        return list(range(5, 39))

    class Streamer(BaseStreamer):
        ended = False

        def put(self, value: Tensor) -> None:
            seen["streamer"].append(value)

        def end(self) -> None:
            self.ended = True

    given = {"stopping_criteria": [Third()], "logits_processor": [Watching()], "prefix_allowed_tokens_fn": allowed}
    given["streamer"] = streamer = Streamer()
    with prune(tiny.model, Norms(), keep_ratio=0.4) as pruning:
        found = tiny.model.generate(**prompts, **given, **GREEDY)
        assert pruning.cut is not None
        limit = StoppingCriteriaList([MaxLengthCriteria(length + 2)])
        assert tiny.model.generate(**prompts, do_sample=False, stopping_criteria=limit).shape[1] == length + 2
    assert found.shape[1] == length + 3
    assert [ids.shape[1] for ids in seen["processor"]] == [length, length + 1, length + 2]
    assert [ids.shape[1] for ids in seen["criterion"]] == [length + 1, length + 2, length + 3]
    assert torch.equal(seen["criterion"][-1], found)
    assert all(torch.equal(ids, found[number % 3, : len(ids)]) for number, ids in enumerate(seen["allowed"]))
    start, *steps = seen["streamer"]
    assert torch.equal(torch.cat([start, torch.stack(steps, 1)], 1), found)
    assert streamer.ended


def test_calls_of_several_threads_do_not_mix() -> None:
    tiny = make("llava")
    prompts = [tiny.batch([3, "I", 9]), tiny.batch([1, "I", 2, "I", 5]), tiny.batch([7])]
    with prune(tiny.model, Sized(), keep_ratio=0.4):
        wanted = [tiny.model.generate(**prompt, **GREEDY) for prompt in prompts]

        def ask(number: int) -> Tensor:
            with torch.no_grad():
                return tiny.model.generate(**prompts[number % 3], **GREEDY)

        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(ask, range(18)))
    assert all(torch.equal(answer, wanted[number % 3]) for number, answer in enumerate(found))


def test_undoing_waits_for_a_call_in_another_thread() -> None:
    """As a stream's does whose reader leaves."""
    tiny = make("llava")
    prompt, began, steps = tiny.batch([3, "I", 9]), threading.Event(), []

    def stop(ids: Tensor, scores: Any, **options: Any) -> bool:
        began.set()
        time.sleep(0.05)
        steps.append(ids.shape[1])
        return False

    with prune(tiny.model, Norms(), budget=3) as pruning:
        wanted = tiny.model.generate(**prompt, **GREEDY)
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(tiny.model.generate, **prompt, **GREEDY, stopping_criteria=[stop])
            began.wait()
            unprune(tiny.model)
            assert steps[-1] == wanted.shape[1]
            assert torch.equal(answer.result(), wanted)
        assert not pruning.attached


def test_a_method_of_a_pruning_that_was_undone_says_so() -> None:
    tiny = make("llava")
    with prune(tiny.model, Norms(), budget=3):
        generate = tiny.model.generate
    with pytest.raises(ValueError, match="this generate is that of a pruning which was undone; take the model's own"):
        generate(**tiny.batch([3, "I", 9]), **GREEDY)


def test_a_handle_that_was_undone_prunes_no_more_and_undoes_no_other() -> None:
    tiny = make("llava")
    with prune(tiny.model, Norms(), budget=2) as first:
        pass
    with pytest.raises(ValueError, match="was undone; prune it anew"), first:
        pass
    with prune(tiny.model, Norms(), budget=2) as old:
        unprune(tiny.model)
        second = prune(tiny.model, Norms(), budget=3)
    assert not old.attached
    assert second.attached
    unprune(tiny.model)
