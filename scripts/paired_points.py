"""Print by how many points one measured cell is behind another, the 95 % interval, paired question by question, and of
how many questions the scores differ."""

import argparse
import json
from pathlib import Path

from tprl.data import load_source
from tprl.evaluate.statistics import points_ci95


def paired_points(cell: Path, other: Path) -> str:
    """Points that ``cell`` is behind ``other``, two files of ``cells/`` about the same questions of a built-in set, and
    how many of their scores differ by more than rounding.

    Raises:
        ValueError: they are about other questions.
    """
    behind, ahead = (json.loads(path.read_text()) for path in (cell, other))
    if behind["made_from"]["samples"] != ahead["made_from"]["samples"]:
        raise ValueError(f"{cell} and {other} are about other questions")
    about = json.loads((cell.parents[1] / "results.json").read_text())
    pictures = [sample.image_id for sample in load_source(about["data"], about["split"], about["n"]).samples]
    points, (low, high) = points_ci95(ahead["scores"], behind["scores"], pictures, about["seed"])
    differ = sum(abs(one - two) > 1e-6 for one, two in zip(behind["scores"], ahead["scores"], strict=True))
    return f"{points:.2f} ({low:.2f} to {high:.2f}), {differ} of {len(pictures)} scores differ"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", type=Path)
    parser.add_argument("other", type=Path)
    print(paired_points(**vars(parser.parse_args())))
