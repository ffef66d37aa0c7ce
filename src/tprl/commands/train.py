"""``tprl train``: the stages autoencoder, imitate and ppo, each alone or all."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from tprl import processes
from tprl.commands.parse import parse_names
from tprl.config import AutoencoderStage, ImitateStage, PpoStage, PrunerShape, TrainConfig
from tprl.data import load_training
from tprl.data.sample import samples_digest
from tprl.demonstrations import teacher_signals
from tprl.evaluate.provenance import pruner_digest
from tprl.lvlm.cache import processor_digest, weights_digest
from tprl.pocket.assemble import cache_folder, choose_dtype, open_lvlm
from tprl.pruner import TokenPruner
from tprl.run import RunFolder
from tprl.train.imitate import heuristics
from tprl.train.pipeline import STAGES
from tprl.train.pipeline import train as run_training

QUICK = TrainConfig(
    AutoencoderStage(steps=60, pictures=4),
    ImitateStage(demonstrations=96, epochs=12, batch=16),
    PpoStage(epochs=6, questions=16, rollouts=4, minibatch=64),
    samples=300,
    validation=50,
    save_every=10,
)
"""A short training that shows every stage at work; far too short for a good pruner."""

PAPER = TrainConfig(
    AutoencoderStage(steps=10_000, pictures=1, learning_rate=1e-4),
    ImitateStage(demonstrations=50_000, beta=0.1, epochs=5, batch=128, learning_rate=5e-5),
    PpoStage(
        epochs=200, questions=64, rollouts=1, horizon=3, discount=0.5, beta=0.1, gamma=0.99, baseline="critic",
        minibatch=16, update_epochs=4, actor_learning_rate=1e-5, critic_learning_rate=3e-5, entropy_coeff=0.01,
    ),
    PrunerShape(
        latent=256, autoencoder_hidden=512, policy_hidden=256, policy_layers=2, policy_heads=8, novelty=0.0,
        proportional=False,
    ),
    samples=50_000,
)  # fmt: skip
"""The values of TPRL, arXiv 2603.13394."""

PRESETS = {"default": TrainConfig(), "quick": QUICK, "paper": PAPER}


def choose_settings(preset: str, config: TrainConfig | None) -> TrainConfig:
    """The settings of a preset, or ``config`` in their place.

    Raises:
        ValueError: there is no such preset, or both are given, or a teacher is unknown.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    if config is not None and preset != "default":
        raise ValueError(f"--preset {preset} and settings of one's own (set:) exclude each other")
    settings = config or PRESETS[preset]
    teacher_signals(heuristics(settings.imitate))
    return settings


def train(
    run: Path,
    *,
    model: str = "pocket-llava",
    data: str = "scenes",
    val_data: str | None = None,
    images: Path | None = None,
    skip_bad: bool = False,
    stages: str = ",".join(STAGES),
    preset: str = "default",
    init: Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    cache: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    config: Annotated[TrainConfig | None, tyro.conf.arg(name="set")] = None,
) -> None:
    """Train a pruner; the result stands in RUN/pruner.

    Args:
        run: folder of the run.
        model: "pocket-llava", or a folder or Hub id of a model.
        data: "scenes", "scenes-crowded", "scenes-tiles", "easy-vqa", or a .jsonl file. What is held out to watch the
            training and to find the threshold is their split "val", a tenth of the pictures of a file.
        val_data: other data to hold out; a .jsonl file is taken whole then, and so is that of --data.
        images: picture folder of a .jsonl file; the file's own unless given.
        skip_bad: leave out records of a .jsonl file that cannot be read.
        stages: comma-separated, of autoencoder, imitate, ppo; without the first of them from a pruner of --init.
        preset: "default", "quick" (minutes, shows every stage at work) or "paper".
        init: folder of a pruner to start from.
        dtype: of the model: "auto", "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda"; each of several processes takes a GPU of its own.
        cache: folder where encoded pictures are kept between runs; $TPRL_CACHE or ~/.cache/tprl unless given.
        resume: go on with the run in the folder.
        overwrite: delete the run in the folder first, and nothing else there.
        tensorboard: write the metrics to RUN/tensorboard too.
        config: settings of one's own, each with the default preset's value unless given; not together with --preset.
    """
    settings = choose_settings(preset, config)
    names = parse_names(stages)
    if unknown := [name for name in names if name not in STAGES]:
        raise ValueError(f"unknown stages {', '.join(unknown)}; known: {', '.join(STAGES)}")
    if STAGES[0] not in names and init is None:
        raise ValueError(f"--stages {stages} needs a pruner that has been through {STAGES[0]}; say which with --init")
    sources = load_training(data, val_data, settings.samples, settings.validation, skip_bad, images)
    with processes.joined(device) as own_device:
        batches = settings.autoencoder.pictures, settings.imitate.batch, settings.ppo.minibatch
        for name, batch in zip(STAGES, batches, strict=True):
            if name in names:
                processes.check_shares(batch, f"{name}'s batch of")
        precision = choose_dtype(dtype, own_device)
        lvlm = open_lvlm(model, precision, own_device)
        start = TokenPruner.from_pretrained(init, lvlm.fingerprint) if init else None
        if start is not None:
            not_learnt = {name: getattr(settings.pruner, name) for name in ("novelty", "proportional")}
            start.config = replace(start.config, **not_learnt)
            wanted = asdict(settings.pruner)
            if other := [name for name in wanted if wanted[name] != getattr(start.config, name)]:
                raise ValueError(f"the pruner in {init} has another {', '.join(other)} than is asked for")
        asked = {
            "model": model, "weights": weights_digest(lvlm), "processor": processor_digest(lvlm), "dtype": precision,
            "data": data, "val_data": val_data, "images": str(images) if images else None,
            "samples": [samples_digest(source) for source in sources], "stages": names,
            "init": str(init) if init else None, "started_from": pruner_digest(start) if start else None,
            "preset": preset, "settings": asdict(settings),
        }  # fmt: skip
        folder = RunFolder(run, asked, resume, overwrite, tensorboard)
        run_training(folder, lvlm, sources, settings, names, start, cache or cache_folder())
        if processes.is_first():
            _print_summary(run)


def _print_summary(run: Path) -> None:
    """What the policy could do after each stage, on the validation samples."""
    table = Table("stage", "figure", "value")
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        stage = entry.pop("stage")
        entry.pop("step")
        if stage.startswith(("demonstrations", "after-", "calibrated")):
            for name, value in entry.items():
                table.add_row(stage, name, f"{value:.4g}")
    Console().print(table)
    print(f"the pruner stands in {run / 'pruner'}")
