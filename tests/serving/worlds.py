"""Tiny random models that vLLM can serve, with their processors and a pruner, and what Hugging Face answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)

import tprl
from tprl.config import PrunerConfig
from tprl.lvlm.model import Lvlm
from tprl.pruner import TokenPruner

IMAGE, VIDEO, START, END, VOCAB = 60, 61, 50, 51, 64
NEW_TOKENS = 8
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "[user]", "[assistant]", "[end]", *(f"w{number}" for number in range(24))]
TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'PICTURE ' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{{ '[end] ' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
_TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 512,
}  # fmt: skip
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": CLIPVisionConfig(**_VISION, num_hidden_layers=2, image_size=24, patch_size=4),
        "text_config": LlamaConfig(**_TEXT), "image_token_index": IMAGE, "vision_feature_layer": -1,
        "image_seq_length": 36,
    },
    "qwen2_5_vl": {
        "vision_config": {
            **{name: value for name, value in _VISION.items() if name != "num_attention_heads"}, "num_heads": 2,
            "depth": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
            "window_size": 16, "fullatt_block_indexes": [1],
        },
        "text_config": {
            **_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 100.0},
        },
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
    },
}  # fmt: skip
ARCHITECTURES = {"llava": "TprlLlavaForConditionalGeneration", "qwen2_5_vl": "TprlQwen2_5_VLForConditionalGeneration"}
POSITIONS: dict[str, Any] = {"llava": "compact", "qwen2_5_vl": "original"}
TOWERS = {"llava": "vision_tower", "qwen2_5_vl": "visual"}
SIZES = [(24, 24), (48, 24), (40, 32)]

Pictures = Image.Image | list[Image.Image]
Request = tuple[str, Pictures, float | None]


@dataclass
class World:
    """A model as Hugging Face runs it, in float32, and the folders of model and pruner."""

    name: str
    lvlm: Lvlm
    pruner: TokenPruner
    folder: Path
    pruner_folder: Path

    def overrides(self, ratio: float) -> dict[str, Any]:
        return {
            "architectures": [ARCHITECTURES[self.name]], "pruner": str(self.pruner_folder), "keep_ratio": ratio,
        }  # fmt: skip

    def visual_tokens(self, image: Image.Image) -> int:
        return 36 if self.name == "llava" else image.width * image.height // 64

    def answer(self, prompt: str, images: Pictures, ratio: float) -> list[int]:
        """Greedy tokens of the pruned model, whose attention is not proportional, since vLLM's cannot be."""
        pruner = copy(self.pruner)
        pruner.config = replace(pruner.config, proportional=False)
        pictures = images if isinstance(images, list) else [images]
        inputs = self.lvlm.processor(text=[prompt], images=[pictures], return_tensors="pt")
        model: Any = self.lvlm.model
        with torch.no_grad(), tprl.prune(
            model, pruner, keep_ratio=ratio, positions=POSITIONS[self.name], processor=self.lvlm.processor
        ):  # fmt: skip
            whole = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return whole[0, inputs["input_ids"].shape[1] :].tolist()


def picture(number: int) -> Image.Image:
    pixels = torch.randint(0, 256, (*SIZES[number % 3][::-1], 3), generator=torch.Generator().manual_seed(number))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def make(name: str, folder: Path) -> World:
    """A random model whose attention is far from uniform, saved as transformers saves it."""
    config = AutoConfig.for_model(name, **CONFIGS[name], tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(noise * 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    lvlm = Lvlm(model, _processor(name))
    torch.manual_seed(0)
    pruner = TokenPruner(PrunerConfig(8, 16, 16, 2, 2, width=64, fingerprint=lvlm.fingerprint)).eval()
    model.save_pretrained(folder / "model")
    lvlm.processor.save_pretrained(folder / "model")
    pruner.save_pretrained(folder / "pruner")
    return World(name, lvlm, pruner, folder / "model", folder / "pruner")


def _processor(name: str) -> Any:
    picture, marks = "<image>", {}
    if name == "qwen2_5_vl":
        picture, marks = "<|image_pad|>", {"<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
    vocabulary = {word: number for number, word in enumerate(WORDS)} | {picture: IMAGE} | marks
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Split(" ", "removed")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=[picture, *marks],
    )  # fmt: skip
    if name == "llava":
        images = CLIPImageProcessorPil(size={"height": 24, "width": 24}, do_center_crop=False)
        return LlavaProcessor(
            images, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=TEMPLATE.replace("PICTURE", picture),
        )  # fmt: skip
    edges = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "patch_size": 4, "merge_size": 2}
    template = TEMPLATE.replace("PICTURE", f"<|vision_start|>{picture}<|vision_end|>")
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(**edges), words, Qwen2VLVideoProcessor(**edges), chat_template=template
    )


@contextmanager
def serving(world: World, **options: Any) -> Iterator[Any]:
    """A vLLM engine in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "block_size": 32, "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 2}, "seed": 0, "hf_overrides": world.overrides(0.5), **options,
    }  # fmt: skip
    try:
        yield LLM(model=str(world.folder), **settings)
    finally:
        cleanup_dist_env_and_memory()


def ask(engine: Any, requests: list[Request]) -> list[list[int]]:
    """Greedy tokens for every (prompt, picture, ratio), all in one batch; None leaves the ratio to the server."""
    from vllm import SamplingParams

    prompts = [
        {
            "prompt": prompt, "multi_modal_data": {"image": images},
            **({} if ratio is None else {"mm_processor_kwargs": {"keep_ratio": ratio}}),
        }
        for prompt, images, ratio in requests
    ]  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    answers = engine.generate(prompts, sampling, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]
