"""The whole training: autoencoder, demonstrations, imitation, PPO, calibration."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch

from tprl import processes
from tprl.config import ImitateStage, PrunerConfig, TrainConfig
from tprl.data.sample import Source
from tprl.demonstrations import make_teacher, teacher_signals
from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.in_model import check_first_cut
from tprl.lvlm.layer_view import unreadable
from tprl.lvlm.model import Lvlm
from tprl.lvlm.signals import TOWER_SIGNALS, tower_signals
from tprl.pruner import TokenPruner
from tprl.run import RunFolder, Stage, fit
from tprl.selectors import InModel
from tprl.train import autoencoder, imitate, ppo
from tprl.train.autoencoder import autoencoder_stage
from tprl.train.calibrate import calibrate, choose_novelty, one_shot
from tprl.train.imitate import collect_demonstrations, heuristics, imitate_stage
from tprl.train.ppo import ppo_stage

STAGES = (autoencoder.NAME, imitate.NAME, ppo.NAME)
WATCHED_BUDGETS = (64, 32)
WATCHED_EVERY, WATCHED_SAMPLES = 5, 64
"""Rounds of PPO between two looks at validation samples, and how many of them."""
LOOKED_AT = 800
"""Validation samples that are looked at after a stage and by which novelty is chosen; the threshold is found on all."""


def train(
    run: RunFolder,
    lvlm: Lvlm,
    sources: tuple[Source, Source],
    config: TrainConfig,
    stages: Sequence[str] = STAGES,
    start: TokenPruner | None = None,
    cache: Path | None = None,
    calibrated: bool = True,
) -> TokenPruner:
    """Train a pruner for ``lvlm``; everything is kept in ``run``, the result in its folder ``pruner``.

    Args:
        sources: training and validation samples.
        stages: which of ``STAGES`` to do, in their order.
        start: a pruner that the first stage starts from instead of a fresh one.
        cache: where visual tokens are kept between runs; the run's own folder unless given.
        calibrated: False ends with the last stage, for a training that another one starts from.
    """
    torch.manual_seed(config.seed)
    shape = PrunerConfig(**asdict(config.pruner), width=lvlm.width, fingerprint=lvlm.fingerprint)
    pruner = (start or TokenPruner(shape)).to(lvlm.device)
    config = without_blind_teachers(lvlm, config)
    signals = frozenset[str]().union(*teacher_signals(heuristics(config.imitate)).values()) & TOWER_SIGNALS
    folder = cache or run.folder / "cache"
    with processes.first_alone():
        data = EncodedSamples(lvlm, sources[0], folder, signals)
        held_out = EncodedSamples(lvlm, sources[1], folder)
    _ = data.unpruned
    unpruned = held_out.accuracy_unpruned
    if not bool(unpruned.any()):
        warnings.warn(
            f"the unpruned model answers none of the {len(held_out)} validation questions as they are answered there, "
            f"such as {held_out.samples[0].question!r} by {held_out.samples[0].answers[0]!r}: there is no accuracy to "
            "keep, and the threshold will say nothing",
            stacklevel=2,
        )

    def watch(step: int) -> dict[str, float]:
        figures = {"padding": data.scorer.passes.padding_share()}
        if (step + 1) % WATCHED_EVERY == 0 or step + 1 == config.ppo.epochs:
            seen = one_shot(pruner, held_out, unpruned, budget=WATCHED_BUDGETS[0], most=WATCHED_SAMPLES)
            figures["validation_accuracy"] = seen.accuracy
        return figures

    def make_ppo() -> Stage:
        data.scorer.passes.padding_share()  # what was scored before is none of its business
        return ppo_stage(pruner, data, config, watch)

    makers: dict[str, Callable[[], Stage]] = {
        autoencoder.NAME: lambda: autoencoder_stage(pruner, data, config.autoencoder, config.seed),
        imitate.NAME: lambda: imitate_stage(pruner, data, collect_demonstrations(run, data, config), config),
        ppo.NAME: make_ppo,
    }
    for name in STAGES:
        if name not in stages or (name == imitate.NAME and config.imitate.demonstrations == 0):
            continue
        stage = makers[name]()
        if stage.steps == 0:
            continue
        fit(run, stage, config.save_every)
        pruner.eval()
        _save(pruner, run.folder / "stages" / name)
        if name != autoencoder.NAME and not run.logged(f"after-{name}"):
            run.log(f"after-{name}", 0, _look_at(pruner, held_out, unpruned))
    if calibrated:
        choose_novelty(pruner, held_out, unpruned, config.imitate.budgets, LOOKED_AT)
        result = calibrate(pruner, held_out, unpruned, config.max_drop)
        _save(pruner, run.folder / "pruner")
        if not run.logged("calibrated"):
            chosen = {"novelty": pruner.config.novelty, "threshold": pruner.config.threshold}
            run.log("calibrated", 0, {**chosen, "kept": result.kept, "drop_points": result.drop_points})
    processes.meet()  # all of them will find there what the first one saved
    return pruner


def blind_teachers(lvlm: Lvlm, settings: ImitateStage) -> list[str]:
    """The teachers that need more than the model gives.

    Raises:
        ValueError: all of them do.
    """
    given, needed = tower_signals(lvlm.model), teacher_signals(heuristics(settings))
    if not unreadable(cast(Any, lvlm.model).get_decoder()):
        given |= {"text_attention"}
    blind = [name for name, needs in needed.items() if not needs <= given or not _can_cut(lvlm, name)]
    if blind and len(blind) == len(needed):
        raise ValueError(f"teachers {', '.join(blind)} all need what this {lvlm.family.name} does not give")
    return blind


def _can_cut(lvlm: Lvlm, teacher: str) -> bool:
    """Whether a teacher that acts inside the language model can do so in this one; others need not."""
    method = make_teacher(teacher, 0)
    try:
        if isinstance(method, InModel):
            check_first_cut(lvlm.model, method)
    except ValueError:
        return False
    return True


def without_blind_teachers(lvlm: Lvlm, config: TrainConfig) -> TrainConfig:
    """The settings without teachers that need more than the model gives, which are named on the way."""
    blind = blind_teachers(lvlm, config.imitate)
    if not blind:
        return config
    print(f"teachers left out, since this {lvlm.family.name} does not give what they need: {', '.join(blind)}")
    teachers = tuple(name for name in config.imitate.teachers if name not in blind)
    return replace(config, imitate=replace(config.imitate, teachers=teachers))


def _save(pruner: TokenPruner, folder: Path) -> None:
    if processes.is_first():
        pruner.save_pretrained(folder)


def _look_at(pruner: TokenPruner, data: EncodedSamples, unpruned: torch.Tensor) -> dict[str, float]:
    above = one_shot(pruner, data, unpruned, threshold=0.5, most=LOOKED_AT)
    metrics = {"accuracy_unpruned": above.unpruned}
    for budget in WATCHED_BUDGETS:
        metrics[f"accuracy_at_{budget}"] = one_shot(pruner, data, unpruned, budget=budget, most=LOOKED_AT).accuracy
    return metrics | {"accuracy_above_half": above.accuracy, "kept_above_half": above.kept}
