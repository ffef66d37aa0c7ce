"""Pruning between the layers of whole models, family by family.

The reference is the untouched model with hooks, written here, that let the layers from the cut on see nothing of the
dropped tokens, at prefill and in every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextConfig, PreTrainedModel

from lvlm.test_prune import BATCH, FAR, gap, generated, second_turn
from lvlm.tiny import CONFIGS, IMAGE, NAMES, VOCAB, Prompt, Tiny, make, state
from tprl.lvlm.handle import HANDLE, unprune
from tprl.lvlm.in_model import dropping
from tprl.lvlm.prune_inside import InsidePruning, prune_inside
from tprl.selectors.in_model import FastV

MODES = {"sdpa64": (torch.float64, "sdpa", 1e-9), "eager32": (torch.float32, "eager", 5e-4)}


def cut_of(name: str) -> int:
    """The earliest layer at which the family's tiny model can be cut."""
    return 2 if name == "qwen3_vl" else 1


@pytest.fixture(scope="module", params=NAMES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return make(request.param)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with torch.no_grad():
        yield


def dropped(pruning: InsidePruning, ids: Tensor) -> Tensor:
    """Which tokens of the prompt were dropped, by what the handle says was kept of each picture; bool ``(B, L)``."""
    drop = torch.zeros_like(ids, dtype=torch.bool)
    for row, pictures in enumerate(pruning.kept):
        flags = [torch.isin(torch.arange(kept.total), kept.indices, invert=True) for kept in pictures]
        if flags:
            drop[row, ids[row] == IMAGE] = torch.cat(flags)
    return drop


@contextmanager
def hiding(model: PreTrainedModel, layer: int, hidden: Tensor) -> Iterator[None]:
    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        queries, cache, mask = args[0].shape[1], kwargs.get("past_key_values"), kwargs["attention_mask"]
        length = max(queries, 0 if cache is None else cache.get_seq_length(0))
        if mask is None:
            mask = torch.ones(queries, length).tril(length - queries).bool()[None, None]
        unseen = torch.nn.functional.pad(hidden, (0, length - hidden.shape[1]))[:, None, None]
        unseen = unseen & ~torch.eye(length)[-queries:].bool()
        low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask.masked_fill(unseen, low)}

    hooks = [m.register_forward_pre_hook(hide, with_kwargs=True) for m in model.get_decoder().layers[layer:]]
    yield
    for hook in hooks:
        hook.remove()


def attended(tiny: Tiny, inputs: dict[str, Tensor], layer: int, counts: list[int]) -> Tensor:
    """The visual tokens with the most attention of the last prompt token, by the eager model's own attention."""
    eager = make(tiny.name, torch.float32, "eager").model
    inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    weights = eager(**inputs, output_attentions=True, use_cache=False).attentions[layer - 1]
    keep = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, count in enumerate(counts):
        last = inputs["attention_mask"][row].nonzero().max()
        places = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]
        keep[row, places[weights[row, :, last].mean(0)[places].topk(count).indices]] = True
    return keep


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_prefill_equals_the_model_that_hides_what_is_dropped(name: str, mode: str, side: str) -> None:
    dtype, attention, close = MODES[mode]
    tiny, cut = make(name, dtype, attention), cut_of(name)
    inputs = tiny.batch(*BATCH, side=side)
    visual, real = inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool()
    plain = tiny.model(**inputs).logits
    with prune_inside(tiny.model, FastV(cut), keep_ratio=0.4) as pruning:
        logits = tiny.model(**inputs).logits
    gone = dropped(pruning, inputs["input_ids"])
    counts = [round(int(count) * 0.4) for count in visual.sum(1)]
    assert (visual & ~gone).sum(1).tolist() == counts
    assert torch.equal(visual & ~gone, attended(tiny, inputs, cut, counts))
    held = real & ~gone
    with hiding(tiny.model, cut, gone):
        expected = tiny.model(**inputs).logits
    assert gap(logits[held], expected[held]) < close
    assert gap(logits[held], plain[held]) > FAR
    with hiding(tiny.model, cut - 1, gone):
        assert gap(logits[held], tiny.model(**inputs).logits[held]) > FAR


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_the_model_that_hides_what_is_dropped(name: str) -> None:
    tiny, cut = make(name), cut_of(name)
    inputs = tiny.batch(*BATCH)
    with prune_inside(tiny.model, FastV(cut), keep_ratio=0.4) as pruning:
        tokens, logits = generated(tiny, inputs)
        uncached = generated(tiny, inputs, use_cache=False)
        with pytest.raises(ValueError, match="got StaticCache"):
            generated(tiny, inputs, cache_implementation="static")
    assert torch.equal(uncached[0], tokens)
    assert gap(uncached[1], logits) < 1e-5
    with hiding(tiny.model, cut, dropped(pruning, inputs["input_ids"])):
        expected = generated(tiny, inputs)
    assert torch.equal(tokens, expected[0])
    assert gap(logits, expected[1]) < 1e-5
    assert gap(logits[:, 0], generated(tiny, inputs)[1][:, 0]) > FAR


