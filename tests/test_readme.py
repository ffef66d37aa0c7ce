"""README and docs say what the results say."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_committed_results() -> None:
    module = script("readme_table")
    readme = (ROOT / "README.md").read_text()
    assert module.with_table(readme, ROOT / "results" / "scenes") == readme
    altered = readme.replace("| tprl |", "| tprl+ |", 1)
    assert altered != readme
    assert module.with_table(altered, ROOT / "results" / "scenes") == readme


@pytest.mark.parametrize(
    ("folder", "other", "budget", "told"),
    [
        ("scenes-no-novelty", "scenes-not-proportional", 32, "0.2 (-0.3 to 0.7)"),
        ("scenes-no-novelty", "scenes-not-proportional", 16, "1.6 (0.8 to 2.3)"),
        ("scenes-not-proportional", "scenes", 64, "-0.3 (-0.8 to 0.1)"),
        ("scenes-not-proportional", "scenes", 32, "0.2 (-0.4 to 0.8)"),
        ("trained-on-easy-vqa-novelty", "trained-on-easy-vqa", 64, "2.45 (1.21 to 3.79)"),
        ("trained-on-easy-vqa-novelty", "trained-on-easy-vqa", 32, "2.10 points (1.01 to 3.31)"),
    ],
)
def test_what_the_choice_is_worth_is_told_as_the_cells_of_two_folders_say(
    folder: str, other: str, budget: int, told: str
) -> None:
    cells = [ROOT / "results" / name / "cells" / f"tprl-{budget}.json" for name in (folder, other)]
    found, _, _ = script("paired_points").paired_points(*cells).partition(",")
    points, _, interval = found.partition(" ")
    places = len(told.partition(" ")[0].partition(".")[2])
    rounded = [f"{float(figure):.{places}f}" for figure in (points, *interval.strip("()").split(" to "))]
    assert rounded == [told.split()[0], *told.partition("(")[2].strip(")").split(" to ")]
    assert told in " ".join((ROOT / "docs" / "results.md").read_text().split())


def test_the_lead_over_6000_questions_is_told_as_the_cells_say() -> None:
    docs = " ".join((ROOT / "docs" / "results.md").read_text().split())
    cells = ROOT / "results" / "scenes-6000-64" / "cells"
    others = [path for path in cells.glob("*-64.json") if path.stem != "tprl-64"]
    leads = [script("paired_points").paired_points(path, cells / "tprl-64.json").partition(",")[0] for path in others]
    assert len(leads) == 4
    assert f"TPRL is ahead of the best other by {min(leads)}." in docs
    assert all(float(lead.partition("(")[2].partition(" ")[0]) > 0 for lead in leads), "significant"


def test_how_many_answers_change_is_told_as_the_cells_say() -> None:
    module, told = script("paired_points"), []
    for folder in ("scenes", "scenes-not-proportional"):
        cells = ROOT / "results" / folder / "cells"
        found = [module.paired_points(cells / f"tprl-{k}.json", cells / "unpruned.json") for k in (192, 128, 64, 32)]
        told.append([each.split(", ")[1].removesuffix(" of 2000 scores differ") for each in found])
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"192 tokens: {told[0][0]} of 2000 in the place of {told[1][0]}" in readme
    own, without = [f"{', '.join(counts[:-1])} and {counts[-1]}" for counts in told]
    wanted = f"the scores of {own} of 2000 questions differ from those without pruning, without it {without}"
    assert wanted in " ".join((ROOT / "docs" / "results.md").read_text().split())


@pytest.mark.parametrize("row", ["demonstrations-only", "ppo-only", "no-question", "teacher-divprune", "no-novelty"])
@pytest.mark.parametrize("budget", [64, 32])
def test_what_parts_are_worth_is_told_as_the_ablation_says(row: str, budget: int) -> None:
    rows = json.loads((ROOT / "results" / "ablation-novelty" / "ablation.json").read_text())["rows"]
    (measured,) = [each for each in rows if each["row"] == row and each["budget"] == budget]
    low, high = measured["difference_ci95"]
    told = f"{-measured['difference_points']:z.1f} ({-high:z.1f} to {-low:z.1f})"
    part = (ROOT / "docs" / "results.md").read_text().split("## What each part is worth")[1].split("## ")[0]
    assert told in " ".join(part.split())


def test_cells_about_other_questions_are_not_paired() -> None:
    cells = [ROOT / "results" / name / "cells" / "tprl-64.json" for name in ("scenes", "scenes-tiles")]
    with pytest.raises(ValueError, match="are about other questions"):
        script("paired_points").paired_points(*cells)


@pytest.mark.parametrize("command", ["make quickstart", "make test"])
def test_the_two_commands_exist(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()
    assert f"\n{command.split()[1]}: setup\n" in (ROOT / "Makefile").read_text()
