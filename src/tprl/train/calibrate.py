"""One look at held-out samples: how accurate and how short the pruned input is, whether novelty helps, and which
threshold is worth it."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from tprl import processes
from tprl.lvlm.cache import EncodedSamples
from tprl.progress import track
from tprl.pruner import TokenPruner

THRESHOLDS = tuple(torch.linspace(4, -16, 128, dtype=torch.float64).sigmoid().tolist())
"""Falling, even in logits."""
STRIDE = 16
"""Thresholds from one look to the next until one is low enough, a power of two that divides their number. A look costs
by the tokens that are kept, so that one in the middle of all would cost more than several from above."""
MOST_LOOKS = len(THRESHOLDS) // STRIDE - 1 + int(math.log2(STRIDE))
BATCH = 64


@dataclass(frozen=True)
class OneShot:
    """What pruning everything above a threshold, or to a budget, gives on a set of samples: accuracies in [0, 1]."""

    accuracy: float
    unpruned: float
    kept: float

    @property
    def drop_points(self) -> float:
        """Rounded, so that what is as much as allowed is not more than that by the last bit."""
        return round(100 * (self.unpruned - self.accuracy), 6)


def one_shot(
    pruner: TokenPruner,
    data: EncodedSamples,
    unpruned: Tensor,
    budget: int | None = None,
    threshold: float | None = None,
    most: int | None = None,
) -> OneShot:
    """Prune and answer samples of ``data``; with neither budget nor threshold, by the pruner's own threshold.

    Args:
        unpruned: their accuracy with every token kept.
        most: how many samples, the first ones; all unless given.
    """
    unpruned = unpruned[:most]
    own = range(len(unpruned))[processes.mine()]
    accuracy, kept = 0.0, 0
    for first in range(0, len(own), BATCH):
        indices = own[first : first + BATCH]
        visual = data.visual(indices)
        if budget is None:
            chosen = pruner.select_above(visual, threshold)
        else:
            chosen = pruner.select(visual, visual.mask.sum(1).clamp(max=budget))
        accuracy += float(data.accuracy(indices, visual.tokens, chosen.keep_mask, sizes=chosen.sizes).sum())
        kept += int(chosen.keep_mask.sum())
    accuracy, kept = processes.total(torch.tensor([accuracy, kept], dtype=torch.float64)).tolist()
    return OneShot(accuracy / len(unpruned), float(unpruned.double().mean()), kept / len(unpruned))


def choose_novelty(
    pruner: TokenPruner, data: EncodedSamples, unpruned: Tensor, budgets: Sequence[int], most: int
) -> None:
    """Set the pruner's novelty to 0 if the first ``most`` samples of ``data`` are answered better so, in the mean over
    ``budgets``; ``unpruned`` as for ``one_shot``."""
    if not pruner.config.novelty:
        return
    accuracy = dict.fromkeys((pruner.config.novelty, 0.0), 0.0)
    for weight, budget in track(list(product(accuracy, budgets)), "with and without novelty"):
        pruner.config = replace(pruner.config, novelty=weight)
        accuracy[weight] += one_shot(pruner, data, unpruned, budget, most=most).accuracy
    # rounded, so that level answers are level, and the first wins
    pruner.config = replace(pruner.config, novelty=max(accuracy, key=lambda weight: round(accuracy[weight], 6)))


def calibrate(pruner: TokenPruner, data: EncodedSamples, unpruned: Tensor, max_drop: float) -> OneShot:
    """Set the pruner's threshold to the highest one that costs at most ``max_drop`` points on ``data``, found by
    strides from above and bisection of the last one, which takes it that less is lost the lower it is.

    Where none that it tries costs so little, the lowest is set, with a warning if that one costs more too.
    """
    tried: dict[int, OneShot] = {}
    too_high, low_enough = -1, len(THRESHOLDS) - 1
    for _ in track(range(MOST_LOOKS), "calibrating"):
        if low_enough - too_high == 1:
            break
        middle = too_high + min(STRIDE, (low_enough - too_high) // 2)
        tried[middle] = one_shot(pruner, data, unpruned, threshold=THRESHOLDS[middle])
        if tried[middle].drop_points <= max_drop:
            low_enough = middle
        else:
            too_high = middle
    threshold = THRESHOLDS[low_enough]
    pruner.config = replace(pruner.config, threshold=threshold)
    result = tried.get(low_enough) or one_shot(pruner, data, unpruned, threshold=threshold)
    if result.drop_points > max_drop:
        warnings.warn(
            f"no threshold was found that costs at most {max_drop:g} points: {threshold:.2g}, the lowest one, costs "
            f"{result.drop_points:.2f} on the {len(unpruned)} validation questions, and is set",
            stacklevel=2,
        )
    return result