def test_the_cache_is_short_from_the_cut_on(tiny: Tiny) -> None:
    cut, inputs = cut_of(tiny.name), tiny.batch([2, "I", 4])
    with prune_inside(tiny.model, FastV(cut), budget=2):
        cache = tiny.model(**inputs, use_cache=True).past_key_values
    length = inputs["input_ids"].shape[1]
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == [length] * cut + [length - tiny.counts[0] + 2] * (len(lengths) - cut)


def test_keeping_all_changes_nothing(tiny: Tiny) -> None:
    inputs = tiny.batch(*BATCH)
    plain = tiny.model(**inputs).logits
    with prune_inside(tiny.model, FastV(cut_of(tiny.name)), keep_ratio=1.0) as pruning:
        assert gap(tiny.model(**inputs).logits, plain) < 1e-12
    assert [kept.count for kept in chain(*pruning.kept)] == tiny.counts


def test_samples_beams_and_turns(tiny: Tiny) -> None:
    """A batch equals each sample alone, with beams too; a text-only row passes; a second turn goes on."""
    cut, inputs = cut_of(tiny.name), tiny.batch(*BATCH)
    length = inputs["input_ids"].shape[1]
    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 4}
    options = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    text = tiny.batch([5], [3])
    plain = tiny.model(**text).logits
    with prune_inside(tiny.model, FastV(cut), keep_ratio=0.4) as pruning:
        tokens, logits = generated(tiny, inputs)
        batch_kept = pruning.kept
        together = tiny.model.generate(**inputs, **beams)
        pairs = zip(chain(*pruning.kept), chain(*batch_kept), strict=True)
        assert all(torch.equal(one.indices, other.indices) for one, other in pairs)
        first = 0
        for row, prompt in enumerate(BATCH):
            alone = tiny.batch(prompt, skip=first)
            first += prompt.count("I")
            single, steps = generated(tiny, alone)
            assert torch.equal(tokens[row], single[0])
            assert gap(logits[row], steps[0]) < 1e-5
            expected = tiny.model.generate(**alone, **beams)[:, alone["input_ids"].shape[1] :]
            assert torch.equal(together[2 * row : 2 * row + 2, length:], expected)
        assert torch.equal(tiny.model(**text).logits, plain)
        begun = tiny.model.generate(**inputs, **options)
        turn = second_turn(inputs, begun.sequences)
        cache = deepcopy(begun.past_key_values)
        with pytest.raises(ValueError, match="new pictures on a filled cache"):
            tiny.model(**inputs, past_key_values=cache)
        second = tiny.model.generate(**turn, past_key_values=begun.past_key_values, **options)
    with hiding(tiny.model, cut, dropped(pruning, inputs["input_ids"])):
        begun = tiny.model.generate(**inputs, **options)
        expected = tiny.model.generate(**turn, past_key_values=begun.past_key_values, **options)
    assert torch.equal(second.sequences, expected.sequences)
    assert gap(torch.stack(second.logits, 1), torch.stack(expected.logits, 1)) < 1e-5


