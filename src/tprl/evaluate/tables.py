"""Results as a spreadsheet, as a Markdown table and as curves."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tprl.checkpoint import save_text
from tprl.selectors import ON_AVERAGE

COLOURS = {
    "tprl": "#c2410c", "random": "#9ca3af", "uniform": "#6b7280", "fastervlm": "#2563eb", "visionzip": "#0891b2",
    "vispruner": "#7c3aed", "prumerge+": "#a16207", "divprune": "#059669", "cdpruner": "#db2777",
    "fastv": "#a21caf", "sparsevlm": "#4d7c0f", "pyramiddrop": "#1e3a8a", "dart": "#111827",
}  # fmt: skip
"""One colour a method, the same in every picture; those with a budget on average have their method's."""
COLOURS |= {name: COLOURS[own] for name, method in ON_AVERAGE.items() if (own := method.method.name) in COLOURS}
NEAR = 10
"""Points below the unpruned accuracy where the upper curves end."""


def write_tables(results: dict[str, Any], folder: Path) -> None:
    """Write ``results.csv``, ``results.md`` and ``curves.png``."""
    save_text(folder / "results.csv", csv_table(results))
    save_text(folder / "results.md", markdown_table(results))
    figure = Figure(figsize=(7, 6), dpi=150, layout="constrained")
    draw_curves(results, figure)
    figure.savefig(folder / "curves.png")


