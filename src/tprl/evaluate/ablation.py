"""The ablation's table: every row against the full method, paired question by question, over the same seeds."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tprl.checkpoint import save_text
from tprl.data.sample import Sample
from tprl.evaluate.cell import Cell, score_questions
from tprl.evaluate.methods import make_methods
from tprl.evaluate.provenance import write_json
from tprl.evaluate.statistics import points_ci95
from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.cut import Positions
from tprl.pruner import TokenPruner

ABLATION = "ablation.json"
Cells = dict[int | None, Cell]
"""What was measured of one pruner, by budget; None is by threshold."""


def measure(
    encoded: EncodedSamples, pruner: TokenPruner, budgets: Sequence[int], positions: Positions, title: str
) -> Cells:
    """Scores of all samples under every budget and by the pruner's threshold."""
    encoded.scorer.reader.positions = positions
    methods = make_methods([TokenPruner.name], budgets, pruner, None, True, seed=0)
    return {method.budget: score_questions(encoded, method, f"{title}, {method.label}") for method in methods}


def save_cells(path: Path, made_from: dict[str, Any], cells: Cells, commit: str) -> None:
    """Write the cells of a row and seed, and the commit that measured them."""
    parts = [{"budget": budget, "scores": cell.scores, "kept": cell.kept} for budget, cell in cells.items()]
    write_json(path, {"made_from": made_from, "commit": commit, "cells": parts})


def load_cells(path: Path, made_from: dict[str, Any]) -> tuple[Cells, str]:
    """The cells of a row and seed, and the commit that measured them.

    Raises:
        ValueError: they were made from something else.
    """
    content = json.loads(path.read_text())
    if content["made_from"] != json.loads(json.dumps(made_from)):
        raise ValueError(f"{path} was made with other settings; use another folder or --overwrite")
    return {part["budget"]: Cell(part["scores"], part["kept"]) for part in content["cells"]}, content["commit"]


def compare(
    measured: Mapping[str, Mapping[int, Cells]], groups: Mapping[str, str], full: str, samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    """The rows of the table, one for every row and budget.

    A difference is that of the accuracies in points, over the seeds that a row shares with ``full``; its 95 % interval
    is that of the questions, each with its mean over seeds, drawn by picture.

    Args:
        measured: cells by row and seed.
        groups: what each row is about.
        full: the row that the others are compared with.
        samples: the questions.
    """
    pictures = [sample.image_id for sample in samples]
    rows = []
    for name, seeds in measured.items():
        for budget in next(iter(seeds.values())):
            cells = {seed: cells[budget] for seed, cells in seeds.items()}
            accuracies = [fmean(cell.scores) for cell in cells.values()]
            others = {seed: part[budget] for seed, part in measured.get(full, {}).items() if seed in cells}
            row: dict[str, Any] = {
                "group": groups[name],
                "row": name,
                "seeds": sorted(cells),
                "budget": budget,
                "kept_mean": fmean([fmean(cell.kept) for cell in cells.values()]),
                "accuracy": fmean(accuracies),
                "accuracy_sd": stdev(accuracies) if len(accuracies) > 1 else None,
                "difference_points": None,
                "difference_ci95": None,
            }
            if others and name != full:
                own, theirs = _mean_scores([cells[seed] for seed in others]), _mean_scores([*others.values()])
                row["difference_points"], row["difference_ci95"] = points_ci95(own, theirs, pictures, 0)
            rows.append(row)
    return rows


def _mean_scores(cells: Sequence[Cell]) -> list[float]:
    """Of every question, over seeds."""
    return [fmean(scores) for scores in zip(*(cell.scores for cell in cells), strict=True)]


def write_ablation(results: dict[str, Any], folder: Path) -> None:
    """Write ``ablation.json``, ``ablation.csv`` and ``ablation.md``; see ``compare`` for ``results["rows"]``."""
    write_json(folder / ABLATION, results)
    save_text(folder / "ablation.csv", _csv(results["rows"]))
    save_text(folder / "ablation.md", ablation_table(results))


def ablation_table(results: dict[str, Any]) -> str:
    """A Markdown table, one line a row, its accuracy and its difference to the full method under every budget."""
    rows = results["rows"]
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    heads = ["by threshold" if budget is None else f"{budget} tokens" for budget in budgets]
    machine = results["machine"]
    lines = [
        f"{results['model']} on {results['data']}/{results['split']}, {results['n']} questions. Accuracy, and points "
        f"against the full method with the 95 % interval, drawn by picture. {machine['cpu']}, {machine['dtype']}, "
        f"torch {machine['torch']}; commit {', '.join(each[:12] for each in results['commits'])}.",
        "",
        "| about | row | seeds | " + " | ".join(heads) + " |",
        "|:---|:---|---:|" + "---:|" * len(heads),
    ]
    for name in dict.fromkeys(row["row"] for row in rows):
        own = {row["budget"]: row for row in rows if row["row"] == name}
        first = next(iter(own.values()))
        cells = [_cell(own[budget]) if budget in own else "" for budget in budgets]
        lines.append(f"| {first['group']} | {name} | {len(first['seeds'])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    text = f"{row['accuracy']:.1%}"
    if row["accuracy_sd"] is not None:
        text += f" \u00b1 {100 * row['accuracy_sd']:.1f}"
    if row["budget"] is None:
        text += f" with {row['kept_mean']:.0f}"
    if row["difference_points"] is not None:
        low, high = row["difference_ci95"]
        text += f", {row['difference_points']:+z.1f} ({low:+z.1f} to {high:+z.1f})"
    return text


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    flat = []
    for row in rows:
        low, high = row["difference_ci95"] or (None, None)
        seeds = " ".join(map(str, row["seeds"]))
        rest = {name: value for name, value in row.items() if name != "difference_ci95"}
        flat.append(rest | {"seeds": seeds, "difference_ci95_low": low, "difference_ci95_high": high})
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
