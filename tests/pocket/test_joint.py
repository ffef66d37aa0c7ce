"""Stage three: a tower that learned on by itself is put back, frozen, and what is learned behind it is shipped."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tprl.checkpoint import load_checkpoint, prefixed, save_checkpoint, with_prefix
from tprl.commands.pocket import pack
from tprl.pocket.assemble import DELTA
from tprl.pocket.base import load_base
from tprl.pocket.joint import JOINT, JointConfig, load_weights, start_from, train_joint
from tprl.pocket.labels import UNITS
from tprl.pocket.language import LANGUAGE
from tprl.pocket.model import unrounded
from tprl.pocket.pictures import Batches, normalise
from tprl.pocket.tower import TOWER, shipped_tower

pytestmark = pytest.mark.usefixtures("base")
PROJECTOR = "model.multi_modal_projector.linear_1."


@pytest.fixture(scope="module")
def base() -> Iterator[None]:
    """The base model is read from its package once."""
    loaded = load_base()
    with pytest.MonkeyPatch.context() as patched:
        for module in ("tprl.pocket.joint", "tprl.commands.pocket"):
            patched.setattr(f"{module}.load_base", lambda: loaded)
        yield


@torch.no_grad()
def test_the_projector_goes_on_to_say_what_it_said(tmp_path: Path) -> None:
    """A last layer whose outputs are mixed anew holds the same facts elsewhere."""
    pixels = normalise(Batches(2, 1000, 1001)[0].pixels)
    tower, shipped = shipped_tower(DELTA), shipped_tower(DELTA)
    last = tower.vision.get_submodule("encoder.layers")[-1].mlp.fc2.weight
    last += 0.3 * last.roll(1, 0)
    tower.words.bias += 1.0
    save_checkpoint(tmp_path / TOWER, prefixed(tower.state_dict(), "model."), {"step": 1})
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


@torch.no_grad()
def test_a_language_model_that_learned_on_is_the_one_that_goes_on(tmp_path: Path) -> None:
    llava, _ = start_from(DELTA, tmp_path)
    language = llava.model.language_model
    own = {name: weight for name, weight in language.named_parameters() if "embed_tokens" not in name}
    learned = {name: weight + 1 for name, weight in own.items()}
    save_checkpoint(tmp_path / LANGUAGE, prefixed(learned, "model.model."), {"step": 1})
    after = dict(start_from(DELTA, tmp_path)[0].model.language_model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in learned.items())


def test_the_tower_stays_and_what_learned_is_packed_whole(tmp_path: Path) -> None:
    settings = JointConfig(steps=1, pictures=1, questions=3, warmup_steps=1)
    list(train_joint(tmp_path, settings, DELTA))
    pack((tmp_path,), out=tmp_path / "packed.safetensors")
    before, after = unrounded(load_file(DELTA)), unrounded(load_file(tmp_path / "packed.safetensors"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        changed = (after[name] - weight).abs().max().item()
        if "vision_tower" in name:
            assert changed <= weight.abs().max() / 250, name
        elif name.endswith(("q_proj.weight", "linear_1.weight", "linear_2.weight")):
            assert changed > 0, name

    tensors, meta = load_checkpoint(tmp_path / JOINT)
    assert meta == {"step": 1, "steps": 1}
    bias = "model.multi_modal_projector.linear_2.bias"
    (tmp_path / "other").mkdir()
    save_checkpoint(tmp_path / "other" / JOINT, tensors | {"model." + bias: tensors["model." + bias] + 0.5}, meta)
    pack((tmp_path, tmp_path / "other"), out=tmp_path / "mean.safetensors")
    mean = unrounded(load_file(tmp_path / "mean.safetensors"))
    torch.testing.assert_close(mean[bias].float(), after[bias].float() + 0.25, atol=0.01, rtol=0.0)

    save_checkpoint(tmp_path / "other" / JOINT, tensors, {"step": 1, "steps": 2})
    with pytest.raises(ValueError, match="other stands at step 1 of 2; finish it first"):
        pack((tmp_path, tmp_path / "other"), out=tmp_path / "mean.safetensors")

    llava, _ = start_from(DELTA, tmp_path)
    load_weights(llava, tensors)
    some = dict(list(with_prefix(tensors, "model.").items())[1:])
    for wrong in (prefixed(some, "model."), prefixed(with_prefix(tensors, "model."), "model.llava.")):
        with pytest.raises(ValueError, match="no checkpoint of the whole model"):
            load_weights(llava, wrong)
