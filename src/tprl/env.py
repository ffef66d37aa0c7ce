"""Pruning as a sequential decision process with explicit transitions, batched (TPRL, arXiv 2603.13394).

State ``s_t = (Z_t, q)``: the latents of the tokens still kept, and the question. Action: keep or drop each of them.
Transition: the kept ones are the next state. Reward: ``tprl.rewards``. The environment knows nothing of the policy
and asks a score function how well the model answers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tprl.rewards import step_rewards

Score = Callable[[Tensor], Tensor]
"""From keep masks ``(T, B, N)`` to scores ``(T, B)``: all steps of all rollouts in one call."""


@dataclass(frozen=True)
class Trajectory:
    """What happened in a batch of episodes.

    Attributes:
        states: bool ``(B, T + 1, N)``, tokens held before every step and after the last.
        actions: bool ``(B, T, N)``, exactly what acted: ``states[:, t + 1]``.
        rewards: float ``(B, T)``.
        scores: float ``(B, T + 1)``, unpruned first.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    scores: Tensor

    @property
    def counts(self) -> Tensor:
        """Tokens held, int64 ``(B, T + 1)``."""
        return self.states.sum(-1)


class PruningEnv:
    """A batch of episodes over one batch of pictures and questions.

    Args:
        mask: bool ``(B, N)``, the real tokens: the initial state.
        horizon: T, steps in an episode.
        alpha: weight of the task's gain in the reward.
        beta: weight of the share of tokens removed.
    """

    def __init__(self, mask: Tensor, horizon: int, alpha: float, beta: float) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        if not bool(mask.any(1).all()):
            raise ValueError("every row must have at least one real token")
        self.horizon, self.alpha, self.beta = horizon, alpha, beta
        self.states = [mask]

    @property
    def state(self) -> Tensor:
        """Tokens held now, bool ``(B, N)``."""
        return self.states[-1]

    @property
    def done(self) -> bool:
        return len(self.states) > self.horizon

    def step(self, action: Tensor) -> Tensor:
        """Keep ``action`` of the tokens held; returns the new state.

        Raises:
            ValueError: the action keeps a token that is not held, or none at all.
            RuntimeError: the episode is over.
        """
        if self.done:
            raise RuntimeError(f"the episode ended after {self.horizon} steps")
        if bool((action & ~self.state).any()):
            raise ValueError("the action keeps a token that the state does not hold")
        if not bool(action.any(1).all()):
            raise ValueError("the action drops every token of a row; at least one must stay")
        self.states.append(action)
        return action

    def finish(self, unpruned_score: Tensor, score: Score) -> Trajectory:
        """Score all steps at once and hand out the rewards.

        Args:
            unpruned_score: ``(B,)``, the score of ``H_0``: the first difference is measured against it.
            score: see ``Score``.
        """
        if not self.done:
            raise RuntimeError(f"the episode has taken {len(self.states) - 1} of {self.horizon} steps")
        states = torch.stack(self.states, 1)
        after = score(states[:, 1:].transpose(0, 1)).T
        scores = torch.cat([unpruned_score[:, None], after], 1).to(states.device)
        rewards = step_rewards(scores, states.sum(-1), self.alpha, self.beta)
        return Trajectory(states, states[:, 1:], rewards, scores)
