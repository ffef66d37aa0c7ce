"""The whole training through the real command line, killed and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evaluate.world import World, save_world, tiny_lvlm
from tprl.pruner import TokenPruner

SETTINGS = [
    "set:train-config",
    "--set.samples", 32, "--set.validation", 8, "--set.save-every", 2,
    "--set.autoencoder.steps", 6, "--set.autoencoder.pictures", 2,
    "--set.imitate.demonstrations", 32, "--set.imitate.epochs", 2, "--set.imitate.batch", 8,
    "--set.imitate.budgets", 8, 4, 2, "--set.imitate.teachers", "text-attention", "fastervlm", "divprune", "search",
    "--set.imitate.search-rounds", 3, "--set.imitate.search-children", 2,
    "--set.ppo.epochs", 4, "--set.ppo.questions", 4, "--set.ppo.rollouts", 3, "--set.ppo.minibatch", 6,
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
    return subprocess.run(command(world, run, *more), capture_output=True, text=True, timeout=200, check=False)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


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
    assert {"reward", "kept_3", "approx_kl", "clip_fraction", "effective_sample_size", "explained_variance"} <= set(ppo)
    for folder in ("stages/imitate", "stages/ppo", "pruner"):
        assert TokenPruner.from_pretrained(whole / folder).config.width == 16
    assert not list(whole.rglob("*.partial"))


def killed_and_resumed(world: Path, whole: Path, run: Path, moment: float) -> None:
    """Kill -9 after ``moment`` seconds, resume, and compare with the uninterrupted run."""
    process = subprocess.Popen(command(world, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(moment)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    outcome = train(world, run, "--resume")
    assert outcome.returncode == 0, outcome.stderr
    assert metrics(run) == metrics(whole)
    names = ("pruner/pruner.safetensors", "pruner/pruner.json")
    assert all((run / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_a_run_killed_in_its_middle_ends_as_one_that_was_not(world: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(command(world, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(run.glob("checkpoints/imitate-000004.safetensors")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    outcome = train(world, run, "--resume")
    assert outcome.returncode == 0, outcome.stderr
    assert metrics(run) == metrics(whole)
    assert (run / "pruner/pruner.safetensors").read_bytes() == (whole / "pruner/pruner.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(20))
def test_kill_at_any_moment(world: Path, whole: Path, tmp_path: Path, attempt: int) -> None:
    start = time.perf_counter()
    train(world, tmp_path / "timed")
    length = time.perf_counter() - start
    killed_and_resumed(world, whole, tmp_path / "run", random.Random(attempt).uniform(0.2, 0.95) * length)
