"""Cases to look at: pictures, questions, which patches each method kept, and what the model then said."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tprl.data.sample import Sample, Source
from tprl.evaluate.answers import greedy_answer, kept_tokens
from tprl.evaluate.cell import Cell
from tprl.evaluate.latency import prompt_inputs, pruned_model
from tprl.evaluate.methods import Method
from tprl.evaluate.provenance import write_json
from tprl.lvlm.model import Lvlm
from tprl.progress import track
from tprl.scoring import score

BUDGET = 64
RIGHT = 0.5
"""Score from which an answer counts as right: more than half of the people, or half of the box."""
KINDS = ("lost", "kept", "beyond")
"""Right until it was pruned; right before and after; wrong even with every token."""


def write_gallery(
    lvlm: Lvlm, source: Source, methods: Sequence[Method], before: Cell, after: dict[str, Cell], out: Path, count: int
) -> None:
    """Write ``gallery.json`` and ``gallery/*.jpg``.

    Cases are chosen by the first method, under the budget closest to ``BUDGET``: a third each of ``KINDS`` as far as
    there are any, of as many question families as possible, no picture twice.

    Args:
        before: the unpruned model's cell.
        after: the methods' cells, by label.
        count: number of cases.
    """
    budgets = [method.budget for method in methods if method.budget is not None]
    budget = min(budgets, key=lambda size: abs(size - BUDGET)) if budgets else None
    shown = [method for method in methods if method.budget in (budget, None)]
    folder = out / "gallery"
    (out / "gallery.json").unlink(missing_ok=True)  # it names pictures that go now
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    cases = []
    chosen = choose_cases(source.samples, before.scores, after[shown[0].label].scores, count)
    for number, index in enumerate(track(chosen, "gallery")):
        case = _case(lvlm, source, source.samples[index], shown)
        source.image(source.samples[index].image_id).save(folder / f"{number}.jpg", quality=88)
        cases.append({"picture": f"gallery/{number}.jpg", **case})
    cases.sort(key=lambda case: KINDS.index(case["kind"]))
    write_json(out / "gallery.json", {"chosen_by": shown[0].label, "cases": cases})


def choose_cases(samples: Sequence[Sample], before: Sequence[float], after: Sequence[float], count: int) -> list[int]:
    """Indices of samples, see ``write_gallery``."""
    groups: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for index in range(len(samples)):
        groups[_kind(before[index], after[index])].append(index)
    used: set[str] = set()
    chosen: list[int] = []
    for left, kind in zip((3, 2, 1), sorted(KINDS, key=lambda kind: len(groups[kind])), strict=True):
        taken = Counter[str]()
        for _ in range((count - len(chosen)) // left):
            free = [i for i in groups[kind] if samples[i].image_id not in used]
            if not free:
                break
            index = min(free, key=lambda i: taken[samples[i].family])
            taken[samples[index].family] += 1
            used.add(samples[index].image_id)
            chosen.append(index)
    return sorted(chosen)


def _kind(before: float, after: float) -> str:
    """Of ``KINDS``, by the scores of the unpruned and of the pruned answer."""
    return "beyond" if before < RIGHT else "kept" if after >= RIGHT else "lost"


def _case(lvlm: Lvlm, source: Source, sample: Sample, methods: Sequence[Method]) -> dict[str, Any]:
    inputs = prompt_inputs(lvlm, source, sample)
    coords = lvlm.encode_images([source.image(sample.image_id)])[0].coords.cpu()
    (rows, row), (columns, column) = (np.unique(coords[:, axis].numpy(), return_inverse=True) for axis in (0, 1))
    patches = torch.from_numpy(row * len(columns) + column)
    entries: list[dict[str, Any]] = []
    for method in methods:
        with pruned_model(lvlm, method, inputs) as handle:
            answer = greedy_answer(lvlm, inputs)
            kept = patches[kept_tokens(handle, len(patches)).cpu()].tolist()
        entries.append(
            {
                "method": method.name,
                "budget": method.budget,
                "answer": answer,
                "score": score(sample, answer),
                "kept": sorted(set(kept)),
            }
        )
    whole = greedy_answer(lvlm, inputs)
    before = score(sample, whole)
    return {
        "kind": _kind(before, entries[0]["score"]),  # of the answers shown: the cells' may differ by rounding
        "question": sample.question,
        "accepted": list(sample.answers),
        "family": sample.family,
        "rows": len(rows),
        "columns": len(columns),
        "unpruned": {"answer": whole, "score": before},
        "methods": entries,
    }
