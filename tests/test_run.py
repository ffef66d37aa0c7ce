"""Run folders and the loop that can be killed anywhere."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from disk import synced_in
from tprl.checkpoint import load_checkpoint
from tprl.run import TIMES, RunFolder, Stage, fit

STEPS = 7


def make_stage(steps: int = STEPS, stop_at: int | None = None, poison_at: int | None = None) -> Stage:
    """A regression whose data depend on the step's number alone."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    batch: dict[str, torch.Tensor] = {}

    def update(step: int) -> dict[str, float]:
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        generator = torch.Generator().manual_seed(step)
        rows = batch["rows"] = torch.randn(5, 3, generator=generator)
        batch["first"] = rows[:1]
        loss = (module(rows) - rows[:, :2]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": float("nan") if step == poison_at else loss.item()}

    return Stage("toy", steps, module, optimizer, update, batch)


def metrics(folder: Path) -> list[dict[str, float]]:
    """All but what a clock told."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in entries]


def uninterrupted(folder: Path) -> tuple[list[dict[str, float]], torch.Tensor]:
    stage = make_stage()
    fit(RunFolder(folder, {}), stage, save_every=2)
    return metrics(folder), stage.module.weight.detach()


@pytest.mark.parametrize("died_after", range(1, STEPS))
def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path: Path, died_after: int) -> None:
    lines, weight = uninterrupted(tmp_path / "whole")
    fit(RunFolder(tmp_path / "broken", {}), make_stage(died_after), save_every=2)
    if died_after % 2:  # as if killed before that checkpoint was written
        (tmp_path / "broken" / "checkpoints" / f"toy-{died_after:06d}.safetensors").unlink()
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "toy", "st')  # killed while writing
    stage = make_stage()
    fit(RunFolder(tmp_path / "broken", {}, resume=True), stage, save_every=2)
    assert metrics(tmp_path / "broken") == lines
    assert torch.equal(stage.module.weight, weight)


def test_what_was_broken_off_in_the_metrics_is_gone_before_anything_is_added(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", {}).log("one", 0, {"value": 1.0})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "two"')
    run = RunFolder(tmp_path / "run", {}, resume=True)
    assert run.logged("one")
    run.log("three", 0, {})
    assert [entry["stage"] for entry in metrics(tmp_path / "run")] == ["one", "three"]
    assert not run.logged("two")


def test_sigterm_saves_and_leaves(tmp_path: Path) -> None:
    lines, weight = uninterrupted(tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        fit(RunFolder(tmp_path / "run", {}), make_stage(stop_at=2), save_every=100)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["toy-000003.safetensors"]
    stage = make_stage()
    fit(RunFolder(tmp_path / "run", {}, resume=True), stage, save_every=100)
    assert metrics(tmp_path / "run") == lines
    assert torch.equal(stage.module.weight, weight)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, weight = uninterrupted(tmp_path / "whole")
    fit(RunFolder(tmp_path / "run", {}), make_stage(4), save_every=2)
    newest = tmp_path / "run" / "checkpoints" / "toy-000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    stage = make_stage()
    fit(RunFolder(tmp_path / "run", {}, resume=True), stage, save_every=2)
    assert "toy-000004.safetensors" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == lines
    assert torch.equal(stage.module.weight, weight)


def test_values_that_are_not_finite_stop_the_run_and_are_saved(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"update 4 of toy .* loss"):
        fit(RunFolder(tmp_path / "run", {}), make_stage(poison_at=3), save_every=2)
    assert len(metrics(tmp_path / "run")) == 3
    tensors, meta = load_checkpoint(tmp_path / "run" / "not-finite-toy-000004.safetensors")
    assert meta["not_finite"] == ["loss"]
    assert tensors.keys() == {"module.weight", "module.bias", "batch.rows", "batch.first"}
    assert torch.equal(tensors["batch.rows"], torch.randn(5, 3, generator=torch.Generator().manual_seed(3)))


def test_only_the_newest_two_checkpoints_stay(tmp_path: Path) -> None:
    fit(RunFolder(tmp_path / "run", {}), make_stage(), save_every=1)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["toy-000006.safetensors", "toy-000007.safetensors"]


def test_a_folder_is_not_reused_by_accident(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", {"seed": 1})
    with pytest.raises(ValueError, match="exists; --resume goes on with it, --overwrite deletes it"):
        RunFolder(tmp_path / "run", {"seed": 1})
    with pytest.raises(ValueError, match="other settings of seed"):
        RunFolder(tmp_path / "run", {"seed": 2}, resume=True)
    with pytest.raises(ValueError, match="not both"):
        RunFolder(tmp_path / "run", {"seed": 1}, resume=True, overwrite=True)
    (tmp_path / "run" / "mine.txt").write_text("mine")
    (tmp_path / "run" / "pruner").mkdir()
    RunFolder(tmp_path / "run", {"seed": 2}, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.json",
        "lock",
        "mine.txt",
    ]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"seed": 2}
    (tmp_path / "other" / "cache").mkdir(parents=True)
    with pytest.raises(ValueError, match="other holds no run, so --overwrite leaves it alone"):
        RunFolder(tmp_path / "other", {"seed": 2}, overwrite=True)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["cache"]


def test_a_run_that_goes_on_elsewhere_is_left_alone(tmp_path: Path) -> None:
    held = "import sys, pathlib, tprl.run; run = tprl.run.RunFolder(pathlib.Path(sys.argv[1]), {}); print(1); input()"
    command = [sys.executable, "-c", held, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        before = {path.name for path in (tmp_path / "run").iterdir()}
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=r"another process is at work in .*run"):
                RunFolder(tmp_path / "run", {}, **how)
        assert {path.name for path in (tmp_path / "run").iterdir()} == before
        other.kill()
    RunFolder(tmp_path / "run", {}, resume=True)


def test_a_run_that_got_no_further_than_its_lock_is_begun(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    RunFolder(tmp_path / "run", {})
    assert (tmp_path / "run" / "config.json").exists()


def test_metrics_go_to_tensorboard_if_asked(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(RunFolder(tmp_path / "run", {}, tensorboard=True), make_stage(), save_every=2)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("toy/loss")]
    assert seen == [(line["step"], pytest.approx(line["loss"])) for line in metrics(tmp_path / "run")]


def test_a_checkpoint_of_other_versions_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tprl.__version__", "0.0.1")
        fit(RunFolder(tmp_path / "run", {}), make_stage(4), save_every=2)
    fit(RunFolder(tmp_path / "run", {}, resume=True), make_stage(), save_every=2)
    assert "0.0.1" in capsys.readouterr().err


def test_weights_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    stage = make_stage()

    def update(step: int) -> dict[str, float]:
        nn.init.constant_(stage.module.get_parameter("bias"), torch.inf)
        return {"loss": 0.0}

    with pytest.raises(FloatingPointError, match=r"update 1 of toy .* bias"):
        fit(RunFolder(tmp_path / "run", {}), replace(stage, update=update), save_every=2)


def test_nothing_of_an_overwritten_run_is_left(tmp_path: Path) -> None:
    """Neither a checkpoint to go on from nor a metric that says what is done."""
    run = tmp_path / "run"
    with pytest.raises(FloatingPointError):
        fit(RunFolder(run, {}), make_stage(poison_at=3), save_every=2)
    for name in ("stages", "pruner", "tensorboard", "cache"):
        (run / name / "more").mkdir(parents=True)
    assert {path.name for path in run.iterdir()} >= {"metrics.jsonl", "not-finite-toy-000004.safetensors"}
    RunFolder(run, {}, overwrite=True)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json", "lock"]
    assert not list((run / "checkpoints").iterdir())


def test_ctrl_c_saves_and_leaves_and_then_is_as_before(tmp_path: Path) -> None:
    stage, before = make_stage(), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def update(step: int) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return stage.update(step)

    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
        fit(RunFolder(tmp_path / "run", {}), replace(stage, update=update), save_every=100)
    assert stopped.value.args == (128 + signal.SIGINT,)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["toy-000001.safetensors"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_metrics_reach_the_disk_before_the_checkpoint_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, synced = RunFolder(tmp_path / "run", {}), synced_in(tmp_path, monkeypatch)
    fit(run, make_stage(1), save_every=2)
    assert synced == ["metrics.jsonl", "toy-000001.safetensors.partial"]


def test_stages_keep_their_own_checkpoints_and_metrics(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", {})
    fit(run, make_stage(4), save_every=2)
    other = replace(make_stage(), name="other")
    assert run.restore(other.name, other.module, other.optimizer) == 0
    fit(run, other, save_every=7)
    lines = metrics(tmp_path / "run")
    run.rewind("other", 1)
    assert metrics(tmp_path / "run") == lines[:5]
