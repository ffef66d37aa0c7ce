"""Pruning inside a model of transformers: the prompt is shortened before the language model sees it.

Four methods of the instance are replaced: ``forward`` and ``_expand_inputs_for_generation`` make the cut once the
pictures are encoded, ``generate`` keeps lengths and the returned prompt as they were, and
``_merge_criteria_processor_list``, by which it adds the caller's processors and criteria to its own, lets those see the
whole prompt. Positions, masks and caches are then those of an ordinary, shorter prompt, except that by default every
token keeps the position id that it had (``positions="original"``), so that the pruned model computes exactly what the
whole one would compute if nobody could attend to the dropped tokens. Kept tokens of which the selector says how many
they stand for are attended to in proportion to that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from tprl.lvlm.cut import Choice, Cut, Positions, contained, cut_features, cut_of, shortened
from tprl.lvlm.families import family_of
from tprl.lvlm.handle import Handle, check_amount, kept_of, named, refuse, refuse_encoded, refuse_videos, unanswered
from tprl.lvlm.past import Past, past_of, remember
from tprl.lvlm.pictures import ImageFeatures, collate, encode, samples_of, split_pictures
from tprl.lvlm.proportional import check_attention, proportional
from tprl.lvlm.signals import recorded_tower
from tprl.lvlm.whole import count_new_tokens, count_whole, show_whole, with_prompt
from tprl.types import Selection, VisualTokens


class Selects(Protocol):
    """What ``prune`` needs of a selector; with a threshold, ``select_above`` in the place of ``select``."""

    needs: frozenset[str]

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection: ...


class Pruning(Handle):
    """The state of a model that prunes its prompts; ``prune`` makes it.

    Attributes:
        cut: how the prompts of the last call that had pictures were shortened; None if nothing was dropped. The logits
            of a direct ``forward`` are those of the short prompt, and ``cut.source (B, L')`` says which column each
            belongs to.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        selector: Selects,
        budget: int | None,
        keep_ratio: float | None,
        threshold: float | None,
        positions: Positions,
        template_ids: frozenset[int],
    ) -> None:
        super().__init__(model, _REPLACEMENTS)
        self.cut: Cut | None = None
        self.selector, self.positions, self.template_ids = selector, positions, template_ids
        self.budget, self.keep_ratio, self.threshold = budget, keep_ratio, threshold
        self._generation: _Generation | None = None

    def choose(self, visual: VisualTokens) -> Selection:
        """The selector's decision for a batch of pictures, checked."""
        counts = visual.mask.sum(1)
        if self.threshold is not None:
            selection = cast(Selection, cast(Any, self.selector).select_above(visual, self.threshold))
        else:
            if self.budget is None:
                assert self.keep_ratio is not None
                budget = (counts.double() * self.keep_ratio).round().long().clamp(min=1)
            else:
                budget = counts.clamp(max=self.budget)
            selection = self.selector.select(visual, budget)
        if (selection.keep_mask & ~visual.mask).any():
            raise ValueError(f"the selector {type(self.selector).__name__} keeps padding")
        return selection


def prune(
    model: PreTrainedModel,
    selector: Selects,
    *,
    budget: int | None = None,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    positions: Positions = "original",
    template_ids: frozenset[int] = frozenset(),
) -> Pruning:
    """Let ``model`` drop visual tokens by itself: plain ``forward`` and ``generate`` then work on fewer of them.

    Args:
        model: of one of ``tprl.lvlm.families.FAMILIES``, with a language-modelling head.
        selector: decides what is kept, picture by picture.
        budget: visual tokens to keep of every picture; all of one that has fewer.
        keep_ratio: share of every picture's visual tokens to keep, in (0, 1]; rounded, one token at least.
        threshold: keep what the selector keeps at this threshold of its ``select_above``, in [0, 1]; possibly nothing.
        positions: "original": what is kept stays at its position ids, as if the rest were masked. "compact": position
            ids count the short prompt, and a language model with two-dimensional ones sees a row of tokens.
        template_ids: ids that belong to the chat template and not to a question, see ``Prompts.template_ids``. The
            selector takes the attended tokens that are neither these nor placeholders for the question.

    Returns:
        The handle that tells what was kept, and un-prunes the model if used in a ``with`` statement.

    Raises:
        ValueError: the family is not known, the model is pruned already, not exactly one of ``budget``, ``keep_ratio``
            and ``threshold`` is given, or a value is not allowed.
    """
    check_amount(model, {"budget": budget, "keep_ratio": keep_ratio, "threshold": threshold})
    if threshold is not None and not hasattr(selector, "select_above"):
        raise ValueError(f"threshold needs a selector with probabilities, which {type(selector).__name__} has not")
    if positions not in ("original", "compact"):
        raise ValueError(f"positions {positions!r} is not allowed; 'original' or 'compact'")
    with recorded_tower(model, selector.needs):
        pass
    pruning = Pruning(model, selector, budget, keep_ratio, threshold, positions, template_ids)
    pruning.attach()
    return pruning


