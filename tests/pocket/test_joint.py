"""A tower that learned on by itself, put back into the model."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tprl.pocket.assemble import DELTA
from tprl.pocket.base import image_token_id, load_base
from tprl.pocket.joint import renew_tower
from tprl.pocket.labels import UNITS
from tprl.pocket.model import add_delta, new_llava
from tprl.pocket.tower import Batches, normalise, shipped_tower


@pytest.fixture(scope="module")
def llava() -> Any:
    base, tokenizer = load_base()
    llava = new_llava(base, image_token_id(tokenizer))
    add_delta(llava, load_file(DELTA))
    return llava


@torch.no_grad()
def test_the_projector_goes_on_to_say_what_it_said(llava: Any) -> None:
    """A last layer whose outputs are mixed anew holds the same facts elsewhere."""
    pixels = normalise(Batches(2, 1000, 1001)[0].pixels)

    def units() -> Tensor:
        return llava.model.multi_modal_projector.linear_1(llava.model.vision_tower(pixels).last_hidden_state[:, 1:])

    before = units()
    tower = shipped_tower(DELTA)
    last = tower.vision.encoder.layers[-1].mlp.fc2
    last.weight[:] += 0.3 * last.weight.roll(1, 0)
    tower.words.bias += 1.0
    stale = llava.model.multi_modal_projector.linear_1(tower.vision(pixels).last_hidden_state[:, 1:])
    renew_tower(llava, tower, batches=1)
    after = units()
    words = tower.words(tower.vision(pixels).last_hidden_state[:, 1:])
    torch.testing.assert_close(after[..., :UNITS], words, atol=1e-4, rtol=1e-4)
    spread = before[..., UNITS:].std()
    fitted = (after - before)[..., UNITS:].std() / spread
    left = (stale - before)[..., UNITS:].std() / spread
    assert fitted < 0.5 * left
