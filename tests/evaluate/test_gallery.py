"""The gallery's cases: which are chosen, and that they show what the model did."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluate.world import World, tiny_lvlm
from tprl.data.sample import Sample
from tprl.evaluate.cell import Cell
from tprl.evaluate.gallery import choose_cases, write_gallery
from tprl.evaluate.methods import make_methods
from tprl.scoring import score
from tprl.selectors import FasterVLM


def test_cases_are_a_third_of_each_kind_of_many_families_and_pictures() -> None:
    samples = [Sample(str(i), str(i // 2), "?", ("a",), "abc"[i % 3], None) for i in range(120)]
    before = [float(i % 5 != 0) for i in range(120)]
    after = [float(i % 7 != 0) for i in range(120)]
    chosen = choose_cases(samples, before, after, 12)
    kinds = {index: "beyond" if not before[index] else "kept" if after[index] else "lost" for index in chosen}
    assert Counter(kinds.values()) == {"lost": 4, "kept": 4, "beyond": 4}
    assert len({samples[index].image_id for index in chosen}) == 12
    for kind in ("lost", "kept", "beyond"):
        assert {samples[index].family for index in chosen if kinds[index] == kind} == {"a", "b", "c"}
    assert choose_cases(samples, before, after, 12) == chosen


def test_missing_kinds_leave_room_for_the_others() -> None:
    samples = [Sample(str(i), str(i), "?", ("a",), "all", None) for i in range(20)]
    assert len(choose_cases(samples, [1.0] * 20, [1.0] * 20, 6)) == 6, "all of one kind"
    assert len(choose_cases(samples[:3], [1.0] * 3, [0.0] * 3, 6)) == 3


def test_half_right_counts_as_right() -> None:
    samples = [Sample(str(i), str(i), "?", ("a",), "all", None) for i in range(6)]
    assert choose_cases(samples, [0.5] * 6, [0.4] * 3 + [0.5] * 3, 4) == [0, 1, 3, 4], "two lost, two kept"


def test_cases_show_what_was_kept_and_answered(tmp_path: Path) -> None:
    lvlm, world = tiny_lvlm(), World()
    methods = make_methods(("fastervlm", "fastv"), (3, 8), None, None, False, 0)
    cell = Cell([1.0] * 24, [16.0] * 24)
    write_gallery(lvlm, world, methods, cell, {method.label: cell for method in methods}, tmp_path, 2)
    gallery = json.loads((tmp_path / "gallery.json").read_text())
    assert gallery["chosen_by"] == "fastervlm-8"
    assert len(gallery["cases"]) == 2
    for case in gallery["cases"]:
        whole, pruned = case["unpruned"]["score"], case["methods"][0]["score"]
        assert case["kind"] == ("beyond" if whole < 0.5 else "kept" if pruned >= 0.5 else "lost"), "cells say kept"
        assert Image.open(tmp_path / case["picture"]).size == (24, 24)
        assert (case["rows"], case["columns"]) == (4, 4)
        outer, inner = case["methods"]
        assert [(part["method"], part["budget"]) for part in case["methods"]] == [("fastervlm", 8), ("fastv", 8)]
        assert len(outer["kept"]) == len(inner["kept"]) == 8
    sample = world.samples[0]
    features = lvlm.encode_images([world.image("0")], frozenset({"cls_attention"}))
    visual = lvlm.visual_tokens(features, [sample.question])
    kept = FasterVLM().select(visual, torch.tensor([8])).keep_mask[0].nonzero()[:, 0].tolist()
    assert gallery["cases"][0]["question"] == sample.question
    assert gallery["cases"][0]["methods"][0]["kept"] == kept
    answer = gallery["cases"][0]["unpruned"]["answer"]
    assert gallery["cases"][0]["unpruned"]["score"] == pytest.approx(score(sample, answer))
