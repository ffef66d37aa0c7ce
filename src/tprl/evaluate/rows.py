"""The rows of a table: what the cells of all methods say of one of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from tprl.data.sample import Sample
from tprl.evaluate.cell import Cell
from tprl.evaluate.methods import Method
from tprl.evaluate.statistics import points_ci95
from tprl.pruner import TokenPruner


def quality(method: Method, cells: Mapping[str, Cell], samples: Sequence[Sample], seed: int) -> dict[str, Any]:
    """Accuracy of a method, what it loses, and how far it is behind TPRL under the same budget, paired question by
    question, in points with their 95 % intervals; None for TPRL itself and where that was not measured.

    Args:
        cells: of "unpruned", "blind" and all methods, by label.
        samples: the questions.
        seed: of the bootstrap.
    """
    cell, unpruned, blind = cells[method.label], cells["unpruned"], cells["blind"]
    pictures = [sample.image_id for sample in samples]
    lost, lost_ci95 = points_ci95(unpruned.scores, cell.scores, pictures, seed)
    row: dict[str, Any] = {
        "method": method.name,
        "budget": method.budget,
        "kept_mean": fmean(cell.kept),
        "accuracy": fmean(cell.scores),
        "accuracy_unpruned": fmean(unpruned.scores),
        "accuracy_blind": fmean(blind.scores),
        "drop_points": lost,
        "drop_ci95": lost_ci95,
        "behind_tprl_points": None,
        "behind_tprl_ci95": None,
    }
    own = cells.get(replace(method, name=TokenPruner.name).label)
    if own is not None and method.name != TokenPruner.name:
        behind = points_ci95(own.scores, cell.scores, pictures, seed)
        row["behind_tprl_points"], row["behind_tprl_ci95"] = behind
    return row


def per_family(method: Method, cells: Mapping[str, Cell], samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Accuracies and kept tokens by kind of question; cells as in ``quality``."""
    cell, unpruned, blind = cells[method.label], cells["unpruned"], cells["blind"]
    families: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        families.setdefault(sample.family, []).append(index)
    return {
        family: {
            "accuracy": fmean(cell.scores[i] for i in indices),
            "accuracy_unpruned": fmean(unpruned.scores[i] for i in indices),
            "accuracy_blind": fmean(blind.scores[i] for i in indices),
            "n": len(indices),
            "kept_mean": fmean(cell.kept[i] for i in indices),
        }
        for family, indices in sorted(families.items())
    }
