"""What the package has to know about the model families of transformers, in two tables.

To add a family, add a row to ``FAMILIES``; if its vision tower is new and can give signals, add one to ``TOWERS``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt, sqrt
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

BothWays = Literal["nothing", "pictures", "prompts"]

Coords = Callable[[PreTrainedConfig, Mapping[str, Any], list[int], Tensor], list[Tensor]]
"""From the model's config, its vision inputs, the lengths of the entries of its image features and ``input_ids
(B, L)`` to one float32 ``(n, 2)`` for every picture of the batch, in the order of the features."""

Pack = Callable[[PreTrainedModel, Tensor, Mapping[str, Any], list[int]], Tensor]
"""From the model, values of the tower's patches ``(E, P, K)``, the vision inputs and the lengths of the entries of
the image features to values of the visual tokens ``(T, K)``, all pictures one after the other."""


@dataclass(frozen=True)
class Family:
    """The facts of one family.

    Attributes:
        name: for messages.
        container: what the encoder's ``pooler_output`` is, and what ``forward`` wants it to be.
        coords: where the visual tokens of each picture stand.
        pack: patches of the tower to visual tokens; None where they do not correspond.
        vision_inputs: arguments of ``forward`` that describe the pictures and are of no use once they are encoded.
        tower: the vision tower, as a path from the model.
        names_layer: whether ``config.vision_feature_layer`` says which layer's features are used, else the last.
        first_position: position id of a prompt's first token in ``forward``.
        both_ways: what attends in both directions: the visual tokens of a picture to each other, all tokens of a
            prompt, or nothing.
        prompt: what the processor makes of a picture and a question where models have no chat template.
    """

    name: str
    container: type
    coords: Coords
    pack: Pack | None = None
    vision_inputs: tuple[str, ...] = ("pixel_values",)
    tower: str = "model.vision_tower"
    names_layer: bool = False
    first_position: int = 0
    both_ways: BothWays = "nothing"
    prompt: str = ""


@dataclass(frozen=True)
class Tower:
    """Where a vision tower keeps what ``tprl.types.SIGNALS`` are made of.

    Attributes:
        layers: its layers, as a path from the tower.
        attention: a layer's attention, as a path from the layer; it has a ``k_proj`` and a ``scale``.
        queries: what gives its queries as they are compared, heads one after the other, as a path from the attention.
        keys: the same for its keys.
        has_cls: whether its first token is [CLS].
    """

    layers: str = "encoder.layers"
    attention: str = "self_attn"
    queries: str = "q_proj"
    keys: str = "k_proj"
    has_cls: bool = False


def grid_coords(rows: int, columns: int) -> Tensor:
    """Centres of the cells of a grid, row by row, float32 ``(rows * columns, 2)``: ``(r + 0.5) / rows`` and so on."""
    row = (torch.arange(rows, dtype=torch.float32) + 0.5) / rows
    column = (torch.arange(columns, dtype=torch.float32) + 0.5) / columns
    return torch.cartesian_prod(row, column)


def square_coords(count: int) -> Tensor:
    """``grid_coords`` of a square grid of ``count`` cells.

    Raises:
        ValueError: ``count`` is not a square.
    """
    side = isqrt(count)
    if side * side != count:
        raise ValueError(f"{count} visual tokens do not make a square grid")
    return grid_coords(side, side)


def image_runs(config: PreTrainedConfig, ids: Tensor) -> list[list[tuple[int, int]]]:
    """Start and end of every run of image placeholders in each row of ``ids (B, L)``."""
    image = torch.nn.functional.pad((ids == config.image_token_id).int(), (1, 1))
    edges = image.diff(dim=1)
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    runs: list[list[tuple[int, int]]] = [[] for _ in ids]
    for (row, start), (_, end) in zip(starts, ends, strict=True):
        runs[row].append((start, end))
    return runs


def _square(config: PreTrainedConfig, inputs: Mapping[str, Any], entries: list[int], ids: Tensor) -> list[Tensor]:
    return [square_coords(count) for count in entries]


def _llava(config: PreTrainedConfig, inputs: Mapping[str, Any], entries: list[int], ids: Tensor) -> list[Tensor]:
    """Square, or with Pixtral's tower as many rows and columns of patches as the picture has."""
    if inputs.get("image_sizes") is None:
        return _square(config, inputs, entries, ids)
    return _sized_grids(inputs, config.vision_config.patch_size)