def test_a_cache_that_was_cropped_behind_its_picture_goes_on(tiny: Tiny) -> None:
    """With another end of the question, longer or shorter."""
    cut, inputs = cut_of(tiny.name), tiny.batch([3, "I", 9])
    mores = [torch.randint(5, 39, (1, count), generator=torch.Generator().manual_seed(count)) for count in (1, 4, 6)]

    def asked() -> list[Tensor]:
        cache = tiny.model(**inputs, use_cache=True).past_key_values
        cache.crop(-4)
        return [tiny.model(input_ids=more, past_key_values=deepcopy(cache)).logits for more in mores]

    with prune_inside(tiny.model, FastV(cut), keep_ratio=0.4) as pruning:
        found = asked()
        cache = tiny.model(**inputs, use_cache=True).past_key_values
        cache.crop(3 - cache.layers[-1].get_seq_length())
        with pytest.raises(
            ValueError, match=r"cache can be cropped behind its pictures only, .* start again without it"
        ):
            tiny.model(input_ids=torch.cat(4 * mores, 1), past_key_values=cache)
    with hiding(tiny.model, cut, dropped(pruning, inputs["input_ids"])):
        expected = asked()
    assert all(gap(one, other) < 1e-9 for one, other in zip(found, expected, strict=True))


def test_a_cache_that_was_emptied_has_forgotten_its_prompt() -> None:
    tiny = make("llava")
    text = torch.randint(5, 39, (1, 40), generator=torch.Generator().manual_seed(0))
    plain = tiny.model(input_ids=text).logits
    with prune_inside(tiny.model, FastV(1), keep_ratio=0.4):
        cache = tiny.model(**tiny.batch([3, "I", 9]), use_cache=True).past_key_values
        cache.crop(-28)
        tiny.model(input_ids=text[:, :-2], past_key_values=cache)
        assert gap(tiny.model(input_ids=text[:, -2:], past_key_values=cache).logits, plain[:, -2:]) < 1e-9


def test_candidate_tokens_are_taken_back_in_all_layers() -> None:
    """Assisted decoding crops what it guessed wrongly off the cache."""
    tiny = make("llava")
    inputs = tiny.batch([3, "I", 2])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"do_sample": False, "max_new_tokens": 12}
    with prune_inside(tiny.model, FastV(1), keep_ratio=0.4):
        wanted = tiny.model.generate(**inputs, **options)
        for guessed in (1, 3, 5):
            assert torch.equal(tiny.model.generate(**inputs, prompt_lookup_num_tokens=guessed, **options), wanted)


def test_none_undoes_what_the_models_generation_config_says() -> None:
    tiny = make("llava")
    inputs = tiny.batch([3, "I", 9])
    tiny.model.generation_config.eos_token_id = list(range(VOCAB))  # every token ends an answer
    with prune_inside(tiny.model, FastV(1), budget=2):
        assert generated(tiny, inputs)[0].shape[1] == 1
        assert generated(tiny, inputs, eos_token_id=None)[0].shape[1] == 4


def test_unpruning_leaves_the_model_as_it_was(tiny: Tiny) -> None:
    inputs = tiny.batch(*BATCH)
    tiny.model.generate(**inputs, max_new_tokens=2)
    before = state(tiny.model)
    prune_inside(tiny.model, FastV(cut_of(tiny.name)), budget=2)
    tiny.model.generate(**inputs, max_new_tokens=2)
    copy = deepcopy(tiny.model)
    pruned = tiny.model(**inputs).logits
    unprune(tiny.model)
    after = state(tiny.model)
    assert set(after) == set(before)
    for name, value in before.items():
        if not name.endswith("rope_deltas"):
            assert after[name] is value or after[name] == value, name
    assert HANDLE in copy.__dict__
    assert gap(copy(**inputs).logits, pruned) == 0


