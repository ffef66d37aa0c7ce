"""The real command line, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tprl.cli import COMMANDS
from tprl.commands.answer import answer
from tprl.data import load_source
from tprl.pocket.assemble import SHIPPED_PRUNER


def tprl(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tprl.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "scene.png"
    load_source("scenes", "val", 1).image("0").save(path)
    return path


def refused(outcome: subprocess.CompletedProcess[str], *words: str) -> None:
    assert outcome.returncode == 2
    assert "Traceback" not in outcome.stderr
    error = outcome.stderr.strip().splitlines()[-1]
    assert error.startswith("tprl"), outcome.stderr
    for word in words:
        assert word in error


def test_the_overview_names_every_command() -> None:
    outcome = tprl()
    assert outcome.returncode == 0
    assert all(name in outcome.stdout for name in COMMANDS)
    refused(tprl("prune"), "prune", "answer")


@pytest.mark.parametrize("command", ["answer", "train", "evaluate"])
def test_help_tells_options_and_defaults(command: str) -> None:
    outcome = tprl(command, "--help")
    assert outcome.returncode == 0
    assert "default: pocket-llava" in " ".join(outcome.stdout.replace("│", " ").split())


def test_pictures_that_cannot_be_read(tmp_path: Path, picture: Path) -> None:
    refused(tprl("answer", tmp_path / "none.png", "Is there a dog?"), "none.png")
    (tmp_path / "empty.png").touch()
    refused(tprl("answer", tmp_path / "empty.png", "Is there a dog?"), "empty.png")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:2000])
    refused(tprl("answer", tmp_path / "cut.png", "Is there a dog?"), "cut.png")


def test_questions_and_amounts_that_are_not_allowed(picture: Path, tmp_path: Path) -> None:
    refused(tprl("answer", picture, "  "), "question is empty")
    refused(tprl("answer", picture, "Is there a dog?", "--budget", 0), "0", "at least 1")
    refused(tprl("answer", picture, "Is there a dog?", "--threshold", 1.5), "1.5", "[0, 1]")
    refused(tprl("answer", picture, "Is there a dog?", "--steps"), "--steps", "--picture")
    refused(tprl("answer", picture, "Is there a dog?", "--picture", tmp_path / "kept.psd"), "kept.psd", "kept.png")
    refused(tprl("answer", picture, "Is there a dog?", "--picture", tmp_path / "no" / "k.png"), "no/k.png", "exists")
    refused(tprl("answer", picture, "Is there a dog?", "--method", "divprune"), "divprune", "--budget")
    drawn = tmp_path / "kept.png"
    refused(tprl("answer", picture, "Is there a dog?", "--budget", 577, "--picture", drawn), "577", "1 to 576")
    assert not drawn.exists()


def test_options_of_a_method_that_is_not_measured_are_refused(tmp_path: Path) -> None:
    for option in (("--pruner", tmp_path), ("--threshold", 0.3)):
        refused(tprl("evaluate", tmp_path / "out", "--methods", "random,fastv", *option), "tprl", "--methods")


def test_an_answer_with_a_picture_of_what_was_kept(picture: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "kept.png"
    outcome = tprl("answer", picture, "Is there a dog in the picture?", "--budget", 64, "--picture", drawn, "--steps")
    assert outcome.returncode == 0, outcome.stderr
    assert "576" in outcome.stdout
    assert "64" in outcome.stdout
    with Image.open(drawn) as shown:
        assert shown.width > 3 * 400


def test_a_peer_answers_too(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(picture, "Is there a dog [/b] in it?", method="divprune", budget=64, picture=tmp_path / "kept.png")
    said = " ".join(capsys.readouterr().out.split())
    assert "\u2502 576 \u2502 64 " in said
    assert "Is there a dog [/b] in it?" in said
    assert (tmp_path / "kept.png").stat().st_size > 10_000


def test_a_run_directory_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"mine": 1}\n')
    refused(tprl("train", tmp_path, "--preset", "quick"), "exists", "--resume")
    assert json.loads((tmp_path / "config.json").read_text()) == {"mine": 1}
    refused(tprl("train", tmp_path / "new", "--stages", "dance"), "dance", "autoencoder")
    refused(tprl("train", tmp_path / "new", "--stages", "imitate,ppo"), "imitate,ppo", "autoencoder", "--init")
    refused(tprl("train", tmp_path / "new", "--preset", "huge"), "huge", "quick")
    set_to = ["set:train-config", "--set.ppo.rollouts"]
    one = tprl("train", tmp_path / "new", *set_to, 1)
    assert one.returncode == 2
    assert "rollouts has to be at least 2, got 1" in one.stderr
    refused(tprl("train", tmp_path / "new", "--preset", "quick", *set_to, 4), "quick", "exclude each other")
    refused(tprl("train", tmp_path / "new", "--device", "gpu"), "'gpu'", "cpu")
    refused(tprl("train", tmp_path, "--overwrite", "--model", tmp_path / "none"), "none")
    assert json.loads((tmp_path / "config.json").read_text()) == {"mine": 1}
    blind = ["--init", SHIPPED_PRUNER, "set:train-config", "--set.pruner.no-use-question"]
    refused(tprl("train", tmp_path / "new", *blind), "use_question", "than is asked for")
    assert not (tmp_path / "new").exists()


def test_methods_and_budgets_that_are_not_known(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(tprl("evaluate", out, "--methods", "magic"), "magic", "divprune")
    refused(tprl("evaluate", out, "--budgets", "64,0"), "0")
    refused(tprl("evaluate", out, "--data", "nothing"), "nothing", "scenes")
    refused(tprl("evaluate", out, "--seed", -1), "-1", "from 0 on")
    refused(tprl("evaluate", out, "--seed", 2**63), str(2**63), "from 0 on")
    refused(tprl("evaluate", out, "--gallery", -3), "-3", "from 0 on")
    refused(tprl("benchmark", out, "--data", "scenes,nothing"), "nothing", "scenes")
    assert not out.exists()


def test_data_are_written_in_the_form_that_is_read(tmp_path: Path) -> None:
    outcome = tprl("data", "make", tmp_path / "made", "--split", "val", "--n", 12)
    assert outcome.returncode == 0, outcome.stderr
    made = load_source(str(tmp_path / "made" / "questions.jsonl"), "test")
    original = load_source("scenes", "val", 12)
    assert [(s.question, s.answers, s.family) for s in made.samples] == [
        (s.question, s.answers, s.family) for s in original.samples
    ]
    boxes = [(s.box, s.box_scale) for s in made.samples if s.box]
    assert boxes == [(s.box, s.box_scale) for s in original.samples if s.box]
    refused(tprl("data", "make", tmp_path / "made"), "exists")
