"""Training and evaluation of models of other families through the real command line."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from lvlm.processors import processor_of
from lvlm.test_packed_families import Pictures
from lvlm.tiny import CONFIGS, make
from tprl.lvlm.model import Lvlm
from tprl.pruner import TokenPruner

LAYERS = 4
"""Enough for methods that prune inside the language model."""

SETTINGS = [
    "set:train-config",
    "--set.autoencoder.steps", 2, "--set.autoencoder.pictures", 2, "--set.imitate.demonstrations", 6,
    "--set.imitate.epochs", 1, "--set.imitate.batch", 2, "--set.imitate.budgets", 4, 2,
    "--set.ppo.epochs", 1, "--set.ppo.questions", 3, "--set.ppo.rollouts", 2, "--set.ppo.minibatch", 4,
]  # fmt: skip


def save_model(name: str, folder: Path) -> None:
    """A model as it lies on the Hub: weights, tokenizer, image processor and chat template."""
    processor = processor_of(name)
    text = CONFIGS[name]["text_config"]
    fields = text if isinstance(text, dict) else text.to_dict()
    fields = {key: value for key, value in fields.items() if key != "layer_types"} | {"num_hidden_layers": LAYERS}
    deeper = {**CONFIGS[name], "text_config": fields if isinstance(text, dict) else type(text)(**fields)}
    with patch.dict(CONFIGS, {name: deeper}):
        make(name, torch.float32).model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(processor.chat_template)
    settings = {"processor_class": type(processor).__name__}
    if name == "gemma3":
        settings["image_seq_length"] = 9
    if name == "idefics3":
        settings["image_seq_len"] = 9
    (folder / "processor_config.json").write_text(json.dumps(settings))


def save_questions(folder: Path) -> Path:
    source, lines = Pictures(), []
    for sample in source.samples:
        source.image(sample.image_id).save(folder / f"{sample.image_id}.png")
        record = {"image": f"{sample.image_id}.png", "question": sample.question, "answer": sample.answers[0]}
        lines.append(json.dumps(record) + "\n")
    path = folder / "questions.jsonl"
    path.write_text("".join(lines))
    return path


def tprl(*arguments: object) -> str:
    command = [sys.executable, "-m", "tprl.cli", *map(str, arguments)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    "name",
    ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow), pytest.param("idefics3", marks=pytest.mark.slow)],
)
def test_a_model_is_trained_for_and_evaluated(name: str, tmp_path: Path) -> None:
    model, run, out = tmp_path / "model", tmp_path / "run", tmp_path / "out"
    save_model(name, model)
    questions = save_questions(tmp_path)
    given = ["--model", model, "--data", questions, "--dtype", "float32", "--cache", tmp_path / "cache"]
    said = tprl("train", run, *given, *SETTINGS)
    assert ("teachers left out" in said and "fastervlm" in said) == (name == "qwen2_5_vl")
    lvlm = Lvlm.from_pretrained(str(model))
    pruner = TokenPruner.from_pretrained(run / "pruner", lvlm.fingerprint)
    stages = [json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"autoencoder", "imitate", "ppo", "calibrated"} <= set(stages)
    methods = "tprl,uniform,divprune,fastv"
    measured = ["--pruner", run / "pruner", "--budgets", "4,2", "--methods", methods, "--gallery", 1]
    said = tprl("evaluate", out, *given, *measured)
    assert f"warning: the pruner was trained or calibrated on {questions}, which is measured here" in said
    results = json.loads((out / "results.json").read_text())
    assert len(results["rows"]) == 9
    for row in results["rows"]:
        assert row["flops_unpruned"] > 0
        assert row["prefill_ms"] > 0
        if row["method"] in ("tprl", "uniform", "divprune") and row["budget"]:
            assert row["kept_mean"] == row["budget"]
    assert pruner.config.width == 16
