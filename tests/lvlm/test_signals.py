"""What the vision tower tells besides its tokens, against its own attention."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lvlm.tiny import CONFIGS, make, state
from tprl.lvlm.families import FAMILIES
from tprl.lvlm.signals import TOWER_SIGNALS, TOWERS, recorded_tower


@pytest.mark.parametrize("name", ["gemma3", "idefics3", "llava_onevision"])
def test_without_cls_it_is_what_a_patch_receives_on_average(name: str) -> None:
    """Over heads and over the patches that ask; LLaVA's tower, which has one, is in ``test_model``."""
    tiny, weights = make(name, attention="eager"), list[Tensor]()
    tower: Any = tiny.model.get_submodule(FAMILIES[name].tower)
    attention = tower.get_submodule(TOWERS[tower.config.model_type].layers)[-1].self_attn
    attention.register_forward_hook(lambda module, given, output: weights.append(output[1]))
    with torch.no_grad(), recorded_tower(tiny.model, frozenset({"cls_attention"})) as patches:
        tiny.model(**tiny.batch([1, "I", 2]))
    torch.testing.assert_close(patches["cls_attention"], weights[0].mean((1, 2)).float())


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
