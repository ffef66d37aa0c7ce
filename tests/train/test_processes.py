"""Two real processes, joined by gloo, learn what one learns. Run as a script, this file is one of the two."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tprl import processes
from tprl.config import AutoencoderStage, ImitateStage, PpoStage, TrainConfig
from tprl.run import TIMES, RunFolder, Stage, fit
from tprl.train.autoencoder import autoencoder_stage
from tprl.train.calibrate import calibrate, one_shot
from tprl.train.imitate import DemonstrationSet, imitate_stage
from tprl.train.ppo import ppo_stage
from train.puzzle import COUNT, Puzzle, make_pruner

SETTINGS = TrainConfig(
    AutoencoderStage(steps=3, pictures=5, learning_rate=1e-2),
    ImitateStage(batch=7, epochs=1, learning_rate=1e-2),
    PpoStage(epochs=3, questions=5, rollouts=3, horizon=3, minibatch=7, actor_learning_rate=1e-2, entropy_coeff=0.01),
)


class Pictures:
    """Ragged random tokens, for the autoencoder."""

    image_ids = tuple(range(12))

    def features(self, image_id: int) -> Any:
        generator = torch.Generator().manual_seed(image_id)
        return SimpleNamespace(tokens=1 + torch.randn(2 + image_id % 3, 16, generator=generator) * (1 + image_id))


def demonstrations(puzzle: Puzzle) -> DemonstrationSet:
    """Of every other question: the needed token and two or one of the others."""
    indices = torch.arange(0, len(puzzle), 2)
    place = puzzle.place(indices.tolist())[:, None]
    away = (torch.arange(COUNT) - place) % COUNT
    return DemonstrationSet(indices, torch.stack([away < size for size in (COUNT, 3 + int(place[0]) % 2, 2)], 1))


def learn(folder: Path) -> list[dict[str, Any]]:
    """All stages in a folder, and what the pruner can do then; what the metrics say."""
    run, puzzle, pruner = RunFolder(folder, {}), cast(Any, Puzzle()), make_pruner()
    critic = replace(SETTINGS, ppo=replace(SETTINGS.ppo, baseline="critic", score="correct"))
    stages: list[Stage] = [
        autoencoder_stage(pruner, cast(Any, Pictures()), SETTINGS.autoencoder, 0),
        imitate_stage(pruner, puzzle, demonstrations(puzzle), SETTINGS),
        ppo_stage(pruner, puzzle, SETTINGS),
        replace(ppo_stage(pruner, puzzle, critic), name="critic"),
    ]
    for stage in stages:
        fit(run, stage, save_every=2)
    unpruned = puzzle.accuracy_unpruned
    seen = [one_shot(pruner, puzzle, unpruned, budget=3, most=9), calibrate(pruner, puzzle, unpruned, 30.0)]
    for look in seen:
        run.log("seen", 0, {"accuracy": look.accuracy, "kept": look.kept})
    processes.meet()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def two_processes(folder: Path) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = str(Path(__file__).parents[1])
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=600) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(started, ended, strict=True)
    ]


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    outcomes = two_processes(tmp_path / "two")
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes[0].stderr + outcomes[1].stderr
    one = learn(tmp_path / "one")
    two = json.loads(outcomes[0].stdout)
    assert json.loads(outcomes[1].stdout) == two
    assert [entry.keys() for entry in one] == [entry.keys() for entry in two]
    for alone, shared in zip(one, two, strict=True):
        assert alone.pop("stage") == shared.pop("stage")
        assert shared == pytest.approx(alone, rel=1e-3, abs=1e-4)
    apart = json.loads(outcomes[0].stderr.splitlines()[-1])
    assert apart["unexplained_variance"] != pytest.approx(one[2]["unexplained_variance"], rel=1e-3)


def test_alone_nothing_is_shared() -> None:
    values = torch.arange(3.0)
    assert processes.count() == 1
    assert processes.is_first()
    assert torch.equal(values[processes.mine()], values)
    assert torch.equal(processes.total(values), values)
    assert torch.equal(processes.gathered(values, 3), values)
    assert processes.agreed(True)
    assert not processes.agreed(False)


def main(folder: Path) -> None:
    with processes.joined("cpu"):
        print(json.dumps(learn(folder)))
        rows = processes.gathered(torch.arange(5)[processes.mine()], 5)
        assert rows.tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="the batch of 1 cannot be shared by 2 processes; allowed: 2 or more"):
            processes.check_shares(1, "the batch of")
        # a negative control: gradients that are not added up lead elsewhere
        processes.sum_gradients = lambda parameters: None  # type: ignore[assignment]
        pruner = make_pruner()
        stage = autoencoder_stage(pruner, cast(Any, Pictures()), SETTINGS.autoencoder, 0)
        last = [stage.update(step) for step in range(stage.steps)][-1]
        print(json.dumps(last), file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
