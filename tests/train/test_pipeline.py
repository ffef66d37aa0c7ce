"""The whole training: through the real command line, killed and resumed, and in one process, what it starts from and
refuses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluate.world import World, save_world, tiny_lvlm
from launcher import BY_TWO
from tprl import processes
from tprl.checkpoint import load_checkpoint
from tprl.commands.train import train as train_command
from tprl.config import AutoencoderStage, ImitateStage, PpoStage, PrunerConfig, TrainConfig
from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.model import Lvlm
from tprl.pruner import TokenPruner
from tprl.run import TIMES, RunFolder
from tprl.train import pipeline
from tprl.train.autoencoder import NAME as AUTOENCODER
from tprl.train.calibrate import OneShot
from tprl.train.ppo import NAME as PPO

SETTINGS = [
    "set:train-config",
    "--set.samples", 32, "--set.validation", 8, "--set.save-every", 2,
    "--set.autoencoder.steps", 6, "--set.autoencoder.pictures", 2,
    "--set.imitate.demonstrations", 32, "--set.imitate.epochs", 2, "--set.imitate.batch", 8,
    "--set.imitate.budgets", 8, 4, 2, "--set.imitate.teachers", "text-attention", "fastervlm", "divprune", "search",
    "--set.imitate.search-rounds", 3, "--set.imitate.search-children", 2,
    "--set.ppo.epochs", 4, "--set.ppo.horizon", 3, "--set.ppo.questions", 4, "--set.ppo.rollouts", 3,
    "--set.ppo.minibatch", 6,
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    lvlm = tiny_lvlm()
    lvlm.model.save_pretrained(folder / "model")
    lvlm.processor.save_pretrained(folder / "model")
    save_world(folder, World(20))
    return folder


def command(world: Path, run: Path, *more: object) -> list[str]:
    data = ["--model", world / "model", "--data", world / "world.jsonl", "--dtype", "float32"]
    arguments = ["train", run, *data, "--cache", run.parent / "cache", *more, *SETTINGS]
    return [sys.executable, "-m", "tprl.cli", *map(str, arguments)]


def train(world: Path, run: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(world, run, *more), capture_output=True, text=True, timeout=900, check=False)


def metrics(run: Path) -> list[dict[str, Any]]:
    """All but what a clock told."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    run = world / "whole"
    outcome = train(world, run)
    assert outcome.returncode == 0, outcome.stderr
    return run


def test_every_stage_leaves_its_metrics_and_its_pruner(whole: Path) -> None:
    stages = [entry["stage"] for entry in metrics(whole)]
    assert list(dict.fromkeys(stages)) == [
        "autoencoder", "demonstrations", "imitate", "after-imitate", "ppo", "after-ppo", "calibrated",
    ]  # fmt: skip
    assert stages.count("autoencoder") == 6
    assert stages.count("ppo") == 4
    told = next(entry for entry in metrics(whole) if entry["stage"] == "demonstrations")
    wins = [told[f"won_by_{name}"] for name in ("text-attention", "fastervlm", "divprune", "search")]
    assert 0 < told["liked"] == sum(wins) <= 32
    assert wins[-1] > 0
    ppo = [entry for entry in metrics(whole) if entry["stage"] == "ppo"][-1]
    assert {
        "reward", "score_lost", "kept_1", "kept_3", "approx_kl", "clip_fraction", "effective_sample_size", "entropy",
        "grad_norm", "padding", "validation_accuracy",
    } <= set(ppo)  # fmt: skip
    assert 0 <= ppo["padding"] < 0.1
    assert 0 <= ppo["validation_accuracy"] <= 1
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-3])
    assert last["rollouts_per_second"] > 12 / last["seconds"]
    for folder in ("stages/imitate", "stages/ppo", "pruner"):
        assert TokenPruner.from_pretrained(whole / folder).config.width == 16
    assert not list(whole.rglob("*.partial"))


