"""The policy in several looks, for as many steps as demonstrations have; PPO trains one look, and draws at random."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tprl.pruner import TokenPruner
from tprl.selectors.base import check, top
from tprl.types import Selection, VisualTokens


@dataclass(frozen=True)
class Stepwise:
    """Chooses in several looks, each at what the one before left: the transitions of ``tprl.env``, with the likeliest
    tokens kept where training draws them. ``K`` of ``N`` tokens in ``T`` steps hold ``N (K / N)^(t / T)`` after step
    ``t``, rounded.

    Attributes:
        pruner: whose policy looks.
        steps: ``T``, at least 1.
        stop: the step after which it stops, 0 to ``T``; after 0 every token is still there.
    """

    pruner: TokenPruner
    steps: int
    stop: int
    name = TokenPruner.name
    needs = frozenset[str]()

    @torch.no_grad()
    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        """What is held after step ``stop`` on the way to ``budget (B,)`` tokens; see ``Selector.select``."""
        check(self, visual, budget)
        latents, state = self.pruner.encode(visual), visual.mask
        total = state.sum(1)
        for step in range(1, self.stop + 1):
            count = (total * (budget / total) ** (step / self.steps)).round().long()
            state = top(self.pruner.chosen_by(latents, visual, state), state, count)
        return Selection(state)