@dataclass
class _Generation:
    """A call of ``generate`` on its way: its inputs, what the tower recorded, what its cache holds, and whether it was
    given the whole prompt; then the cut, with one row a returned sequence or beam, and the position ids of the short
    prompt."""

    inputs: Mapping[str, Any]
    patches: Mapping[str, Tensor]
    past: Past | None
    whole: bool
    cut: Cut | None = None
    position_ids: Tensor | None = None


def _forward(model: PreTrainedModel, pruning: Pruning, *args: Any, **kwargs: Any) -> Any:
    original = pruning.original("forward")
    inputs = named(original, args, kwargs)
    past = past_of(inputs)
    refuse_videos(inputs)
    if "pixel_values" not in inputs:
        if pruning._generation is None:
            refuse_encoded(inputs)
        if past is not None and (pruning._generation is None or "position_ids" not in inputs):
            with proportional(lambda: past.cut.bias):
                return original(**past.resumed(inputs))
        return original(*args, **kwargs)
    refuse(inputs)
    pictures, output = encode(model, inputs, pruning.selector.needs)
    choice = _choose(model, pruning, pictures, inputs)
    if choice is None:
        whole = {name: value for name, value in inputs.items() if name not in ("pixel_values", "pixel_attention_mask")}
        return original(**whole, mm_encoder_outputs={"image": output})
    if "position_ids" not in inputs:
        position_ids = cast(Any, model)._prepare_position_ids_for_generation(inputs["input_ids"], inputs)
        if position_ids.ndim == 2:
            position_ids = position_ids + family_of(model).first_position
        inputs["position_ids"] = position_ids
    mask = inputs.get("attention_mask")
    cut = cut_of(model, inputs, choice, right=mask is not None and not bool(mask[:, -1].all()))
    short = shortened(model, inputs, cut, pruning.positions)
    features = cut_features(output, choice)
    features["pooler_output"] = contained(model, features["pooler_output"])
    with proportional(lambda: cut.bias):
        result = original(**short, mm_encoder_outputs={"image": type(output)(**features)})
    pruning.cut = cut
    caches = result.values() if isinstance(result, ModelOutput) else result
    for cache in caches:
        if isinstance(cache, Cache):
            remember(cache, cut, short["position_ids"])
    return result


def _expand(
    model: PreTrainedModel,
    pruning: Pruning,
    expand_size: int = 1,
    is_encoder_decoder: bool = False,
    input_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Any]]:
    original: Callable[..., tuple[Tensor, dict[str, Any]]] = pruning.original("_expand_inputs_for_generation")
    generation = pruning._generation
    output = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    if generation is None or input_ids is None:
        return original(expand_size, is_encoder_decoder, input_ids, **kwargs)
    cut, past = None, generation.past
    if output is not None:
        inputs = {**generation.inputs, **kwargs, "input_ids": input_ids}
        pictures = split_pictures(model, inputs, output.pooler_output, generation.patches)
        choice = _choose(model, pruning, pictures, inputs)
        if choice is not None:
            cut = cut_of(model, inputs, choice)
            features = cut_features(output, choice)
            kwargs["mm_encoder_outputs"] = {"image": type(output)(**features)}
    elif past is not None:
        cut = past.cut.extended(kwargs["position_ids"].shape[-1])
    if cut is not None:
        short = shortened(model, {**kwargs, "input_ids": input_ids}, cut, pruning.positions)
        input_ids = short.pop("input_ids")
        kwargs = short
        if past is not None and past.next_position.ndim == 3 and generation.inputs.get("position_ids") is None:
            # Qwen's own would go on from whichever prompt the model was given last
            kwargs["position_ids"] = past.positions(kwargs["attention_mask"])
    input_ids, kwargs = original(expand_size, is_encoder_decoder, input_ids, **kwargs)
    if cut is not None:
        if output is not None:
            encoded = kwargs["mm_encoder_outputs"]["image"]
            encoded["pooler_output"] = contained(model, encoded["pooler_output"])
            pruning.cut = cut
        generation.cut, generation.position_ids = cut.repeated(expand_size), kwargs["position_ids"]
    return input_ids, kwargs


