"""Pruning between the layers of a whole model of transformers, by methods that look inside the language model.

``forward`` of the instance opens ``tprl.lvlm.in_model.dropping`` around the language model. Prompts, positions and
lengths are those of the whole model: only layers from the cut on see fewer tokens, and their part of the cache is
shorter. So logits and returned sequences have the whole length.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from tprl.lvlm.handle import (
    Handle,
    check_amount,
    kept_of,
    named,
    noted,
    refuse,
    refuse_encoded,
    refuse_videos,
    unanswered,
)
from tprl.lvlm.in_model import Dropping, check_first_cut, dropping, resumed
from tprl.lvlm.pictures import ImageFeatures, encode, samples_of, split_pictures
from tprl.selectors.stages import InModel

_NOTE = "_tprl_dropped"


class InsidePruning(Handle):
    """The state of a model that prunes between its layers; ``prune_inside`` makes it."""

    def __init__(self, model: PreTrainedModel, method: InModel, budget: int | None, keep_ratio: float | None) -> None:
        super().__init__(model, _REPLACEMENTS)
        self.method, self.budget, self.keep_ratio = method, budget, keep_ratio
        self._generation: _Generation | None = None

    def budgets(self, sizes: Tensor, sample: Tensor, batch: int) -> Tensor:
        """Visual tokens that the samples keep, int64 ``(batch,)``, of pictures of ``sizes`` in rows ``sample``."""
        if self.budget is None:
            totals = torch.bincount(sample, sizes, batch)
            return (totals.double() * cast(float, self.keep_ratio)).round().clamp(min=1).minimum(totals).long()
        return torch.bincount(sample, sizes.clamp(max=self.budget), batch).long()


@dataclass
class _Prompt:
    """Prompts with pictures: where the visual tokens ``(B, L)`` and the last tokens before an answer ``(B,)`` stand."""

    pictures: list[ImageFeatures]
    visual: Tensor
    last: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, pictures: list[ImageFeatures], inputs: Mapping[str, Any]) -> "_Prompt":
        ids = inputs["input_ids"]
        visual, places = ids == model.config.image_token_id, torch.arange(ids.shape[1], device=ids.device)
        behind = places >= (visual * places).amax(1, keepdim=True)
        if (mask := inputs.get("attention_mask")) is not None:
            behind &= mask.bool()
        return cls(pictures, visual, (unanswered(behind, inputs) * places).argmax(1))


@dataclass
class _Generation:
    """A call of ``generate`` on its way: its inputs; then its prompts, and rows that each of them became."""

    inputs: Mapping[str, Any]
    prompt: _Prompt | None = None
    times: int = 1


def prune_inside(
    model: PreTrainedModel, method: InModel, *, budget: int | None = None, keep_ratio: float | None = None
) -> InsidePruning:
    """Let the language model of ``model`` drop visual tokens between its layers.

    Args:
        model: of one of ``tprl.lvlm.families.FAMILIES``, with a language-modelling head.
        method: of ``tprl.selectors.IN_MODEL`` or ``ON_AVERAGE``. The pictures of a sample share their budget.
        budget: visual tokens of a picture that reach the last layer (all of one that has fewer), or with
            ``ON_AVERAGE`` that a layer sees, on average over a sample's pictures.
        keep_ratio: share of a sample's visual tokens, in (0, 1], in the place of ``budget``.

    Returns:
        The handle that tells what reached the last layer, and un-prunes the model if used in a ``with`` statement.

    Raises:
        ValueError: the family is not known, the model is pruned already, not exactly one of ``budget`` and
            ``keep_ratio`` is given or its value is not allowed, the language model's layers are not read as Llama's, or
            ``method`` cuts where this model cannot be cut.
    """
    check_amount(model, {"budget": budget, "keep_ratio": keep_ratio})
    check_first_cut(model, method, _layers_before_a_cut(model))
    pruning = InsidePruning(model, method, budget, keep_ratio)
    pruning.attach()
    return pruning


def _layers_before_a_cut(model: PreTrainedModel) -> int:
    """The fewest layers that see all: masks are made by the first layer of each type of attention."""
    types = cast(Any, model).get_decoder().config.to_dict().get("layer_types") or []
    return max([1, *(1 + types.index(kind) for kind in set(types))])


def _forward(model: PreTrainedModel, pruning: InsidePruning, *args: Any, **kwargs: Any) -> Any:
    original = pruning.original("forward")
    inputs = named(original, args, kwargs)
    cache, dropped = inputs.get("past_key_values"), noted(inputs, _NOTE)
    if cache is not None and int(cache.get_seq_length()) > 0:
        return _continue(model, dropped, inputs, original)
    generation = pruning._generation
    refuse_videos(inputs)
    if "pixel_values" in inputs:
        refuse(inputs)
        pictures, output = encode(model, inputs)
        prompt = _Prompt.of(model, pictures, inputs)
        inputs = {name: value for name, value in inputs.items() if name not in ("pixel_values", "pixel_attention_mask")}
        inputs["mm_encoder_outputs"] = {"image": output}
    elif generation is not None and generation.prompt is not None:
        prompt = generation.prompt
    else:
        refuse_encoded(inputs)
        return original(**inputs)

    given = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
    if given.shape[1] < prompt.visual.shape[1]:
        raise ValueError(
            f"{pruning.method.name} prunes inside the language model and needs the whole prompt in one pass: no "
            "prefill_chunk_size, no guidance_scale"
        )
    times = generation.times if generation is not None else 1
    sample = samples_of(prompt.pictures, prompt.visual)
    sizes = torch.tensor([len(picture.tokens) for picture in prompt.pictures])
    budgets = pruning.budgets(sizes, sample, len(prompt.visual)).to(prompt.visual.device)
    visual, last, budgets = (part.repeat_interleave(times, 0) for part in (prompt.visual, prompt.last, budgets))
    decoder = cast(Any, model).get_decoder()
    with dropping(decoder, pruning.method, visual=visual, last=last, budgets=budgets) as dropped:
        result = original(**inputs)
    keep = dropped.kept[-1][::times, : prompt.visual.shape[1]][prompt.visual]
    pruning.kept = kept_of(prompt.pictures, sample, len(prompt.visual), keep)
    for part in result.values() if isinstance(result, ModelOutput) else result:
        if isinstance(part, Cache):
            setattr(part, _NOTE, dropped)
    return result


def _continue(
    model: PreTrainedModel, dropped: Dropping | None, inputs: dict[str, Any], original: Callable[..., Any]
) -> Any:
    """A call on a filled cache, of whose prompts tokens were ``dropped``."""
    if "pixel_values" in inputs or inputs.get("mm_encoder_outputs"):
        raise ValueError("a pruned model does not take new pictures on a filled cache; start again without the cache")
    if dropped is None:
        return original(**inputs)
    given = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
    if len(given) != len(dropped.kept[-1]):
        raise ValueError(f"the cache was filled by {len(dropped.kept[-1])} prompts and cannot go on with {len(given)}")
    with resumed(cast(Any, model).get_decoder(), dropped):
        return original(**inputs)


def _expand(
    model: PreTrainedModel,
    pruning: InsidePruning,
    expand_size: int = 1,
    is_encoder_decoder: bool = False,
    input_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Any]]:
    generation, output = pruning._generation, (kwargs.get("mm_encoder_outputs") or {}).get("image")
    if generation is not None and output is not None and input_ids is not None:
        inputs = {**generation.inputs, **kwargs, "input_ids": input_ids}
        pictures = split_pictures(model, inputs, output.pooler_output, {})
        generation.prompt = _Prompt.of(model, pictures, inputs)
        generation.times = expand_size
    original = pruning.original("_expand_inputs_for_generation")
    return cast(tuple[Tensor, dict[str, Any]], original(expand_size, is_encoder_decoder, input_ids, **kwargs))


def _generate(model: PreTrainedModel, pruning: InsidePruning, *args: Any, **kwargs: Any) -> Any:
    original = pruning.original("generate")
    inputs = named(original, args, kwargs)
    if "inputs" in inputs:
        inputs["input_ids"] = inputs.pop("inputs")
    refuse_videos(inputs)
    if "pixel_values" in inputs:
        refuse(inputs)
    before, pruning._generation = pruning._generation, _Generation(inputs)
    try:
        return original(**{**dict.fromkeys(kwargs), **inputs})  # None undoes what the generation_config says
    finally:
        pruning._generation = before


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "forward": torch.compiler.disable(_forward),  # code compiled before the hooks were there would pass them by
    "_expand_inputs_for_generation": _expand,
    "generate": _generate,
}
