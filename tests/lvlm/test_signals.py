"""What the vision tower tells besides its tokens, against its own attention."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lvlm.tiny import CONFIGS, make, state
from tprl.lvlm.families import FAMILIES
from tprl.lvlm.signals import TOWER_SIGNALS, TOWERS, recorded_tower

NORMED = {**CONFIGS["internvl"], "vision_config": {**CONFIGS["internvl"]["vision_config"], "use_qk_norm": True}}


def eager_weights(name: str, inputs: dict[str, Tensor]) -> Tensor:
    """What the eager tower's own last layer returns, mean over heads: ``(E, P, P)``."""
    tiny, weights = make(name, attention="eager"), list[Tensor]()
    tower: Any = tiny.model.get_submodule(FAMILIES[name].tower)
    facts = TOWERS[tower.config.model_type]
    attention = tower.get_submodule(facts.layers)[-1].get_submodule(facts.attention)
    attention.register_forward_hook(lambda module, given, output: weights.append(output[1]))
    tiny.model(**inputs)
    return weights[0].mean(1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gemma3", "idefics3", "smolvlm", "llava_onevision"])
def test_without_cls_it_is_what_a_patch_receives_on_average(name: str, attention: str) -> None:
    """Over heads and over the patches that ask."""
    tiny = make(name, attention=attention)
    inputs = tiny.batch([1, "I", 2])
    with recorded_tower(tiny.model, frozenset({"cls_attention"})) as patches:
        tiny.model(**inputs)
    torch.testing.assert_close(patches["cls_attention"], eager_weights(name, inputs).mean(1).float())


@torch.no_grad()
@pytest.mark.parametrize("name", ["internvl", "llava"])
def test_with_cls_it_is_what_that_pays(name: str) -> None:
    """Queries and keys of InternVL's larger towers are normalised first."""
    with patch.dict(CONFIGS, internvl=NORMED):
        tiny = make(name)
        inputs = tiny.batch([1, "I", 2], [1, "I", 3])
        with recorded_tower(tiny.model, frozenset({"cls_attention"})) as patches:
            tiny.model(**inputs)
        weights = eager_weights(name, inputs)
    torch.testing.assert_close(patches["cls_attention"], weights[:, 0, 1:].float())


@torch.no_grad()
def test_padding_of_a_picture_receives_nothing() -> None:
    tiny = make("idefics3")
    inputs = tiny.batch([1, "I", 2])
    shape = inputs["pixel_values"].shape
    inputs["pixel_attention_mask"] = torch.ones(*shape[:2], *shape[3:], dtype=torch.bool)
    inputs["pixel_attention_mask"][:, :, 16:] = False
    with recorded_tower(tiny.model, frozenset({"cls_attention"})) as patches:
        tiny.model(**inputs)
    assert not patches["cls_attention"].unflatten(1, (6, 6))[:, 4:].any()
    torch.testing.assert_close(patches["cls_attention"], eager_weights("idefics3", inputs).mean(1).float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_left_alone(reentrant: bool) -> None:
    """What backward computes again, when nothing is recorded any more, is what was computed."""
    gradients = []
    for checkpointing in (False, True):
        tiny = make("llava")
        tiny.model.train()
        if checkpointing:
            tiny.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        inputs = tiny.batch([1, "I", 2])
        with recorded_tower(tiny.model, TOWER_SIGNALS) as patches:
            loss = tiny.model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        assert not any(signal.requires_grad for signal in patches.values())
        named = tiny.model.named_parameters()
        gradients.append({name: part.grad for name, part in named if part.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_of_several_layers_that_a_projector_reads_the_last_one_tells() -> None:
    keys = []
    for layer in ([1, 2], 2, 1):
        with patch.dict(CONFIGS, llava={**CONFIGS["llava"], "vision_feature_layer": layer}):
            tiny = make("llava")
        with torch.no_grad(), recorded_tower(tiny.model, frozenset({"tower_keys"})) as patches:
            tiny.model(**tiny.batch([1, "I", 2]))
        keys.append(patches["tower_keys"])
    assert torch.equal(keys[0], keys[1])
    assert not torch.allclose(keys[0], keys[2])


def test_the_tower_is_left_as_it_was() -> None:
    tiny = make("llava")
    before = state(tiny.model)
    with pytest.raises(RuntimeError, match="meanwhile"), recorded_tower(tiny.model, TOWER_SIGNALS):
        raise RuntimeError("meanwhile")
    after = state(tiny.model)
    assert set(after) == set(before)
    for name, value in before.items():
        assert after[name] is value or after[name] == value, name
