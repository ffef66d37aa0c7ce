"""Settings that would train something else than was meant are refused when they are made."""

from math import nan
from typing import Any

import pytest

from tprl.commands.train import PRESETS
from tprl.config import AutoencoderStage, ImitateStage, PpoStage, PrunerShape, TrainConfig


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        (AutoencoderStage, {"pictures": 0}, "pictures has to be at least 1, got 0"),
        (ImitateStage, {"batch": 0}, "batch has to be at least 1, got 0"),
        (ImitateStage, {"budgets": (16, 32)}, r"budgets have to fall and to be at least 1, got \(16, 32\)"),
        (ImitateStage, {"budgets": (16, 0)}, r"got \(16, 0\)"),
        (ImitateStage, {"budgets": ()}, r"got \(\)"),
        (PpoStage, {"rollouts": 1}, "rollouts has to be at least 2, got 1"),
        (PpoStage, {"baseline": "grup"}, "baseline has to be one of group, critic, got 'grup'"),
        (PpoStage, {"score": "right"}, "score has to be one of log_likelihood, correct, got 'right'"),
        (PpoStage, {"discount": 1.5}, r"discount has to lie in \(0, 1\], got 1.5"),
        (PpoStage, {"gamma": 9}, r"gamma has to lie in \[0, 1\], got 9"),
        (PpoStage, {"clip_epsilon": -1.0}, "clip_epsilon has to be above 0, got -1.0"),
        (PpoStage, {"actor_learning_rate": 0.0}, "actor_learning_rate has to be above 0, got 0.0"),
        (ImitateStage, {"margin": nan}, "margin has to be at least 0, got nan"),
        (TrainConfig, {"max_drop": nan}, "max_drop has to be at least 0, got nan"),
        (PrunerShape, {"latent": 0}, "latent has to be at least 1, got 0"),
        (PrunerShape, {"novelty": -1.0}, "novelty has to be at least 0, got -1.0"),
        (PrunerShape, {"policy_heads": 5}, "policy_hidden has to be a multiple of policy_heads, got 96 and 5"),
        (TrainConfig, {"save_every": 0}, "save_every has to be at least 1, got 0"),
        (TrainConfig, {"seed": -1}, r"seed has to lie in \[0, 9223372036854775807\], got -1"),
        (
            PpoStage,
            {"questions": 1, "rollouts": 1, "baseline": "critic"},
            "questions times rollouts has to be at least 2",
        ),
    ],
)
def test_what_is_refused(stage: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(**settings)


def test_a_critic_needs_no_other_rollouts_and_a_stage_can_be_left_out() -> None:
    PpoStage(rollouts=1, baseline="critic", epochs=0)
    ImitateStage(demonstrations=0, budgets=(32,))
    AutoencoderStage(steps=0)


def test_the_papers_sizes() -> None:
    """TPRL, arXiv 2603.13394: latents of 256, and neither novelty nor proportional attention, which are ours."""
    paper = PRESETS["paper"].pruner
    assert (paper.latent, paper.autoencoder_hidden, paper.policy_hidden, paper.novelty) == (256, 512, 256, 0)
    assert not paper.proportional
