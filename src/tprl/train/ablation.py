"""The ablation: what each part of the method is worth. One row a change, everything else as in the row "full".

Rows that agree on their first stages share them, so that a row which changes nothing but PPO costs PPO alone.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tprl.config import ImitateStage, PpoStage, TrainConfig
from tprl.data.sample import Source, samples_digest
from tprl.demonstrations import SEARCH
from tprl.lvlm.cache import processor_digest, weights_digest
from tprl.lvlm.cut import Positions
from tprl.lvlm.model import Lvlm
from tprl.pruner import CONFIG, TokenPruner
from tprl.run import RunFolder
from tprl.train import autoencoder, imitate, ppo
from tprl.train.pipeline import STAGES, blind_teachers, train

FULL = "full"


@dataclass(frozen=True)
class Row:
    """A change of the method.

    Attributes:
        group: what the row is about.
        stages: that are trained.
        pruner: settings of the pruner in the place of those of the row "full".
        choice: the same where they act on what is chosen alone, or how it is shown: only the threshold is found anew.
        imitate: the same of the imitation.
        ppo: the same of PPO.
        positions: of the kept tokens when the row is measured.
    """

    group: str
    stages: tuple[str, ...] = STAGES
    pruner: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)
    imitate: Mapping[str, Any] = field(default_factory=dict)
    ppo: Mapping[str, Any] = field(default_factory=dict)
    positions: Positions = "original"

    def settings(self, full: TrainConfig) -> TrainConfig:
        """What the row is trained with, from the settings of the row "full"."""
        return replace(
            full,
            pruner=replace(full.pruner, **self.pruner),
            imitate=replace(full.imitate, **self.imitate),
            ppo=replace(full.ppo, **self.ppo),
        )


HEURISTICS = ("text-attention", "fastervlm", "divprune", "cdpruner")

ROWS: dict[str, Row] = {
    FULL: Row("learning"),
    "demonstrations-only": Row("learning", (autoencoder.NAME, imitate.NAME)),
    "ppo-only": Row("learning", (autoencoder.NAME, ppo.NAME)),
    "no-autoencoder": Row("state", pruner={"use_autoencoder": False}),
    **{f"latent-{width}": Row("state", pruner={"latent": width}) for width in (16, 32, 128)},
    "no-question": Row("state", pruner={"use_question": False}),
    **{f"teacher-{name}": Row("teacher", imitate={"teachers": (name,)}) for name in HEURISTICS},
    "teacher-search": Row("teacher", imitate={"teachers": (*ImitateStage().teachers, SEARCH)}),
    "one-budget": Row("teacher", imitate={"budgets": (32,)}),
    **{f"steps-{horizon}": Row("episode", ppo={"horizon": horizon}) for horizon in (2, 3)},
    "sparse-score": Row("reward", ppo={"score": "correct"}),
    "critic": Row("reward", ppo={"baseline": "critic"}),
    "no-novelty": Row("choice", choice={"novelty": 0.0}),
    "not-proportional": Row("choice", choice={"proportional": False}),
    "compact-positions": Row("positions", positions="compact"),
}
"""All rows. "full" is the default: three teachers compete through three budgets, T = 1, dense score, group baseline,
novelty, proportional attention, original positions."""


def train_row(
    row: Row,
    folder: Path,
    lvlm: Lvlm,
    sources: tuple[Source, Source],
    config: TrainConfig,
    cache: Path,
) -> TokenPruner:
    """The row's pruner, from ``folder`` as far as it was trained there already.

    Args:
        sources: training and validation samples.
        config: settings of the row "full".
        cache: of encoded pictures and demonstrations.
    """
    config = row.settings(config)
    pruner, made_from = None, ""
    parts = _parts(row)
    for stages in parts:
        part = config if ppo.NAME in stages else replace(config, ppo=_reward_only(config.ppo))
        if not stages:
            part = replace(part, pruner=replace(part.pruner, **row.choice))
        settings = {
            "model": [weights_digest(lvlm), processor_digest(lvlm)],
            "samples": [samples_digest(source) for source in sources],
            "settings": asdict(part), "stages": stages, "start": made_from,
        }  # fmt: skip
        made_from = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        run, last = folder / made_from, stages is parts[-1]
        trained = run / "pruner" if last else run / "stages" / stages[-1]
        if (trained / CONFIG).exists():
            pruner = TokenPruner.from_pretrained(trained, lvlm.fingerprint)
        else:
            if pruner:
                pruner.config = replace(pruner.config, **asdict(part.pruner))
            own = RunFolder(run, settings, resume=True)
            pruner = train(own, lvlm, sources, part, stages, pruner, cache, calibrated=last)
    assert pruner is not None
    return pruner


def check_rows(rows: Sequence[str], lvlm: Lvlm, config: TrainConfig) -> None:
    """Raise ValueError if some of ``ROWS`` cannot be had with a model."""
    wrong = []
    for name in rows:
        try:
            blind_teachers(lvlm, ROWS[name].settings(config).imitate)
            if ROWS[name].positions == "compact" and lvlm.has_places:
                raise ValueError("positions 'compact' are not allowed where they are two-dimensional")
        except ValueError as error:
            wrong.append(f"{name} ({error})")
    if wrong:
        raise ValueError(f"rows that {lvlm.family.name} cannot have, so leave them out of --rows: {', '.join(wrong)}")


def _parts(row: Row) -> list[tuple[str, ...]]:
    """The trainings one after the other: PPO by itself where it follows an imitation that other rows share, and by
    itself, without any stage, what chooses otherwise with what others have learnt."""
    parts = [row.stages[:-1], row.stages[-1:]] if row.stages == STAGES else [row.stages]
    return [*parts, ()] if row.choice else parts


def _reward_only(settings: PpoStage) -> PpoStage:
    """PPO's settings as far as demonstrations are chosen by them."""
    return PpoStage(score=settings.score, alpha=settings.alpha, gamma=settings.gamma)