def csv_table(results: dict[str, Any]) -> str:
    """Every row, without its families."""
    text = io.StringIO()
    rows = [{name: value for name, value in row.items() if name != "per_family"} for row in results["rows"]]
    for row in rows:
        for name in ("drop_ci95", "behind_tprl_ci95"):
            row[f"{name}_low"], row[f"{name}_high"] = row.pop(name) or (None, None)
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown_table(results: dict[str, Any]) -> str:
    """What was measured, and a table by falling budget, the threshold row first, in bold the best of each budget among
    those whose layers see no more."""
    rows = results["rows"]
    lines = [
        _measured(results),
        "",
        "| budget | method | tokens kept | accuracy | points lost | behind TPRL | FLOPs saved | prefill | KV cache |",
        "|---:|:---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in by_budget(rows):
        accuracy = _bold_if_best(f"{row['accuracy']:.1%}", row, rows)
        lines.append(
            f"| {row['budget'] or 'threshold'} | {row['method']} | {row['kept_mean']:.1f} | {accuracy} "
            f"| {_points(row, 'drop', 2)} {_interval(row, 'drop', 2)} | {_behind(row, 2)} | {_cost(row)} |"
        )
    return "\n".join(lines) + "\n"


def overview_table(results: dict[str, Any]) -> str:
    """What was measured, and two tables: the points that each method loses under each budget, with the tokens that a
    layer sees on average and the FLOPs saved at the largest and the smallest budget; and what TPRL costs and gains.

    Methods stand by their mean loss, those whose layers see more than the budget behind the others: these cost more
    under the same budget, so the fewest points lost are in bold among the others alone."""
    rows = results["rows"]
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None}, reverse=True)
    cells = {(row["method"], row["budget"]): row for row in rows}
    methods = dict.fromkeys(row["method"] for row in rows)
    lines = [
        _measured(results),
        "",
        f"| points lost at | {' | '.join(map(str, budgets))} | tokens a layer | FLOPs saved |",
        "|:---|" + "---:|" * (len(budgets) + 2),
    ]
    within = [row for row in rows if keeps_to_budget(row)]
    costly = {row["method"] for row in rows if not keeps_to_budget(row)}
    loss = {name: sum(cells[name, budget]["drop_points"] for budget in budgets) for name in methods}
    for name in sorted(methods, key=lambda name: (name in costly, loss[name])):
        own = [cells[name, budget] for budget in budgets]
        lost = [f"{_bold_if_best(_points(row, 'drop', 1), row, rows)} {_interval(row, 'drop', 1)}" for row in own]
        seen = f"{own[0]['kept_mean']:.0f} to {own[-1]['kept_mean']:.0f}"
        saved = f"{own[0]['flops_saved']:.0%} to {own[-1]['flops_saved']:.0%}"
        lines.append(f"| {name} | {' | '.join(lost)} | {seen} | {saved} |")
    lines += [
        "",
        "| tprl at | tokens kept | accuracy | points lost | ahead of best other | FLOPs saved | prefill | KV cache |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in by_budget([row for row in rows if row["method"] == "tprl"]):
        others = [other for other in within if other["budget"] == row["budget"] and other["method"] != "tprl"]
        best = max(others, key=lambda other: other["accuracy"], default=None)
        ahead = f"{_behind(best, 1)}, {best['method']}" if best else "-"
        lines.append(
            f"| {row['budget'] or 'its threshold'} | {row['kept_mean']:.0f} | {row['accuracy']:.1%} "
            f"| {_points(row, 'drop', 1)} {_interval(row, 'drop', 1)} | {ahead} | {_cost(row)} |"
        )
    return "\n".join(lines) + "\n"


def keeps_to_budget(row: dict[str, Any]) -> bool:
    """Whether a layer, on average, sees no more visual tokens than the row's budget, if it has one."""
    return row["budget"] is None or bool(round(row["kept_mean"]) <= row["budget"])


def _measured(results: dict[str, Any]) -> str:
    row, machine = results["rows"][0], results["machine"]
    return (
        f"{results['model']} on {results['data']}/{results['split']}, {results['n']} questions, "
        f"seed {results['seed']}. Unpruned {row['accuracy_unpruned']:.1%}, blind {row['accuracy_blind']:.1%}. "
        f"{machine['cpu']}, {machine['threads']} threads, {machine['dtype']}, torch {machine['torch']}; "
        f"commit {results['commit'][:12]}."
    )


def is_best(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
    """Whether ``row`` is the most accurate of those of ``rows`` under its budget that keep to it."""
    same = [other["accuracy"] for other in rows if other["budget"] == row["budget"] and keeps_to_budget(other)]
    return keeps_to_budget(row) and bool(row["accuracy"] == max(same))


def _bold_if_best(text: str, row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    return f"**{text}**" if is_best(row, rows) else text


def _points(row: dict[str, Any], what: str, digits: int) -> str:
    return f"{row[f'{what}_points']:z.{digits}f}"


def _interval(row: dict[str, Any], what: str, digits: int) -> str:
    low, high = row[f"{what}_ci95"]
    return f"({low:z.{digits}f} to {high:z.{digits}f})"


def _behind(row: dict[str, Any], digits: int) -> str:
    """How far a peer is behind TPRL, with the interval."""
    if row["behind_tprl_points"] is None:
        return "-"
    return f"{_points(row, 'behind_tprl', digits)} {_interval(row, 'behind_tprl', digits)}"


def _cost(row: dict[str, Any]) -> str:
    """The cells of FLOPs, prefill and KV cache."""
    prefill = f"{row['prefill_ms']:.0f} ms, {row['speedup']:.2f}x"
    return f"{row['flops_saved']:.1%} | {prefill} | {row['kv_cache_mib']:.1f} MiB"


def by_budget(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by falling budget, those without one first, and by falling accuracy."""
    return sorted(rows, key=lambda row: (-(row["budget"] or float("inf")), -row["accuracy"]))


def draw_curves(results: dict[str, Any], figure: Figure) -> None:
    """Accuracy against kept tokens, near the unpruned model above and whole below: a line a method, its band the paired
    interval of the drop, levels for the unpruned and the blind model, a star for threshold mode."""
    rows = results["rows"]
    near, whole = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes in (near, whole):
        _draw_rows(rows, axes)
        axes.set_ylabel("accuracy (%)")
        axes.grid(color="#e5e7eb", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    unpruned = rows[0]["accuracy_unpruned"]
    highest = max(unpruned, *(row["accuracy"] for row in rows))
    near.set_ylim(100 * unpruned - NEAR, 100 * highest + NEAR / 5)
    if budgets := sorted({row["budget"] for row in rows if row["budget"] is not None}):
        whole.set_xscale("log", base=2)
        whole.set_xticks(budgets, [str(budget) for budget in budgets])
        whole.minorticks_off()
    whole.set_xlabel("visual tokens kept")
    near.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


def _draw_rows(rows: Sequence[dict[str, Any]], axes: Axes) -> None:
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        line = sorted((row for row in own if row["budget"] is not None), key=lambda row: row["kept_mean"])
        colour, front = COLOURS.get(name, "#111827"), name == "tprl"
        style = "--" if name in ON_AVERAGE else "-"
        kept = [row["kept_mean"] for row in line]
        axes.plot(
            kept, [100 * row["accuracy"] for row in line], color=colour, label=name, marker="o",
            linestyle=style, markersize=4 if front else 3, linewidth=2.4 if front else 1.2, zorder=4 if front else 3,
        )  # fmt: skip
        bands = [[100 * row["accuracy_unpruned"] - end for end in row["drop_ci95"]] for row in line]
        axes.fill_between(kept, [low for _, low in bands], [high for high, _ in bands], color=colour, alpha=0.12, lw=0)
        for row in own:
            if row["budget"] is None:
                axes.plot(row["kept_mean"], 100 * row["accuracy"], "*", color=colour, markersize=13, zorder=5)
    for level, name in ((rows[0]["accuracy_unpruned"], "unpruned"), (rows[0]["accuracy_blind"], "blind")):
        axes.axhline(100 * level, color="#111827", linewidth=0.9, linestyle="--" if name == "unpruned" else ":")
        # the blind level lies far below the upper curves, where it is neither to be seen nor to be made room for
        axes.annotate(
            name, (1, 100 * level), xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points",
            ha="right", fontsize=8, color="#374151", annotation_clip=True, in_layout=False,
        )  # fmt: skip
