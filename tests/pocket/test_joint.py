"""A tower that learned on by itself, put back into the model."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from tprl.checkpoint import prefixed, save_checkpoint, with_prefix
from tprl.pocket.assemble import DELTA
from tprl.pocket.joint import start_from
from tprl.pocket.labels import UNITS
from tprl.pocket.model import unrounded
from tprl.pocket.tower import TOWER, Batches, normalise, shipped_tower

PROJECTOR = "model.multi_modal_projector.linear_1."


@torch.no_grad()
def test_the_projector_goes_on_to_say_what_it_said(tmp_path: Path) -> None:
    """A last layer whose outputs are mixed anew holds the same facts elsewhere."""
    pixels = normalise(Batches(2, 1000, 1001)[0].pixels)
    tower, shipped = shipped_tower(DELTA), shipped_tower(DELTA)
    last = tower.vision.get_submodule("encoder.layers")[-1].mlp.fc2.weight
    last += 0.3 * last.roll(1, 0)
    tower.words.bias += 1.0
    save_checkpoint(tmp_path / TOWER, prefixed(tower.state_dict().items(), "model."), {"step": 1})
    llava, _ = start_from(DELTA, tmp_path)

    fitted = llava.model.multi_modal_projector.linear_1
    old = {name: part.float() for name, part in with_prefix(unrounded(load_file(DELTA)), PROJECTOR).items()}
    before = shipped.vision(pixels).last_hidden_state[:, 1:]
    after = llava.model.vision_tower(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(after, tower.vision(pixels).last_hidden_state[:, 1:])
    torch.testing.assert_close(fitted(after)[..., :UNITS], tower.words(after), atol=1e-4, rtol=1e-4)
    known = nn.functional.linear(before, old["weight"], old["bias"])[..., UNITS:]
    stale = nn.functional.linear(after, old["weight"], old["bias"])[..., UNITS:]
    assert (fitted(after)[..., UNITS:] - known).std() < 0.25 * (stale - known).std()
