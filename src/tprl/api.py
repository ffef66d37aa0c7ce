"""The face of the package: prune a model in one call."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from tprl.lvlm.cut import Positions
from tprl.lvlm.handle import Handle, check_model, unprune
from tprl.lvlm.model import Lvlm
from tprl.lvlm.proportional import check_attention
from tprl.lvlm.prune import prune as prune_prompt
from tprl.lvlm.prune_inside import prune_inside
from tprl.pruner import TokenPruner
from tprl.selectors import InModel, Selector, make_selector

__all__ = ["TokenPruner", "prune", "unprune"]


def prune(
    model: PreTrainedModel,
    pruner: TokenPruner | Selector | InModel | str,
    *,
    budget: int | None = None,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    positions: Positions = "original",
    processor: ProcessorMixin | None = None,
    template_ids: frozenset[int] | None = None,
) -> Handle:
    """Let ``model`` drop visual tokens: ``model(**inputs)`` and ``model.generate(**inputs)`` then see fewer of them.

    Only this instance changes; ``unprune(model)`` or leaving a ``with`` statement undoes it.

    Args:
        model: of one of ``tprl.lvlm.families.FAMILIES``, with a language-modelling head.
        pruner: what decides: a trained pruner, one of the peers in ``tprl.selectors``, or a peer's name.
        budget: visual tokens to keep of every picture, all of one that has fewer. Inside the language model the
            pictures of a prompt share as many as that makes together.
        keep_ratio: share of the visual tokens to keep, in (0, 1].
        threshold: keep what a ``TokenPruner`` gives more than this probability, in [0, 1]; its calibrated one where no
            amount is given.
        positions: "original": kept tokens stay at their position ids. "compact": position ids count what is left; not
            for methods that act inside the language model.
        processor: the model's own, by whose chat template the question's own tokens are told from the rest.
        template_ids: the ids of the chat template, instead of ``processor``. What reads the question, a
            ``TokenPruner`` or "cdpruner", needs one of the two.

    Returns:
        A handle whose ``kept`` tells, after a call, which tokens of which picture were kept and where they lie.

    Raises:
        ValueError: an unknown family or name, a model that is pruned already, a pruner of another model, no way to tell
            the question from the template, a pruner on another device, without weights or not in float32, a pruner that
            wants proportional attention and a model whose attention cannot be, not exactly one amount, or a value that
            is not allowed.

    Example:
        >>> with tprl.prune(model, pruner, budget=64, processor=processor) as pruned:
        ...     model.generate(**inputs)
        >>> pruned.kept[0][0].coords
    """
    check_model(model)
    chosen: Any = make_selector(pruner) if isinstance(pruner, str) else pruner
    if isinstance(chosen, type):
        raise ValueError(f"give an object, {chosen.__name__}(), not the class itself")
    if not isinstance(chosen, InModel) and not hasattr(chosen, "select"):
        raise ValueError(f"pruner {chosen!r} is not allowed; a TokenPruner, a selector or the name of one")
    if isinstance(chosen, InModel):
        if positions != "original":
            raise ValueError(f"positions {positions!r} is not allowed with {chosen.name}; 'original'")
        if threshold is not None:
            raise ValueError(f"threshold {threshold} is not allowed with {chosen.name}; give budget or keep_ratio")
        return prune_inside(model, chosen, budget=budget, keep_ratio=keep_ratio)
    if isinstance(chosen, TokenPruner):
        chosen.check_fits(Lvlm(model).fingerprint)
        if chosen.config.proportional:
            check_attention(model)
        weights, device = chosen.token_mean, _device(model)
        if weights.is_meta:
            raise ValueError("the pruner is on meta, without its weights; load it again: TokenPruner.from_pretrained")
        if weights.device != device or weights.dtype != torch.float32:
            raise ValueError(
                f"the pruner is on {weights.device} in {weights.dtype}, the model on {device}; a pruner works in "
                f"float32 beside its model: pruner.float().to({str(device)!r})"
            )
        if budget is None and keep_ratio is None and threshold is None:
            threshold = chosen.config.threshold
    if processor is not None and template_ids is None:
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(f"processor {type(processor).__name__} is not allowed; the whole one, of AutoProcessor")
        template_ids = Lvlm(model, processor).prompts.template_ids
    if getattr(chosen, "reads_question", False) and template_ids is None:
        raise ValueError(
            f"{chosen.name} reads the question's own tokens: give the model's own as processor=, or the ids of the "
            "chat template as template_ids="
        )
    return prune_prompt(
        model,
        chosen,
        budget=budget,
        keep_ratio=keep_ratio,
        threshold=threshold,
        positions=positions,
        template_ids=template_ids or frozenset(),
    )


def _device(model: PreTrainedModel) -> torch.device:
    """Where the model computes; offloaded by accelerate, its weights are on meta between calls and its hooks know."""
    if model.device.type != "meta":
        return model.device
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    return torch.empty(0, device=devices[0] if devices else "cpu").device  # 0 and "cuda" are "cuda:0"
