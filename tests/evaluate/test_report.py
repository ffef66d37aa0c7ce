"""The page about a folder of results."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluate.world import result_row as row
from tprl.commands.report import report
from tprl.evaluate.report import draw_ablation, draw_training, dropped_path, headlines, transfers

ROWS = [row("tprl", 16, 0.89), row("tprl", 4, 0.85), row("tprl", None, 0.9), row("uniform", 16, 0.8)]
ROWS += [row("uniform", 4, 0.6), row("fastv", 4, 0.7)]
MACHINE = {"cpu": "A & B", "cores": 2, "threads": 1, "device": "cpu", "torch": "2", "dtype": "float32"}


def write(folder: Path, data: str = "scenes", **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "model": "m",
        "data": data,
        "split": "test",
        "n": 10,
        "seed": 0,
        "machine": MACHINE,
        "commit": "abc",
        **more,
    }
    (folder / "results.json").write_text(json.dumps({**results, "rows": ROWS}))


def write_gallery(folder: Path) -> None:
    (folder / "gallery").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "gallery" / "0.jpg")
    methods = [
        {"method": "tprl", "budget": 4, "answer": "<b>", "score": 1.0, "kept": [0, 5]},
        {"method": "fastv", "budget": 4, "answer": "", "score": 0.0, "kept": [1]},
    ]
    case = {
        "picture": "gallery/0.jpg", "kind": "lost", "question": "what's it?", "accepted": ["<b>"], "family": "reading",
        "rows": 2, "columns": 4, "unpruned": {"answer": "cat", "score": 0.0}, "methods": methods,
    }  # fmt: skip
    (folder / "gallery.json").write_text(json.dumps({"chosen_by": "tprl-4", "cases": [case]}))


class Tags(HTMLParser):
    """What a page refers to, and whether every element that is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        given = dict(attrs)
        self.links += [given[name] or "" for name in ("src", "href", "xlink:href") if name in given and tag != "a"]
        self.ids += [given["id"] or ""] if "id" in given else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    write(tmp_path)
    write_gallery(tmp_path)
    lines = [{"stage": "ppo", "step": step, "reward": step / 9, "approx_kl": 0.1} for step in range(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    tags = Tags(page)
    assert tags.open == []
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in tags.links)
    assert {link[1:] for link in tags.links if link[0] == "#"} <= set(tags.ids)
    assert "<script" not in page
    assert len(re.findall('<tr class="own">', page)) == 3
    assert "ppo · approx kl" in page
    assert "reading &lt;1&gt;" in page
    assert "✓ &lt;b&gt;" in page
    assert "✗ (nothing)" in page
    assert "OpenMoji" in page
    assert '<path class="dropped" d="M1 0h3v1h-3zM0 1h1v1h-1zM2 1h2v1h-2z"/>' in page
    assert "<span>9.5</span><span>90.0 → 90.0 %</span>" in page, "the threshold's tokens by kind of question"
    heats = [heat.split("</table>")[0] for heat in page.split('<table class="heat">')[1:]]
    assert [(re.findall("<th>(.+?) tokens", heat), heat.count("<tr><td>")) for heat in heats] == [
        (["16"], 2), (["4"], 3),
    ]  # fmt: skip
    assert page.count("<td>0.50 <small>-0.50 to 1.50</small></td>") == 3, "every peer's distance from TPRL"
    report(tmp_path, out=tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page
    lines = [{"stage": "imitate", "step": step, "loss": 1 / step} for step in (1, 2)]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(tmp_path, run=tmp_path / "run")
    page = (tmp_path / "report.html").read_text()
    assert "imitate · loss" in page
    assert "ppo · approx kl" not in page


def test_bold_is_the_best_that_keeps_to_its_budget(tmp_path: Path) -> None:
    write(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    results["rows"].append(row("pyramiddrop", 4, 0.95) | {"kept_mean": 9.0})
    (tmp_path / "results.json").write_text(json.dumps(results))
    report(tmp_path)
    assert re.findall(r'class="best">([^<]+)<', (tmp_path / "report.html").read_text()) == ["89.0", "85.0"]


def test_nothing_lost_has_no_sign(tmp_path: Path) -> None:
    write(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    results["rows"].append(row("random", 16, 0.9003) | {"behind_tprl_ci95": [-0.001, 0.5]})
    (tmp_path / "results.json").write_text(json.dumps(results))
    report(tmp_path, out=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert ">0.0<" in page
    assert ">-0.0<" not in page
    assert "-0.00 to" not in page
    assert "0.00 to 0.50" in page


def test_a_folder_of_folders_is_one_page(tmp_path: Path) -> None:
    write(tmp_path / "out" / "scenes")
    write(tmp_path / "out" / "easy-vqa", "easy-vqa")
    report(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    tags = Tags(page)
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert "Visual tokens of m, pruned" in page
    write(tmp_path / "out" / "other", model="n")
    report(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Visual tokens of m and n, pruned" in page
    assert {"n on scenes, test split", "m on scenes, test split"} <= set(re.findall(r'class="note">(.*split)', page))


def ablated(name: str, budget: int | None, difference: float | None) -> dict[str, Any]:
    return {
        "group": "learning", "row": name, "seeds": [0, 1], "budget": budget, "kept_mean": 4.0, "accuracy": 0.8,
        "accuracy_sd": 0.011, "difference_points": difference,
        "difference_ci95": None if difference is None else [difference - 2, difference + 1],
    }  # fmt: skip


ABLATED = [ablated("full", budget, None) for budget in (16, None)]
ABLATED += [ablated("no-question", 16, -7.25), ablated("no-question", None, -3.0)]


def write_ablated(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = {"model": "m", "data": "scenes-tiles", "split": "test", "n": 10, "machine": MACHINE, "commits": ["abc"]}
    results["settings"] = {"samples": 4321, "imitate": {"demonstrations": 1234}, "ppo": {"epochs": 21}}
    (folder / "ablation.json").write_text(json.dumps({**results, "rows": ABLATED}))


def test_an_ablation_is_a_section_or_a_page_of_its_own(tmp_path: Path) -> None:
    write(tmp_path)
    write_ablated(tmp_path / "ablation")
    write_ablated(tmp_path / "alone")
    for folder, sections in ((tmp_path, 3), (tmp_path / "alone", 1)):
        report(folder)
        page = (folder / "report.html").read_text()
        tags = Tags(page)
        assert tags.open == []
        assert len(set(tags.ids)) == len(tags.ids)
        assert page.count("<section>") == sections
        assert ("What each part is worth: alone" in page) == (sections == 3)
        assert "4,321 training samples, 1,234 of them demonstrated, 21 rounds of PPO" in page
        assert "-7.2 (-9.2 to -6.2)" in page
        assert "-3.0 (-5.0 to -2.0)" in page
        assert "± 1.1" in page
        assert "no-question" in page
        assert "OpenMoji" in page  # the things in the pictures, whatever lies behind them
    assert "What each part is worth" not in page_without_ablation(tmp_path / "plain")


def page_without_ablation(folder: Path) -> str:
    write(folder)
    report(folder)
    return (folder / "report.html").read_text()


def test_only_rows_that_are_compared_are_drawn() -> None:
    figure = draw_ablation([*ABLATED, ablated("critic", 4, 1.5)])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["no-question", "critic"]
    centres = [container.lines[0].get_xdata().tolist() for container in axes.containers]
    assert centres == [[-7.25], [1.5]]
    assert [[round(place) for place in container.lines[0].get_ydata()] for container in axes.containers] == [[0], [1]]
    (low, _), (high, _) = axes.containers[0].lines[2][0].get_segments()[0]
    assert (low, high) == (-9.25, -6.25)


def test_a_policy_beyond_its_training_data(tmp_path: Path) -> None:
    write(tmp_path / "out" / "scenes", trained_on="scenes")
    write(tmp_path / "out" / "others", "easy-vqa")  # nobody knows by what it was pruned
    report(tmp_path / "out")
    assert "Beyond the training data" not in (tmp_path / "out" / "report.html").read_text()
    write(tmp_path / "out" / "beyond", "scenes-tiles", trained_on="scenes")
    report(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert Tags(page).open == []
    assert re.findall("<h2>([^<]+)", page) == ["others", "scenes", "beyond", "Beyond the training data"]
    table = page[page.index("Beyond the training data") :].split("</table>")[0]
    assert re.findall(r"<tr[^>]*><td>([^<]+)</td><td[^>]*>([^<]+)</td>\s*<td[^>]*>([^<]+)</td>", table) == [
        ("scenes", "scenes", "scenes"), ("beyond", "scenes", "scenes-tiles"),
    ]  # fmt: skip
    assert re.findall("<th>(.+?) tokens, %", table) == ["16", "4"]
    assert "98.9 <small>88.9 uniform</small>" in table  # 0.89 and 0.8 of 0.9 at 16 tokens
    assert "94.4 <small>77.8 fastv</small>" in table


def test_shares_of_the_unpruned_accuracy_by_hand() -> None:
    result = {"trained_on": "a", "data": "b", "n": 3, "rows": [row("tprl", 8, 0.45), row("tprl", None, 0.9)]}
    result["rows"].append(row("random", 2, 0.1))  # what no policy is compared with
    at_home = {**result, "data": "a", "rows": [row("tprl", 8, 0.9), row("tprl", 4, 0.3)]}
    elsewhere = {**at_home, "rows": [row("random", 8, 0.3), row("tprl", 4, 0.3)]}  # no policy under that budget
    found = transfers({"beyond": result, "home": at_home, "other": elsewhere})
    assert found is not None
    assert found["budgets"] == [8]
    assert [(line["name"], line["data"]) for line in found["rows"]] == [("home", "a"), ("beyond", "b")]
    assert [line["cells"] for line in found["rows"]] == [
        [{"own": 1.0, "best": None, "other": None}], [{"own": 0.5, "best": None, "other": None}],
    ]  # fmt: skip
    costly = [*result["rows"], row("fastv", 8, 0.6) | {"kept_mean": 20.0}]
    assert transfers({"": {**result, "rows": costly}})["rows"][0]["cells"][0]["best"] is None
    assert transfers({"home": at_home, "unknown": {**result, "trained_on": None}}) is None
    assert transfers({"": {**result, "trained_on": "my.jsonl", "data": "my-test.jsonl"}}) is None
    assert transfers({"": {**result, "trained_on": "my.jsonl"}}) is not None
    never_right = {**result, "rows": [row("tprl", 8, 0.0) | {"accuracy_unpruned": 0.0}]}
    assert transfers({"beyond": never_right, "home": at_home}) is None


def test_headlines_say_what_the_rows_say() -> None:
    assert headlines(ROWS) == [
        ("10", "tokens kept on average where each question decides, no accuracy lost"),
        ("60.0%", "fewer FLOPs at 16 tokens, 1.0 points of accuracy lost"),
        ("2.00\u00d7", "prefill speed at 16 tokens, pruner included"),
        ("+15.0", "points against fastv, the best other at 4 tokens a layer"),
    ]
    costly = [row("pyramiddrop", 4, 0.95) | {"kept_mean": 9.0}]
    assert headlines([*ROWS, *costly]) == headlines(ROWS) == headlines(ROWS[::-1])
    for accuracy, told in ((0.92, "2.0 points of accuracy gained"), (0.897, "0.3 points of accuracy lost")):
        assert headlines([row("tprl", 16, accuracy)])[0] == ("60.0%", f"fewer FLOPs at 16 tokens, {told}")
    assert headlines(ROWS[3:4])[0][0] == "60.0%"
    assert headlines(ROWS[3:])[-1] == ("-10.0", "points against fastv, the best other at 4 tokens a layer")


def test_every_metric_of_every_stage_is_drawn_over_its_steps() -> None:
    entries = [{"stage": "imitate", "step": step, "loss": 1 / step, "note": "no number"} for step in (10, 20)]
    entries += [{"stage": "ppo", "step": step, "loss": step, "reward": -step, "kl": 0.5, "lr": 2} for step in (5, 7)]
    entries += [{"stage": "ppo", "step": 9, "seen_once": 1.0}]
    drawn = [axes for axes in draw_training(entries).axes if axes.axison]
    assert {axes.get_title("left"): axes.get_lines()[0].get_xydata().tolist() for axes in drawn} == {
        "imitate · loss": [[10, 0.1], [20, 0.05]], "ppo · loss": [[5, 5], [7, 7]],
        "ppo · reward": [[5, -5], [7, -7]], "ppo · kl": [[5, 0.5], [7, 0.5]], "ppo · lr": [[5, 2], [7, 2]],
    }  # fmt: skip


def test_dropped_path_covers_what_was_not_kept() -> None:
    assert dropped_path([0, 5], 2, 4) == "M1 0h3v1h-3zM0 1h1v1h-1zM2 1h2v1h-2z"
    assert dropped_path(range(8), 2, 4) == ""


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no results.json in .*, nor ablation.json; `tprl evaluate`"):
        report(tmp_path)
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no metrics.jsonl in .*run"):
        report(tmp_path, run=tmp_path / "run")
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ppo", "step": 1}\n{"stage": ')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is no line of training metrics"):
        report(tmp_path)
    for text in ("[]", '{"rows": 3}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results.json has no list 'rows'"):
            report(tmp_path)
    assert not (tmp_path / "report.html").exists()