def _mistral(config: PreTrainedConfig, inputs: Mapping[str, Any], entries: list[int], ids: Tensor) -> list[Tensor]:
    return _sized_grids(inputs, config.vision_config.patch_size * config.spatial_merge_size)


def _sized_grids(inputs: Mapping[str, Any], cell: int) -> list[Tensor]:
    sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
    return [grid_coords(height // cell, width // cell) for height, width in sizes]


def _qwen(config: PreTrainedConfig, inputs: Mapping[str, Any], entries: list[int], ids: Tensor) -> list[Tensor]:
    merge = config.vision_config.spatial_merge_size
    return [grid_coords(rows // merge, columns // merge) for _, rows, columns in inputs["image_grid_thw"].tolist()]


def _internvl(config: PreTrainedConfig, inputs: Mapping[str, Any], entries: list[int], ids: Tensor) -> list[Tensor]:
    """A run is a picture; if it was cut into tiles, each tile has coordinates of its own, since neither the rows
    and columns of the tiles nor which of them is the thumbnail can be known from the model's inputs."""
    tile = square_coords(entries[0])
    return [tile.repeat((end - start) // len(tile), 1) for runs in image_runs(config, ids) for start, end in runs]


def _tiled(config: PreTrainedConfig, inputs: Mapping[str, Any], entries: list[int], ids: Tensor) -> list[Tensor]:
    """Rows of tiles and then the whole picture, each a run: two tokens stand between tiles of a row, more between
    rows, and the same token before every whole picture."""
    pictures = []
    for row, runs in zip(ids.tolist(), image_runs(config, ids), strict=True):
        tiles: list[list[Tensor]] = []
        before = 0
        for start, end in runs:
            cells = square_coords(end - start)
            if row[start - 1] == row[runs[-1][0] - 1]:
                pictures.append(torch.cat([*_mosaic(tiles), cells]))
                tiles = []
            elif tiles and start - before == 2:
                tiles[-1].append(cells)
            else:
                tiles.append([cells])
            before = end
    return pictures


def _mosaic(tiles: list[list[Tensor]]) -> list[Tensor]:
    """Coordinates within tiles to coordinates within the picture that the tiles make."""
    return [
        (cells + torch.tensor([row, column])) / torch.tensor([len(tiles), len(tiles[row])])
        for row in range(len(tiles))
        for column, cells in enumerate(tiles[row])
    ]


def _anyres(config: PreTrainedConfig, inputs: Mapping[str, Any], entries: list[int], ids: Tensor) -> list[Tensor]:
    """The whole picture on a square grid, then its crops on one finer grid without the padding, each row of it closed
    by a newline token, which stands at the right edge."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    base = grid_coords(side, side)
    pictures = []
    for size, count in zip(torch.as_tensor(inputs["image_sizes"]).tolist(), entries, strict=True):
        if count == len(base) + 1:
            pictures.append(torch.cat([base, torch.ones(1, 2)]))
            continue
        crops = cast(Any, get_anyres_image_grid_shape)(size, config.image_grid_pinpoints, vision.image_size)
        cells = torch.empty(1, crops[0] * side, crops[1] * side, device="meta")
        rows, columns = cast(Any, unpad_image)(cells, size).shape[1:]
        if config.model_type == "llava_onevision":
            aspect = inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio
            ratio = sqrt(rows * columns / (int(aspect.removeprefix("anyres_max_")) * side**2))
            if ratio > 1.1:
                rows, columns = int(rows // ratio), int(columns // ratio)
        fine = grid_coords(rows, columns).view(rows, columns, 2)
        newline = torch.stack([fine[:, 0, 0], torch.ones(rows)], -1)
        pictures.append(torch.cat([base, torch.cat([fine, newline[:, None]], 1).flatten(0, 1)]))
    return pictures


def _blocks(model: PreTrainedModel, patches: Tensor, inputs: Mapping[str, Any], entries: list[int]) -> Tensor:
    """Means over the square blocks of patches that a square tower's projector makes one token of."""
    side = isqrt(patches.shape[1])
    block = side // isqrt(sum(entries) // len(patches))
    grid = torch.unflatten(patches, 1, (side // block, block, side // block, block))
    return grid.mean((2, 4)).flatten(0, 2)


def _pack_anyres(model: PreTrainedModel, patches: Tensor, inputs: Mapping[str, Any], entries: list[int]) -> Tensor:
    """The model's own packing; newline tokens get zero."""
    config, sizes = model.config, torch.as_tensor(inputs["image_sizes"])
    vision = config.vision_config
    crops = [
        1
        if count == patches.shape[1] + 1
        else image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size)
        for size, count in zip(sizes, entries, strict=True)
    ]
    newline = patches.new_zeros(patches.shape[2])
    if config.model_type == "llava_next":
        option = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    else:
        option = {"vision_aspect_ratio": inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio}
    packed, _ = cast(Any, model.base_model).pack_image_features(
        torch.split(patches, crops), sizes, image_newline=newline, **option
    )
    return torch.cat(list(packed))


_QWEN_INPUTS = ("pixel_values", "image_grid_thw")
_ANYRES_INPUTS = ("pixel_values", "image_sizes", "vision_aspect_ratio", "batch_num_images")
_TILED_INPUTS = ("pixel_values", "pixel_attention_mask")
_SIZED_INPUTS = ("pixel_values", "image_sizes")

FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA-1.5", list, _llava, _blocks, _SIZED_INPUTS, names_layer=True),
    "llava_next": Family("LLaVA-NeXT", list, _anyres, _pack_anyres, _ANYRES_INPUTS, names_layer=True),
    "llava_onevision": Family("LLaVA-OneVision", list, _anyres, _pack_anyres, _ANYRES_INPUTS, names_layer=True),
    "qwen2_vl": Family("Qwen2-VL", tuple, _qwen, None, _QWEN_INPUTS, "model.visual"),
    "qwen2_5_vl": Family("Qwen2.5-VL", tuple, _qwen, None, _QWEN_INPUTS, "model.visual"),
    "qwen3_vl": Family("Qwen3-VL", tuple, _qwen, None, _QWEN_INPUTS, "model.visual"),
    "internvl": Family("InternVL", Tensor, _internvl, _blocks, names_layer=True),
    "idefics3": Family("Idefics3", list, _tiled, _blocks, _TILED_INPUTS, "model.vision_model"),
    "smolvlm": Family("SmolVLM", list, _tiled, _blocks, _TILED_INPUTS, "model.vision_model"),
    "gemma3": Family("Gemma3", Tensor, _square, _blocks, both_ways="pictures"),
    "paligemma": Family(
        "PaliGemma", Tensor, _square, _blocks, first_position=1, both_ways="prompts", prompt="{image}{bos}{question}\n"
    ),
    "mistral3": Family("Mistral3", tuple, _mistral, None, _SIZED_INPUTS, names_layer=True),
}
"""By ``config.model_type``."""

TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower(has_cls=True),
    "siglip_vision_model": Tower(),
    "internvl_vision": Tower("encoder.layer", "attention", "q_norm", "k_norm", has_cls=True),
    "idefics3_vision": Tower(),
    "smolvlm_vision": Tower(),
}
"""By ``config.vision_config.model_type``."""


def family_of(model: PreTrainedModel | PreTrainedConfig) -> Family:
    """The family of a model or of its config.

    Raises:
        ValueError: it is none of ``FAMILIES``.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    if config.model_type not in FAMILIES:
        raise ValueError(f"unknown model family {config.model_type!r}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.model_type]
