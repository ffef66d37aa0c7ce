"""A tower that learned on by itself, put back into the model."""

from pathlib import Path

import torch
from torch import Tensor

from tprl.checkpoint import prefixed, save_checkpoint
from tprl.pocket.assemble import DELTA
from tprl.pocket.joint import Pocket, start_from
from tprl.pocket.labels import UNITS
from tprl.pocket.tower import TOWER, Batches, normalise, shipped_tower


@torch.no_grad()
def test_the_projector_goes_on_to_say_what_it_said(tmp_path: Path) -> None:
    """A last layer whose outputs are mixed anew holds the same facts elsewhere."""
    pixels = normalise(Batches(2, 1000, 1001)[0].pixels)

    def units(pocket: Pocket, vision: torch.nn.Module) -> Tensor:
        told: Tensor = pocket.llava.model.multi_modal_projector.linear_1(vision(pixels).last_hidden_state[:, 1:])
        return told

    tower = shipped_tower(DELTA)
    last = tower.vision.get_parameter("encoder.layers.4.mlp.fc2.weight")
    last += 0.3 * last.roll(1, 0)
    tower.words.bias += 1.0
    save_checkpoint(tmp_path / TOWER, prefixed(tower.state_dict().items(), "model."), {"step": 1})

    before, _ = start_from(DELTA, tmp_path / "nothing")
    after, _ = start_from(DELTA, tmp_path)
    vision = after.llava.model.vision_tower
    assert torch.equal(after.marks.weight, tower.marks.weight)
    told = units(after, vision)
    words = tower.words(tower.vision(pixels).last_hidden_state[:, 1:])
    torch.testing.assert_close(told[..., :UNITS], words, atol=1e-4, rtol=1e-4)
    known = units(before, before.llava.model.vision_tower)[..., UNITS:]
    stale = units(before, vision)[..., UNITS:]
    assert (told[..., UNITS:] - known).std() < 0.25 * (stale - known).std()
