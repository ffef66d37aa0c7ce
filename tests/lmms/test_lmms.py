"""lmms-eval against ``tprl evaluate``, through both command lines, on the same questions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance

import tprl
from tprl.cli import main
from tprl.lmms import manifest
from tprl.lmms.model import Tprl
from tprl.lmms.tasks import utils

TASKS = Path(tprl.__file__).parent / "lmms" / "tasks"
COUNT, BUDGET = 80, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the questions lie, as a person would make them."""
    folder = tmp_path_factory.mktemp("lmms")
    assert main(["data", "make", str(folder / "tprl-questions"), "--split", "test", "--n", str(COUNT)]) == 0
    return folder


def lmms_eval(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "lmms_eval", "--model", "tprl", "--include_path", str(TASKS), *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | offline, check=False)


def test_the_same_scores_to_the_sample(folder: Path) -> None:
    done = lmms_eval(
        folder, "--model_args", f"budget={BUDGET},dtype=float32", "--tasks", "tprl_questions", "--batch_size", "1",
        "--log_samples", "--output_path", "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (log,) = (folder / "out").rglob("*samples_tprl_questions.jsonl")
    (summary,) = (folder / "out").rglob("*results.json")
    samples = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    outcome = main(
        ["evaluate", str(folder / "evaluated"), "--data", str(folder / "tprl-questions" / "questions.jsonl"),
         "--n", str(COUNT), "--budgets", str(BUDGET), "--methods", "tprl", "--no-threshold-row", "--gallery", "0",
         "--dtype", "float32", "--cache", str(folder / "cache")]
    )  # fmt: skip
    assert outcome == 0
    expected = json.loads((folder / "evaluated" / "cells" / f"tprl-{BUDGET}.json").read_text())["scores"]
    assert [sample["accuracy"] for sample in samples] == pytest.approx(expected, abs=1e-6)
    results = json.loads(summary.read_text())["results"]["tprl_questions"]
    assert results["accuracy,none"] == pytest.approx(sum(expected) / COUNT, abs=1e-6)
    assert 0 < sum(expected) < COUNT


def test_lmms_eval_knows_the_model() -> None:
    found = manifest()
    assert found.model_id == "tprl"
    module, _, name = found.simple_class_path.rpartition(".")
    assert getattr(sys.modules[module], name) is Tprl


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 4}, "one by one: --batch_size 1, got 4"),
        ({"batch_size": "auto"}, "one by one: --batch_size 1, got auto"),
        ({"method": "divprune"}, "exactly one"),
        (
            {"method": "divprune", "budget": 64, "pruner": "mine"},
            "a pruner goes with the method tprl, not with",
        ),
        ({"pruner": "not/there/at/all"}, "there is no folder"),
        ({"dtype": "int8"}, "dtype 'int8' is not"),
        ({"budget": 64, "keep_ratio": 0.5}, "exactly one"),
        ({"budget": 0}, "budget 0 is not allowed"),
        ({"budget": 64, "method": "best"}, "unknown selector 'best'"),
    ],
)
def test_arguments_that_are_not_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Tprl(**arguments)


@pytest.fixture(scope="module")
def model() -> Tprl:
    return Tprl(method="uniform", keep_ratio=0.25)


def request(pictures: list[Any], **settings: Any) -> Instance:
    arguments = ("Is there a dog in the picture?", settings, lambda doc: pictures, 0, "some-task", "test")
    metadata = {"task": "some-task", "doc_id": 0, "repeats": 1}
    return Instance("generate_until", arguments, 0, metadata)


def test_what_is_asked_of_it(folder: Path, model: Tprl) -> None:
    model.task_dict = {"some-task": {"test": [{}]}}
    record = json.loads((folder / "tprl-questions" / "questions.jsonl").read_text().splitlines()[0])
    picture = utils.read_image(folder / "tprl-questions" / record["image"])
    (text,) = model.generate_until([request([picture])])
    assert text
    (first,) = model.generate_until([request([picture], until=[text[-1]])])
    assert text.startswith(first)
    assert text[-1] not in first
    with pytest.raises(ValueError, match="shows 2 pictures"):
        model.generate_until([request([picture, picture])])
    with pytest.raises(ValueError, match="shows 0 pictures"):
        model.generate_until([request([])])
    with pytest.raises(ValueError, match="shows a str, no picture, with question 0"):
        model.generate_until([request(["video.mp4"])])
    with pytest.raises(ValueError, match="answers greedily"):
        model.generate_until([request([picture], do_sample=True)])
    with pytest.raises(ValueError, match="generate_until"):
        model.loglikelihood([])


def test_a_question_is_scored_as_tprl_does() -> None:
    text = {"id": "1", "image": "a.png", "question": "How many?", "answer": "two", "box": None, "family": "counting"}
    assert utils.process_results(text, ["2"]) == {"accuracy": 1.0}
    assert utils.process_results(text, ["22"]) == {"accuracy": 0.0}
    box = {"id": "2", "image": "a.png", "question": "Where?", "answer": None, "box": [0, 0, 12, 24], "box_scale": 24}
    assert utils.process_results(box, ["0 0 24 24"]) == {"accuracy": pytest.approx(0.5)}
    assert utils.doc_to_target(box) == "0 0 12 24"
