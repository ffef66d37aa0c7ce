"""Settings of a pruner and of its training: the command line, the saved JSON and the defaults are these classes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Literal, get_args


def _at_least(least: int, settings: object, names: Sequence[str], most: float = inf) -> None:
    for name in names:
        if not least <= getattr(settings, name) <= most:  # which "not a number" does not
            allowed = f"be at least {least}" if most == inf else f"lie in [{least}, {most}]"
            raise ValueError(f"{name} has to {allowed}, got {getattr(settings, name)}")


def _above_zero(settings: object, names: Sequence[str], most: float = inf) -> None:
    for name in names:
        if not 0 < getattr(settings, name) <= most:
            allowed = "be above 0" if most == inf else f"lie in (0, {most}]"
            raise ValueError(f"{name} has to {allowed}, got {getattr(settings, name)}")


@dataclass(frozen=True)
class PrunerShape:
    """What a pruner is made of. The defaults suit a language model of width 576.

    Attributes:
        latent: L, width of the autoencoder's latents.
        autoencoder_hidden: hidden units of the autoencoder.
        policy_hidden: width of the policy's trunk.
        policy_layers: transformer layers of the trunk.
        policy_heads: attention heads of the trunk.
        use_question: False hides the question from the policy (an ablation).
        use_autoencoder: False lets the policy read the tokens themselves (an ablation).
        novelty: weight in a token's logit of what it shows that no likelier token shows, see ``tprl.novelty``; 0 leaves
            twins their places, and is set at the end of a training if validation samples are answered better so.
        proportional: whether a kept token is attended to as the dropped ones that it stands for, see ``tprl.sizes``.
    """

    latent: int = 64
    autoencoder_hidden: int = 128
    policy_hidden: int = 96
    policy_layers: int = 3
    policy_heads: int = 2
    use_question: bool = True
    use_autoencoder: bool = True
    novelty: float = 2.0
    proportional: bool = True

    def __post_init__(self) -> None:
        _at_least(1, self, ["latent", "autoencoder_hidden", "policy_hidden", "policy_layers", "policy_heads"])
        _at_least(0, self, ["novelty"])
        if self.policy_hidden % self.policy_heads:
            raise ValueError(
                f"policy_hidden has to be a multiple of policy_heads, got {self.policy_hidden} and {self.policy_heads}"
            )


@dataclass(frozen=True)
class PrunerConfig(PrunerShape):
    """All that is to be known of a trained pruner but its weights.

    Attributes:
        width: D, width of the language model it prunes for.
        fingerprint: of that model, see ``Lvlm.fingerprint``; another model is refused.
        threshold: keep probability above which a token stays when neither budget nor threshold is given.
    """

    width: int = field(kw_only=True)
    fingerprint: str = field(kw_only=True)
    threshold: float = field(default=0.5, kw_only=True)


@dataclass(frozen=True)
class AutoencoderStage:
    """Stage 1: the autoencoder learns to reconstruct visual tokens, without any label.

    Attributes:
        steps: updates.
        pictures: in a batch.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
    """

    steps: int = 1000
    pictures: int = 8
    learning_rate: float = 2e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _at_least(0, self, ["steps", "weight_decay"])
        _at_least(1, self, ["pictures"])
        _above_zero(self, ["learning_rate"])


@dataclass(frozen=True)
class ImitateStage:
    """Stage 2: the policy imitates, for every sample, the demonstration that the reward likes best.

    Attributes:
        demonstrations: samples that are demonstrated, one trajectory kept of each; 0 skips the stage.
        teachers: selectors that compete for every sample, and "search", which improves on the best of them, see
            ``tprl.demonstrations.Search``.
        margin: return by which another teacher, but for the search, has to beat the first of them to be imitated
            instead. Teachers blind to the question often win by a hair, and a policy that imitates them learns to keep
            whatever there is.
        beta: weight of the tokens removed in a demonstration's return. All teachers remove as many, so it says how much
            of the answer's score a demonstration may cost.
        budgets: tokens kept after every step of a demonstration, falling.
        search_rounds: generations of the search.
        search_children: subsets that are tried in a generation; a search scores ``search_rounds * search_children``
            times as many subsets as one heuristic teacher.
        epochs: passes over the demonstrations.
        batch: samples in an update.
        learning_rate: of AdamW.
    """

    demonstrations: int = 8192
    teachers: tuple[str, ...] = ("text-attention", "fastervlm", "divprune")
    margin: float = 0.2
    beta: float = 0.03
    budgets: tuple[int, ...] = (64, 32, 16)
    search_rounds: int = 8
    search_children: int = 4
    epochs: int = 4
    batch: int = 32
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        _at_least(0, self, ["demonstrations", "margin", "beta"])
        _above_zero(self, ["learning_rate"])
        _at_least(1, self, ["search_rounds", "search_children", "epochs", "batch"])
        falling = all(before > after for before, after in pairwise((*self.budgets, 0)))
        if not self.budgets or not falling:
            raise ValueError(f"budgets have to fall and to be at least 1, got {self.budgets}")


Score = Literal["log_likelihood", "correct"]
Baseline = Literal["group", "critic"]


@dataclass(frozen=True)
class PpoStage:
    """Stage 3: PPO on the joint reward of accuracy and efficiency.

    Attributes:
        epochs: rounds of rollouts; 0 skips the stage.
        questions: in a round.
        rollouts: of every question in a round.
        horizon: T, steps in an episode.
        discount: ``lambda_disc``; step t keeps with probability ``discount ** t * p``.
        alpha: weight of the task in the reward.
        beta: weight of the tokens removed in the reward.
        score: "log_likelihood" of the reference answer, or "correct", 1 where it is what greedy decoding gives.
        baseline: "group", the other rollouts of the question; "critic", generalised advantage estimation.
        gamma: discount of later rewards.
        gae_lambda: of the critic's advantages.
        minibatch: episodes in an update.
        update_epochs: passes over a round's episodes.
        actor_learning_rate: of the policy.
        critic_learning_rate: of the critic.
        clip_epsilon: of the ratios.
        entropy_coeff: weight of the entropy.
        value_coeff: weight of the critic's loss.
        max_kl: an update epoch is the last where the approximate KL a token exceeds this.
    """

    epochs: int = 100
    questions: int = 64
    rollouts: int = 8
    horizon: int = 1
    discount: float = 0.9
    alpha: float = 1.0
    beta: float = 0.5
    score: Score = "log_likelihood"
    baseline: Baseline = "group"
    gamma: float = 0.5
    gae_lambda: float = 0.95
    minibatch: int = 512
    update_epochs: int = 4
    actor_learning_rate: float = 7e-4
    critic_learning_rate: float = 1e-3
    clip_epsilon: float = 0.2
    entropy_coeff: float = 0.0
    value_coeff: float = 0.5
    max_kl: float = 0.02

    def __post_init__(self) -> None:
        _at_least(0, self, ["epochs", "alpha", "beta", "entropy_coeff", "value_coeff"])
        _at_least(0, self, ["gamma", "gae_lambda"], most=1)
        _above_zero(self, ["actor_learning_rate", "critic_learning_rate", "clip_epsilon", "max_kl"])
        _above_zero(self, ["discount"], most=1)
        _at_least(1, self, ["questions", "horizon", "minibatch", "update_epochs"])
        for name, allowed in (("score", get_args(Score)), ("baseline", get_args(Baseline))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} has to be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        _at_least(2 if self.baseline == "group" else 1, self, ["rollouts"])
        if self.questions * self.rollouts < 2:
            raise ValueError("questions times rollouts has to be at least 2, since advantages are normalised, got 1")


@dataclass(frozen=True)
class TrainConfig:
    """A whole training: one after the other, each stage starting from what the one before left.

    Attributes:
        pruner: what is trained.
        samples: of the training split.
        validation: samples of the validation split, for metrics and for the threshold.
        max_drop: points of validation accuracy that the calibrated threshold may cost.
        seed: all randomness follows from it.
        save_every: updates between two checkpoints.
    """

    autoencoder: AutoencoderStage = AutoencoderStage()
    imitate: ImitateStage = ImitateStage()
    ppo: PpoStage = PpoStage()
    pruner: PrunerShape = PrunerShape()
    samples: int = 8192
    validation: int = 2400
    max_drop: float = 0.3
    seed: int = 0
    save_every: int = 20

    def __post_init__(self) -> None:
        _at_least(0, self, ["max_drop"])
        _at_least(0, self, ["seed"], most=2**63 - 1)
        _at_least(1, self, ["samples", "validation", "save_every"])
