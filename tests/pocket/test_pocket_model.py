"""pocket-llava as a file of differences and as a Hugging Face folder."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from launcher import BY_TWO
from tprl.data import load_source
from tprl.evaluate.flops import lvlm_flops
from tprl.pocket.assemble import DELTA, open_lvlm, pocket_llava
from tprl.pocket.base import image_token_id, load_base
from tprl.pocket.model import LANGUAGE_PREFIX, add_delta, new_llava, to_delta
from tprl.pocket.questions import Tokens


@pytest.fixture(scope="module")
def base() -> Any:
    return load_base()


def test_differences_come_back_to_a_fraction_of_themselves(base: Any) -> None:
    model, tokenizer = base
    image_id = image_token_id(tokenizer)
    trained = new_llava(model, image_id)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "embed_tokens" not in name:
                weight += 0.01 * torch.randn(weight.shape)
    restored = new_llava(model, image_id)
    tensors = to_delta(trained, model)
    assert not any("embed_tokens" in name for name in tensors)
    add_delta(restored, tensors)
    before, after, start = trained.state_dict(), restored.state_dict(), new_llava(model, image_id).state_dict()
    for name, weight in before.items():
        own = weight - start[name] if name.startswith(LANGUAGE_PREFIX) else weight
        assert (after[name] - weight).abs().max() <= own.abs().max() / 250, name
    with pytest.raises(ValueError, match="damaged"):
        add_delta(restored, {"model.nonsense": torch.zeros(1)})


def test_the_shipped_file_is_small_enough() -> None:
    assert DELTA.stat().st_size < 40e6


def test_it_loads_as_any_model_of_transformers_and_answers() -> None:
    folder = pocket_llava()
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor: Any = AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    source = load_source("scenes", "val", 40)
    right = asked = 0
    for sample in source.samples:
        if sample.family not in ("existence", "position"):
            continue
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
        text = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=[[source.image(sample.image_id)]], return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 576
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += answer.strip() == sample.answers[0]
        asked += 1
    assert asked >= 6
    assert right / asked >= 0.7


def test_two_processes_put_it_together_once(tmp_path: Path) -> None:
    script = tmp_path / "both.py"
    script.write_text(
        "from tprl import processes\n"
        "from tprl.pocket.assemble import open_lvlm\n"
        "with processes.joined('cpu'):\n"
        "    print(open_lvlm('pocket-llava', 'float32').fingerprint)\n"
    )
    environment = {**os.environ, "TPRL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*BY_TWO[:-2], str(script)]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.split() == [open_lvlm("pocket-llava", "float32").fingerprint] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_training_and_inference_write_the_same_prompt(base: Any) -> None:
    lvlm = open_lvlm("pocket-llava", "float32")
    tokens = Tokens(base[1])
    block = tokens.block("Is there a dog in the picture?", "yes")
    before, prompt = lvlm.prompts.ids("Is there a dog in the picture?")
    assert [*tokens.before, tokens.image_id] == before
    assert block.ids[: block.answer_start] == prompt
    assert block.ids == lvlm.prompts.ids("Is there a dog in the picture?", "yes")[1]


def test_the_language_model_takes_most_of_an_unpruned_prefill() -> None:
    flops = lvlm_flops(open_lvlm("pocket-llava", "float32").model.config, 576, 30)
    assert flops.language / flops.total >= 0.8
