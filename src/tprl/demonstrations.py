"""Demonstrations: what heuristic pruners would do step by step, and which of them the reward prefers.

For every sample each teacher prunes through a nested sequence of budgets. All its steps are scored by the frozen
model in one batch, and the teacher with the highest return is the one that is imitated (TPRL,
arXiv 2603.13394, section on learning from demonstrations; keeping only what the reward likes is ours).

"search" is a teacher of its own: it starts from what the others agreed on and looks for tokens that answer better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tprl.env import PruningEnv, Score
from tprl.rewards import discounted_returns
from tprl.selectors import IN_MODEL, SELECTORS, InModel, Selector, make_selector
from tprl.selectors.attention import TextAttention
from tprl.types import VisualTokens

SEARCH = "search"
BLOCK = 4
"""Tokens that the search moves together, as many as a square of 2 x 2 holds."""

Worth = Callable[[Tensor, Tensor], Tensor]
"""From rows of the batch, int64 ``(R,)``, and a keep mask for each, bool ``(R, N)``, to scores ``(R,)``."""


@dataclass(frozen=True)
class Demonstrations:
    """The best demonstration of every sample of a batch: bool ``states (B, T + 1, N)``, its return ``(B,)``, and the
    index of the teacher it comes from, int64 ``(B,)``."""

    states: Tensor
    returns: Tensor
    teacher: Tensor


def make_teacher(name: str, seed: int) -> Selector | InModel:
    """A demonstrator by name: any selector or method inside the language model, or "text-attention". A method inside
    the model demonstrates by way of ``tprl.lvlm.recorded.Recorded``.

    Raises:
        ValueError: nothing that can demonstrate has that name.
    """
    if name == TextAttention.name:
        return TextAttention()
    known = [TextAttention.name, *SELECTORS, *IN_MODEL]
    if name not in known:
        raise ValueError(f"unknown teacher {name!r}; known: {', '.join(known)}")
    return make_selector(name, seed)


def teacher_signals(names: Sequence[str]) -> dict[str, frozenset[str]]:
    """The signals that each of some teachers needs."""
    teachers = {name: make_teacher(name, 0) for name in names}
    return {name: frozenset() if isinstance(teacher, InModel) else teacher.needs for name, teacher in teachers.items()}


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


class MemoScore:
    """A ``Score`` that asks for the worth of a row's subset once only.

    Args:
        worth: of subsets.
    """

    def __init__(self, worth: Worth) -> None:
        self.worth = worth
        self._known: dict[tuple[int, bytes], float] = {}

    def __call__(self, masks: Tensor) -> Tensor:
        """Scores ``(T, B)`` of keep masks ``(T, B, N)``."""
        steps, batch, _ = masks.shape
        bits = np.packbits(masks.cpu().numpy(), axis=-1)
        keys = [(row, bits[step, row].tobytes()) for step in range(steps) for row in range(batch)]
        new = {key: place for place, key in enumerate(keys) if key not in self._known}
        if new:
            places = torch.tensor(list(new.values()), device=masks.device)
            scores = self.worth(places % batch, masks.flatten(0, 1)[places])
            self._known.update(zip(new, scores.tolist(), strict=True))
        return torch.tensor([self._known[key] for key in keys]).reshape(steps, batch)


@dataclass(frozen=True)
class Search:
    """Improves nested subsets by moving blocks of tokens: an evolution of one parent and its children.

    A token's level is the number of steps that it survives, so that levels are nested subsets. A child swaps the levels
    of a block that the first step keeps with those of a block that hints propose, so that every step keeps as many
    tokens as before; every second child moves single tokens. The best child becomes the parent where it is worth more.
    At most ``rounds * children * T`` subsets of a sample are scored.

    Attributes:
        rounds: generations.
        children: of a parent.
        seed: of what is proposed.
    """

    rounds: int
    children: int
    seed: int

    def improve(self, start: Tensor, hints: Tensor, visual: VisualTokens, value: Callable[[Tensor], Tensor]) -> Tensor:
        """Nested subsets that are worth at least as much as ``start``.

        Args:
            start: bool ``(T, B, N)``, nested.
            hints: ``(B, N)``, how likely a token is to be proposed, above 0 where real.
            visual: the samples.
            value: what nested subsets ``(T, B, N)`` are worth, ``(B,)``.
        """
        device = start.device
        generator = torch.Generator(device).manual_seed(self.seed)
        rows = torch.arange(start.shape[1], device=device)
        steps = torch.arange(len(start), device=device)[:, None, None]
        blocks, proposed = _blocks(visual), hints * visual.mask.float()
        best, worth = start.sum(0), value(start)
        for _ in range(self.rounds):
            parent = best
            for number in range(self.children):
                size = BLOCK if number % 2 == 0 else 1
                given = blocks[rows, torch.multinomial((parent > 0).float(), 1, generator=generator)[:, 0], :size]
                taken = blocks[rows, torch.multinomial(proposed, 1, generator=generator)[:, 0], :size]
                child = parent.clone()
                for one, other in zip(given.T, taken.T, strict=True):
                    child[rows, one], child[rows, other] = child[rows, other], child[rows, one]
                found = value(child > steps)
                better = found > worth
                best, worth = torch.where(better[:, None], child, best), torch.where(better, found, worth)
        return best > steps


def _blocks(visual: VisualTokens) -> Tensor:
    """Every real token and the nearest others, ``BLOCK`` of them or as many as there are: int64 ``(B, N, BLOCK)``."""
    size = min(BLOCK, int(visual.mask.sum(1).min()))
    distance = torch.cdist(visual.coords, visual.coords).masked_fill(~visual.mask[:, None], torch.inf)
    return distance.topk(size, largest=False).indices


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
    search: Search | None = None,
) -> Demonstrations:
    """Let every teacher prune the batch and keep, for every sample, the trajectory with the highest return.

    Args:
        score: from keep masks ``(T, B, N)`` to scores ``(T, B)``.
        margin: return by which another has to beat the first teacher; the search may win by any.
        search: goes on from what was best, as one more teacher; it proposes tokens the more often, the more teachers
            keep them for the longer. None does without.
    """

    def follow(masks: Tensor) -> tuple[Tensor, Tensor]:
        env = PruningEnv(visual.mask, len(budgets), alpha, beta)
        for mask in masks:
            env.step(mask)
        trajectory = env.finish(unpruned_score, score)
        return trajectory.states, discounted_returns(trajectory.rewards, gamma)[:, 0]

    tried = [follow(nested_masks(teacher, visual, budgets)) for teacher in teachers]
    returns = torch.stack([value for _, value in tried])
    handicap = returns.new_full((len(teachers), 1), margin)
    handicap[0] = 0
    best = (returns - handicap).argmax(0)
    rows = torch.arange(len(best), device=best.device)
    if search is not None:
        held = torch.stack([states[:, 1:] for states, _ in tried])
        start = held[best, rows].transpose(0, 1)
        found = follow(search.improve(start, 1 + held.sum((0, 2)), visual, lambda masks: follow(masks)[1]))
        best = torch.where(found[1] > returns[best, rows], len(teachers), best)
        tried.append(found)
    states, returns = (torch.stack(parts)[best, rows] for parts in zip(*tried, strict=True))
    return Demonstrations(states, returns, best)