def _generate(model: PreTrainedModel, pruning: Pruning, *args: Any, **kwargs: Any) -> Any:
    original = pruning.original("generate")
    inputs = named(original, args, kwargs)
    refuse_encoded(inputs)
    pictures, past = "pixel_values" in inputs, past_of(inputs)
    refuse_videos(inputs)
    if not pictures and past is None:
        return original(*args, **kwargs)
    if "inputs" in inputs:
        inputs["input_ids"] = inputs.pop("inputs")
    prompt = inputs.get("input_ids")
    if pictures:
        refuse(inputs)
    if prompt is None:
        raise ValueError("a pruned model needs input_ids, to know which tokens are visual")
    whole = past is None or past.begins(prompt, inputs.get("attention_mask"))
    inputs = {**dict.fromkeys(kwargs), **inputs}  # None undoes what the model's generation_config says
    with recorded_tower(model, pruning.selector.needs if pictures else frozenset()) as patches:
        generation = _Generation(inputs, patches, past, whole)
        if whole:
            count_whole(inputs, prompt, lambda: generation.cut)
            count_new_tokens(model, inputs, prompt.shape[1])
        before, pruning._generation = pruning._generation, generation
        try:
            with proportional(lambda: generation.cut.bias if generation.cut else None):
                result = original(**inputs)
        finally:
            pruning._generation = before
    cut, positions = generation.cut, generation.position_ids
    if cut is None or positions is None:
        return result
    returned = isinstance(result, ModelOutput)
    cache = result.get("past_key_values") if returned else inputs.get("past_key_values")
    if whole:
        sequences = with_prompt(prompt, result["sequences"] if returned else result, cut)
        if returned:
            result["sequences"] = sequences
        else:
            result = sequences
    if cache is not None:
        remember(cache, cut, positions + family_of(model).first_position if positions.ndim == 2 else positions)
    return result


def _merge(model: PreTrainedModel, pruning: Pruning, default_list: list[Any], custom_list: list[Any]) -> Any:
    merged = pruning.original("_merge_criteria_processor_list")(default_list, custom_list)
    generation = pruning._generation
    if generation is None or not generation.whole:
        return merged
    prompt = generation.inputs["input_ids"]
    return show_whole(merged, custom_list, lambda ids: with_prompt(prompt, ids, generation.cut))


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "_expand_inputs_for_generation": _expand,
    "_merge_criteria_processor_list": _merge,
    "generate": _generate,
}


def _choose(
    model: PreTrainedModel, pruning: Pruning, pictures: list[ImageFeatures], inputs: Mapping[str, Any]
) -> Choice | None:
    """Ask the selector about all pictures of a batch; None if nothing is dropped or changed."""
    ids = inputs["input_ids"]
    placeholder = ids == model.config.image_token_id
    counts = placeholder.sum(1).tolist()
    sample = samples_of(pictures, placeholder)
    text = ~placeholder & ~torch.isin(ids, torch.tensor(_no_question(model, pruning), device=ids.device))
    if (mask := inputs.get("attention_mask")) is not None:
        text &= mask.bool()
    text = unanswered(text, inputs)
    questions = pad_sequence([row[asked] for row, asked in zip(ids, text, strict=True)], batch_first=True)
    asked = torch.arange(questions.shape[1], device=ids.device) < text.sum(1, keepdim=True)
    query = model.get_input_embeddings()(questions) * asked[..., None]
    where = sample.to(ids.device)
    visual = collate(pictures, query[where], asked[where])
    selection = pruning.choose(visual)

    pruning.cut = None
    if selection.sizes is not None:
        check_attention(model)
    keep = selection.keep_mask[visual.mask]
    pruning.kept = kept_of(pictures, sample, len(ids), keep)
    if selection.tokens is None and bool(keep.all()):
        return None
    tokens = visual.tokens if selection.tokens is None else selection.tokens.to(visual.tokens.dtype)
    sizes = None if selection.sizes is None else selection.sizes[visual.mask]
    return Choice(keep, tokens[visual.mask], counts, sizes)


def _no_question(model: PreTrainedModel, pruning: Pruning) -> list[int]:
    """Ids that are no part of a question."""
    video = [model.config.video_token_id] if hasattr(model.config, "video_token_id") else []
    return sorted(pruning.template_ids) + video
