"""One look at held-out samples: how accurate and how short the pruned input is, and which threshold is worth it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tprl import processes
from tprl.lvlm.cache import EncodedSamples
from tprl.progress import track
from tprl.pruner import TokenPruner

THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
BATCH = 64


@dataclass(frozen=True)
class OneShot:
    """What pruning everything above a threshold, or to a budget, gives on a set of samples: accuracies in [0, 1]."""

    accuracy: float
    unpruned: float
    kept: float

    @property
    def drop_points(self) -> float:
        return 100 * (self.unpruned - self.accuracy)


def unpruned_accuracy(data: EncodedSamples) -> Tensor:
    """Per sample, with every token kept."""
    own = range(len(data))[processes.mine()]
    rows = [torch.zeros(0)]
    for first in track(range(0, len(own), BATCH), "unpruned"):
        indices = own[first : first + BATCH]
        visual = data.visual(indices)
        rows.append(data.accuracy(indices, visual.tokens, visual.mask))
    return processes.gathered(torch.cat(rows), len(data))


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
        unpruned: see ``unpruned_accuracy``.
        most: how many samples, the first ones; all unless given.
    """
    unpruned = unpruned[:most]
    own = range(len(unpruned))[processes.mine()]
    accuracy, kept = 0.0, 0
    for first in range(0, len(own), BATCH):
        indices = own[first : first + BATCH]
        visual = data.visual(indices)
        if budget is None:
            keep = pruner.select_above(visual, threshold).keep_mask
        else:
            keep = pruner.select(visual, visual.mask.sum(1).clamp(max=budget)).keep_mask
        accuracy += float(data.accuracy(indices, visual.tokens, keep).sum())
        kept += int(keep.sum())
    accuracy, kept = processes.total(torch.tensor([accuracy, kept], dtype=torch.float64)).tolist()
    return OneShot(accuracy / len(unpruned), float(unpruned.mean()), kept / len(unpruned))


def calibrate(pruner: TokenPruner, data: EncodedSamples, unpruned: Tensor, max_drop: float) -> OneShot:
    """Set the pruner's threshold to the highest one that costs at most ``max_drop`` points on ``data``.

    Where even the lowest costs more, that one is set.
    """
    for threshold in track(THRESHOLDS, "calibrating"):
        result = one_shot(pruner, data, unpruned, threshold=threshold)
        if result.drop_points <= max_drop:
            break
    pruner.config = replace(pruner.config, threshold=threshold)
    return result
