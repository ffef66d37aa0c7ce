"""What a table compares: TPRL and its peers, each made ready to choose tokens under a budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.score import Within
from tprl.pruner import TokenPruner
from tprl.selectors import IN_MODEL, ON_AVERAGE, SELECTORS, InModel, Selector, make_selector
from tprl.selectors.stages import LayerView, Stage
from tprl.types import Selection, VisualTokens

METHODS = (TokenPruner.name, *SELECTORS, *IN_MODEL)
"""The methods that do under every budget. Those of ``ON_AVERAGE`` can be named besides them."""

QUESTION_BLIND = frozenset({"uniform", "fastervlm", "visionzip", "vispruner", "prumerge+", "divprune"})
"""Methods that choose by the picture alone, so that all questions about it can share one pass."""


@dataclass(frozen=True)
class Method:
    """A method under a budget.

    Attributes:
        name: one of ``METHODS`` or ``ON_AVERAGE``.
        selector: what chooses, between projector and language model; None where ``in_model`` does, inside the latter.
        budget: tokens to keep; None keeps by ``threshold``.
        threshold: keep probability above which tokens stay.
    """

    name: str
    selector: Selector | None
    budget: int | None
    threshold: float | None = None
    in_model: InModel | None = None

    @property
    def label(self) -> str:
        """As files and tables call it: "tprl-64" or "tprl-threshold"."""
        return f"{self.name}-{'threshold' if self.budget is None else self.budget}"

    @property
    def pruner(self) -> TokenPruner | None:
        return self.selector if isinstance(self.selector, TokenPruner) else None

    @property
    def needs(self) -> frozenset[str]:
        """Signals that it needs besides the tokens."""
        return self.selector.needs if self.selector else frozenset()

    @property
    def within(self) -> Within | None:
        """What it does inside the language model."""
        if self.in_model is None:
            return None
        assert self.budget is not None
        return Within(self.in_model, self.budget)

    def select(self, visual: VisualTokens) -> Selection:
        """What it lets into the language model of a batch."""
        if self.selector is None:
            return Selection(visual.mask)
        if self.budget is None:
            assert self.pruner is not None
            return self.pruner.select_above(visual, self.threshold)
        return self.selector.select(visual, visual.mask.sum(1).clamp(max=self.budget))

    def layer_counts(self, layers: int, visual_tokens: int) -> list[int] | None:
        """The visual tokens that each decoder layer sees of a picture; None where all see those of ``select``."""
        if self.in_model is None:
            return None
        assert self.budget is not None
        return self.in_model.layer_counts(layers, visual_tokens, min(self.budget, visual_tokens))


@dataclass
class Counted:
    """A method inside the language model, counting the FLOPs of its choices: matrix products."""

    method: InModel
    flops: int = 0
    name: str = field(default="counted", init=False)

    def stages(self, layers: int) -> list[Stage]:
        return self.method.stages(layers)

    def stage_budgets(self, layers: int, visual_tokens: Tensor, budget: Tensor) -> list[Tensor]:
        return self.method.stage_budgets(layers, visual_tokens, budget)

    def layer_counts(self, layers: int, visual_tokens: int, budget: int) -> list[int]:
        return self.method.layer_counts(layers, visual_tokens, budget)

    def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
        with FlopCounterMode(display=False) as counter:
            selection = self.method.select(stage, view, budget)
        self.flops += counter.get_total_flops()
        return selection


def choice_flops(method: Method, encoded: EncodedSamples, index: int) -> int:
    """``count_choice`` for one sample."""
    visual = encoded.visual([index])
    return count_choice(method, visual, lambda within: encoded.score([index], visual.tokens, visual.mask, within))


def count_choice(method: Method, visual: VisualTokens, prefill: Callable[[Within], object]) -> int:
    """FLOPs of what ``method`` does to choose tokens for one picture and question: matrix products, as
    ``tprl.evaluate.flops`` counts them.

    Args:
        visual: of batch 1, with the signals that the method needs.
        prefill: runs the language model on the prompt, pruned inside as it is told.
    """
    if method.within is not None:
        counted = Counted(method.within.method)
        prefill(Within(counted, method.within.budget))
        return counted.flops
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method.select(visual)
    return int(counter.get_total_flops())


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError unless all ``names`` are in ``METHODS`` or ``ON_AVERAGE``."""
    known = (*METHODS, *ON_AVERAGE)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown methods {', '.join(unknown)}; known: {', '.join(known)}")


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
        names: of ``METHODS`` or ``ON_AVERAGE``.
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
        if name in IN_MODEL or name in ON_AVERAGE:
            methods += [Method(name, None, budget, in_model=cast(InModel, make_selector(name))) for budget in budgets]
            continue
        if name in SELECTORS:
            methods += [Method(name, cast(Selector, make_selector(name, seed)), budget) for budget in budgets]
            continue
        if pruner is None:
            raise ValueError(f"the method {name!r} needs a pruner")
        methods += [Method(name, pruner, budget) for budget in budgets]
        if threshold_row:
            methods.append(Method(name, pruner, None, pruner.config.threshold if threshold is None else threshold))
    return methods
