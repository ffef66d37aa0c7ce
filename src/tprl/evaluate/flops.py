"""FLOPs and cache sizes of vision-language models, from their configs alone.

A multiply-add is 2 FLOPs; matrix products and convolutions are counted, element-wise work is not. Models are built
without weights on the meta device and their own forward pass is counted there. Attention is written out as products
(eager), since fused attention is not counted on every device, and counts as full ``L x L``, as the field does,
although half of a causal score matrix, and all of it outside a sliding window, is of no use.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, prod
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from tprl.evaluate.presets import config_of
from tprl.lvlm.families import family_of


@dataclass(frozen=True)
class Flops:
    """FLOPs of one answer: vision tower, projector, and language model with its head."""

    vision: int
    projector: int
    language: int

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.language

    def saved(self, unpruned: "Flops") -> float:
        """The fraction of ``unpruned``'s FLOPs that is not spent."""
        return 1 - self.total / unpruned.total


def lvlm_flops(
    config: PreTrainedConfig,
    visual_tokens: int,
    text_tokens: int,
    layer_counts: Sequence[int] | None = None,
    generated_tokens: int = 1,
    encoded_tokens: int | Sequence[int] | None = None,
) -> Flops:
    """FLOPs of answering one prompt.

    Args:
        config: of a model of one of ``tprl.lvlm.families.FAMILIES``.
        visual_tokens: visual tokens that enter the language model. The vision tower always sees whole pictures.
        text_tokens: all other tokens of the prompt.
        layer_counts: for pruning inside the language model, the visual tokens that each decoder layer sees instead.
        generated_tokens: tokens of the answer. The first comes from the prefill, each further one costs one step
            with a KV cache. The head is counted once for each.
        encoded_tokens: visual tokens that the tower makes, before newline tokens and unpadding; None is one picture
            of the size that the config names. Needed where a family takes pictures of any size; there one picture
            as square as can be is counted. Of several numbers the mean is taken.

    Raises:
        ValueError: unknown family, a count out of range, ``layer_counts`` of another length than the decoder, or
            ``encoded_tokens`` that whole pictures do not give.
    """
    if visual_tokens < 0 or text_tokens < 1 or generated_tokens < 1:
        raise ValueError(
            "need visual_tokens >= 0, text_tokens >= 1 and generated_tokens >= 1, "
            f"got {visual_tokens}, {text_tokens} and {generated_tokens}"
        )
    key = _key(config)
    costs = _language(key)
    counts = [visual_tokens] * len(costs.linear) if layer_counts is None else list(layer_counts)
    if len(counts) != len(costs.linear) or min(counts) < 0:
        raise ValueError(f"layer_counts has to give {len(costs.linear)} counts of at least 0, got {counts}")
    sizes = encoded_tokens if isinstance(encoded_tokens, Sequence) else [encoded_tokens]
    towers = [_tower(key, *_pictures(config, size)) for size in sizes]
    vision, projector = fmean(tower.vision for tower in towers), fmean(tower.projector for tower in towers)
    language = costs.flops([count + text_tokens for count in counts], generated_tokens)
    return Flops(round(vision), round(projector), language)


def text_tokens_at(
    config: PreTrainedConfig, visual_tokens: int, saved: float, encoded_tokens: int | None = None
) -> int:
    """The greatest number of text tokens at which pruning to ``visual_tokens`` still saves the fraction ``saved`` of
    a prefill's FLOPs: text is never pruned, so longer prompts save less.

    Args:
        encoded_tokens: visual tokens of the unpruned model, as for ``lvlm_flops``.

    Raises:
        ValueError: ``saved`` is not a fraction, or not even saved with a single text token.
    """
    tokens = encoded_tokens if encoded_tokens is not None else encoded_by(config)

    def saves(text_tokens: int) -> bool:
        pruned = lvlm_flops(config, visual_tokens, text_tokens, encoded_tokens=tokens)
        return pruned.saved(lvlm_flops(config, tokens, text_tokens, encoded_tokens=tokens)) >= saved

    if not 0 < saved < 1:
        raise ValueError(f"the fraction saved has to lie between 0 and 1, got {saved}")
    if not saves(1):
        raise ValueError(f"with 1 text token, going from {tokens} to {visual_tokens} saves less than {saved:.1%}")
    enough, too_many = 1, 2
    while saves(too_many):
        enough, too_many = too_many, 2 * too_many
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        enough, too_many = (middle, too_many) if saves(middle) else (enough, middle)
    return enough


