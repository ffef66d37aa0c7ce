"""The README's tables, from numbers made up so that every place of every table is known."""

import csv

import pytest
from matplotlib.figure import Figure

from evaluate.world import result_row
from tprl.evaluate.tables import csv_table, draw_curves, is_best, keeps_to_budget, markdown_table, overview_table

RESULTS = {
    "model": "m", "data": "d", "split": "test", "n": 10, "seed": 3, "commit": "0123456789abcdef",
    "machine": {"cpu": "cpu", "threads": 2, "dtype": "float32", "torch": "2"},
    "rows": [
        result_row("random", 64, 0.86), result_row("random", 32, 0.81) | {"flops_saved": 0.7},
        result_row("tprl", None, 0.885), result_row("tprl", 64, 0.88), result_row("tprl", 32, 0.83),
        result_row("peer", 64, 0.89) | {"kept_mean": 300.0}, result_row("peer", 32, 0.845) | {"kept_mean": 100.0},
    ],
}  # fmt: skip


def test_methods_stand_by_their_mean_loss_and_those_that_keep_to_the_budget_first() -> None:
    lines = overview_table(RESULTS).splitlines()
    assert lines[0] == (
        "m on d/test, 10 questions, seed 3. Unpruned 90.0%, blind 30.0%. cpu, 2 threads, float32, torch 2; "
        "commit 0123456789ab."
    )
    assert lines[2] == "| points lost at | 64 | 32 | tokens a layer | FLOPs saved |"
    assert lines[4:7] == [
        "| tprl | **2.0** (1.0 to 3.0) | **7.0** (6.0 to 8.0) | 64 to 32 | 60% to 60% |",
        "| random | 4.0 (3.0 to 5.0) | 9.0 (8.0 to 10.0) | 64 to 32 | 60% to 70% |",
        "| peer | 1.0 (0.0 to 2.0) | 5.5 (4.5 to 6.5) | 300 to 100 | 60% to 60% |",
    ]
    rows = [*RESULTS["rows"], result_row("steep", 64, 0.89), result_row("steep", 32, 0.7)]
    lines = overview_table(RESULTS | {"rows": rows}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:8]] == ["tprl", "random", "steep", "peer"]


def test_what_tprl_costs_stands_by_falling_budget() -> None:
    lines = overview_table(RESULTS).splitlines()
    assert [line.split("|")[1].strip() for line in lines[8:]] == ["tprl at", ":---", "its threshold", "64", "32"]
    assert "| - | 60.0%" in lines[10], "no peer decides by threshold"
    assert lines[11] == (
        "| 64 | 64 | 88.0% | 2.0 (1.0 to 3.0) | 0.5 (-0.5 to 1.5), random | 60.0% | 50 ms, 2.00x | 1.5 MiB |"
    )


def test_tprl_is_compared_with_the_best_of_the_others() -> None:
    rows = [row for row in RESULTS["rows"] if row["budget"] == 64]
    rows += [result_row("uniform", 64, 0.85), result_row("divprune", 64, 0.87)]
    (line,) = [line for line in overview_table(RESULTS | {"rows": rows}).splitlines() if line.startswith("| 64 ")]
    assert line.split("|")[5].strip() == "0.5 (-0.5 to 1.5), divprune"


def test_every_row_stands_by_budget_and_accuracy() -> None:
    lines = markdown_table(RESULTS).splitlines()
    assert [line.split("|")[1:3] for line in lines[4:8]] == [
        [" threshold ", " tprl "], [" 64 ", " peer "], [" 64 ", " tprl "], [" 64 ", " random "],
    ]  # fmt: skip
    assert lines[5] == (
        "| 64 | peer | 300.0 | 89.0% | 1.00 (0.00 to 2.00) | 0.50 (-0.50 to 1.50) | 60.0% | 50 ms, 2.00x | 1.5 MiB |"
    ), "its layers see more than the budget"
    assert lines[6].startswith("| 64 | tprl | 64.0 | **88.0%** | 2.00 (1.00 to 3.00) |")


def test_the_best_is_one_that_keeps_to_its_budget() -> None:
    rows = RESULTS["rows"]
    best = [(row["method"], row["budget"]) for row in rows if is_best(row, rows)]
    assert sorted(best, key=str) == [("tprl", 32), ("tprl", 64), ("tprl", None)]
    assert not is_best(result_row("close", 64, 0.879), rows)
    costly = [row for row in rows if not keeps_to_budget(row)]
    assert keeps_to_budget(result_row("peer", 64, 0.9) | {"kept_mean": 64.4}), "as it is printed"
    assert not any(is_best(row, costly) for row in costly)


def test_curves_stand_at_the_kept_tokens_near_the_unpruned_model_and_whole() -> None:
    figure = Figure()
    draw_curves(RESULTS, figure)
    near, whole = figure.axes
    for axes in (near, whole):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        assert lines["peer"] == [[100, 84.5], [300, 89]]
        assert lines["tprl"] == [[32, 83], [64, 88]]
        bands = [path.get_extents().intervaly.tolist() for area in axes.collections for path in area.get_paths()]
        assert bands[2] == pytest.approx([83.5, 90]), "the peer's accuracies less and more one point"
        assert [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() == "*"] == [[[9.5, 88.5]]]
        levels = {line.get_linestyle(): set(line.get_ydata()) for line in axes.get_lines()[-2:]}
        assert levels == {"--": {90}, ":": {30}}
        assert [(text.get_text(), text.xy[1]) for text in axes.texts] == [("unpruned", 90), ("blind", 30)]
    assert near.get_ylim() == (80, 92)
    assert whole.get_ylim()[0] < 30
    assert whole.get_ylim()[1] > 90
    averaged = Figure()
    draw_curves(RESULTS | {"rows": [result_row(name, 64, 0.8) for name in ("fastv", "fastv-mean")]}, averaged)
    last, mean = averaged.axes[0].get_lines()[:2]
    assert last.get_color() == mean.get_color()
    assert (last.get_linestyle(), mean.get_linestyle()) == ("-", "--")
    better = Figure()
    draw_curves(RESULTS | {"rows": [*RESULTS["rows"], result_row("peer", 16, 0.95)]}, better)
    assert better.axes[0].get_ylim() == (80, 97)
    lines = {line.get_label(): line.get_xydata().tolist() for line in better.axes[0].get_lines()}
    assert lines["peer"] == [[16, 95], [100, 84.5], [300, 89]]


def test_the_spreadsheet_holds_every_number_of_every_row() -> None:
    lines = list(csv.DictReader(csv_table(RESULTS).splitlines()))
    assert [(line["method"], line["budget"], line["kept_mean"]) for line in lines[1:4]] == [
        ("random", "32", "32"), ("tprl", "", "9.5"), ("tprl", "64", "64"),
    ]  # fmt: skip
    intervals = [f"{name}_ci95_{end}" for name in ("drop", "behind_tprl") for end in ("low", "high")]
    assert [float(lines[0][name]) for name in intervals] == pytest.approx([3, 5, -0.5, 1.5])
    assert [lines[3][name] for name in intervals[2:]] == ["", ""]
    whole = RESULTS["rows"][0].keys() - {"per_family", "drop_ci95", "behind_tprl_ci95"}
    assert lines[0].keys() == whole | set(intervals)
