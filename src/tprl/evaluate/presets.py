"""Configs of models without their weights: well-known ones by name, others from a file or the Hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


def _llava(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llava", "image_token_index": 32000, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
        },
        "text_config": {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": 32064,
        },
    }  # fmt: skip


def _qwen(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl", "tie_word_embeddings": tied,
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": hidden,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "text_config": {
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": _llava(4096, 11008, 32, 32),
    "llava-1.5-13b": _llava(5120, 13824, 40, 40),
    "qwen2.5-vl-3b": _qwen(2048, 11008, 36, 16, 2, 151936, tied=True),
    "qwen2.5-vl-7b": _qwen(3584, 18944, 28, 28, 4, 152064, tied=False),
}
"""What matters of the config.json of well-known models."""


def load_config(name_or_path: str) -> PreTrainedConfig:
    """A model's config: one of ``PRESETS``, a config.json, or a model's folder or Hub id.

    Raises:
        ValueError: the file is no config of a known kind.
        OSError: it is nowhere to be found.
    """
    if name_or_path in PRESETS:
        return config_of(PRESETS[name_or_path])
    path = Path(name_or_path)
    try:
        if not path.is_file():
            return cast(PreTrainedConfig, AutoConfig.from_pretrained(name_or_path))
        return config_of(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{path} is no config.json of a model that transformers knows: {error!r}") from error


def config_of(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that the fields of a config.json describe."""
    return CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
