"""pocket-llava as a model of transformers: config, processor, and its weights as a small file of differences."""

import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from tprl.data.scenes.scene import SIDE
from tprl.pocket.base import CHAT_TEMPLATE, IMAGE_TOKEN
from tprl.pocket.labels import GRID

LANGUAGE_PREFIX = "model.language_model."


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        image_size=SIDE, patch_size=SIDE // GRID, hidden_act="gelu",
    )  # fmt: skip


def new_llava(base: LlamaForCausalLM, image_token_id: int) -> LlavaForConditionalGeneration:
    """A LLaVA around the layers of ``base``; tower and projector random."""
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=base.config,
        image_token_index=image_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=GRID**2,
        tie_word_embeddings=True,
    )
    llava = LlavaForConditionalGeneration(config)
    llava.model.language_model.load_state_dict(base.model.state_dict())
    llava.tie_weights()
    llava.generation_config.eos_token_id = base.generation_config.eos_token_id
    llava.generation_config.pad_token_id = base.generation_config.pad_token_id
    return llava


def new_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Pictures of any size are squeezed to ``SIDE`` x ``SIDE`` and scaled to [-1, 1]."""
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(
        size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=SIDE // GRID,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def to_delta(llava: LlavaForConditionalGeneration, base: LlamaForCausalLM) -> dict[str, Tensor]:
    """All that ``llava`` does not share with ``base``.

    Matrices, the language model's as differences, are rounded to 8 bits, one scale an output row, which is finer than
    training noise; all else is kept as it is, in 16 bits where it has more than one dimension.
    """
    before = base.model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, weight in llava.state_dict().items():
        shared = before.get(name.removeprefix(LANGUAGE_PREFIX))
        if name.startswith("lm_head") or (shared is not None and torch.equal(weight, shared)):
            continue
        if weight.ndim == 2:
            own = weight.float() if shared is None else weight.float() - shared
            scale = own.abs().amax(1) / 127
            steps = (own / scale.clamp(min=1e-12)[:, None]).round()
            tensors |= {name + ".steps": steps.to(torch.int8), name + ".scale": scale}
        else:
            tensors[name] = weight.half() if weight.ndim > 1 else weight.float()
    return tensors


def unrounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights and differences in a file of ``to_delta``, by name."""
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith((".steps", ".scale"))}
    for name, steps in tensors.items():
        if name.endswith(".steps"):
            of = name.removesuffix(".steps")
            whole[of] = steps.float() * tensors[of + ".scale"][:, None]
    return whole


def add_delta(llava: LlavaForConditionalGeneration, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``to_delta``; ``llava`` is fresh from ``new_llava``.

    Raises:
        ValueError: the file does not fit the model.
    """
    weights = llava.state_dict()
    with torch.no_grad():
        for name, value in unrounded(tensors).items():
            if name not in weights:
                raise ValueError(f"pocket-llava has no weight {name!r}: the package's weights are damaged")
            is_difference = name.startswith(LANGUAGE_PREFIX) and value.ndim == 2
            weights[name].copy_(weights[name] + value if is_difference else value)
