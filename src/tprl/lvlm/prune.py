"""Pruning inside a model of transformers: the prompt is shortened before the language model sees it.

Three methods of the instance are replaced, none of its classes: ``forward`` and ``_expand_inputs_for_generation`` make
the cut once the pictures are encoded, ``generate`` keeps lengths and the returned prompt as they were. Positions,
masks and caches are then those of an ordinary, shorter prompt, except that by default every token keeps the position
id that it had (``positions="original"``), so that the pruned model computes exactly what the whole one would compute
if nobody could attend to the dropped tokens.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from types import MethodType, TracebackType
from typing import Any, Literal, Protocol, Self, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from tprl.lvlm.families import family_of
from tprl.lvlm.model import ImageFeatures, collate, encode, split_pictures
from tprl.lvlm.signals import recorded_tower
from tprl.types import Selection, VisualTokens

Positions = Literal["original", "compact"]
HANDLE = "_tprl_pruning"
"""Name of the attribute of a pruned model that holds its ``Pruning``."""

_ALIGNED = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}
"""Inputs with one entry a token besides ids, mask and positions, and what stands for padding in them."""


class Selects(Protocol):
    """What ``prune`` needs of a selector; with a threshold, ``select_above`` in the place of ``select``."""

    needs: frozenset[str]

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection: ...


@dataclass(frozen=True)
class Kept:
    """What was kept of one picture.

    Attributes:
        indices: int64 ``(k,)``, ascending, of the picture's visual tokens.
        coords: float32 ``(k, 2)``, row and column of the kept tokens' centres in the picture, in [0, 1].
        total: how many visual tokens the picture has.
    """

    indices: Tensor
    coords: Tensor
    total: int

    @property
    def count(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Cut:
    """How a batch of prompts was shortened.

    Attributes:
        index: int64 ``(B, L')``, the column of the whole prompt that each column of the short one comes from.
        mask: bool ``(B, L')``, True where a column is not padding.
        length: ``L``, of the whole prompt.
    """

    index: Tensor
    mask: Tensor
    length: int

    @property
    def source(self) -> Tensor:
        """``index`` with -1 where the short prompt is padding."""
        return self.index.masked_fill(~self.mask, -1)

    def extended(self, length: int) -> "Cut":
        """The cut of a longer prompt that begins with this one; nothing of its continuation is dropped."""
        more = torch.arange(self.length, length, device=self.index.device).expand(len(self.index), -1)
        return Cut(torch.cat([self.index, more], 1), torch.cat([self.mask, torch.ones_like(more).bool()], 1), length)

    def repeated(self, times: int) -> "Cut":
        return Cut(self.index.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0), self.length)


@dataclass(frozen=True)
class _Past:
    """What stands in a cache: the cut of its prompt, and the position ids ``(..., B, 1)`` of the token behind it."""

    cut: Cut
    next_position: Tensor


class Handle:
    """The state of a pruned model. As a context manager it un-prunes the model on leaving.

    Attributes:
        kept: what was kept in the last call that had pictures: for each sample, a ``Kept`` a picture.
        replacements: methods of the model and what stands in their place.
    """

    def __init__(self, model: PreTrainedModel, replacements: Mapping[str, Callable[..., Any]]) -> None:
        self.kept: list[list[Kept]] = []
        self.replacements = replacements
        self.replaced: dict[str, Any] = {name: model.__dict__[name] for name in replacements if name in model.__dict__}
        self._model = model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unprune(self._model)

    def original(self, name: str) -> Callable[..., Any]:
        """The method of the model that was replaced."""
        if name in self.replaced:
            return cast(Callable[..., Any], self.replaced[name])
        return cast(Callable[..., Any], MethodType(getattr(type(self._model), name), self._model))

    def attach(self) -> None:
        """Put the replacements in their places."""
        for name, replacement in self.replacements.items():
            method = MethodType(_with_signature(replacement, self.original(name)), self._model)
            setattr(self._model, name, method)
        setattr(self._model, HANDLE, self)


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
                budget = (counts * self.keep_ratio).round().long().clamp(min=1)
            else:
                budget = torch.full_like(counts, self.budget)
                if (counts < budget).any():
                    raise ValueError(
                        f"budget {self.budget} is more than a picture's {int(counts.min())} visual tokens; "
                        "allowed: 1 to as many as the smallest picture has, or use keep_ratio"
                    )
            selection = self.selector.select(visual, budget)
        if (selection.keep_mask & ~visual.mask).any():
            raise ValueError(f"the selector {type(self.selector).__name__} keeps padding")
        return selection


@dataclass
class _Generation:
    """A call of ``generate`` on its way: its inputs, what the tower recorded and what its cache holds; then the cut,
    with one row a returned sequence or beam, and the position ids of the short prompt."""

    inputs: Mapping[str, Any]
    patches: Mapping[str, Tensor]
    past: _Past | None
    cut: Cut | None = None
    position_ids: Tensor | None = None


@dataclass(frozen=True)
class _Choice:
    """What to keep of the visual tokens of a batch, all pictures one after the other: bool ``keep (T,)``, their values
    ``(T, D)``, and how many each sample has."""

    keep: Tensor
    tokens: Tensor
    counts: list[int]


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
        budget: visual tokens to keep of every picture.
        keep_ratio: share of every picture's visual tokens to keep, in (0, 1]; rounded, one token at least.
        threshold: keep what the selector keeps with at least this probability, in [0, 1]; possibly nothing.
        positions: "original": what is kept stays at its position ids, as if the rest were masked. "compact": position
            ids count the short prompt, and a language model with two-dimensional ones sees a row of tokens.
        template_ids: ids that belong to the chat template and not to a question, see ``Lvlm.template_ids``. The
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


def check_amount(model: PreTrainedModel, given: Mapping[str, float | None]) -> None:
    """Raise ValueError unless ``model`` can be pruned and exactly one of the amounts ``given`` is given and allowed."""
    family_of(model)
    if HANDLE in model.__dict__:
        raise ValueError("the model is pruned already; unprune it first")
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        names = list(given)
        raise ValueError(
            f"give exactly one of {', '.join(names[:-1])} and {names[-1]}; got {', '.join(chosen) or 'none'}"
        )
    if chosen.get("budget", 1) < 1:
        raise ValueError(f"budget {chosen['budget']} is not allowed; at least 1")
    if not 0 < chosen.get("keep_ratio", 1) <= 1:
        raise ValueError(f"keep_ratio {chosen['keep_ratio']} is not allowed; more than 0 and at most 1")
    if not 0 <= chosen.get("threshold", 0) <= 1:
        raise ValueError(f"threshold {chosen['threshold']} is not allowed; 0 to 1")


def unprune(model: PreTrainedModel) -> None:
    """Leave ``model`` as it was before ``prune``; nothing to do if it is not pruned."""
    pruning = model.__dict__.get(HANDLE)
    if pruning is None:
        return
    for name in pruning.replacements:
        delattr(model, name)
        if name in pruning.replaced:
            setattr(model, name, pruning.replaced[name])
    delattr(model, HANDLE)


def _with_signature(replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A fresh ``replacement`` that reads like the bound method ``original``, whose signature ``generate`` inspects."""

    @wraps(original)
    def method(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, self.__dict__[HANDLE], *args, **kwargs)

    signature = inspect.signature(original)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [first, *signature.parameters.values()]
    method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    del method.__wrapped__
    return method


def _forward(model: PreTrainedModel, pruning: Pruning, *args: Any, **kwargs: Any) -> Any:
    original = pruning.original("forward")
    inputs = named(original, args, kwargs)
    past = _past_of(inputs)
    if "pixel_values" not in inputs:
        if pruning._generation is None and inputs.get("mm_encoder_outputs"):
            raise ValueError("a pruned model wants pixel_values, not pictures that are encoded already")
        if past is not None and "position_ids" not in inputs:
            return original(**_resumed(past, inputs))
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
    cut = _cut_of(model, inputs, choice, right=mask is not None and not bool(mask[:, -1].all()))
    short = _shortened(model, pruning, inputs, cut)
    features = _cut_features(model, output, choice)
    features["pooler_output"] = _contained(model, features["pooler_output"])
    result = original(**short, mm_encoder_outputs={"image": type(output)(**features)})
    pruning.cut = cut
    caches = result.values() if isinstance(result, ModelOutput) else result
    for cache in caches:
        if isinstance(cache, Cache):
            _remember(cache, cut, short["position_ids"])
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
    cut = None
    if output is not None:
        inputs = {**generation.inputs, **kwargs, "input_ids": input_ids}
        pictures = split_pictures(model, inputs, output.pooler_output, generation.patches)
        choice = _choose(model, pruning, pictures, inputs)
        if choice is not None:
            cut = _cut_of(model, inputs, choice)
            features = _cut_features(model, output, choice)
            kwargs["mm_encoder_outputs"] = {"image": type(output)(**features)}
    elif generation.past is not None:
        cut = generation.past.cut.extended(kwargs["position_ids"].shape[-1])
    if cut is not None:
        short = _shortened(model, pruning, {**kwargs, "input_ids": input_ids}, cut)
        input_ids = short.pop("input_ids")
        kwargs = short
    input_ids, kwargs = original(expand_size, is_encoder_decoder, input_ids, **kwargs)
    if cut is not None:
        if output is not None:
            encoded = kwargs["mm_encoder_outputs"]["image"]
            encoded["pooler_output"] = _contained(model, encoded["pooler_output"])
            pruning.cut = cut
        generation.cut, generation.position_ids = cut.repeated(expand_size), kwargs["position_ids"]
    return input_ids, kwargs


def _generate(model: PreTrainedModel, pruning: Pruning, *args: Any, **kwargs: Any) -> Any:
    original = pruning.original("generate")
    inputs = named(original, args, kwargs)
    if inputs.get("mm_encoder_outputs"):
        raise ValueError("a pruned model wants pixel_values, not pictures that are encoded already")
    pictures, past = "pixel_values" in inputs, _past_of(inputs)
    if not pictures and past is None:
        return original(*args, **kwargs)
    if "inputs" in inputs:
        inputs["input_ids"] = inputs.pop("inputs")
    prompt = inputs.get("input_ids")
    if pictures:
        refuse(inputs)
    if prompt is None:
        raise ValueError("a pruned model needs input_ids, to know which tokens are visual")
    whole = past is None or prompt.shape[1] >= past.cut.length
    if whole:
        _count_new_tokens(model, inputs, prompt.shape[1])
    with recorded_tower(model, pruning.selector.needs if pictures else frozenset()) as patches:
        generation = pruning._generation = _Generation(inputs, patches, past)
        try:
            result = original(**inputs)
        finally:
            pruning._generation = None
    cut, positions = generation.cut, generation.position_ids
    if cut is None or positions is None:
        return result
    returned = isinstance(result, ModelOutput)
    cache = result.get("past_key_values") if returned else inputs.get("past_key_values")
    if whole:
        sequences = result["sequences"] if returned else result
        repeated = prompt.to(sequences.device).repeat_interleave(len(sequences) // len(prompt), 0)
        sequences = torch.cat([repeated, sequences[:, cut.index.shape[1] :]], 1)
        if returned:
            result["sequences"] = sequences
        else:
            result = sequences
    if cache is not None:
        _remember(cache, cut, positions + family_of(model).first_position if positions.ndim == 2 else positions)
    return result


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "_expand_inputs_for_generation": _expand,
    "generate": _generate,
}


def named(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without those that are None."""
    arguments = inspect.signature(method).bind(*args, **kwargs).arguments
    named = {**arguments, **arguments.pop("kwargs", {})}
    return {name: value for name, value in named.items() if value is not None and name != "kwargs"}


def refuse(inputs: Mapping[str, Any]) -> None:
    """Raise ValueError for what a call with pictures cannot be cut by."""
    if "pixel_values_videos" in inputs:
        raise ValueError("a pruned model does not take videos; unprune it, or give pictures")
    if "inputs_embeds" in inputs or "input_ids" not in inputs:
        raise ValueError("a pruned model needs input_ids, to know which tokens are visual")
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise ValueError("a pruned model wants an attention_mask of shape (B, L)")
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise ValueError("a pruned model takes logits_to_keep as a number, since the prompt becomes shorter")
    cache = inputs.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError("a pruned model does not take new pictures on a filled cache; start again without the cache")


def samples_of(pictures: list[ImageFeatures], placeholder: Tensor) -> Tensor:
    """The row of ``placeholder (B, L)`` in which each picture stands, int64 on the CPU.

    Raises:
        ValueError: the pictures have more or fewer visual tokens than the rows.
    """
    ends = placeholder.sum(1).cumsum(0).cpu()
    sizes = torch.tensor([len(picture.tokens) for picture in pictures])
    if int(sizes.sum()) != int(ends[-1]):
        raise ValueError(f"the pictures have {int(sizes.sum())} visual tokens, the prompts hold {int(ends[-1])}")
    return torch.searchsorted(ends, sizes.cumsum(0))


def kept_of(pictures: list[ImageFeatures], sample: Tensor, batch: int, keep: Tensor) -> list[list[Kept]]:
    """What bool ``keep (T,)``, all pictures one after the other, says of the pictures of each of ``batch`` samples."""
    kept: list[list[Kept]] = [[] for _ in range(batch)]
    flags = torch.split(keep, [len(picture.tokens) for picture in pictures])
    for number, picture, flag in zip(sample.tolist(), pictures, flags, strict=True):
        indices = flag.nonzero()[:, 0]
        kept[number].append(Kept(indices, picture.coords[indices], len(picture.tokens)))
    return kept


def _choose(
    model: PreTrainedModel, pruning: Pruning, pictures: list[ImageFeatures], inputs: Mapping[str, Any]
) -> _Choice | None:
    """Ask the selector about all pictures of a batch; None if nothing is dropped or changed."""
    ids = inputs["input_ids"]
    placeholder = ids == model.config.image_token_id
    counts = placeholder.sum(1).tolist()
    sample = samples_of(pictures, placeholder)
    text = ~placeholder & ~torch.isin(ids, torch.tensor(_no_question(model, pruning), device=ids.device))
    if (mask := inputs.get("attention_mask")) is not None:
        text &= mask.bool()
    questions = pad_sequence([row[asked] for row, asked in zip(ids, text, strict=True)], batch_first=True)
    asked = torch.arange(questions.shape[1], device=ids.device) < text.sum(1, keepdim=True)
    query = model.get_input_embeddings()(questions) * asked[..., None]
    where = sample.to(ids.device)
    visual = collate(pictures, query[where], asked[where])
    selection = pruning.choose(visual)

    pruning.cut = None
    keep = selection.keep_mask[visual.mask]
    pruning.kept = kept_of(pictures, sample, len(ids), keep)
    if selection.tokens is None and bool(keep.all()):
        return None
    tokens = visual.tokens if selection.tokens is None else selection.tokens.to(visual.tokens.dtype)
    return _Choice(keep, tokens[visual.mask], counts)


def _no_question(model: PreTrainedModel, pruning: Pruning) -> list[int]:
    """Ids that are no part of a question."""
    video = [model.config.video_token_id] if hasattr(model.config, "video_token_id") else []
    return sorted(pruning.template_ids) + video


def _cut_of(model: PreTrainedModel, inputs: Mapping[str, Any], choice: _Choice, right: bool = False) -> Cut:
    """Kept tokens in their order, padded to the longest row on the left, or on the ``right``."""
    ids = inputs["input_ids"]
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[ids == model.config.image_token_id] = choice.keep.to(ids.device)
    if (mask := inputs.get("attention_mask")) is not None:
        keep &= mask.bool()
    longest = int(keep.sum(1).max())
    if right:
        index = keep.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    else:
        index = keep.int().argsort(dim=1, stable=True)[:, -longest:]
    return Cut(index, keep.gather(1, index), ids.shape[1])


def _shortened(model: PreTrainedModel, pruning: Pruning, inputs: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """The inputs of the short prompt, without those that describe pictures."""
    short = {name: value for name, value in inputs.items() if name not in family_of(model).vision_inputs}
    pad = model.generation_config.pad_token_id or 0
    for name, filler in {**_ALIGNED, "input_ids": pad}.items():
        if isinstance(value := short.get(name), Tensor) and value.shape[1] == cut.length:
            short[name] = value.gather(1, cut.index).masked_fill(~cut.mask, filler)
    mask = short.get("attention_mask")
    attended = cut.mask if mask is None else mask.bool().gather(1, cut.index) & cut.mask
    short["attention_mask"] = attended.long() if mask is None else attended.to(mask.dtype)
    short["position_ids"] = _cut_positions(short["position_ids"], cut, pruning.positions)
    return short


def _cut_positions(position_ids: Tensor, cut: Cut, positions: Positions) -> Tensor:
    """Position ids ``(..., B, L)`` of the short prompt; where there are four rows the first is that of the text, which
    masks are made by, and never has gaps."""
    index = cut.index.expand(*position_ids.shape[:-2], -1, -1)
    gathered = position_ids.expand(*index.shape[:-1], -1).gather(-1, index)
    counted = cut.mask.long().cumsum(-1) - 1
    if positions == "compact":
        first = gathered.masked_fill(~cut.mask, gathered.max() + 1).amin(-1, keepdim=True)
        gathered = counted + first
    elif position_ids.ndim == 3 and len(position_ids) == 4:
        gathered = torch.cat([counted[None], gathered[1:]])
    return gathered.masked_fill(~cut.mask, 0)


def _cut_features(model: PreTrainedModel, output: Any, choice: _Choice) -> dict[str, Any]:
    """The kept features, one entry a sample, and those of the deeper layers that some models add."""
    keep = choice.keep
    counts = [int(part.sum()) for part in torch.split(keep, choice.counts)]
    features: dict[str, Any] = {"pooler_output": list(torch.split(choice.tokens[keep], counts))}
    deep = output.get("deepstack_features")
    if deep is not None:
        features["deepstack_features"] = [list(torch.split(torch.cat(list(layer))[keep], counts)) for layer in deep]
    return features


def _contained(model: PreTrainedModel, entries: list[Tensor]) -> Any:
    """One entry a sample, in the container that the model wants."""
    container = family_of(model).container
    return torch.cat(entries)[None] if container is Tensor else container(entries)


def _remember(cache: Cache, cut: Cut, position_ids: Tensor) -> None:
    """Note in a cache what a continuation has to know."""
    last = torch.where(cut.mask, torch.arange(cut.mask.shape[1], device=cut.mask.device), -1).amax(1)
    index = last[:, None].expand(*position_ids.shape[:-1], 1)
    cache._tprl_past = _Past(cut, position_ids.gather(-1, index) + 1)  # type: ignore[attr-defined]


def _past_of(inputs: Mapping[str, Any]) -> _Past | None:
    """What was noted in the cache that a call continues."""
    cache = inputs.get("past_key_values")
    if cache is None or int(cache.get_seq_length()) == 0:
        return None
    return cast("_Past | None", cache.__dict__.get("_tprl_past"))


def _resumed(past: _Past, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a direct ``forward`` on a cache, with the positions and the mask of the short prompt."""
    tokens = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
    before, new = int(inputs["past_key_values"].get_seq_length()), tokens.shape[1]
    behind = before - past.cut.index.shape[1] + torch.arange(new, device=tokens.device)
    cut = past.cut.extended(past.cut.length + before - past.cut.index.shape[1] + new)
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = cut.mask.long()
    elif mask.shape[1] == cut.length:
        mask = (mask.bool().gather(1, cut.index) & cut.mask).to(mask.dtype)
    return {**inputs, "attention_mask": mask, "position_ids": past.next_position + behind}


def _count_new_tokens(model: PreTrainedModel, inputs: dict[str, Any], prompt: int) -> None:
    """Turn lengths that count the whole prompt into numbers of new tokens, which a shorter prompt does not change."""
    config = inputs.get("generation_config", model.generation_config)
    for new, whole in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        given = {**config.to_dict(), **inputs}
        if given.get(new) is None and given.get(whole):
            inputs.pop(whole, None)
            inputs[new] = max(given[whole] - prompt, 0)
            if new == "max_new_tokens" and inputs[new] == 0:
                raise ValueError(f"max_length {given[whole]} leaves no room behind a prompt of {prompt} tokens")