def killed_and_resumed(world: Path, whole: Path, run: Path, until: Callable[[], bool], seconds: float = 0) -> None:
    """Kill -9 so many seconds after a moment, resume, and compare with the uninterrupted run."""
    process = subprocess.Popen(command(world, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not until():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.wait()
    outcome = train(world, run, "--resume")
    assert outcome.returncode == 0, outcome.stderr
    assert metrics(run) == metrics(whole)
    names = ("pruner/pruner.safetensors", "pruner/pruner.json")
    assert all((run / name).read_bytes() == (whole / name).read_bytes() for name in names)
    assert not list(run.parent.rglob("*.partial"))
    for path in run.rglob("checkpoints/*"):
        load_checkpoint(path)


def test_a_run_killed_in_its_middle_ends_as_one_that_was_not(world: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed_and_resumed(world, whole, run, lambda: bool(list(run.glob("checkpoints/imitate-000004.safetensors"))))


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(20))
def test_kill_at_any_moment(world: Path, whole: Path, tmp_path: Path, attempt: int) -> None:
    """Moments are spread over the run's progress, not over its seconds, of which starting takes the most."""
    chance, run = random.Random(attempt), tmp_path / "run"
    count, seconds = chance.randrange(len(metrics(whole))), chance.uniform(0, 0.3)

    def reached() -> bool:
        if not (tmp_path / "cache").exists():
            return False
        path = run / "metrics.jsonl"
        return count == 0 or (path.exists() and path.read_text().count("\n") >= count)

    killed_and_resumed(world, whole, run, reached, seconds)


def launch(world: Path, run: Path, *more: object) -> subprocess.Popen[str]:
    """The same training by two processes."""
    return subprocess.Popen(
        [*BY_TWO, *command(world, run, *more)[3:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def process_of(rank: int, launcher: subprocess.Popen[str]) -> int:
    """The process id of a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid and f"RANK={rank}" in (path / "environ").read_text().split("\0"):
                return int(path.name)
    raise ProcessLookupError(f"{launcher.args} has no rank {rank}")


@pytest.mark.slow
def test_a_rank_that_dies_is_named_and_the_run_goes_on_as_one_process_would(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launcher = launch(world, run)
    while not list(run.glob("checkpoints/imitate-000004.safetensors")):
        assert launcher.poll() is None
        time.sleep(0.02)
    os.kill(process_of(1, launcher), signal.SIGKILL)
    told, _ = launcher.communicate(timeout=900)
    assert launcher.returncode != 0
    cause = told[told.index("Root Cause") :]
    assert "rank      : 1 " in cause
    assert "SIGKILL" in cause
    launcher = launch(world, run, "--resume")
    told, _ = launcher.communicate(timeout=900)
    assert launcher.returncode == 0, told
    assert len(metrics(run)) == len(metrics(whole))
    for one, two in zip(metrics(whole), metrics(run), strict=True):
        one.pop("padding", None), two.pop("padding", None)  # of other batches
        assert two.pop("stage") == one.pop("stage")
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)


IDLE = TrainConfig(AutoencoderStage(steps=0), ImitateStage(demonstrations=0), PpoStage(epochs=0))


@pytest.fixture(scope="module")
def lvlm() -> Lvlm:
    return tiny_lvlm()


def idle(folder: Path, lvlm: Lvlm, held_out: World, start: TokenPruner | None = None) -> TokenPruner:
    """A training of no updates."""
    run = RunFolder(folder, {})
    return pipeline.train(run, lvlm, (World(2), held_out), IDLE, (PPO,), start, folder.parent / "cache")


def test_it_starts_from_the_pruner_given_and_is_calibrated_on_the_held_out_samples(
    tmp_path: Path, lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def accuracy_unpruned(data: EncodedSamples) -> torch.Tensor:
        asked.append(data.source)
        return torch.ones(len(data))

    monkeypatch.setattr(EncodedSamples, "accuracy_unpruned", property(accuracy_unpruned))
    torch.manual_seed(5)
    start, held_out = TokenPruner(PrunerConfig(width=lvlm.width, fingerprint=lvlm.fingerprint)), World(3)
    weights = {name: weight.clone() for name, weight in start.state_dict().items()}
    trained, fresh = idle(tmp_path / "a", lvlm, held_out, start), idle(tmp_path / "b", lvlm, held_out)
    assert all(torch.equal(weight, trained.state_dict()[name]) for name, weight in weights.items())
    assert not all(torch.equal(weight, fresh.state_dict()[name]) for name, weight in weights.items())
    assert asked == [held_out, held_out]


def test_a_training_that_another_goes_on_from_is_left_without_a_threshold(tmp_path: Path, lvlm: Lvlm) -> None:
    run = RunFolder(tmp_path / "run", {})
    config = replace(IDLE, autoencoder=AutoencoderStage(steps=1, pictures=1))
    sources = World(2), World(3)
    trained = pipeline.train(run, lvlm, sources, config, (AUTOENCODER,), cache=tmp_path / "cache", calibrated=False)
    assert not (run.folder / "pruner").exists()
    assert not run.logged("calibrated")
    saved = TokenPruner.from_pretrained(run.folder / "stages" / AUTOENCODER, lvlm.fingerprint)
    assert saved.config == trained.config
    assert all(torch.equal(weight, saved.state_dict()[name]) for name, weight in trained.state_dict().items())


def test_a_model_that_is_never_right_is_told_of(
    tmp_path: Path, lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    right = [0.0, 1.0]
    accuracy = property(lambda data: torch.full((len(data),), right.pop()))
    monkeypatch.setattr(EncodedSamples, "accuracy_unpruned", accuracy)
    idle(tmp_path / "a", lvlm, World(3))
    assert not [warning for warning in recwarn if "answers none" in str(warning.message)]
    with pytest.warns(UserWarning, match="answers none of the 12 validation questions .* such as 'what is it"):
        idle(tmp_path / "b", lvlm, World(3))


def test_teachers_that_the_tower_serves_with_nothing_are_named(
    tmp_path: Path, lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "tower_signals", lambda model: frozenset())
    monkeypatch.setattr(pipeline, "heuristics", lambda settings: ("fastervlm", "visionzip"))
    with pytest.raises(ValueError, match=r"teachers fastervlm, visionzip all need what this LLaVA-1\.5 does not give"):
        idle(tmp_path / "a", lvlm, World(3))


def test_batches_that_processes_cannot_share_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    single = TrainConfig(AutoencoderStage(pictures=1), samples=4, validation=4)
    with pytest.raises(ValueError, match="autoencoder's batch of 1 cannot be shared by 2 processes"):
        train_command(tmp_path / "run", model=str(tmp_path / "none"), config=single)
    with pytest.raises(OSError, match="none"):  # the model is what is missing where that stage is not asked for
        train_command(
            tmp_path / "run", model=str(tmp_path / "none"), stages="imitate", init=tmp_path / "pruner", config=single
        )


def test_a_run_goes_on_with_the_model_and_the_start_that_it_had(world: Path, tmp_path: Path) -> None:
    """And a pruner whose novelty was given up may be one to start from, whether there is any is chosen anew, and one
    without proportional attention, which is as the settings of this run say."""
    lvlm, model, start = tiny_lvlm(), tmp_path / "model", tmp_path / "start"
    shutil.copytree(world / "model", model)
    shape = PrunerConfig(width=lvlm.width, fingerprint=lvlm.fingerprint, novelty=0.0, proportional=False)
    first, second = (TokenPruner(shape) for _ in range(2))  # one after the other, so never the same
    first.save_pretrained(start)

    def go_on(resume: bool) -> None:
        train_command(
            tmp_path / "run", model=str(model), data=str(world / "world.jsonl"), dtype="float32", resume=resume,
            stages="ppo", init=start, cache=tmp_path / "cache", config=replace(IDLE, samples=8, validation=8),
        )  # fmt: skip

    go_on(resume=False)
    assert TokenPruner.from_pretrained(tmp_path / "run" / "pruner").config.proportional
    second.save_pretrained(start)
    with pytest.raises(ValueError, match="other settings of started_from; it cannot go on"):
        go_on(resume=True)
    lvlm.model.get_output_embeddings().weight.data *= 2
    lvlm.model.save_pretrained(model)
    with pytest.raises(ValueError, match="other settings of started_from, weights; it cannot go on"):
        go_on(resume=True)


def test_a_training_without_demonstrations(tmp_path: Path, lvlm: Lvlm) -> None:
    pipeline.train(RunFolder(tmp_path / "run", {}), lvlm, (World(2), World(3)), IDLE, cache=tmp_path / "cache")
    assert not (tmp_path / "run" / "stages").exists()
    assert (tmp_path / "run" / "pruner").exists()


def test_a_seed_is_a_start_of_its_own(tmp_path: Path, lvlm: Lvlm) -> None:
    def begun(seed: int) -> TokenPruner:
        torch.manual_seed(99)
        run = RunFolder(tmp_path / str(len(list(tmp_path.iterdir()))), {})
        return pipeline.train(
            run, lvlm, (World(2), World(3)), replace(IDLE, seed=seed), (PPO,), cache=tmp_path / "cache"
        )

    first, again, other = (begun(seed).policy.token_in.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_threshold_may_cost_what_is_asked_for(tmp_path: Path, lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watched(pruner: Any, data: Any, unpruned: Any, max_drop: float) -> OneShot:
        asked.append(max_drop)
        return OneShot(1.0, 1.0, 1.0)

    monkeypatch.setattr(pipeline, "calibrate", watched)
    run = RunFolder(tmp_path / "run", {})
    pipeline.train(run, lvlm, (World(2), World(3)), replace(IDLE, max_drop=7.5), (PPO,), cache=tmp_path / "cache")
    assert asked == [7.5]


def test_the_threshold_is_that_of_the_novelty_which_is_chosen_on_the_first_held_out_samples(
    tmp_path: Path, lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def choose(pruner: TokenPruner, data: EncodedSamples, unpruned: torch.Tensor, *more: Any) -> None:
        asked.append((data.source, len(unpruned), *more))
        pruner.config = replace(pruner.config, novelty=0.0)

    def watched(pruner: TokenPruner, *_: Any) -> OneShot:
        asked.append(pruner.config.novelty)
        return OneShot(1.0, 1.0, 1.0)

    monkeypatch.setattr(pipeline, "choose_novelty", choose)
    monkeypatch.setattr(pipeline, "calibrate", watched)
    run, sources = RunFolder(tmp_path / "run", {}), (World(2), World(3))
    config = replace(IDLE, imitate=ImitateStage(demonstrations=0, budgets=(9, 4)))
    pipeline.train(run, lvlm, sources, config, (PPO,), cache=tmp_path / "cache")
    assert asked == [(sources[1], len(sources[1].samples), (9, 4), pipeline.LOOKED_AT), 0.0]
    assert TokenPruner.from_pretrained(run.folder / "pruner").config.novelty == metrics(run.folder)[-1]["novelty"] == 0


def test_a_teacher_that_the_tower_serves_with_nothing_is_left_out(
    lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "tower_signals", lambda model: frozenset())
    config = TrainConfig(imitate=ImitateStage(teachers=("fastervlm", "uniform", "search")))
    found = pipeline.without_blind_teachers(lvlm, config)
    assert found == replace(config, imitate=replace(config.imitate, teachers=("uniform", "search")))
    assert "does not give what they need: fastervlm\n" in capsys.readouterr().out


def test_a_teacher_that_the_language_model_serves_with_nothing_is_left_out(
    lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(imitate=ImitateStage(teachers=("text-attention", "fastv", "uniform")))
    assert pipeline.without_blind_teachers(lvlm, config) == config
    monkeypatch.setattr(lvlm.model.get_decoder().layers[1].self_attn, "sinks", torch.zeros(1), raising=False)
    found = pipeline.without_blind_teachers(lvlm, config)
    assert found == replace(config, imitate=replace(config.imitate, teachers=("uniform",)))


def test_a_run_that_is_done_is_left_as_it_is(tmp_path: Path, lvlm: Lvlm) -> None:
    imitate = ImitateStage(demonstrations=4, teachers=("uniform",), beta=9.0, budgets=(8, 4), epochs=1, batch=4)
    ppo = PpoStage(epochs=1, questions=2, rollouts=2)
    config = TrainConfig(AutoencoderStage(steps=1, pictures=1), imitate, ppo)
    left = []
    for resume in (False, True):
        run = RunFolder(tmp_path / "run", {}, resume)
        pipeline.train(run, lvlm, (World(2), World(3)), config, cache=tmp_path / "cache")
        left.append((metrics(run.folder), (run.folder / "pruner" / "pruner.safetensors").read_bytes()))
    assert left[0] == left[1]
    assert [entry["stage"] for entry in left[0][0]] == [
        "autoencoder", "demonstrations", "imitate", "after-imitate", "ppo", "after-ppo", "calibrated",
    ]  # fmt: skip
