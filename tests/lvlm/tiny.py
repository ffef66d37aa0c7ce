"""Tiny random models of every family, and inputs for them built by hand.

A prompt is written as a list: a number stands for so many random text tokens, ``"I"`` for a picture. Pictures of
families that take any size differ in size, so batches are ragged.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

IMAGE, VIDEO, START, END, BREAK, FAKE, GLOBAL, TILE, PAD, VOCAB = 60, 61, 50, 51, 52, 53, 54, 40, 0, 64
Prompt = list[int | str]

_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {
    **_SMALL,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0}


def _clip(image: int = 24, patch: int = 6) -> CLIPVisionConfig:
    return CLIPVisionConfig(**_SMALL, image_size=image, patch_size=patch)


def _siglip(image: int = 24, patch: int = 6, **more: Any) -> SiglipVisionConfig:
    return SiglipVisionConfig(**_SMALL, image_size=image, patch_size=patch, vision_use_head=False, **more)


def _qwen_vision(**more: Any) -> dict[str, Any]:
    return {
        "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **more,
    }  # fmt: skip


_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_MARKS = {"vision_start_token_id": START, "vision_end_token_id": END}
_PINPOINTS = [[12, 24], [24, 12], [24, 24]]

CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": _clip(), "text_config": LlamaConfig(**_TEXT), "image_token_id": IMAGE,
        "vision_feature_layer": -1,
    },
    "llava_next": {
        "vision_config": _clip(12, 4), "text_config": LlamaConfig(**_TEXT), "image_token_id": IMAGE,
        "vision_feature_layer": -2, "image_grid_pinpoints": _PINPOINTS,
    },
    "llava_onevision": {
        "vision_config": _siglip(12, 4), "text_config": Qwen2Config(**_TEXT), **_TOKENS,
        "image_grid_pinpoints": _PINPOINTS, "vision_aspect_ratio": "anyres_max_2",
    },
    "qwen2_vl": {
        "vision_config": _qwen_vision(embed_dim=16, hidden_size=16, mlp_ratio=2),
        "text_config": {**_TEXT, "rope_parameters": _MROPE}, **_TOKENS, **_MARKS,
    },
    "qwen2_5_vl": {
        "vision_config": _qwen_vision(
            hidden_size=16, intermediate_size=32, out_hidden_size=16, window_size=16, fullatt_block_indexes=[1]
        ),
        "text_config": {**_TEXT, "rope_parameters": _MROPE}, **_TOKENS, **_MARKS,
    },
    "qwen3_vl": {
        "vision_config": _qwen_vision(
            hidden_size=16, intermediate_size=32, out_hidden_size=16, deepstack_visual_indexes=[0, 1],
            num_position_embeddings=16,
        ),
        "text_config": {**_TEXT, "num_hidden_layers": 3, "head_dim": 8, "rope_parameters": _MROPE}, **_TOKENS, **_MARKS,
    },
    "internvl": {
        "vision_config": {**_SMALL, "image_size": [24, 24], "patch_size": [4, 4]},
        "text_config": Qwen2Config(**_TEXT), "image_token_id": IMAGE, "image_seq_length": 9,
    },
    "idefics3": {
        "vision_config": {**_SMALL, "image_size": 24, "patch_size": 4},
        "text_config": LlamaConfig(**_TEXT), "image_token_id": IMAGE, "scale_factor": 2,
    },
    "smolvlm": {
        "vision_config": {**_SMALL, "image_size": 24, "patch_size": 4},
        "text_config": LlamaConfig(**_TEXT), "image_token_id": IMAGE, "scale_factor": 2,
    },
    "gemma3": {
        "vision_config": _siglip(24, 4),
        "text_config": Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=512),
        "image_token_id": IMAGE, "boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": 9,
    },
    "paligemma": {
        "vision_config": _siglip(projection_dim=16), "text_config": GemmaConfig(**_TEXT, head_dim=8),
        "image_token_id": IMAGE, "projection_dim": 16,
    },
    "mistral3": {
        "vision_config": PixtralVisionConfig(**_SMALL, image_size=32, patch_size=4),
        "text_config": MistralConfig(**_TEXT, head_dim=8), "image_token_id": IMAGE, "vision_feature_layer": -1,
        "spatial_merge_size": 2,
    },
    "pixtral": {
        "vision_config": PixtralVisionConfig(**_SMALL, image_size=32, patch_size=4),
        "text_config": MistralConfig(**_TEXT, head_dim=8), "image_token_id": IMAGE, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}  # fmt: skip
"""By family; ``pixtral`` is a LLaVA with Pixtral's tower."""

NAMES = tuple(CONFIGS)


