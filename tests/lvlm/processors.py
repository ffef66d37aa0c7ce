"""A real processor for every family's tiny model, with a tokenizer of a few words.

SmolVLM's own wants a package for spelling numbers out in videos; its pictures are laid out as Idefics3's are.
"""

from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PixtralImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
)
from transformers.processing_utils import ProcessorMixin

from tprl.lvlm.processors import without_videos

TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'PICTURE ' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{{ '[end] \n ' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "[user]", "[assistant]", "[end]", "what", "is", "it", "?", "a", "cat", "\n"]


def tokenizer(
    image_id: int, image: str = "<image>", more: dict[str, int] | None = None, named: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Of ``WORDS``, a placeholder for visual tokens and ``more``; ``named`` are attributes of some families."""
    vocabulary = {word: number for number, word in enumerate(WORDS)} | {image: image_id} | (more or {})
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Split(" ", "removed")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    extra = [image, *(more or {})]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=extra, model_specific_special_tokens=named or {},
    )  # fmt: skip


QWEN = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}


def edges(shortest: int, longest: int) -> dict[str, int]:
    return {"shortest_edge": shortest, "longest_edge": longest}


def size(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


class PixtralRows(LlavaProcessor):
    """Lays pictures out as Pixtral's processor does, which needs torchvision: a token after every row but the last,
    and another after that."""

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        rows, columns = (side // self.patch_size for side in image_inputs["image_sizes"][image_idx])
        return "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"


def processor_of(name: str) -> ProcessorMixin:
    template = TEMPLATE.replace("PICTURE", "<start_of_image>" if name == "gemma3" else "<image>")
    if name == "llava":
        images = CLIPImageProcessorPil(size=size(24), crop_size=size(24))
        return LlavaProcessor(
            images, tokenizer(60), patch_size=6, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=template,
        )  # fmt: skip
    if name == "llava_next":
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 12}, crop_size=size(12), image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]]
        )
        return LlavaNextProcessor(
            images, tokenizer(60), patch_size=4, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=template,
        )  # fmt: skip
    if name == "gemma3":
        marks = {"<start_of_image>": 50, "<end_of_image>": 51, "\n\n": 52}
        named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        words = tokenizer(60, "<image_soft_token>", marks, named)
        images = Gemma3ImageProcessorPil(size=size(24))
        return Gemma3Processor(images, words, chat_template=template, image_seq_length=9)
    if name == "paligemma":
        words = tokenizer(60)
        images = SiglipImageProcessorPil(size=size(24))
        images.image_seq_length = 16
        return PaliGemmaProcessor(images, words)
    if name.startswith("qwen"):
        template = TEMPLATE.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")
        marks = {"<|video_pad|>": 61, "<|vision_start|>": 50, "<|vision_end|>": 51}
        words = tokenizer(60, "<|image_pad|>", marks)
        images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=edges(256, 1024))
        return without_videos(QWEN[name])(images, words, None, chat_template=template)
    if name == "internvl":
        template = TEMPLATE.replace("PICTURE", "<IMG_CONTEXT>")
        named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        marks = {"<img>": 50, "</img>": 51, "<video>": 61}
        words = tokenizer(60, "<IMG_CONTEXT>", marks, named | {"video_token": "<video>"})
        images = GotOcr2ImageProcessorPil(size=size(24), max_patches=2)
        return without_videos(InternVLProcessor)(images, words, None, image_seq_length=9, chat_template=template)
    if name == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(size=size(12), image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]])
        return without_videos(LlavaOnevisionProcessor)(
            images, tokenizer(60, more={"<video>": 61}), None, num_image_tokens=9, chat_template=template,
            vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2",
        )  # fmt: skip
    if name in ("mistral3", "pixtral"):
        template = TEMPLATE.replace("PICTURE", "[IMG]")
        words = tokenizer(60, "[IMG]", {"[IMG_BREAK]": 52, "[IMG_END]": 51})
        cell = 8 if name == "mistral3" else 4
        images = PixtralImageProcessorPil(size={"longest_edge": 24}, patch_size={"height": cell, "width": cell})
        return PixtralRows(images, words, patch_size=cell, image_token="[IMG]", chat_template=template)
    marks = {f"<row_{row}_col_{column}>": 40 + 2 * row + column for row in (1, 2) for column in (1, 2)}
    marks |= {"<fake_token_around_image>": 53, "<global-img>": 54, "<end_of_utterance>": 55, "\n\n": 56}
    images = Idefics3ImageProcessorPil(size={"longest_edge": 48}, max_image_size={"longest_edge": 24})
    return Idefics3Processor(images, tokenizer(60, more=marks), image_seq_len=9, chat_template=template)
