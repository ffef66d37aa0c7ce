"""Demonstrations: what heuristic pruners would do step by step, and which of them the reward prefers.

For every sample each teacher prunes through a nested sequence of budgets. All steps of all teachers are scored by
the frozen model in one batch, and the teacher with the highest return is the one that is imitated (TPRL,
arXiv 2603.13394, section on learning from demonstrations; keeping only what the reward likes is ours).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tprl.env import PruningEnv, Score, Trajectory
from tprl.rewards import discounted_returns
from tprl.selectors import SELECTORS, Selector, make_selector
from tprl.selectors.attention import TextAttention
from tprl.types import VisualTokens


@dataclass(frozen=True)
class Demonstrations:
    """The best trajectory of every sample of a batch, its return ``(B,)``, and the index of the teacher it comes from,
    int64 ``(B,)``."""

    trajectory: Trajectory
    returns: Tensor
    teacher: Tensor


def make_teacher(name: str, seed: int) -> Selector:
    """A demonstrator by name: any selector, or "text-attention".

    Raises:
        ValueError: nothing that can demonstrate has that name.
    """
    if name == TextAttention.name:
        return TextAttention()
    if name not in SELECTORS:
        raise ValueError(f"unknown teacher {name!r}; known: {', '.join([TextAttention.name, *SELECTORS])}")
    return cast(Selector, make_selector(name, seed))


def nested_masks(teacher: Selector, visual: VisualTokens, budgets: Sequence[int]) -> Tensor:
    """A teacher's trajectory: bool ``(T, B, N)``, each step chosen among what the one before kept.

    Args:
        budgets: tokens kept after every step, falling.
    """
    states, held = [], visual.mask
    for budget in budgets:
        seen = VisualTokens(visual.tokens, held, visual.coords, visual.query, visual.query_mask, visual.signals)
        held = teacher.select(seen, held.sum(1).clamp(max=budget)).keep_mask
        states.append(held)
    return torch.stack(states)


def demonstrate(
    teachers: Sequence[Selector],
    visual: VisualTokens,
    budgets: Sequence[int],
    unpruned_score: Tensor,
    score: Score,
    alpha: float,
    beta: float,
    gamma: float,
    margin: float,
) -> Demonstrations:
    """Let every teacher prune the batch and keep, for every sample, the trajectory with the highest return.

    Args:
        score: from keep masks ``(T, B, N)`` to scores ``(T, B)``.
        margin: return by which another has to beat the first teacher.
    """
    trajectories = []
    for teacher in teachers:
        env = PruningEnv(visual.mask, len(budgets), alpha, beta)
        for mask in nested_masks(teacher, visual, budgets):
            env.step(mask)
        trajectories.append(env.finish(unpruned_score, score))
    returns = torch.stack([discounted_returns(t.rewards, gamma)[:, 0] for t in trajectories])
    handicap = torch.full((len(teachers), 1), margin)
    handicap[0] = 0
    best = (returns - handicap).argmax(0)
    rows = torch.arange(len(best))

    def pick(name: str) -> Tensor:
        return torch.stack([getattr(t, name) for t in trajectories])[best, rows]

    return Demonstrations(
        Trajectory(pick("states"), pick("actions"), pick("rewards"), pick("scores")), returns[best, rows], best
    )
