"""Where the time goes, by a clock that only the vision tower and the language model move; and the real command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from evaluate.world import World, tiny_lvlm
from tprl import clock
from tprl.commands.profile import seconds_table
from tprl.config import AutoencoderStage, ImitateStage, PpoStage, PrunerConfig, TrainConfig
from tprl.lvlm.model import Lvlm
from tprl.profiling import ANSWER_TOKENS, profile_inference, profile_training
from tprl.pruner import TokenPruner
from tprl.train import pipeline

TOWER, LANGUAGE = 1000.0, 1.0
POLICY = {"policy: latents", "policy: look", "policy: novelty", "policy: sizes"}
CONFIG = TrainConfig(
    autoencoder=AutoencoderStage(pictures=2),
    imitate=ImitateStage(demonstrations=8, budgets=(8, 4), batch=4),
    ppo=PpoStage(questions=2, rollouts=2, minibatch=4),
    samples=8,
)


@pytest.fixture
def lvlm(monkeypatch: pytest.MonkeyPatch) -> Lvlm:
    """Its tower takes ``TOWER`` seconds a call, its language model ``LANGUAGE``, and nothing else takes any."""
    lvlm, now = tiny_lvlm(), [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> Any:
        def hook(*_: Any) -> None:
            now[0] += seconds

        return hook

    model = cast(Any, lvlm.model)
    model.model.vision_tower.register_forward_hook(spend(TOWER))
    model.get_decoder().layers[0].register_forward_hook(spend(LANGUAGE))
    return lvlm


def make_pruner(lvlm: Lvlm) -> TokenPruner:
    return TokenPruner(PrunerConfig(latent=4, width=lvlm.width, fingerprint=lvlm.fingerprint)).eval()


def traces(lvlm: Lvlm) -> tuple[bool, int, int]:
    """What a measurement could leave behind."""
    decoder = cast(Any, lvlm.model).get_decoder()
    wrapped = "get_image_features" in vars(lvlm.model.base_model)
    return wrapped, len(decoder._forward_pre_hooks), len(decoder._forward_hooks)


def test_an_answer_is_one_look_one_reading_and_then_steps(lvlm: Lvlm) -> None:
    before = traces(lvlm)
    parts = profile_inference(lvlm, World(1), make_pruner(lvlm), budget=4)
    plain = {
        "other": 0.0,
        "processor": 0.0,
        "vision tower": TOWER,
        "language model": LANGUAGE,
        "language model: decoding": (ANSWER_TOKENS - 1) * LANGUAGE,  # it knows no end
    }
    assert parts == {"answer, every token": plain, "answer, 4 tokens": plain | dict.fromkeys(POLICY, 0.0)}
    assert traces(lvlm) == before


def test_a_training_looks_at_pictures_once_and_learns_without_the_language_model(lvlm: Lvlm) -> None:
    before, pruner = traces(lvlm), make_pruner(lvlm)
    weights = {name: weight.clone() for name, weight in pruner.state_dict().items()}
    parts = profile_training(lvlm, World(2), pruner, CONFIG)
    assert list(parts) == ["cache", "demonstrations", "autoencoder update", "imitation update", "PPO round"]
    assert {name for name, seconds in parts.items() if "vision tower" in seconds} == {"cache"}
    assert {name for name, seconds in parts.items() if seconds.get("language model")} == {
        "cache", "demonstrations", "PPO round",
    }  # fmt: skip
    assert parts["cache"]["vision tower"] == TOWER  # both pictures at once
    assert all(seconds["other"] == 0 for seconds in parts.values())
    assert set(parts["imitation update"]) == {"other", "read", "policy: latents", "policy: look"}
    assert {"update", "score", "policy: latents", "policy: look"} <= set(parts["PPO round"])
    assert all(torch.equal(weight, weights[name]) for name, weight in pruner.state_dict().items())
    assert traces(lvlm) == before


def test_teachers_that_the_tower_does_not_serve_are_left_out(
    lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "tower_signals", lambda model: frozenset())
    parts = profile_training(lvlm, World(2), make_pruner(lvlm), CONFIG)
    assert list(parts)[-1] == "PPO round"
    assert "teachers left out, since this LLaVA-1.5 does not give what they need: fastervlm" in capsys.readouterr().out


def test_shares_by_hand() -> None:
    table = seconds_table({"round": {"score": 0.006, "update": 0.012, "read": 0.002}}, "")
    columns = [list(column.cells) for column in table.columns]
    assert columns == [
        ["round", "", "", ""],
        ["", "update", "score", "read"],
        ["20", "12", "6", "2"],
        ["", "60%", "30%", "10%"],
    ]


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "new" / "profile.json"
    amounts = ["--samples", 2, "--questions", 1, "--rollouts", 2, "--budget", 32, "--dtype", "float32", "--out", out]
    command = [sys.executable, "-m", "tprl.cli", "profile", *map(str, amounts)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert outcome.returncode == 0, outcome.stderr
    written = json.loads(out.read_text())
    assert (written["model"], written["machine"]["dtype"]) == ("pocket-llava", "float32")
    assert list(written["seconds"])[-3:] == ["PPO round", "answer, every token", "answer, 32 tokens"]
    assert all(part in outcome.stdout for part in written["seconds"])
    assert all(spent > 0 for seconds in written["seconds"].values() for spent in seconds.values())
