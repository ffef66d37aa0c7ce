"""The pipeline in one process: where it starts, what it watches, what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate.world import World, tiny_lvlm
from tprl.config import AutoencoderStage, ImitateStage, PpoStage, PrunerConfig, TrainConfig
from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.model import Lvlm
from tprl.pruner import TokenPruner
from tprl.run import RunFolder
from tprl.train import pipeline
from tprl.train.ppo import NAME as PPO

IDLE = TrainConfig(AutoencoderStage(steps=0), ImitateStage(demonstrations=0), PpoStage(epochs=0))


@pytest.fixture(scope="module")
def lvlm() -> Lvlm:
    return tiny_lvlm()


def idle(folder: Path, lvlm: Lvlm, held_out: World, start: TokenPruner | None = None) -> TokenPruner:
    """A training of no updates."""
    shape = PrunerConfig(lvlm.width, lvlm.fingerprint)
    run = RunFolder(folder, {})
    return pipeline.train(run, lvlm, (World(2), held_out), shape, IDLE, (PPO,), start, folder.parent / "cache")


def test_it_starts_from_the_pruner_given_and_is_calibrated_on_the_held_out_samples(
    tmp_path: Path, lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def unpruned_accuracy(data: EncodedSamples) -> torch.Tensor:
        asked.append(data.source)
        return torch.ones(len(data))

    monkeypatch.setattr(pipeline, "unpruned_accuracy", unpruned_accuracy)
    torch.manual_seed(5)
    start, held_out = TokenPruner(PrunerConfig(lvlm.width, lvlm.fingerprint)), World(3)
    weights = {name: weight.clone() for name, weight in start.state_dict().items()}
    trained, fresh = idle(tmp_path / "a", lvlm, held_out, start), idle(tmp_path / "b", lvlm, held_out)
    assert all(torch.equal(weight, trained.state_dict()[name]) for name, weight in weights.items())
    assert not all(torch.equal(weight, fresh.state_dict()[name]) for name, weight in weights.items())
    assert all(source is held_out for source in asked)


def test_a_model_that_is_never_right_is_told_of(
    tmp_path: Path, lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    right = [0.0, 1.0]
    monkeypatch.setattr(pipeline, "unpruned_accuracy", lambda data: torch.full((len(data),), right.pop()))
    idle(tmp_path / "a", lvlm, World(3))
    assert not [warning for warning in recwarn if "validation questions" in str(warning.message)]
    with pytest.warns(UserWarning, match="answers none of the 12 validation questions .* such as 'what is it"):
        idle(tmp_path / "b", lvlm, World(3))