def encoded_by(config: PreTrainedConfig) -> int:
    """Visual tokens that the tower makes of one picture of the size that the config names.

    Raises:
        ValueError: the family is unknown or takes pictures of any size.
    """
    if _takes_any_size(config):
        raise ValueError(
            f"{family_of(config).name} takes pictures of any size: say how many encoded_tokens (--encoded-tokens)"
        )
    return _tower(_key(config), 1, None).tokens


def encoded_tokens(config: PreTrainedConfig, inputs: Mapping[str, Any]) -> int:
    """Visual tokens that the tower makes of the pictures of one prompt, before newline tokens and unpadding.

    Args:
        inputs: what ``forward`` takes for the prompt.
    """
    if _takes_any_size(config):
        return int((inputs["input_ids"] == config.image_token_id).sum())
    return encoded_by(config) * int(prod(inputs["pixel_values"].shape[:-3]))


def kv_cache_mib(config: PreTrainedConfig, tokens: float, dtype_bytes: int) -> float:
    """MiB of the keys and values of ``tokens`` tokens (or their mean over layers or samples) in all layers, all of
    them cached, also where a layer needs only a sliding window."""
    return _language(_key(config)).cached * tokens * dtype_bytes / 2**20


# --- counting ------------------------------------------------------------------------------------------------


