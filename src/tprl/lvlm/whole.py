"""What callers of ``generate`` count by the whole prompt, while the model works on a shorter one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList

from tprl.lvlm.cut import Cut


def with_prompt(prompt: Tensor, ids: Tensor, cut: Cut | None) -> Tensor:
    """Sequences ``ids (B * G, L' + T)`` that begin with the short prompt, with ``prompt (B, L)`` in its place."""
    if cut is None:
        return ids
    repeated = prompt.to(ids.device).repeat_interleave(len(ids) // len(prompt), 0)
    return torch.cat([repeated, ids[:, cut.index.shape[1] :]], 1)


class _Shown:
    """A criterion, processor or streamer of the caller that is shown whole sequences; all else is as it is."""

    def __init__(self, inner: Any, whole: Callable[[Tensor], Tensor]) -> None:
        self._inner, self._whole = inner, whole

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also what a copy lacks at first
            raise AttributeError(name)
        return getattr(self._inner, name)


class _ShownCriterion(_Shown):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self._inner(self._whole(input_ids), scores, **kwargs)


class _ShownProcessor(_Shown):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:  # ``generate`` counts its arguments
        return self._inner(self._whole(input_ids), scores)


class _ShownStreamer(_Shown):
    def put(self, ids: Tensor) -> None:
        """The first that a streamer is given is the prompt."""
        self._inner.put(self._whole(ids))
        self._whole = lambda ids: ids


def show_whole(merged: list[Any], custom: list[Any], whole: Callable[[Tensor], Tensor]) -> Any:
    """Let the caller's own criteria or processors see whole sequences.

    Args:
        merged: those that ``generate`` works with.
        custom: those of the caller.
        whole: from sequences of ``generate`` to whole ones.
    """
    shown = _ShownCriterion if isinstance(merged, StoppingCriteriaList) else _ShownProcessor
    own = {id(each) for each in custom}
    return type(merged)(shown(each, whole) if id(each) in own else each for each in merged)


def count_whole(inputs: dict[str, Any], prompt: Tensor, cut: Callable[[], Cut | None]) -> None:
    """Let the lengths of the caller's own criteria be those of whole sequences, which its constraint and its streamer
    see.

    Args:
        inputs: of ``generate``, changed in place.
        prompt: ``(B, L)``.
        cut: gives how it was shortened, once that is known.
    """
    criteria = inputs.pop("stopping_criteria", None) or []
    for limit in (each for each in criteria if isinstance(each, MaxLengthCriteria)):
        inputs["max_new_tokens"] = max(limit.max_length - prompt.shape[1], 1)
    inputs["stopping_criteria"] = StoppingCriteriaList(
        each for each in criteria if not isinstance(each, MaxLengthCriteria)
    )
    if (allowed := inputs.get("prefix_allowed_tokens_fn")) is not None:
        inputs["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, with_prompt(prompt[row : row + 1], ids[None], cut())[0]
        )
    if (streamer := inputs.get("streamer")) is not None:
        inputs["streamer"] = _ShownStreamer(streamer, lambda ids: with_prompt(prompt, ids, cut()))


def count_new_tokens(model: PreTrainedModel, inputs: dict[str, Any], prompt: int) -> None:
    """Turn lengths that count the whole prompt into numbers of new tokens, which a shorter prompt does not change."""
    own = (inputs.get("generation_config") or model.generation_config).to_dict()
    config = model.generation_config.to_dict() | {name: value for name, value in own.items() if value is not None}
    for new, whole in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        given = {**config, **inputs}
        if given.get(new) is None and given.get(whole):
            inputs.pop(whole, None)
            inputs[new] = max(given[whole] - prompt, 0)
            if new == "max_new_tokens" and inputs[new] == 0:
                raise ValueError(f"max_length {given[whole]} leaves no room behind a prompt of {prompt} tokens")
