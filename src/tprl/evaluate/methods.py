"""What a table compares: TPRL and its peers, each made ready to choose tokens under a budget."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from tprl.evaluate.flops import module_flops
from tprl.pruner import TokenPruner
from tprl.selectors import SELECTORS, Selector, make_selector
from tprl.types import Selection, VisualTokens

METHODS = (TokenPruner.name, *SELECTORS)
"""Every method that can be named."""

QUESTION_BLIND = frozenset({"uniform", "fastervlm", "visionzip", "vispruner", "prumerge+", "divprune"})
"""Methods that choose by the picture alone, so that all questions about it can share one pass."""


@dataclass(frozen=True)
class Method:
    """A method under a budget.

    Attributes:
        name: one of ``METHODS``.
        selector: what chooses.
        budget: tokens to keep; None keeps by ``threshold``.
        threshold: keep probability above which tokens stay.
    """

    name: str
    selector: Selector
    budget: int | None
    threshold: float | None = None

    @property
    def label(self) -> str:
        """As files and tables call it: "tprl-64" or "tprl-threshold"."""
        return f"{self.name}-{'threshold' if self.budget is None else self.budget}"

    def select(self, visual: VisualTokens) -> Selection:
        """What it keeps of a batch."""
        if self.budget is None:
            assert isinstance(self.selector, TokenPruner)
            return self.selector.select_above(visual, self.threshold)
        return self.selector.select(visual, torch.full_like(visual.mask.sum(1), self.budget))

    def flops(self, visual: VisualTokens) -> int:
        """FLOPs of choosing in ``visual``: matrix products, as ``tprl.evaluate.flops`` counts them."""
        if isinstance(self.selector, TokenPruner):
            return module_flops(self.selector, visual, method="keep_probs")
        with FlopCounterMode(display=False) as counter:
            self.select(visual)
        return int(counter.get_total_flops())


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError unless all ``names`` are in ``METHODS``."""
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"unknown methods {', '.join(unknown)}; known: {', '.join(METHODS)}")


def make_methods(
    names: Sequence[str],
    budgets: Sequence[int],
    pruner: TokenPruner | None,
    threshold: float | None,
    threshold_row: bool,
    seed: int,
) -> list[Method]:
    """All methods under all budgets, and TPRL with its threshold.

    Args:
        names: of ``METHODS``.
        budgets: tokens to keep.
        pruner: what "tprl" is.
        threshold: of the threshold row; None is the pruner's own.
        threshold_row: whether "tprl" also gets a row without budget.
        seed: of methods that draw at random.

    Raises:
        ValueError: an unknown name, "tprl" without a pruner, or a threshold outside [0, 1].
    """
    check_names(names)
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    methods = []
    for name in names:
        if name != TokenPruner.name:
            methods += [Method(name, make_selector(name, seed), budget) for budget in budgets]
            continue
        if pruner is None:
            raise ValueError(f"the method {name!r} needs a pruner")
        methods += [Method(name, pruner, budget) for budget in budgets]
        if threshold_row:
            methods.append(Method(name, pruner, None, pruner.config.threshold if threshold is None else threshold))
    return methods
