"""The table of a tiny model, its numbers computed again one sample at a time."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evaluate.world import LAYERS, World, save_world, tiny_lvlm
from launcher import BY_TWO
from lvlm.processors import processor_of
from lvlm.tiny import make
from ragged import visual_tokens
from tprl.commands.benchmark import benchmark
from tprl.commands.evaluate import evaluate
from tprl.config import PrunerConfig
from tprl.data.jsonl import Jsonl
from tprl.data.sample import DataError, Source
from tprl.evaluate import benchmark as module
from tprl.evaluate.benchmark import Benchmark
from tprl.evaluate.flops import lvlm_flops
from tprl.evaluate.latency import prompt_inputs, pruned_model
from tprl.evaluate.methods import METHODS, QUESTION_BLIND, Method, make_methods
from tprl.lvlm.model import Lvlm
from tprl.pruner import TokenPruner
from tprl.scoring import score
from tprl.selectors import IN_MODEL, SELECTORS

ROW = [
    "method", "budget", "kept_mean", "accuracy", "accuracy_unpruned", "accuracy_blind", "drop_points", "drop_ci95",
    "behind_tprl_points", "behind_tprl_ci95", "flops", "flops_unpruned", "flops_saved",
    "prefill_ms", "prefill_ms_unpruned", "speedup", "kv_cache_mib", "per_family",
]  # fmt: skip
TIMES = ("prefill_ms", "prefill_ms_unpruned", "speedup")


@pytest.fixture(scope="module")
def lvlm() -> Lvlm:
    return tiny_lvlm()


@pytest.fixture(scope="module")
def pruner(lvlm: Lvlm) -> TokenPruner:
    torch.manual_seed(0)
    config = PrunerConfig(4, 8, 8, 1, 2, width=lvlm.width, fingerprint=lvlm.fingerprint)
    pruner = TokenPruner(config).eval()
    with torch.no_grad():
        for weight in pruner.policy.parameters():
            weight.add_(torch.randn_like(weight))
    return pruner


@pytest.fixture(scope="module")
def methods(pruner: TokenPruner) -> list[Method]:
    return make_methods(METHODS, (8, 3), pruner, 0.45, True, 5)


@pytest.fixture(scope="module")
def out(lvlm: Lvlm, methods: list[Method], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    measured(lvlm, "tiny", World(), methods, folder / "out", folder / "cache", seed=5)
    return folder / "out"


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def files(lvlm: Lvlm, pruner: TokenPruner, tmp_path: Path) -> Path:
    """``model``, ``pruner`` and ``world.jsonl`` in one folder, for the command."""
    lvlm.model.save_pretrained(tmp_path / "model")
    lvlm.processor.save_pretrained(tmp_path / "model")
    pruner.save_pretrained(tmp_path / "pruner")
    save_world(tmp_path, World())
    return tmp_path


def generated(lvlm: Lvlm, source: Source, index: int) -> str:
    inputs = prompt_inputs(lvlm, source, source.samples[index])
    end = lvlm.processor.tokenizer.convert_tokens_to_ids("[end]")
    output = lvlm.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=end)
    return lvlm.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def measured(*given: Any, **options: Any) -> dict[str, Any]:
    run = Benchmark(*given, **options)
    run.measure()
    return run.results()


def run(files: Path, out: str = "out", **options: Any) -> None:
    given = {
        "data": str(files / "world.jsonl"), "n": 12, "budgets": "8,3", "methods": "tprl,uniform",
        "model": str(files / "model"), "pruner": files / "pruner", "dtype": "float32", "cache": files / "cache",
        "gallery": 0,
    }  # fmt: skip
    evaluate(files / out, **{**given, **options})


def row_of(results: dict[str, Any], method: Method) -> dict[str, Any]:
    (row,) = [row for row in results["rows"] if (row["method"], row["budget"]) == (method.name, method.budget)]
    return row


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in results["rows"]]
    return {**results, "rows": rows}


def test_results_hold_what_they_should(results: dict[str, Any]) -> None:
    assert list(results) == ["model", "data", "split", "trained_on", "n", "seed", "machine", "commit", "rows"]
    assert (results["model"], results["data"], results["split"], results["n"], results["seed"]) == (
        "tiny", "world", "test", 24, 5,
    )  # fmt: skip
    assert len(results["rows"]) == 2 * len(METHODS) + 1
    assert [row["budget"] for row in results["rows"]].count(None) == 1
    assert len({row["prefill_ms_unpruned"] for row in results["rows"]}) == 1, "all methods take turns in one run"
    for row in results["rows"]:
        assert list(row) == ROW
        assert row["drop_points"] == pytest.approx(100 * (row["accuracy_unpruned"] - row["accuracy"]))
        assert row["drop_ci95"][0] <= row["drop_points"] <= row["drop_ci95"][1]
        assert row["speedup"] == pytest.approx(row["prefill_ms_unpruned"] / row["prefill_ms"])
        assert row["flops_saved"] == pytest.approx(1 - row["flops"] / row["flops_unpruned"])
        assert 0 < row["flops_saved"] < 1
        assert set(row["per_family"]) == {"word", "people", "box"}
        counts = [part["n"] for part in row["per_family"].values()]
        for name in ("accuracy", "accuracy_unpruned", "accuracy_blind", "kept_mean"):
            parts = [part[name] for part in row["per_family"].values()]
            assert sum(n * part for n, part in zip(counts, parts, strict=True)) / 24 == pytest.approx(row[name])
        if row["budget"] is not None and row["method"] not in IN_MODEL:
            assert row["kept_mean"] == row["budget"]


def test_random_draws_by_its_seed() -> None:
    visual = visual_tokens([16], [1], width=2)
    first, again, other = (
        make_methods(["random"], [8], None, None, False, seed)[0].select(visual).keep_mask for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_pictures_with_fewer_tokens_than_the_budget_keep_all() -> None:
    for method in make_methods(["fastv", "pyramiddrop-mean"], [8], None, None, False, 0):
        assert method.layer_counts(6, 5) == [5] * 6


@pytest.mark.parametrize("name", METHODS)
def test_accuracy_is_that_of_generate_on_each_sample(
    lvlm: Lvlm, methods: list[Method], results: dict[str, Any], name: str
) -> None:
    world = World()
    for method in (method for method in methods if method.name == name):
        scores, kept = [], []
        for index, sample in enumerate(world.samples):
            with pruned_model(lvlm, method, prompt_inputs(lvlm, world, sample)) as pruning:
                scores.append(score(sample, generated(lvlm, world, index)))
            kept.append(pruning.kept[0][0].count if method.selector else row_of(results, method)["kept_mean"])
        row = row_of(results, method)
        assert row["accuracy"] == pytest.approx(sum(scores) / 24)
        assert row["kept_mean"] == pytest.approx(sum(kept) / 24)


def test_threshold_keeps_different_numbers(out: Path) -> None:
    kept = json.loads((out / "cells" / "tprl-threshold.json").read_text())["kept"]
    assert len(set(kept)) > 2


def test_unpruned_and_blind(lvlm: Lvlm, results: dict[str, Any]) -> None:
    world = World()
    unpruned = [score(sample, generated(lvlm, world, index)) for index, sample in enumerate(world.samples)]
    blind = []
    for sample in world.samples:
        before, after = lvlm.prompts.ids(sample.question)
        ids = before[:-1] + after
        output = lvlm.model.generate(input_ids=torch.tensor([ids]), max_new_tokens=2, do_sample=False, eos_token_id=4)
        answer = lvlm.processor.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        blind.append(score(sample, answer))
    for row in results["rows"]:
        assert row["accuracy_unpruned"] == pytest.approx(sum(unpruned) / 24)
        assert row["accuracy_blind"] == pytest.approx(sum(blind) / 24)


def test_flops_and_cache_include_the_pruner(lvlm: Lvlm, pruner: TokenPruner, results: dict[str, Any]) -> None:
    config = lvlm.model.config
    world = World()
    lengths = [len(ids) for sample in world.samples for ids in lvlm.prompts.ids(sample.question)[1:]]
    text = 1 + sum(lengths) / len(lengths)
    assert {row["flops_unpruned"] for row in results["rows"]} == {lvlm_flops(config, 16, round(text)).total}
    visual = lvlm.visual_tokens(lvlm.encode_images([world.image("0")]), ["what is it ?"])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as looking:
        pruner.keep_probs(visual)
    extra = looking.get_total_flops()
    for row in results["rows"]:
        language = lvlm_flops(config, round(row["kept_mean"]), round(text)).total
        if row["method"] == "fastv":  # one layer sees everything, and choosing takes its keys and one query
            counts = [16, *[row["budget"]] * (LAYERS - 1)]
            assert row["kept_mean"] == pytest.approx(sum(counts) / LAYERS)
            chosen = row["flops"] - lvlm_flops(config, 16, round(text), counts).total
            length = 16 + len(lvlm.prompts.ids("what is it ?")[1]) + 1
            assert chosen == pytest.approx(2 * 16 * (length * 8 + 16) + 2 * length * 16, rel=0.2)
        if row["method"] == "tprl":
            assert row["flops"] - language == pytest.approx(extra, rel=0.2)
        if row["method"] == "divprune":
            assert row["flops"] - language == 2 * 16 * 16 * 16
        if row["method"] in ("random", "uniform", "fastervlm"):
            assert row["flops"] == language
        per_token = LAYERS * 2 * 8 * 4 / 2**20  # keys and values of one head of width 8, float32
        assert row["kv_cache_mib"] == pytest.approx((row["kept_mean"] + text) * per_token)


@pytest.mark.parametrize(("sides", "repeats"), [([16] * 8 + [32], 1), ([16] * 10 + [32] * 10, 4)], ids=["few", "many"])
def test_flops_of_the_tower_are_the_mean_over_pictures_of_all_sizes(
    sides: list[int], repeats: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of 16 pixels has 4 visual tokens, one of 32 has 16; of more than 10 pictures 10 are counted."""
    monkeypatch.setattr(module, "COUNTED_PICTURES", 10)
    lvlm = Lvlm(make("qwen2_5_vl", torch.float32).model, processor_of("qwen2_5_vl"))
    config, lines = lvlm.model.config, []
    for number, side in enumerate(sides):
        Image.new("RGB", (side, side), (number, 0, 0)).save(tmp_path / f"{number}.png")
        question = "what is it ?" + " it" * (number == len(sides) - 1)
        lines += [json.dumps({"image": f"{number}.png", "question": question, "answer": "cat"}) + "\n"] * repeats
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    rows = make_methods(["uniform"], [2], None, None, False, seed=0)
    source = Jsonl(tmp_path / "questions.jsonl", "test")
    run = Benchmark(lvlm, "tiny", source, rows, tmp_path / "out", tmp_path / "cache")
    run.measure()
    (row,) = run.results()["rows"]

    towers = [lvlm_flops(config, 0, 1, encoded_tokens=side**2 // 64) for side in sides]
    tower = sum(part.vision + part.projector for part in towers) / len(towers)
    text = round(sum(run.encoded.text_tokens(i) for i in range(len(source.samples))) / len(source.samples))
    total = round(sum(side**2 // 64 for side in sides) / len(sides))
    assert row["flops_unpruned"] == pytest.approx(tower + lvlm_flops(config, total, text, None, 1, 4).language, abs=1)
    chosen = run.cells["uniform-2"].selector_flops
    assert row["flops"] - chosen == pytest.approx(tower + lvlm_flops(config, 2, text, None, 1, 4).language, abs=1)


@pytest.mark.parametrize("name", SELECTORS)
def test_question_blind_methods_are_those_that_do_not_see_the_question(lvlm: Lvlm, name: str) -> None:
    world = World()
    features = lvlm.encode_images([world.image("0")] * 2, SELECTORS[name]().needs)
    visual = lvlm.visual_tokens(features, ["what is it ?", "now ?"])
    first, second = SELECTORS[name]().select(visual, torch.tensor([5, 5])).keep_mask
    assert bool((first == second).all()) == (name in QUESTION_BLIND)


def test_resumed_equals_uninterrupted(
    lvlm: Lvlm, methods: list[Method], out: Path, results: Any, tmp_path: Path
) -> None:
    cache = out.parent / "cache"
    measured(lvlm, "tiny", World(), methods[:3], tmp_path / "out", cache, seed=5)
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "cells" / "blind.json").unlink()
    kept = (tmp_path / "out" / "cells" / "tprl-8.json").read_text()
    again = measured(lvlm, "tiny", World(), methods, tmp_path / "out", cache, seed=5, resume=True)
    assert without_times(again) == without_times(results)
    assert (tmp_path / "out" / "cells" / "tprl-8.json").read_text() == kept


def test_resume_refuses_cells_of_another_run(lvlm: Lvlm, out: Path, methods: list[Method]) -> None:
    cache = out.parent / "cache"
    with pytest.raises(ValueError, match=r"unpruned.json was made with seed 5 instead of 6; use another folder"):
        measured(lvlm, "tiny", World(), methods, out, cache, seed=6, resume=True)
    config = PrunerConfig(4, 8, 8, 1, 2, width=lvlm.width, fingerprint=lvlm.fingerprint)
    other = make_methods(["tprl"], (8,), TokenPruner(config).eval(), 0.45, True, 5)
    with pytest.raises(ValueError, match=r"tprl-8.json was made with pruner \w+ instead of \w+"):
        measured(lvlm, "tiny", World(), other, out, cache, seed=5, resume=True)


def test_methods_that_cannot_prune_the_model_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    """Visual features enter the first layers of Qwen3-VL."""
    lvlm = Lvlm(make("qwen3_vl", torch.float32).model, processor_of("qwen3_vl"))
    lvlm.model.config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    source = Jsonl(save_world(tmp_path, World(1)), "test")
    for name, why in (
        ("fastv", "fastv cuts before layer .*; at least 3 layers of this model see all"),
        ("visionzip", "visionzip needs cls_attention, tower_keys, which the tower of this Qwen3-VL does not give"),
    ):
        rows = make_methods(["uniform", name], [2], None, None, False, seed=0)
        with pytest.raises(ValueError, match=why):
            Benchmark(lvlm, "tiny", source, rows, tmp_path / "out", tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_the_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(files, gallery=1)
    printed = capsys.readouterr().out
    assert printed.strip() == (files / "out" / "results.md").read_text().strip()
    assert printed.count("\n| ") == 1 + 5  # the heading, two methods under two budgets, and the threshold
    assert len(json.loads((files / "out" / "gallery.json").read_text())["cases"]) == 1
    assert (files / "out" / "curves.png").stat().st_size > 10_000
    assert (files / "out" / "results.csv").read_text().count("\n") == 6
    first = json.loads((files / "out" / "results.json").read_text())
    assert first["n"] == 12
    with pytest.raises(ValueError, match="out exists; --resume goes on with it, --overwrite throws"):
        run(files)
    run(files, resume=True, methods="tprl,uniform,random", threshold_row=False)
    assert len(json.loads((files / "out" / "results.json").read_text())["rows"]) == 6
    with pytest.raises(ValueError, match="--pruner and --threshold are those of tprl, which --methods does not name"):
        run(files, overwrite=True, methods="uniform")
    run(files, overwrite=True, methods="uniform", pruner=None)
    assert len(list((files / "out" / "cells").iterdir())) == 4
    with pytest.raises(ValueError, match="holds no results, so --overwrite leaves it alone"):
        evaluate(files, overwrite=True)
    assert (files / "world.jsonl").is_file()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(files: Path) -> None:
    sets = {"methods": "tprl,uniform,fastv", "cache": files / "cache"}
    run(files, **sets)
    given = {
        "data": files / "world.jsonl", "n": 12, "budgets": "8,3", "model": files / "model", "dtype": "float32",
        "pruner": files / "pruner", "gallery": 0, **sets,
    }  # fmt: skip
    options = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    told = subprocess.run([*BY_TWO, "benchmark", files / "shared", *options], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    one, two = (json.loads((files / name / "results.json").read_text()) for name in ("out", "shared/world"))
    one["machine"]["threads"] = two["machine"]["threads"]  # the launcher gives each process fewer
    assert without_times(two) == without_times(one)
    assert told.stdout.count("| tprl |") == 1 + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": "8,0"}, "budget '0' is not allowed; whole numbers from 1"),
        ({"budgets": "8,x"}, "budget 'x' is not allowed"),
        ({"budgets": ""}, "expected comma-separated names"),
        ({"budgets": "17"}, "budget 17 is not allowed; 1 to 16"),
        (
            {"budgets": "8,2", "methods": "tprl,fastv-mean"},
            r"fastv-mean cannot keep 2 of a prompt's 16 .* at least 4 stay",
        ),
        ({"methods": "tprl,magic"}, r"unknown methods magic; known: tprl, random, uniform.*, dart, fastv-mean"),
        ({"threshold": 0.5, "threshold_row": False}, "--threshold is that of the row that --no-threshold-row leaves"),
        ({"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
        ({"dtype": "float7"}, "dtype 'float7' is not"),
        ({"n": 0}, "at least 1, got 0"),
        ({"data": "nothing"}, "data 'nothing' is not"),
        ({"data": "nothing", "model": "none"}, "data 'nothing' is not"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(files: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(files, **options)
    assert not (files / "out").exists()


def test_bad_files_are_named_and_nothing_is_written(files: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run(files, pruner=files / "none")
    whole = (files / "1.png").read_bytes()
    (files / "1.png").write_bytes(whole[:200])
    with pytest.raises(DataError, match=r"world.jsonl:5: cannot read picture"):
        run(files)
    assert not (files / "out").exists()
    with pytest.warns(UserWarning, match="skipped 4 bad records"):
        run(files, skip_bad=True)
    assert json.loads((files / "out" / "results.json").read_text())["n"] == 12


def test_the_world_as_a_file(tmp_path: Path) -> None:
    world = World()
    source = Jsonl(save_world(tmp_path, world), "test")
    for ours, theirs in zip(world.samples, source.samples, strict=True):
        assert (ours.question, ours.answers if not ours.box else ours.box, ours.box_scale) == (
            theirs.question, theirs.answers if not theirs.box else theirs.box, theirs.box_scale,
        )  # fmt: skip


def test_the_headline_run_is_one_evaluation_a_set(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "other.jsonl").write_text((files / "world.jsonl").read_text())
    options: dict[str, Any] = {
        "n": 8, "budgets": "4", "methods": "uniform,fastv", "model": str(files / "model"), "dtype": "float32",
        "cache": files / "cache", "gallery": 0,
    }  # fmt: skip
    both = f"{files / 'world.jsonl'},{files / 'other.jsonl'}"
    benchmark(files / "out", data=both, **options)
    for name in ("world", "other"):
        assert len(json.loads((files / "out" / name / "results.json").read_text())["rows"]) == 2
    with pytest.raises(ValueError, match="out exists; --resume"):
        benchmark(files / "out", data=both, **options)
    benchmark(files / "out", data=both, resume=True, **options)
    with pytest.raises(ValueError, match="need different file names"):
        benchmark(files / "new", data=f"{files / 'world.jsonl'},world", **options)


def test_resume_refuses_all_that_a_cell_was_made_from(
    tmp_path: Path, pruner: TokenPruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    lvlm = tiny_lvlm()

    def again(pictures: int = 2, threshold: float = 0.4) -> None:
        methods, anew = make_methods(["tprl"], [], pruner, threshold, True, 0), Lvlm(lvlm.model, lvlm.processor)
        Benchmark(anew, "m", World(pictures), methods, tmp_path / "out", tmp_path / "cache", resume=True).measure()

    again()
    with pytest.raises(ValueError, match="with samples"):
        again(pictures=3)
    with pytest.raises(ValueError, match=r"with threshold 0\.4 instead of 0\.5"):
        again(threshold=0.5)
    processor: Any = lvlm.processor
    spoken = processor.chat_template.replace("+ '] '", "+ '] now '")
    for holder, name, other in (
        (processor, "chat_template", spoken),
        (processor.image_processor, "image_mean", [0.9, 0.1, 0.0]),
        (lvlm.model.config, "vision_feature_layer", -2),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, other)
            with pytest.raises(ValueError, match=r"with processor \w+ instead of \w+;"):
                again()
    again()
    with torch.no_grad():
        lvlm.model.lm_head.weight[5] += 1
    with pytest.raises(ValueError, match="with weights"):
        again()
    lvlm.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="dtype float32 instead of bfloat16"):
        again()
