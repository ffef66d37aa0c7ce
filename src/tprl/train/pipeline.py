"""The whole training: autoencoder, demonstrations, imitation, PPO, calibration."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tprl.config import PrunerConfig, TrainConfig
from tprl.data.sample import Source
from tprl.demonstrations import make_teacher
from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.model import Lvlm
from tprl.lvlm.signals import TOWER_SIGNALS, tower_signals
from tprl.pruner import TokenPruner
from tprl.run import RunFolder, Stage, fit
from tprl.train import autoencoder, imitate, ppo
from tprl.train.autoencoder import autoencoder_stage
from tprl.train.calibrate import calibrate, one_shot, unpruned_accuracy
from tprl.train.imitate import collect_demonstrations, heuristics, imitate_stage
from tprl.train.ppo import ppo_stage

STAGES = (autoencoder.NAME, imitate.NAME, ppo.NAME)
WATCHED_BUDGETS = (64, 32)


def train(
    run: RunFolder,
    lvlm: Lvlm,
    sources: tuple[Source, Source],
    shape: PrunerConfig,
    config: TrainConfig,
    stages: Sequence[str] = STAGES,
    start: TokenPruner | None = None,
    cache: Path | None = None,
) -> TokenPruner:
    """Train a pruner for ``lvlm``; everything is kept in ``run``, the result in its folder ``pruner``.

    Args:
        sources: training and validation samples.
        shape: of the pruner.
        stages: which of ``STAGES`` to do, in their order.
        start: a pruner that the first stage starts from instead of a fresh one.
        cache: where visual tokens are kept between runs; the run's own folder unless given.
    """
    torch.manual_seed(config.seed)
    pruner = start or TokenPruner(shape)
    given = tower_signals(lvlm.model)
    needed = {name: make_teacher(name, config.seed).needs & TOWER_SIGNALS for name in heuristics(config.imitate)}
    if blind := [name for name, needs in needed.items() if not needs <= given]:
        print(f"teachers left out, since {lvlm.family.name}'s tower does not give what they need: {', '.join(blind)}")
        config = replace(
            config,
            imitate=replace(
                config.imitate, teachers=tuple(name for name in config.imitate.teachers if name not in blind)
            ),
        )
    signals = frozenset[str]().union(*(needed[name] for name in heuristics(config.imitate)))
    folder = cache or run.folder / "cache"
    data = EncodedSamples(lvlm, sources[0], folder, signals)
    held_out = EncodedSamples(lvlm, sources[1], folder)
    unpruned = unpruned_accuracy(held_out)
    makers: dict[str, Callable[[], Stage]] = {
        autoencoder.NAME: lambda: autoencoder_stage(pruner, data, config.autoencoder, config.seed),
        imitate.NAME: lambda: imitate_stage(pruner, data, collect_demonstrations(run, data, config), config),
        ppo.NAME: lambda: ppo_stage(pruner, data, config),
    }
    for name in STAGES:
        if name not in stages or (name == imitate.NAME and config.imitate.demonstrations == 0):
            continue
        stage = makers[name]()
        if stage.steps == 0:
            continue
        fit(run, stage, config.save_every)
        pruner.eval()
        pruner.save_pretrained(run.folder / "stages" / name)
        if name != autoencoder.NAME and not run.logged(f"after-{name}"):
            run.log(f"after-{name}", 0, _look_at(pruner, held_out, unpruned))
    result = calibrate(pruner, held_out, unpruned, config.max_drop)
    pruner.save_pretrained(run.folder / "pruner")
    if not run.logged("calibrated"):
        figures = {"threshold": pruner.config.threshold, "kept": result.kept, "drop_points": result.drop_points}
        run.log("calibrated", 0, figures)
    return pruner


def _look_at(pruner: TokenPruner, data: EncodedSamples, unpruned: torch.Tensor) -> dict[str, float]:
    metrics = {"accuracy_unpruned": float(unpruned.mean())}
    for budget in WATCHED_BUDGETS:
        metrics[f"accuracy_at_{budget}"] = one_shot(pruner, data, unpruned, budget=budget).accuracy
    above = one_shot(pruner, data, unpruned, threshold=0.5)
    return metrics | {"accuracy_above_half": above.accuracy, "kept_above_half": above.kept}
