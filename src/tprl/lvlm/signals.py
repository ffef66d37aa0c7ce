"""What a vision tower can tell about its patches besides their features: attention and keys of its last used layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

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
    The tower attends eagerly while attention is asked for, the language model stays as it is.

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
    recorded: dict[str, Tensor] = {}

    def record_attention(module: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        weights = output[1].detach().float().mean(1)
        recorded["cls_attention"] = weights[:, 0, skip:] if skip else weights.mean(1)

    def record_keys(module: nn.Module, inputs: object, output: Tensor) -> None:
        heads = torch.unflatten(output.detach().float(), -1, (tower.config.num_attention_heads, -1))
        recorded["tower_keys"] = heads.mean(-2)[:, skip:]

    implementation = tower.config._attn_implementation
    hooks = []
    try:
        if "cls_attention" in names:
            hooks.append(attention.register_forward_hook(record_attention))
            tower.set_attn_implementation("eager")
        if "tower_keys" in names:
            hooks.append(attention.get_submodule("k_proj").register_forward_hook(record_keys))
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
        if "cls_attention" in names:
            tower.set_attn_implementation(implementation)


def _used_layer(model: PreTrainedModel, family: Family) -> int:
    """Index of the layer whose output the projector reads."""
    if not family.names_layer:
        return -1
    layer = model.config.vision_feature_layer
    layer = layer if isinstance(layer, int) else layer[-1]
    return layer if layer < 0 else layer - 1
