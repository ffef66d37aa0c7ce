"""A tiny LVLM that looks, answers with one word and stops, and questions about random pictures."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from lvlm.tiny import CONFIGS, make
from tprl.data.sample import Sample
from tprl.lvlm.model import Lvlm

TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{{ '[end] ' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
WORDS = ["<pad>", "<unk>", "[user]", "[assistant]", "[end]", "what", "is", "it", "where", "now", "?"]
TEXTS = ["cat", "dog", "red", "two"]
BOXES = ["[0,0,4,4]", "[0,0,8,8]", "[4,4,8,8]", "[2,2,8,8]"]
VOCABULARY = {word: number for number, word in enumerate([*WORDS, *TEXTS, *BOXES])} | {"<image>": 60}
END = VOCABULARY["[end]"]
LAYERS = 6
QUESTIONS = ["what is it ?", "where is it now ?", "is it ?", "what now ?"]


def tiny_lvlm() -> Lvlm:
    """16 visual tokens. Which of ``TEXTS`` and ``BOXES`` it answers depends on picture and question; then it stops."""
    text = deepcopy(CONFIGS["llava"]["text_config"])
    text.num_hidden_layers = LAYERS
    with patch.dict(CONFIGS, {"llava": {**CONFIGS["llava"], "text_config": text}}):
        model = make("llava", torch.float32).model
    words, head = model.get_input_embeddings().weight, model.lm_head.weight
    answers = torch.tensor([VOCABULARY[word] for word in [*TEXTS, *BOXES]])
    with torch.no_grad():
        head[:, :2] = 0
        words[:, :2] = 0
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) or ".linear_2." in name:
                weight[:2] = 0  # no layer writes to the first two features
        words[answers, 0] = 100  # after an answer the first feature is all there is, and it means the end
        head[END, 0] = 100
        words[VOCABULARY["[assistant]"], 1] = 2  # after the prompt everything but an answer is out of the question
        head[:, 1] = -100
        head[answers, 1] = 0
        head[answers, 2:] *= 3
    backend = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="[end]", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    side = {"height": 24, "width": 24}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side), tokenizer, patch_size=6,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    return Lvlm(model, processor)


class World:
    """``pictures`` random pictures with four questions each; accepted are one text, several texts, or a box."""

    name, split = "world", "test"

    def __init__(self, pictures: int = 6) -> None:
        rng = np.random.default_rng(0)
        self._pixels = rng.integers(0, 256, (pictures, 24, 24, 3), dtype=np.uint8)
        samples = []
        for index in range(4 * pictures):
            text = str(rng.choice(TEXTS))
            answers, box, family = (text,), None, "word"
            if index % 4 == 1:
                answers, family = (text, text, str(rng.choice(TEXTS))), "people"
            if index % 4 == 3:
                family = "box"
                answers = (str(rng.choice(BOXES)),)
                left, top, right, bottom = (int(edge) / 8 for edge in answers[0][1:-1].split(","))
                box = (left, top, right, bottom)
            question = QUESTIONS[index % 4]
            samples.append(Sample(str(index), f"{index // 4}", question, answers, family, box, 8.0 if box else 1.0))
        self.samples: Sequence[Sample] = samples

    def image(self, image_id: str) -> Image.Image:
        return Image.fromarray(self._pixels[int(image_id)])

    def version(self, image_id: str) -> str:
        return ""


def save_world(folder: Path, world: World) -> Path:
    """The same questions as a JSONL file with a picture folder of PNGs; returns the file."""
    records = []
    for sample in world.samples:
        world.image(sample.image_id).save(folder / f"{sample.image_id}.png")
        record = {"image": f"{sample.image_id}.png", "question": sample.question, "family": sample.family}
        if sample.box:
            record |= {"box": [int(edge * 8) for edge in sample.box], "box_scale": 8}
        elif len(sample.answers) > 1:
            record |= {"answers": list(sample.answers)}
        else:
            record |= {"answer": sample.answers[0]}
        records.append(record)
    path = folder / "world.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def result_row(method: str, budget: int | None, accuracy: float) -> dict[str, Any]:
    """A row of results whose numbers are made up, unpruned accuracy 0.9."""
    part = {"accuracy": accuracy, "accuracy_unpruned": 0.9, "accuracy_blind": 0.3, "n": 5, "kept_mean": budget or 9.5}
    drop = 100 * (0.9 - accuracy)
    behind = None if method == "tprl" else 0.5
    return {
        "method": method, "budget": budget, **{name: value for name, value in part.items() if name != "n"},
        "drop_points": drop, "drop_ci95": [drop - 1, drop + 1],
        "behind_tprl_points": behind, "behind_tprl_ci95": behind and [behind - 1, behind + 1],
        "flops": 40, "flops_unpruned": 100, "flops_saved": 0.6,
        "prefill_ms": 50.0, "prefill_ms_unpruned": 100.0, "speedup": 2.0, "kv_cache_mib": 1.5,
        "per_family": {"reading <1>": part, "counting": part},
    }  # fmt: skip
