"""What the vision tower tells besides its tokens, against its own attention."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lvlm.tiny import make
from tprl.lvlm.families import FAMILIES
from tprl.lvlm.signals import TOWERS, recorded_tower


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
