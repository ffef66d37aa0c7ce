"""What the ways of pruning a model of transformers share: the handle that undoes them and tells what was kept.

Methods of the *instance* are replaced, none of its classes.
"""

import inspect
import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from numbers import Real
from types import MethodType, TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from tprl.lvlm.families import family_of
from tprl.lvlm.pictures import ImageFeatures

HANDLE = "_tprl_pruning"
"""Name of the attribute of a pruned model that holds its ``Handle``."""


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


class Handle:
    """The state of a pruned model. As a context manager it un-prunes the model on leaving.

    Attributes:
        kept: what was kept in the last call that had pictures: for each sample, a ``Kept`` a picture.
        methods: what stands in the place of methods of the model.
        lock: held by the thread whose call is on its way; the calls of others wait.
    """

    def __init__(self, model: PreTrainedModel, replacements: Mapping[str, Callable[..., Any]]) -> None:
        self.kept: list[list[Kept]] = []
        self.replaced: dict[str, Any] = {name: model.__dict__[name] for name in replacements if name in model.__dict__}
        self._model = model
        self.methods = {
            name: MethodType(_with_signature(replacement, self.original(name)), model)
            for name, replacement in replacements.items()
        }
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy({**self.__dict__, "lock": None}, memo), lock=threading.RLock())
        return copy

    def __getstate__(self) -> None:
        raise ValueError("a pruned model cannot be pickled; unprune it first, and prune it anew where it is loaded")

    @property
    def attached(self) -> bool:
        """Whether it is this handle by which the model is pruned."""
        return self._model.__dict__.get(HANDLE) is self

    def __enter__(self) -> Self:
        if not self.attached:
            raise ValueError("this pruning of the model was undone; prune it anew")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.attached:
            unprune(self._model)

    def original(self, name: str) -> Callable[..., Any]:
        """The method of the model that was replaced."""
        if name in self.replaced:
            return cast(Callable[..., Any], self.replaced[name])
        return cast(Callable[..., Any], MethodType(getattr(type(self._model), name), self._model))

    def attach(self) -> None:
        """Put the replacements in their places."""
        for name, method in self.methods.items():
            setattr(self._model, name, method)
        setattr(self._model, HANDLE, self)


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError unless ``model`` can be pruned."""
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise ValueError(
            f"{type(model).__name__} cannot be pruned; give the model of transformers with its language-modelling head "
            "that is inside, such as peft_model.get_base_model(), or that which torch.compile was given"
        )
    family_of(model)


def check_amount(model: PreTrainedModel, given: Mapping[str, float | None]) -> None:
    """Raise ValueError unless ``model`` can be pruned and exactly one of the amounts ``given`` is given and allowed."""
    check_model(model)
    if HANDLE in model.__dict__:
        raise ValueError("the model is pruned already; unprune it first")
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        names = list(given)
        raise ValueError(
            f"give exactly one of {', '.join(names[:-1])} and {names[-1]}; got {', '.join(chosen) or 'none'}"
        )
    budget = chosen.get("budget", 1)
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise ValueError(f"budget {budget!r} is not allowed; a whole number, at least 1")
    ratio, threshold = chosen.get("keep_ratio", 1), chosen.get("threshold", 0)
    if not isinstance(ratio, Real) or not 0 < ratio <= 1:
        raise ValueError(f"keep_ratio {ratio!r} is not allowed; a number more than 0 and at most 1")
    if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold!r} is not allowed; a number from 0 to 1")


def unprune(model: PreTrainedModel) -> None:
    """Leave ``model`` as it was before ``prune``, once a call that is on its way in another thread is done; nothing to
    do if it is not pruned.

    Raises:
        ValueError: one of its methods has been wrapped or replaced since, which would be lost.
    """
    pruning = model.__dict__.get(HANDLE)
    if pruning is None:
        return
    with pruning.lock:
        if wrapped := [name for name, method in pruning.methods.items() if model.__dict__.get(name) != method]:
            raise ValueError(
                f"{', '.join(wrapped)} of the model, wrapped or replaced after it was pruned, would be lost: undo that"
            )
        for name in pruning.methods:
            delattr(model, name)
            if name in pruning.replaced:
                setattr(model, name, pruning.replaced[name])
        delattr(model, HANDLE)


def _with_signature(replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A fresh ``replacement`` that reads like the bound method ``original``, whose signature ``generate`` inspects."""

    @wraps(original)
    def method(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        handle: Handle | None = self.__dict__.get(HANDLE)
        if handle is None:
            raise ValueError(f"this {original.__name__} is that of a pruning which was undone; take the model's own")
        with handle.lock:
            return replacement(self, handle, *args, **kwargs)

    signature = inspect.signature(original)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [first, *signature.parameters.values()]
    method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    del method.__wrapped__
    return method


def named(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without those that are None."""
    arguments = inspect.signature(method).bind(*args, **kwargs).arguments
    named = {**arguments, **arguments.pop("kwargs", {})}
    return {name: value for name, value in named.items() if value is not None and name != "kwargs"}


def noted(inputs: Mapping[str, Any], name: str) -> Any:
    """What an earlier call noted, by the attribute ``name``, in the cache that a call continues; forgotten once that is
    emptied."""
    cache = inputs.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) == 0:
        cache.__dict__.pop(name, None)
    return getattr(cache, name, None)


def refuse_encoded(inputs: Mapping[str, Any]) -> None:
    """Raise ValueError for pictures of which the vision tower's own part is done."""
    if inputs.get("mm_encoder_outputs"):
        raise ValueError("a pruned model wants pixel_values, not pictures that are encoded already")


def refuse_videos(inputs: Mapping[str, Any]) -> None:
    """Raise ValueError for a call with videos, with pictures or without."""
    if "pixel_values_videos" in inputs:
        raise ValueError("a pruned model does not take videos; unprune it, or give pictures")


def refuse(inputs: Mapping[str, Any]) -> None:
    """Raise ValueError for what a call with pictures cannot be cut by."""
    refuse_encoded(inputs)
    if "inputs_embeds" in inputs or "input_ids" not in inputs:
        raise ValueError("a pruned model needs input_ids, to know which tokens are visual")
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise ValueError("a pruned model wants an attention_mask of shape (B, L)")
    if "image_grid_thw" in inputs and not inputs.keys() & {"mm_token_type_ids", "position_ids"}:
        raise ValueError("mm_token_type_ids, which the processor returns, are missing; positions need them")
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise ValueError("a pruned model takes logits_to_keep as a number, since the prompt becomes shorter")
    cache = inputs.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError("a pruned model does not take new pictures on a filled cache; start again without the cache")


def unanswered(text: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Of bool ``text (B, L)`` what stands before a row's first label, so that no answer decides what is kept; all of a
    row whose labels begin before its text."""
    labels: Tensor | None = inputs.get("labels")
    if labels is None:
        return text
    before = text & (labels == -100).cumprod(1).bool()
    return before | (text & ~before.any(1, keepdim=True))


def kept_of(pictures: list[ImageFeatures], sample: Tensor, batch: int, keep: Tensor) -> list[list[Kept]]:
    """What bool ``keep (T,)``, all pictures one after the other, says of the pictures of each of ``batch`` samples."""
    kept: list[list[Kept]] = [[] for _ in range(batch)]
    flags = torch.split(keep, [len(picture.tokens) for picture in pictures])
    for number, picture, flag in zip(sample.tolist(), pictures, flags, strict=True):
        indices = flag.nonzero()[:, 0]
        kept[number].append(Kept(indices, picture.coords[indices], len(picture.tokens)))
    return kept