@dataclass
class Tiny:
    """A model and how its inputs are made."""

    name: str
    model: PreTrainedModel
    counts: list[int] = field(default_factory=list)
    """Visual tokens of the pictures of the batch that was built last."""

    def batch(self, *prompts: Prompt, side: str = "left", seed: int = 0, skip: int = 0) -> dict[str, Tensor]:
        """Model inputs for prompts, padded on ``side``.

        Args:
            skip: number of the first picture, to build a later sample of a batch alone. Text tokens follow from the
                number of the first picture and the prompt itself.
        """
        first, pictures = skip, []
        for prompt in prompts:
            count = prompt.count("I")
            pictures.append(list(range(first, first + count)))
            first += count
        vision, segments = self._vision(pictures, seed)
        rows, taken = [], iter(segments)
        for prompt, numbers in zip(prompts, pictures, strict=True):
            generator = torch.Generator().manual_seed(seed + 100 * sum(numbers) + len(prompt))
            row: list[int] = []
            for part in prompt:
                if isinstance(part, int):
                    row += torch.randint(5, 39, (part,), generator=generator).tolist()
                else:
                    row += next(taken)
            rows.append(row)
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), PAD)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids[number, where] = torch.tensor(row)
            mask[number, where] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, **vision}
        if self.name.startswith("qwen"):
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        if self.name == "gemma3":
            inputs["token_type_ids"] = (ids == IMAGE).long()
        if self.name == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(ids)
        return inputs

    def _vision(self, samples: list[list[int]], seed: int) -> tuple[dict[str, Tensor], list[list[int]]]:
        """Vision inputs of the pictures of every sample, by number, and the ids that stand for each."""
        numbers = [number for numbers in samples for number in numbers]
        if not numbers:
            return {}, []

        def noise(number: int, *shape: int) -> Tensor:
            generator = torch.Generator().manual_seed(1000 * seed + number)
            return torch.randn(shape, generator=generator, dtype=self.model.dtype)

        if self.name in ("llava", "gemma3", "paligemma", "internvl"):
            count = 16 if self.name in ("llava", "paligemma") else 9
            tiles = [1 + number % 2 if self.name == "internvl" else 1 for number in numbers]
            pixels = torch.cat([noise(n, tile, 3, 24, 24) for n, tile in zip(numbers, tiles, strict=True)])
            marks = ([], []) if self.name in ("llava", "paligemma") else ([START], [END])
            self.counts = [count * tile for tile in tiles]
            return {"pixel_values": pixels}, [marks[0] + [IMAGE] * count + marks[1] for count in self.counts]
        if self.name.startswith("qwen"):
            grids = [[1, *[(4, 6), (6, 4), (4, 4)][number % 3]] for number in numbers]
            pixels = torch.cat([noise(n, h * w, 3 * 2 * 4 * 4) for n, (_, h, w) in zip(numbers, grids, strict=True)])
            self.counts = [h * w // 4 for _, h, w in grids]
            vision = {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}
            return vision, [[START] + [IMAGE] * count + [END] for count in self.counts]
        if self.name in ("mistral3", "pixtral"):
            merge = 2 if self.name == "mistral3" else 1
            grids = [[(2, 3), (3, 2), (2, 2)][number % 3] for number in numbers]
            sizes = [[rows * 4 * merge, columns * 4 * merge] for rows, columns in grids]
            pixels = torch.zeros(len(numbers), 3, 24, 24, dtype=self.model.dtype)
            for index, (number, (height, width)) in enumerate(zip(numbers, sizes, strict=True)):
                pixels[index, :, :height, :width] = noise(number, 3, height, width)
            self.counts = [rows * columns for rows, columns in grids]
            rows_of = [([IMAGE] * columns + [BREAK]) * rows for rows, columns in grids]
            return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}, [[*ids[:-1], END] for ids in rows_of]
        if self.name in ("llava_next", "llava_onevision"):
            sizes = [[(24, 20), (14, 24), (10, 24)][number % 3] for number in numbers]
            crops = [[5, 5, 3][number % 3] for number in numbers]
            pixels = torch.zeros(len(numbers), 5, 3, 12, 12, dtype=self.model.dtype)
            for index, (number, count) in enumerate(zip(numbers, crops, strict=True)):
                pixels[index, :count] = noise(number, count, 3, 12, 12)
            vision = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
            with torch.no_grad():
                self.counts = [len(entry) for entry in self.model.model.get_image_features(**vision).pooler_output]
            return vision, [[IMAGE] * count for count in self.counts]
        grids = [[(1, 2), (0, 0), (2, 1)][number % 3] for number in numbers]
        tiles = [rows * columns + 1 for rows, columns in grids]
        most = max(sum(tiles[numbers.index(n)] for n in sample) for sample in samples)
        pixels = torch.zeros(len(samples), most, 3, 24, 24, dtype=self.model.dtype)
        for index, sample in enumerate(samples):
            if sample:
                stack = torch.cat([noise(n, tiles[numbers.index(n)], 3, 24, 24) for n in sample])
                pixels[index, : len(stack)] = stack
        segments = []
        for rows, columns in grids:
            ids = []
            for row in range(rows):
                for column in range(columns):
                    ids += [FAKE, TILE + 2 * row + column] + [IMAGE] * 9
                ids += [4]
            segments.append(ids + ([4] if ids else []) + [FAKE, GLOBAL] + [IMAGE] * 9 + [FAKE])
        self.counts = [9 * count for count in tiles]
        return {"pixel_values": pixels}, segments


def make(name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", seed: int = 0) -> Tiny:
    """A random model whose attention is far from uniform, in evaluation mode."""
    kind = "llava" if name == "pixtral" else name
    config = AutoConfig.for_model(kind, **deepcopy(CONFIGS[name]), tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(noise * 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return Tiny(name, model.to(dtype).eval())


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Every attribute of every module of a model and of its configurations, by identity where that is what counts."""
    attributes: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"):
                value = list(value.items())
            attributes[f"{path}.{name}"] = value if not isinstance(value, dict) else dict(value)
        if isinstance(module, PreTrainedModel):
            attributes[f"{path}.config"] = deepcopy(module.config.__dict__)
    attributes["generation_config"] = model.generation_config.to_dict()
    return attributes
