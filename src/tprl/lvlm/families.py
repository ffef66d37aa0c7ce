"""What the package has to know about each model family of transformers. To add a family, add a row to ``FAMILIES``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

Coords = Callable[[PreTrainedConfig, Mapping[str, Any], list[int], Tensor], list[Tensor]]
"""From the model's config, its vision inputs, the lengths of the entries of its image features and ``input_ids
(B, L)`` to one float32 ``(n, 2)`` for every picture of the batch, in the order of the features."""

Pack = Callable[[PreTrainedModel, Tensor, Mapping[str, Any], list[int]], Tensor]
"""From the model, values of the tower's patches ``(E, P, K)``, the vision inputs and the lengths of the entries of
the image features to values of the visual tokens ``(T, K)``, all pictures one after the other."""

CLS_TOWERS = frozenset({"clip_vision_model", "internvl_vision"})
"""Vision towers whose first token is [CLS]."""


@dataclass(frozen=True)
class Family:
    """The facts of one family.

    Attributes:
        name: for messages.
        coords: where the visual tokens of each picture stand.
        vision_inputs: arguments of ``forward`` that describe the pictures and are of no use once they are encoded.
        tower: the vision tower, as a path from the model.
        layers: the tower's layers, as a path from the tower.
        attention: the attention of a layer, as a path from the layer; it has a ``k_proj``.
        names_layer: whether ``config.vision_feature_layer`` says which layer's features are used, else the last.
        pack: patches to visual tokens; None where the tower gives no signals.
    """

    name: str
    coords: Coords
    pack: Pack | None
    vision_inputs: tuple[str, ...] = ("pixel_values",)
    tower: str = "model.vision_tower"
    layers: str = "encoder.layers"
    attention: str = "self_attn"
    names_layer: bool = False


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


def _square(config: PreTrainedConfig, inputs: Mapping[str, Any], entries: list[int], ids: Tensor) -> list[Tensor]:
    return [square_coords(count) for count in entries]


def _blocks(model: PreTrainedModel, patches: Tensor, inputs: Mapping[str, Any], entries: list[int]) -> Tensor:
    """Means over the square blocks of patches that a square tower's projector makes one token of."""
    side = isqrt(patches.shape[1])
    block = side // isqrt(sum(entries) // len(patches))
    grid = patches.unflatten(1, (side // block, block, side // block, block))
    return grid.mean((2, 4)).flatten(0, 2)


FAMILIES: dict[str, Family] = {
    "llava": Family("LLaVA-1.5", _square, _blocks, ("pixel_values", "image_sizes"), names_layer=True),
}
"""By ``config.model_type``."""


def family_of(model: PreTrainedModel | PreTrainedConfig) -> Family:
    """The family of a model or of its config.

    Raises:
        ValueError: it is none of ``FAMILIES``.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    if config.model_type not in FAMILIES:
        raise ValueError(f"unknown model family {config.model_type!r}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.model_type]
