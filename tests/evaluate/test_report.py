"""The page about a folder of results."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tprl.commands.report import report
from tprl.evaluate.report import dropped_path, headlines


def row(method: str, budget: int | None, accuracy: float) -> dict[str, Any]:
    part = {"accuracy": accuracy, "accuracy_unpruned": 0.9, "accuracy_blind": 0.3, "n": 5, "kept_mean": budget or 9.5}
    drop = 100 * (0.9 - accuracy)
    return {
        "method": method, "budget": budget, **{name: value for name, value in part.items() if name != "n"},
        "drop_points": drop, "drop_ci95": [drop - 1, drop + 1], "flops": 40, "flops_unpruned": 100,
        "flops_saved": 0.6, "prefill_ms": 50.0, "prefill_ms_unpruned": 100.0, "speedup": 2.0, "kv_cache_mib": 1.5,
        "per_family": {"reading <1>": part, "counting": part},
    }  # fmt: skip


ROWS = [row("tprl", 16, 0.89), row("tprl", 4, 0.85), row("tprl", None, 0.9), row("uniform", 16, 0.8)]
ROWS += [row("uniform", 4, 0.6), row("fastv", 4, 0.7)]
MACHINE = {"cpu": "A & B", "cores": 2, "threads": 1, "device": "cpu", "torch": "2", "dtype": "float32"}


def write(folder: Path, data: str = "scenes") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = {"model": "m", "data": data, "split": "test", "n": 10, "seed": 0, "machine": MACHINE, "commit": "abc"}
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
        "rows": 4, "columns": 4, "unpruned": {"answer": "cat", "score": 0.0}, "methods": methods,
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
    report(tmp_path, out=tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_a_folder_of_folders_is_one_page(tmp_path: Path) -> None:
    write(tmp_path / "out" / "scenes")
    write(tmp_path / "out" / "easy-vqa", "easy-vqa")
    report(tmp_path / "out")
    tags = Tags((tmp_path / "out" / "report.html").read_text())
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)


def test_headlines_say_what_the_rows_say() -> None:
    assert headlines(ROWS) == [
        ("10", "tokens kept on average where each question decides, no accuracy lost"),
        ("60.0%", "fewer FLOPs at 16 tokens, 1.0 points of accuracy lost"),
        ("2.00\u00d7", "prefill speed at 16 tokens, pruner included"),
        ("+15.0", "points against fastv, the best other at 4 tokens"),
    ]
    assert headlines(ROWS[3:4])[0][0] == "60.0%"


def test_dropped_path_covers_what_was_not_kept() -> None:
    assert dropped_path([0, 5], 2, 4) == "M1 0h3v1h-3zM0 1h1v1h-1zM2 1h2v1h-2z"
    assert dropped_path(range(8), 2, 4) == ""


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no results.json in .*; `tprl evaluate` writes one"):
        report(tmp_path)
    write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no metrics.jsonl in .*run"):
        report(tmp_path, run=tmp_path / "run")
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ppo", "step": 1}\n{"stage": ')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is no line of training metrics"):
        report(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match=r"results.json has no list 'rows'"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()
