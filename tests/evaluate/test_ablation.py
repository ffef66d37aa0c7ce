"""The ablation's table against sums by hand, and the whole recipe through the real command line."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluate.world import World, save_world, tiny_lvlm
from launcher import BY_TWO
from lvlm.tiny import make
from tprl.commands.ablate import ablate as run_ablation
from tprl.config import ImitateStage, PpoStage, PrunerConfig, TrainConfig
from tprl.data.sample import Sample
from tprl.evaluate.ablation import ablation_table, compare
from tprl.evaluate.cell import Cell
from tprl.lvlm.model import Lvlm
from tprl.pruner import TokenPruner
from tprl.run import RunFolder
from tprl.train import ablation
from tprl.train.ablation import FULL, ROWS, _reward_only, check_rows
from tprl.train.pipeline import STAGES

SETTINGS = [
    "set:train-config", "--set.samples", 24, "--set.validation", 8, "--set.autoencoder.steps", 2,
    "--set.autoencoder.pictures", 2, "--set.imitate.demonstrations", 16, "--set.imitate.epochs", 1,
    "--set.imitate.batch", 8, "--set.imitate.budgets", 8, 4, 2, "--set.imitate.search-rounds", 1,
    "--set.ppo.epochs", 2, "--set.ppo.questions", 4, "--set.ppo.rollouts", 2,
]  # fmt: skip
NAMES = ("full", "demonstrations-only", "ppo-only", "steps-3", "no-novelty", "compact-positions")
SAMPLES = [Sample(str(i), str(i), "?", ("a",), "all", None) for i in range(4)]
MACHINE = {"cpu": "A", "dtype": "float32", "torch": "2"}


def test_rows_by_hand() -> None:
    """Four questions, two seeds; the row has one seed in common with the full method and one of its own."""
    measured = {
        "full": {0: {8: Cell([1, 1, 0, 0], [8] * 4)}, 1: {8: Cell([1, 1, 1, 1], [8] * 4)}},
        "critic": {0: {8: Cell([0, 1, 0, 0], [8, 8, 8, 4])}, 2: {8: Cell([0, 0, 0, 0], [8] * 4)}},
        "no-question": {1: {8: Cell([0.5, 0.5, 1, 1], [8] * 4)}},
    }
    rows = {row["row"]: row for row in compare(measured, dict.fromkeys(measured, "g"), "full", SAMPLES)}
    assert rows["full"]["accuracy"] == 0.75
    assert rows["full"]["accuracy_sd"] == pytest.approx(0.5 / 2**0.5)
    assert rows["full"]["difference_points"] is None
    assert rows["critic"]["seeds"] == [0, 2]
    assert rows["critic"]["accuracy"] == 0.125
    assert rows["critic"]["kept_mean"] == 7.5
    assert rows["critic"]["difference_points"] == -25  # of seed 0, question by question: -1, 0, 0, 0
    low, high = rows["critic"]["difference_ci95"]
    assert low == pytest.approx(-75, abs=1)
    assert high == 0
    assert rows["no-question"]["difference_points"] == -25
    assert rows["no-question"]["accuracy_sd"] is None
    alone = compare({"critic": measured["critic"]}, {"critic": "g"}, "full", SAMPLES)
    assert alone[0]["difference_points"] is None
    results = {"model": "m", "data": "d", "split": "test", "n": 4, "machine": MACHINE, "commits": ["abc", "def"]}
    table = ablation_table({**results, "rows": list(rows.values())})
    assert "commit abc, def." in table
    assert "| g | critic | 2 | 12.5% \u00b1 17.7, -25.0 (-75.0 to +0.0) |" in table


def test_every_row_changes_what_it_says_and_nothing_else() -> None:
    config = TrainConfig()
    assert ROWS[FULL].settings(config) == config
    seen = set()
    for name, row in ROWS.items():
        settings = (row.settings(config), row.stages, str(row.choice), row.positions)
        assert settings not in seen, name
        seen.add(settings)
    assert ROWS["steps-2"].settings(config) == replace(config, ppo=replace(config.ppo, horizon=2))
    one_budget = replace(config, imitate=replace(config.imitate, budgets=(32,)))
    assert ROWS["one-budget"].settings(config) == one_budget
    search = ("text-attention", "fastervlm", "divprune", "search")
    searching = replace(config, imitate=replace(config.imitate, teachers=search))
    assert ROWS["teacher-search"].settings(config) == searching
    assert ROWS["critic"].settings(config) == replace(config, ppo=replace(config.ppo, baseline="critic"))
    assert ROWS["sparse-score"].settings(config) == replace(config, ppo=replace(config.ppo, score="correct"))
    blind = replace(config, pruner=replace(config.pruner, use_question=False))
    assert ROWS["no-question"].settings(config) == blind
    raw = replace(config, pruner=replace(config.pruner, use_autoencoder=False))
    assert ROWS["no-autoencoder"].settings(config) == raw
    assert ROWS["latent-16"].settings(config) == replace(config, pruner=replace(config.pruner, latent=16))
    assert all(set(row.stages) <= set(STAGES) for row in ROWS.values())


def test_imitations_are_shared_by_what_their_demonstrations_depend_on() -> None:
    config = TrainConfig()
    dense = {name: _reward_only(row.settings(config).ppo) for name, row in ROWS.items()}
    assert {name for name, kept in dense.items() if kept != dense[FULL]} == {"sparse-score"}
    own = PpoStage(score="correct", alpha=2.0, gamma=0.25, beta=9.0, epochs=7, horizon=3)
    assert _reward_only(own) == PpoStage(score="correct", alpha=2.0, gamma=0.25)


def test_another_choice_is_made_by_what_the_full_method_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def train(
        run: RunFolder, lvlm: Lvlm, sources: Any, config: TrainConfig, *more: Any, calibrated: bool
    ) -> TokenPruner:
        stages, start, _ = more
        asked.append((stages, config.pruner.novelty, start and start.config.novelty, calibrated))
        return TokenPruner(PrunerConfig(width=lvlm.width, fingerprint=lvlm.fingerprint, novelty=7.0))

    monkeypatch.setattr(ablation, "train", train)
    lvlm, sources = tiny_lvlm(), (World(2), World(3))
    for name in ("full", "no-novelty"):
        ablation.train_row(ROWS[name], tmp_path / name, lvlm, sources, TrainConfig(), tmp_path)
    parts = [(STAGES[:-1], 2.0, None, False), (STAGES[-1:], 2.0, 2.0, True), (STAGES[-1:], 2.0, 2.0, False)]
    assert asked == [*parts[:2], parts[0], parts[2], ((), 0.0, 0.0, True)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    lvlm = tiny_lvlm()
    lvlm.model.save_pretrained(folder / "model")
    lvlm.processor.save_pretrained(folder / "model")
    save_world(folder, World(12))
    shutil.copy(folder / "world.jsonl", folder / "test.jsonl")
    return folder


ALONE = (sys.executable, "-m", "tprl.cli")


def ablate(
    world: Path, *more: object, out: str = "out", processes: tuple[str, ...] = ALONE
) -> subprocess.CompletedProcess[str]:
    data = ["--data", world / "world.jsonl", "--test-data", world / "test.jsonl", "--n", 12]
    model = ["--model", world / "model", "--dtype", "float32"]
    arguments = ["ablate", world / out, *model, *data, "--budgets", "4,2", "--cache", world / "cache", *more, *SETTINGS]
    command = [*processes, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def written(world: Path, out: str = "out") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((world / out / "ablation.json").read_text())
    return content


def test_the_recipe_trains_measures_and_goes_on(world: Path) -> None:
    outcome = ablate(world, "--rows", ",".join(NAMES))
    assert outcome.returncode == 0, outcome.stderr
    rows = written(world)["rows"]
    assert [(row["row"], row["budget"]) for row in rows] == [(name, b) for name in NAMES for b in (4, 2, None)]
    by_name = {(row["row"], row["budget"]): row for row in rows}
    assert all((row["difference_points"] is None) == (row["row"] == "full") for row in rows)
    assert by_name["full", 4]["kept_mean"] == 4
    out = world / "out"
    assert (out / "ablation.csv").read_text().count("\n") == 1 + len(rows)
    assert (out / "ablation.md").read_text() in outcome.stdout
    cells = {name: json.loads((out / "cells" / f"{name}@0.json").read_text())["cells"] for name in NAMES}
    full, compact = cells["full"], cells["compact-positions"]  # the same tokens, elsewhere
    assert [part["kept"] for part in full] == [part["kept"] for part in compact]
    assert [part["scores"] for part in full] != [part["scores"] for part in compact]
    # all but ppo-only share one imitation; PPO is by itself; no-novelty and compact-positions have that of full
    runs = {path.parent.name: json.loads(path.read_text()) for path in out.glob("trainings/*/config.json")}
    stages = sorted(tuple(run["stages"]) for run in runs.values())
    assert stages == [(), ("autoencoder", "imitate"), ("autoencoder", "ppo"), ("ppo",), ("ppo",)]
    unnovel = next(out / "trainings" / name for name, run in runs.items() if not run["stages"])
    full_run = out / "trainings" / runs[unnovel.name]["start"]
    weights = [(run / "pruner" / "pruner.safetensors").read_bytes() for run in (unnovel, full_run)]
    assert weights[0] == weights[1]
    novelty = [TokenPruner.from_pretrained(run / "pruner").config.novelty for run in (unnovel, full_run)]
    told = json.loads((full_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert novelty == [0.0, told["novelty"]]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = ablate(world, "--rows", "full,demonstrations-only", "--seeds", "0,3", "--resume")
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    rows = written(world)["rows"]
    assert [row["seeds"] for row in rows if row["budget"] == 2] == [[0, 3], [0, 3], [0], [0], [0], [0]]
    (world / "out" / "mine.txt").write_text("kept")
    for path in (world / "out" / "cells").glob("*@3.json"):
        path.write_text(path.read_text().replace('"commit": "', '"commit": "earlier-'))
    assert ablate(world, "--rows", "full", "--resume").returncode == 0
    measured_by = written(world)["commits"]
    assert len(measured_by) == 2
    assert sum(commit.startswith("earlier-") for commit in measured_by) == 1
    other = ablate(world, "--rows", "full", "--resume", "--budgets", "3")
    assert other.returncode == 2
    assert "other settings" in other.stderr
    shorter = world / "shorter.jsonl"
    shorter.write_text("".join((world / "world.jsonl").read_text().splitlines(keepends=True)[1:]))
    other = ablate(world, "--rows", "full", "--resume", "--data", shorter)
    assert other.returncode == 2
    assert "other settings" in other.stderr
    template = world / "model" / "chat_template.jinja"
    spoken = template.read_text()
    template.write_text(spoken.replace("+ '] '", "+ '] now '"))
    other = ablate(world, "--rows", "full", "--resume")
    template.write_text(spoken)
    assert other.returncode == 2
    assert "other settings" in other.stderr
    own = world / "out" / "cells" / "full@0.json"
    own.write_text(own.read_text().replace('"novelty": 2.0', '"novelty": 0.0'))
    other = ablate(world, "--rows", "full", "--resume")
    assert other.returncode == 2
    assert "other settings" in other.stderr
    many = ablate(world, "--budgets", "99", out="many")
    assert many.returncode == 2
    assert "budget 99 is not allowed; 1 to 16" in many.stderr
    assert not (world / "many").exists()


def test_rows_that_a_model_cannot_have_are_refused_before_any_is_trained() -> None:
    settings = TrainConfig()
    check_rows([*ROWS], Lvlm(make("llava").model), settings)
    with pytest.raises(
        ValueError,
        match=r"rows that Qwen2\.5-VL cannot have, .*: teacher-fastervlm \(teachers fast.*\), "
        r"compact-positions \(positions 'compact' are not allowed",
    ):
        check_rows([*ROWS], Lvlm(make("qwen2_5_vl").model), settings)


@pytest.mark.slow
def test_two_processes_find_what_one_does(world: Path) -> None:
    for out, processes in (("one", ALONE), ("two", BY_TWO)):
        outcome = ablate(world, "--rows", "full,demonstrations-only", out=out, processes=processes)
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stdout.count("| learning | full |") == 1
    for one, two in zip(written(world, "one")["rows"], written(world, "two")["rows"], strict=True):
        assert two["accuracy"] == pytest.approx(one["accuracy"])
        assert two["kept_mean"] == pytest.approx(one["kept_mean"])


def test_what_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown rows no-luck; known: full, demonstrations-only"):
        run_ablation(tmp_path / "out", rows="full,no-luck")
    with pytest.raises(ValueError, match="seeds are whole numbers from 0 on, got -1"):
        run_ablation(tmp_path / "out", seeds="0,-1")
    with pytest.raises(ValueError, match=r"--set\.seed 5 has no say here; --seeds are those of the trainings"):
        run_ablation(tmp_path / "out", config=TrainConfig(seed=5))
    for test_data in (None, "my.jsonl", "./my.jsonl"):
        with pytest.raises(
            ValueError, match=r"my\.jsonl is trained on; say with --test-data which other questions are"
        ):
            run_ablation(tmp_path / "out", data="my.jsonl", test_data=test_data)
    with pytest.raises(ValueError, match="unknown teacher 'oracle'"):
        run_ablation(tmp_path / "out", config=TrainConfig(imitate=ImitateStage(teachers=("oracle",))))
    with pytest.raises(ValueError, match="preset 'huge' is not one of"):
        run_ablation(tmp_path / "out", preset="huge")
    with pytest.raises(ValueError, match=r"--preset quick and settings of one's own .* exclude each other"):
        run_ablation(tmp_path / "out", preset="quick", config=TrainConfig())
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exists; --resume"):
        run_ablation(tmp_path)
