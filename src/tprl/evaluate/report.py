"""One HTML page about a folder of results: no network, no scripts, everything inside."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from tprl.checkpoint import save_text
from tprl.evaluate.ablation import ABLATION
from tprl.evaluate.benchmark import RESULTS
from tprl.evaluate.gallery import RIGHT
from tprl.evaluate.tables import COLOURS, by_budget, draw_curves, is_best, keeps_to_budget

METRICS = "metrics.jsonl"
ABLATION_COLOURS = ("#c2410c", "#2563eb", "#059669", "#7c3aed")
KINDS = {
    "lost": "Right with every token, wrong after pruning",
    "kept": "Right with every token, and still right",
    "beyond": "Wrong even with every token",
}
Row = dict[str, Any]


def write_report(folder: Path, run: Path | None, out: Path) -> None:
    """Write the page.

    Args:
        folder: of ``tprl evaluate``, of ``tprl benchmark``, which holds a folder for each set of questions, or of
            ``tprl ablate``, which may also stand in it.
        run: of a training, for its curves; None looks for ``metrics.jsonl`` in ``folder``.
        out: the page.

    Raises:
        FileNotFoundError: ``folder`` holds no results, or ``run`` no metrics.
        ValueError: a file is not what these commands write.
    """
    places = [folder] if (folder / RESULTS).is_file() else sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))
    ablated = (
        [folder] if (folder / ABLATION).is_file() else sorted(path.parent for path in folder.glob(f"*/{ABLATION}"))
    )
    if not places and not ablated:
        raise FileNotFoundError(
            f"there is no {RESULTS} in {folder} or in a folder in it, nor {ABLATION}; `tprl evaluate` writes the one, "
            "`tprl ablate` the other"
        )
    metrics = (run or folder) / METRICS
    if run and not metrics.is_file():
        raise FileNotFoundError(f"there is no {METRICS} in {run}; `tprl train` writes one")
    environment = Environment(
        loader=PackageLoader("tprl", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = sorted((_section(place) for place in places), key=lambda section: _is_transfer(section["results"]))
    ablations = [_ablation(place) for place in ablated]
    told = [part["results"] for part in [*sections, *ablations]]
    page = environment.get_template("report.html.j2").render(
        models=list(dict.fromkeys(results["model"] for results in told)),
        told=told,
        openmoji=any(results["data"].startswith("scenes") for results in told),
        sections=sections,
        transfers=transfers({section["name"]: section["results"] for section in sections}),
        ablations=ablations,
        training=_svg(draw_training(_metrics(metrics)), METRICS) if metrics.is_file() else None,
        colours=COLOURS,
        kinds=KINDS,
        right=RIGHT,
        is_best=is_best,
    )
    save_text(out, page)


def headlines(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """A few large figures and what they say, about TPRL if it is among the methods, else about the first one."""
    name = "tprl" if any(row["method"] == "tprl" for row in rows) else rows[0]["method"]
    own = {row["budget"]: row for row in rows if row["method"] == name}
    figures = []
    if None in own:
        figures.append(
            (f"{own[None]['kept_mean']:.0f}", f"tokens kept on average where each question decides, {_lost(own[None])}")
        )
    budgets = sorted((budget for budget in own if budget is not None), reverse=True)
    for budget in budgets[:1]:
        figures.append((f"{own[budget]['flops_saved']:.1%}", f"fewer FLOPs at {budget} tokens, {_lost(own[budget])}"))
        figures.append((f"{own[budget]['speedup']:.2f}\u00d7", f"prefill speed at {budget} tokens, pruner included"))
    for budget in budgets[-1:]:
        same = [row for row in rows if row["budget"] == budget and row["method"] != name]
        if others := [row for row in same if keeps_to_budget(row)]:
            best = max(others, key=lambda row: row["accuracy"])
            gap = 100 * (own[budget]["accuracy"] - best["accuracy"])
            told = f"points against {best['method']}, the best other at {budget} tokens a layer"
            figures.append((f"{gap:+.1f}", told))
    return figures


def transfers(results: Mapping[str, Row]) -> Row | None:
    """How a policy does on questions unlike those that it was trained on, and on those for comparison.

    Args:
        results: by the name of their folder.

    Returns:
        ``budgets``, and ``rows`` with ``name``, ``trained_on``, ``data``, ``n``, ``unpruned`` and, for every budget,
        ``cells``: the shares of the unpruned accuracy that TPRL and the best other method keep, and the latter's name;
        None where there is no such row. None where every policy was tested on what it was trained on.
    """
    beyond = [result for result in results.values() if _is_transfer(result)]
    sizes = {row["budget"] for result in beyond for row in result["rows"] if row["method"] == "tprl" and row["budget"]}
    budgets = sorted(sizes, reverse=True)
    rows = [
        {
            "name": name,
            "trained_on": result["trained_on"],
            "data": result["data"],
            "n": result["n"],
            "unpruned": result["rows"][0]["accuracy_unpruned"],
            "cells": [_transfer(result["rows"], budget) for budget in budgets],
        }
        for name, result in results.items()
        if result.get("trained_on")
    ]
    rows = [row for row in rows if any(row["cells"])]
    ordered = sorted(rows, key=lambda row: (row["trained_on"], _is_transfer(row)))
    return {"budgets": budgets, "rows": ordered} if any(map(_is_transfer, rows)) else None


def _is_transfer(results: Row) -> bool:
    """Whether the policy was tested on something else than it was trained on. Of two files nobody knows whether they
    are parts of one thing."""
    known = results.get("trained_on")
    return known not in (None, results["data"]) and not (
        known.endswith(".jsonl") and results["data"].endswith(".jsonl")
    )


def _transfer(rows: Sequence[Row], budget: int) -> Row | None:
    same = [row for row in rows if row["budget"] == budget and keeps_to_budget(row) and row["accuracy_unpruned"]]
    shares = {row["method"]: row["accuracy"] / row["accuracy_unpruned"] for row in same}
    own = shares.pop("tprl", None)
    best = max(shares, key=lambda name: shares[name], default=None)
    return None if own is None else {"own": own, "best": best, "other": shares[best] if best else None}


def draw_ablation(rows: Sequence[Row]) -> Figure:
    """Every row's difference to the full method with its interval, one colour a budget."""
    told = [row for row in rows if row["difference_points"] is not None and row["budget"] is not None]
    names, budgets = list(dict.fromkeys(row["row"] for row in told)), list(dict.fromkeys(row["budget"] for row in told))
    figure = Figure(figsize=(9.4, 0.8 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    for number, budget in enumerate(budgets):
        own = {row["row"]: row for row in told if row["budget"] == budget}
        places = [place for place, name in enumerate(names) if name in own]
        points = [own[names[place]]["difference_points"] for place in places]
        ends = [own[names[place]]["difference_ci95"] for place in places]
        around = [
            [point - low for point, (low, _) in zip(points, ends, strict=True)],
            [high - point for point, (_, high) in zip(points, ends, strict=True)],
        ]
        shift = 0.34 * ((number + 0.5) / len(budgets) - 0.5)
        axes.errorbar(
            points, [place + shift for place in places], xerr=around, fmt="o", markersize=4.5, linewidth=1.4,
            color=ABLATION_COLOURS[number % len(ABLATION_COLOURS)], label=f"{budget} tokens",
        )  # fmt: skip
    axes.axvline(0, color="#111827", linewidth=0.9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("points against the full method")
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def dropped_path(kept: Sequence[int], rows: int, columns: int) -> str:
    """The patches that are not in ``kept`` as an SVG path in units of patches, runs of a row in one rectangle."""
    held, parts = set(kept), []
    for row in range(rows):
        cells = [(column, row * columns + column in held) for column in range(columns)]
        for is_kept, group in groupby(cells, key=lambda cell: cell[1]):
            run = list(group)
            if not is_kept:
                parts.append(f"M{run[0][0]} {row}h{len(run)}v1h-{len(run)}z")
    return "".join(parts)


def draw_training(entries: Sequence[Row]) -> Figure:
    """Every metric of every stage over its steps, one small plot each."""
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for entry in entries:
        for name, value in entry.items():
            if name not in ("stage", "step") and isinstance(value, int | float):
                curves.setdefault((entry["stage"], name), []).append((entry["step"], value))
    curves = {title: points for title, points in curves.items() if len(points) > 1}
    lines = max(1, -(-len(curves) // 4))
    figure = Figure(figsize=(10, 1.75 * lines), layout="constrained")
    grid = figure.subplots(lines, 4, squeeze=False).flat
    for axes, ((stage, name), points) in zip(grid, curves.items(), strict=False):
        axes.plot(*zip(*points, strict=True), color="#c2410c", linewidth=1.1)
        axes.set_title(f"{stage} \u00b7 {name.replace('_', ' ')}", fontsize=8.5, loc="left", color="#374151")
        axes.tick_params(labelsize=7, length=2, color="#9ca3af", labelcolor="#6b7280")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#d1d5db")
    for axes in list(figure.axes)[len(curves) :]:
        axes.set_axis_off()
    return figure


def _section(place: Path) -> dict[str, Any]:
    """What the template wants to know of one set of questions."""
    results = _json(place / RESULTS, "rows")
    rows: list[Row] = results["rows"]
    gallery = _json(place / "gallery.json", "cases")["cases"] if (place / "gallery.json").is_file() else []
    figure = Figure(figsize=(9.4, 7.6), layout="constrained")
    draw_curves(results, figure)
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None}, reverse=True)
    ordered = by_budget(rows)
    return {
        "name": place.name,
        "results": results,
        "first": rows[0],
        "groups": [(budget, list(group)) for budget, group in groupby(ordered, key=lambda row: row["budget"])],
        "headlines": headlines(rows),
        "curves": _svg(figure, place.name),
        "threshold": next((row for row in rows if row["budget"] is None), None),
        "families": [(budget, [row for row in ordered if row["budget"] == budget]) for budget in budgets],
        "cases": [_drawn(case, place) for case in gallery],
    }


def _ablation(place: Path) -> dict[str, Any]:
    """What the template wants to know of an ablation."""
    results = _json(place / ABLATION, "rows")
    rows: list[Row] = results["rows"]
    lines = [
        {"name": name, **own[0], "cells": {row["budget"]: row for row in own}}
        for name, own in ((name, list(group)) for name, group in groupby(rows, key=lambda row: row["row"]))
    ]
    told = any(row["difference_points"] is not None and row["budget"] is not None for row in rows)
    return {
        "name": place.name,
        "results": results,
        "budgets": list(dict.fromkeys(row["budget"] for row in rows)),
        "groups": [(group, list(part)) for group, part in groupby(lines, key=lambda line: line["group"])],
        "chart": _svg(draw_ablation(rows), f"ablation-{place.name}") if told else None,
    }


def _drawn(case: dict[str, Any], place: Path) -> dict[str, Any]:
    """A case of the gallery with its picture and overlays inside."""
    picture = base64.b64encode((place / case["picture"]).read_bytes()).decode()
    methods = [
        {**part, "dropped": dropped_path(part["kept"], case["rows"], case["columns"])} for part in case["methods"]
    ]
    return {**case, "data": f"data:image/jpeg;base64,{picture}", "methods": methods}


def _lost(row: Row) -> str:
    points = row["drop_points"]
    if abs(points) < 0.05:
        return "no accuracy lost"
    return f"{abs(points):.1f} points of accuracy {'lost' if points > 0 else 'gained'}"


def _svg(figure: Figure, salt: str) -> Markup:
    """A figure as inline SVG whose ids, made with ``salt``, do not meet those of another one."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return Markup(re.sub(r'<g id="[^"]+"', "<g", svg[svg.index("<svg") :]))  # groups are numbered alike in all figures


def _json(path: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"{path} has no list {key!r}; it was not written by `tprl evaluate` or `tprl ablate`")
    return content


def _metrics(path: Path) -> list[Row]:
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            entries.append({**entry, "stage": str(entry["stage"]), "step": int(entry["step"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number} is no line of training metrics: {error!r}") from error
    return entries
