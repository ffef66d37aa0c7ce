"""``tprl pocket``: train pocket-llava from nothing, stage by stage, or say where it stands."""

import json
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from torch.optim.swa_utils import AveragedModel

from tprl.checkpoint import load_checkpoint, save_text
from tprl.commands.parse import parse_names
from tprl.pocket.assemble import DELTA, pocket_llava, save_delta
from tprl.pocket.base import image_token_id, load_base
from tprl.pocket.joint import JOINT, JointConfig, load_weights, train_joint
from tprl.pocket.language import LanguageConfig, train_language
from tprl.pocket.model import new_llava, to_delta
from tprl.pocket.tower import TowerConfig, train_tower

STAGES = ("tower", "language", "joint")


def path() -> None:
    """Print the folder of pocket-llava; put it together first where it does not stand yet."""
    print(pocket_llava())


def train(run: Path, *, stages: str = ",".join(STAGES), shipped: bool = False, seed: int = 0) -> None:
    """Train pocket-llava; an interrupted stage goes on from its checkpoint.

    The stages tower and language do not depend on each other and may run side by side, joint needs both.

    Args:
        run: folder of checkpoints and metrics.
        stages: comma-separated, of tower, language, joint.
        shipped: start each stage from the weights that the package ships, joint with the tower and the language model
            that ``run`` holds, if any.
        seed: all randomness follows from it.
    """
    names = parse_names(stages)
    if unknown := [name for name in names if name not in STAGES]:
        raise ValueError(f"unknown stages {', '.join(unknown)}; known: {', '.join(STAGES)}")
    if seed < 0:
        raise ValueError(f"--seed is a whole number from 0 on, got {seed}")
    run.mkdir(parents=True, exist_ok=True)
    for name in names:
        _remember(run, name, {"shipped": shipped, "seed": seed})
        _log(run / f"{name}.jsonl", _training(name, run, seed, DELTA if shipped else None))


def pack(runs: tuple[Path, ...], *, out: Path = DELTA) -> None:
    """Write the weights that the package ships, from finished trainings.

    Args:
        runs: folders of trainings; of several, which must have begun alike, the mean of their weights is taken
            (arXiv 2203.05482).
        out: the file to write.
    """
    if not runs:
        raise ValueError("name the folder of a training, or of several")
    base, tokenizer = load_base()
    llava = new_llava(base, image_token_id(tokenizer))
    mean = AveragedModel(llava)
    for run in runs:
        weights, meta = load_checkpoint(run / JOINT)
        if meta["step"] < meta["steps"]:
            raise ValueError(f"the training in {run} stands at step {meta['step']} of {meta['steps']}; finish it first")
        load_weights(llava, weights)
        mean.update_parameters(llava)
    llava.load_state_dict(mean.module.state_dict())
    out.parent.mkdir(parents=True, exist_ok=True)
    save_delta(to_delta(llava, base), out)
    print(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB")


def _remember(run: Path, stage: str, asked: dict[str, int]) -> None:
    """Note what a stage in ``run`` began with; raise ValueError if it began with something else."""
    path = run / "config.json"
    with FileLock(run / "config.lock"):  # stages may run side by side
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get(stage, asked) != asked:
            raise ValueError(f"the stage {stage} in {run} began with {known[stage]}; it cannot go on with {asked}")
        save_text(path, json.dumps(known | {stage: asked}, indent=2) + "\n")


def _training(name: str, run: Path, seed: int, delta: Path | None) -> Iterator[dict[str, float]]:
    if name == "tower":
        goes_on = TowerConfig(steps=1600, learning_rate=8e-4, warmup_steps=50, seed=seed)
        return train_tower(run, goes_on if delta else TowerConfig(seed=seed), delta)
    if name == "language":
        goes_on_reading = LanguageConfig(steps=600, learning_rate=4e-4, seed=seed)
        return train_language(run, goes_on_reading if delta else LanguageConfig(seed=seed), delta)
    return train_joint(run, JointConfig(seed=seed), delta)


def _log(file: Path, metrics: Iterator[dict[str, float]]) -> None:
    with file.open("a") as log:
        for line in metrics:
            log.write(json.dumps(line) + "\n")
            log.flush()
            print("  ".join(f"{name} {value:.3g}" for name, value in line.items()), flush=True)
