"""A training's folder: settings, metrics, checkpoints, and the loop that can be killed anywhere and goes on.

    RUN/config.json        what was asked for
    RUN/metrics.jsonl      one line an update
    RUN/tensorboard/       the same for TensorBoard, if asked for
    RUN/checkpoints/       the newest two of every stage
    RUN/stages/            the pruner after every stage
    RUN/pruner/            the result
    RUN/lock               held while a process trains there

A stage's update is a function of the step's number and of what the checkpoint holds, so a resumed run ends exactly as
one that was never interrupted. Of several processes only the first writes.
"""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from torch import Tensor, nn

import tprl
from tprl import processes
from tprl.checkpoint import (
    DamagedCheckpoint,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    prefixed,
    reach_disk,
    save_checkpoint,
    save_text,
    with_prefix,
)

LOCK = "lock"
KEPT_CHECKPOINTS = 2
TIMES = ("seconds", "rollouts_per_second")
"""Metrics that differ from run to run."""


class RunFolder:
    """See the module.

    Args:
        folder: of the run.
        config: JSON-able settings, all that the result depends on.
        resume: go on with the run that stands there.
        overwrite: delete the run that stands there, and nothing else, and begin anew.
        tensorboard: write metrics for TensorBoard too.

    Raises:
        ValueError: the folder exists and neither ``resume`` nor ``overwrite`` is given, both are, or the run there has
            other settings or goes on in another process; TensorBoard is not installed.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        tensorboard: bool = False,
    ) -> None:
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        first = processes.is_first()
        make_board = _tensorboard() if tensorboard and first else None
        with processes.first_alone():
            self._open(config, resume or not first, overwrite and first)
        self._board = make_board(str(folder / "tensorboard")) if make_board else None

    def _open(self, config: dict[str, Any], resume: bool, overwrite: bool) -> None:
        folder = self.folder
        if resume and overwrite:
            raise ValueError("give one of --resume and --overwrite, not both")
        if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
            if overwrite and not (folder / "config.json").is_file():
                raise ValueError(f"{folder} holds no run, so --overwrite leaves it alone; give another folder")
            if not (resume or overwrite):
                raise ValueError(f"the run directory {folder} exists; --resume goes on with it, --overwrite deletes it")
        if processes.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(folder)
            if overwrite:
                _delete(folder)
        config = json.loads(json.dumps(config))
        if (folder / "config.json").exists():
            found = json.loads((folder / "config.json").read_text())
            if found != config:
                differing = sorted(key for key in found.keys() | config.keys() if found.get(key) != config.get(key))
                raise ValueError(f"the run in {folder} has other settings of {', '.join(differing)}; it cannot go on")
        if processes.is_first():
            self.checkpoints.mkdir(exist_ok=True)
            save_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
            self._cut_broken_line()

    def _cut_broken_line(self) -> None:
        """Take away what a run that was killed while it wrote left at the end of the metrics."""
        path = self.folder / "metrics.jsonl"
        if path.exists() and not (text := path.read_text()).endswith("\n"):
            save_text(path, text[: text.rfind("\n") + 1])

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line to the metrics."""
        if not processes.is_first():
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(f"{stage}/{name}", value, step)
            self._board.flush()

    def logged(self, stage: str) -> bool:
        """Whether the metrics hold anything of ``stage``."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the first process may be writing
        return any(json.loads(line)["stage"] == stage for line in whole)

    def rewind(self, stage: str, step: int) -> None:
        """Forget metrics of ``stage`` behind ``step``, which a resumed run will write again."""
        path = self.folder / "metrics.jsonl"
        if not path.exists() or not processes.is_first():
            return
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            entry = json.loads(line)
            if entry["stage"] != stage or entry["step"] <= step:
                kept.append(line)
        save_text(path, "".join(kept))

    def save(self, stage: str, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint and delete all but the newest of the stage."""
        if not processes.is_first():
            return
        reach_disk(self.folder / "metrics.jsonl")  # a checkpoint shall not outlive the metrics before it
        tensors = prefixed(module.state_dict(), "module.") | optimizer_tensors(optimizer)
        save_checkpoint(self.checkpoints / f"{stage}-{step:06d}.safetensors", tensors, _origin(step))
        for old in self._saved(stage)[KEPT_CHECKPOINTS:]:
            old.unlink()

    def restore(self, stage: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest checkpoint of a stage that is whole; returns its step, 0 if there is none."""
        with processes.first_alone():
            return self._restore(stage, module, optimizer)

    def _restore(self, stage: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        for path in self._saved(stage):
            try:
                tensors, meta = load_checkpoint(path)
            except DamagedCheckpoint as error:
                print(f"{error}; the checkpoint before it is used", file=sys.stderr)
                path.unlink()
                continue
            module.load_state_dict(with_prefix(tensors, "module."))
            load_optimizer(optimizer, tensors)
            if (own := _origin(0)["versions"]) != (theirs := meta.get("versions", own)):
                print(f"{path} was written with {theirs}; going on with {own}", file=sys.stderr)
            return int(meta["step"])
        return 0

    def _saved(self, stage: str) -> list[Path]:
        return sorted(self.checkpoints.glob(f"{stage}-*.safetensors"), reverse=True)


@dataclass(frozen=True)
class Stage:
    """One stage of a training.

    Attributes:
        name: of its metrics and checkpoints.
        steps: updates.
        module: what is trained.
        optimizer: holds the parameters that are.
        update: does update number ``step`` and returns its metrics.
        batch: what the newest update worked on, by name; saved where it gave values that are not finite.
    """

    name: str
    steps: int
    module: nn.Module
    optimizer: torch.optim.Optimizer
    update: Callable[[int], dict[str, float]]
    batch: dict[str, Tensor] = field(default_factory=dict)


def fit(run: RunFolder, stage: Stage, save_every: int) -> None:
    """Do all updates of a stage that are not done yet.

    Raises:
        FloatingPointError: a metric or a parameter is not finite; module and batch are saved for inspection.
        SystemExit: SIGTERM or Ctrl-C came; what is done is saved first.
    """
    done = run.restore(stage.name, stage.module, stage.optimizer)
    run.rewind(stage.name, done)
    with _stopped_gently() as stopped, _table(stage) as show:
        for step in range(done, stage.steps):
            start = time.perf_counter()
            metrics = stage.update(step)
            metrics["seconds"] = time.perf_counter() - start
            _check_finite(run, stage, step, metrics)
            run.log(stage.name, step + 1, metrics)
            show(step + 1, metrics)
            stop = processes.agreed(bool(stopped))
            if stop or (step + 1) % save_every == 0 or step + 1 == stage.steps:
                run.save(stage.name, step + 1, stage.module, stage.optimizer)
            if stop:
                if processes.is_first():
                    told = f"stopped and saved after update {step + 1} of {stage.name}"
                    print(f"{told}; go on with --resume", file=sys.stderr)
                raise SystemExit(128 + (stopped or [signal.SIGTERM])[0])


def _check_finite(run: RunFolder, stage: Stage, step: int, metrics: dict[str, float]) -> None:
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    wrong += [name for name, weight in stage.module.named_parameters() if not bool(weight.isfinite().all())]
    if wrong:
        path = run.folder / f"not-finite-{stage.name}-{step + 1:06d}.safetensors"
        if processes.is_first():
            batch = {name: tensor.clone() for name, tensor in stage.batch.items()}  # some may share their memory
            tensors = prefixed(stage.module.state_dict(), "module.") | prefixed(batch, "batch.")
            save_checkpoint(path, tensors, _origin(step + 1) | {"not_finite": wrong})
        raise FloatingPointError(
            f"update {step + 1} of {stage.name} gave values that are not finite: {', '.join(wrong[:5])}; see {path}"
        )


def _locked(folder: Path) -> FileLock:
    """Keeps other processes out of a run for as long as it is referred to, however this process ends."""
    lock = FileLock(folder / LOCK, thread_local=False, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another process is at work in {folder}; stop it, or wait for it") from error
    return lock


def _delete(folder: Path) -> None:
    """Remove what a run writes, see the module."""
    for name in ("checkpoints", "stages", "pruner", "tensorboard", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in [folder / "config.json", folder / "metrics.jsonl", *folder.glob("not-finite-*.safetensors")]:
        path.unlink(missing_ok=True)


def _origin(step: int) -> dict[str, Any]:
    """What a checkpoint says of itself. Config and seed stand in the run's ``config.json``; all random numbers and the
    place in the data follow from the seed and the step."""
    return {"step": step, "versions": {"tprl": tprl.__version__, "torch": str(torch.__version__)}}


def _tensorboard() -> Any:
    """TensorBoard's writer, imported only if asked for."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter


@contextmanager
def _stopped_gently() -> Iterator[list[int]]:
    """Gives a list that holds the number of a signal to stop, once one came."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda given, _: came.append(given)) for number in _STOPS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _table(stage: Stage) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Shows the newest metrics and the time left on a terminal, a line every tenth of the stage elsewhere."""
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console)
    task = progress.add_task(stage.name, total=stage.steps)

    def show(step: int, metrics: dict[str, float]) -> None:
        progress.update(task, completed=step)
        if live is not None:
            table = Table.grid(padding=(0, 2))
            for name, value in metrics.items():
                table.add_row(name, f"{value:.4g}")
            grid = Table.grid()
            grid.add_row(progress)
            grid.add_row(table)
            live.update(grid)
        elif step % max(1, stage.steps // 10) == 0 or step == stage.steps:
            line = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"{stage.name} {step}/{stage.steps}  {line}", file=sys.stderr, flush=True)

    if not processes.is_first():
        yield lambda step, metrics: None
    elif console.is_terminal:
        with Live(progress, console=console, transient=True) as live:
            yield show
    else:
        live = None
        yield show