def test_several_pictures_share_a_budget() -> None:
    tiny = make("llava")
    prompts: list[Prompt] = [[2, "I", 1, "I", 4], [1, "I", 2]]
    with prune_inside(tiny.model, FastV(1), budget=5) as pruning:
        tiny.model(**tiny.batch(*prompts))
        assert [sum(kept.count for kept in row) for row in pruning.kept] == [10, 5]
        assert [[kept.total for kept in row] for row in pruning.kept] == [[16, 16], [16]]
        for kept in chain(*pruning.kept):
            expected = torch.stack([kept.indices // 4, kept.indices % 4], 1) / 4 + 0.125
            assert torch.equal(kept.coords, expected)


def test_what_is_refused() -> None:
    tiny = make("llava")
    for options, message in (
        ({}, "exactly one of budget and keep_ratio; got none"),
        ({"budget": 1, "keep_ratio": 0.5}, "got budget, keep_ratio"),
        ({"budget": 0}, "budget 0 is not allowed"),
        ({"keep_ratio": 1.5}, "keep_ratio 1.5 is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_inside(tiny.model, FastV(1), **options)
    with pytest.raises(ValueError, match="layer 2 is not allowed in a decoder of 2 layers; 1 to 1"):
        prune_inside(tiny.model, FastV(2), budget=1)
    with pytest.raises(ValueError, match="fastv cuts before layer 1; at least 2 layers of this model see all"):
        prune_inside(make("qwen3_vl").model, FastV(1), budget=1)
    with prune_inside(tiny.model, FastV(1), budget=17) as pruning:
        with pytest.raises(ValueError, match="pruned already"):
            prune_inside(tiny.model, FastV(1), budget=1)
        tiny.model(**tiny.batch([1, "I", 2]))
        assert pruning.kept[0][0].count == 16  # all that there are
    inputs = tiny.batch([1, "I", 2])
    with prune_inside(tiny.model, FastV(1), budget=4):
        cache = tiny.model(**inputs, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="filled by 1 prompts and cannot go on with 2"):
            tiny.model(input_ids=torch.tensor([[7], [8]]), past_key_values=cache)
        for option in ({"prefill_chunk_size": 4}, {"guidance_scale": 2.0}):
            with pytest.raises(ValueError, match="fastv prunes inside the language model and needs the whole prompt"):
                tiny.model.generate(**inputs, max_new_tokens=2, **option)
        for call in (tiny.model, tiny.model.generate):
            with pytest.raises(ValueError, match="does not take videos"):
                call(input_ids=inputs["input_ids"], pixel_values_videos=inputs["pixel_values"])
            with pytest.raises(ValueError, match="encoded already"):
                call(**inputs, mm_encoder_outputs={"image": [inputs["pixel_values"]]})
        with pytest.raises(ValueError, match="a pruned model needs input_ids"):
            tiny.model.generate(pixel_values=inputs["pixel_values"])
    assert HANDLE not in tiny.model.__dict__


def test_the_first_layer_of_each_type_of_attention_sees_every_token() -> None:
    """The lengths of the masks of all layers of its type are those of its cache."""
    config = Gemma3TextConfig(**{
        **CONFIGS["gemma3"]["text_config"].to_dict(), "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    })  # fmt: skip
    with patch.dict(CONFIGS, gemma3={**CONFIGS["gemma3"], "text_config": config}):
        model = make("gemma3").model
    with pytest.raises(ValueError, match="fastv cuts before layer 1; at least 2 layers of this model see all"):
        prune_inside(model, FastV(1), budget=1)
    with prune_inside(model, FastV(2), budget=1):
        assert HANDLE in model.__dict__


def test_layers_that_visual_features_enter_see_every_token() -> None:
    tiny = make("qwen3_vl")
    inputs = tiny.batch([2, "I", 4])
    visual = inputs["input_ids"] == IMAGE
    given = {"visual": visual, "last": torch.tensor([visual.shape[1] - 1]), "budgets": torch.tensor([2])}
    with dropping(tiny.model.get_decoder(), FastV(2), **given) as held:
        tiny.model(**inputs)
    assert held.kept[-1].sum() == 2
    message = "layer 1 is not allowed: visual features enter this decoder's first 2 layers"
    with dropping(tiny.model.get_decoder(), FastV(1), **given), pytest.raises(ValueError, match=message):
        tiny.model(**inputs)


def test_at_least_one_token_of_a_prompt_with_a_picture_stays() -> None:
    tiny = make("llava")
    with prune_inside(tiny.model, FastV(1), keep_ratio=0.01) as pruning:
        tiny.model(**tiny.batch([1, "I", 2], [1, 2]))
    assert [[kept.count for kept in row] for row in pruning.kept] == [[1], []]
