"""What a vision tower can tell about its patches besides their features: attention and keys of its last used layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tprl.lvlm.families import TOWERS, Family, family_of

TOWER_SIGNALS = frozenset({"cls_attention", "tower_keys"})
"""The keys of ``tprl.types.SIGNALS`` that come from the vision tower."""


def tower_signals(model: PreTrainedModel) -> frozenset[str]:
    """Those of ``TOWER_SIGNALS`` that the model's vision tower gives: all or none."""
    known = family_of(model).pack is not None and model.config.vision_config.model_type in TOWERS
    return TOWER_SIGNALS if known else frozenset()


@contextmanager
def recorded_tower(model: PreTrainedModel, names: frozenset[str]) -> Iterator[dict[str, Tensor]]:
    """While it is open, the vision tower writes signals of its patches into the mapping that it gives.

    ``cls_attention``: float32 ``(E, P)`` for ``E`` crops of ``P`` patches; ``tower_keys``: float32 ``(E, P, K)``.
    The model runs as it does without, by whatever implementation it attends: the attention of the one layer is computed
    beside it, from its queries and keys, and has no gradient.

    Raises:
        ValueError: a name is not in ``TOWER_SIGNALS``, or the family's tower does not give it.
    """
    if not names:
        yield {}
        return
    family = family_of(model)
    if not names <= TOWER_SIGNALS:
        unknown = sorted(names - TOWER_SIGNALS)
        raise ValueError(f"signals {unknown} do not come from a vision tower; {sorted(TOWER_SIGNALS)} do")
    tower = cast(PreTrainedModel, model.get_submodule(family.tower))
    if not tower_signals(model):
        raise ValueError(
            f"{family.name} with the tower {tower.config.model_type!r} gives no signals, asked for {sorted(names)}; "
            f"towers that do: {', '.join(sorted(TOWERS))}"
        )
    facts = TOWERS[tower.config.model_type]
    layers = cast(nn.ModuleList, tower.get_submodule(facts.layers))
    attention = layers[_used_layer(model, family)].get_submodule(facts.attention)
    skip = int(facts.has_cls)
    projected: dict[str, Tensor] = {}
    recorded: dict[str, Tensor] = {}

    def split(states: Tensor) -> Tensor:
        return torch.unflatten(states.detach(), -1, (tower.config.num_attention_heads, -1))

    def see(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        projected[name] = split(output)

    def see_mask(module: nn.Module, inputs: object, given: dict[str, Any]) -> None:
        if (mask := given.get("patch_attention_mask")) is not None:
            projected["mask"] = mask.flatten(1).bool()

    def record_attention(module: nn.Module, inputs: object, output: object) -> None:
        asking = projected["queries"][:, :1] if skip else projected["queries"]
        received = _received(asking, projected["keys"], cast(float, module.scale), projected.get("mask"))
        recorded["cls_attention"] = received[:, skip:]
        projected.clear()

    def record_keys(module: nn.Module, inputs: object, output: Tensor) -> None:
        recorded["tower_keys"] = split(output).float().mean(-2)[:, skip:]

    hooks = []
    try:
        if "cls_attention" in names:
            hooks.append(tower.register_forward_pre_hook(see_mask, with_kwargs=True))
            hooks.append(attention.get_submodule(facts.queries).register_forward_hook(partial(see, "queries")))
            hooks.append(attention.get_submodule(facts.keys).register_forward_hook(partial(see, "keys")))
            hooks.append(attention.register_forward_hook(record_attention))
        if "tower_keys" in names:
            hooks.append(attention.get_submodule("k_proj").register_forward_hook(record_keys))
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def _received(queries: Tensor, keys: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The attention that every key receives, mean over the queries and heads: float32 ``(E, P)``.

    Head by head, as the weights of all heads are what fast attention never holds.

    Args:
        queries: ``(E, Q, heads, d)``.
        keys: ``(E, P, heads, d)``.
        mask: bool ``(E, P)``, the keys that are seen; all where None.
    """
    heads = []
    for asking, asked in zip(queries.unbind(2), keys.unbind(2), strict=True):
        scores = asking.float() @ asked.mT.float() * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None].to(scores.device), -torch.inf)
        heads.append(scores.softmax(-1, torch.float32).mean(1))
    return torch.stack(heads).mean(0)


def _used_layer(model: PreTrainedModel, family: Family) -> int:
    """Index of the layer whose output the projector reads."""
    if not family.names_layer:
        return -1
    layer = model.config.vision_feature_layer
    layer = layer if isinstance(layer, int) else layer[-1]
    return layer if layer < 0 else layer - 1