class _Weightless(TorchDispatchMode):
    """Runs on the meta device whatever touches a tensor there, and all else on the CPU.

    So grids, windows and lengths, on which shapes depend, stay real numbers, while weights and activations are
    shapes only.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        elif kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


@torch.no_grad()
def _count(call: Any, *args: Any, **kwargs: Any) -> tuple[Any, FlopCounterMode]:
    """What ``call`` returns, and its FLOPs."""
    weightless = _Weightless()  # type: ignore[no-untyped-call]
    with sdpa_kernel(SDPBackend.MATH), weightless, FlopCounterMode(display=False) as counter:
        result = call(*args, **kwargs)
    return result, counter


def _of(counter: FlopCounterMode, module: str) -> int:
    return sum(counter.get_flop_counts().get(module, {}).values())


def _key(config: PreTrainedConfig) -> str:
    family_of(config)
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


@lru_cache(maxsize=8)
def _model(key: str) -> Any:
    auto: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(config_of(json.loads(key)), attn_implementation="eager").eval()


# --- the language model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Language:
    """FLOPs of layer i on ``L`` tokens: ``linear[i] * L + square[i] * L**2``; besides them a token costs ``other``,
    and the head ``head`` for each generated token. ``cached`` numbers a token are kept in the cache."""

    linear: tuple[int, ...]
    square: tuple[int, ...]
    other: int
    head: int
    cached: int

    def flops(self, lengths: Sequence[int], generated_tokens: int) -> int:
        steps = generated_tokens - 1
        total = self.other * (lengths[0] + steps) + self.head * generated_tokens
        for length, linear, square in zip(lengths, self.linear, self.square, strict=True):
            contexts = steps * length + steps * (steps + 1) // 2
            total += linear * (length + steps) + square * (length**2 + contexts)
        return total


@lru_cache(maxsize=64)
def _language(key: str) -> _Language:
    """Each layer's FLOPs are a polynomial of degree 2 in the length without constant, so two lengths tell all."""
    model = _model(key)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    width = decoder.config.hidden_size
    short, long = 8, 16
    counts = {}
    for length in (short, long):
        embeds = torch.empty(1, length, width, dtype=model.dtype, device="meta")
        mask = torch.empty(1, 1, length, length, dtype=model.dtype, device="meta")
        result, counter = _count(decoder, inputs_embeds=embeds, attention_mask=mask, use_cache=True)
        names = [f"{type(decoder).__name__}.layers.{i}" for i in range(len(decoder.layers))]
        counts[length] = [_of(counter, name) for name in names]
        rest = counter.get_total_flops() - sum(counts[length])
    square = [(b - a * long // short) // (long * (long - short)) for a, b in zip(*counts.values(), strict=True)]
    linear = [(a - s * short**2) // short for a, s in zip(counts[short], square, strict=True)]
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in result.past_key_values.layers) // long
    _, counter = _count(head, torch.empty(1, 1, width, dtype=model.dtype, device="meta"))
    return _Language(tuple(linear), tuple(square), rest // long, counter.get_total_flops(), cached)


# --- the vision tower -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tower:
    vision: int
    projector: int
    tokens: int


def _takes_any_size(config: PreTrainedConfig) -> bool:
    family_of(config)
    return config.vision_config.model_type == "pixtral" or "image_grid_thw" in family_of(config).vision_inputs


def _pictures(config: PreTrainedConfig, encoded_tokens: int | None) -> tuple[int, tuple[int, int] | None]:
    """Number of pictures or tiles, and the rows and columns of their tokens where those are not fixed."""
    if encoded_tokens is None:
        encoded_tokens = encoded_by(config)
    if encoded_tokens < 1:
        raise ValueError(f"encoded_tokens has to be at least 1, got {encoded_tokens}")
    if not _takes_any_size(config):
        tile = encoded_by(config)
        if encoded_tokens % tile:
            raise ValueError(f"encoded_tokens {encoded_tokens} is not a multiple of the {tile} tokens of a picture")
        return encoded_tokens // tile, None
    rows = next(rows for rows in range(isqrt(encoded_tokens), 0, -1) if encoded_tokens % rows == 0)
    return 1, (rows, encoded_tokens // rows)


@lru_cache(maxsize=256)
def _tower(key: str, pictures: int, grid: tuple[int, int] | None) -> _Tower:
    if pictures > 1:
        one = _tower(key, 1, grid)
        return _Tower(pictures * one.vision, pictures * one.projector, pictures * one.tokens)
    model = _model(key)
    config = model.config
    inputs, tiles = _tower_inputs(config, grid)
    result, counter = _count(model.model.get_image_features, **inputs)
    tower = type(model.get_submodule(family_of(config).tower)).__name__
    inner = [name for name in counter.get_flop_counts() if name.startswith(f"{tower}.")]
    mergers = [name for name in inner if name.removeprefix(f"{tower}.").split(".")[0] in _MERGERS]
    outermost = [name for name in mergers if name.rpartition(".")[0] not in mergers]
    vision = _of(counter, tower) - sum(_of(counter, name) for name in outermost)
    if tiles > 1:
        tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    else:
        tokens = sum(len(part.flatten(0, -2)) for part in result.pooler_output) // tiles
    return _Tower(vision // tiles, (counter.get_total_flops() - vision) // tiles, tokens)


_MERGERS = ("merger", "deepstack_merger_list")
"""Parts of Qwen's towers that are its projector."""


def _tower_inputs(config: PreTrainedConfig, grid: tuple[int, int] | None) -> tuple[dict[str, Any], int]:
    """What ``get_image_features`` wants of one picture, and how many tiles that makes."""
    vision, fields = config.vision_config, family_of(config).vision_inputs
    if grid is None:
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        if "batch_num_images" in fields:
            size = config.image_grid_pinpoints[0]
            tiles = 1 + (size[0] // side) * (size[1] // side)
            return {"pixel_values": torch.ones(1, tiles, 3, side, side), "image_sizes": torch.tensor([size])}, tiles
        shape = (1, 1, 3, side, side) if "pixel_attention_mask" in fields else (1, 3, side, side)
        return {"pixel_values": torch.ones(shape)}, 1
    rows, columns = grid
    if vision.model_type == "pixtral":
        cell = vision.patch_size * (config.spatial_merge_size if config.model_type == "mistral3" else 1)
        height, width = rows * cell, columns * cell
        return {
            "pixel_values": torch.ones(()).expand(1, 3, height, width),
            "image_sizes": torch.tensor([[height, width]]),
        }, 1
    rows, columns = rows * vision.spatial_merge_size, columns * vision.spatial_merge_size
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.ones(()).expand(rows * columns, patch),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }, 1
