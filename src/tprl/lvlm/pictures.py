"""Pictures as a language model is shown them: visual tokens, where they lie, what the vision tower tells besides."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tprl.lvlm.families import family_of
from tprl.lvlm.signals import recorded_tower
from tprl.types import VisualTokens


@dataclass(frozen=True)
class ImageFeatures:
    """One picture as the language model is shown it.

    Attributes:
        tokens: projected visual tokens, ``(n, D)`` in the model's dtype.
        coords: float32 ``(n, 2)``, row and column of each token's centre in the picture, in [0, 1].
        signals: those of ``TOWER_SIGNALS`` that were asked for, float32 ``(n, ...)``.
    """

    tokens: Tensor
    coords: Tensor
    signals: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EncodedPicture(ImageFeatures):
    """One picture with all that a language model needs to see it in a prompt.

    Attributes:
        text: what the processor puts in the place of the picture, each run of visual tokens as one placeholder.
        runs: how many visual tokens each run has.
        places: int64 ``(n, 3)``, positions of the visual tokens counted from the first of them, where a family's
            positions are two-dimensional (M-RoPE).
        deep: ``(n, K, D)``, what is added to the visual tokens after each of the first ``K`` decoder layers.
    """

    text: str
    runs: tuple[int, ...]
    places: Tensor | None = None
    deep: Tensor | None = None


def encode(
    model: PreTrainedModel, inputs: Mapping[str, Any], signals: frozenset[str] = frozenset()
) -> tuple[list[ImageFeatures], Any]:
    """Every picture of a batch in the order of its visual tokens, and the model's own output that holds them.

    Args:
        inputs: what ``forward`` takes, with the pictures and ``input_ids``.
    """
    encoder = cast(Any, model.base_model).get_image_features
    taken = inspect.signature(encoder).parameters
    with recorded_tower(model, signals) as patches:
        output = encoder(**{name: value for name, value in inputs.items() if name in taken}, return_dict=True)
    return split_pictures(model, inputs, output.pooler_output, patches), output


def split_pictures(
    model: PreTrainedModel, inputs: Mapping[str, Any], features: Sequence[Tensor], patches: Mapping[str, Tensor]
) -> list[ImageFeatures]:
    """A model's image features, and what its tower recorded of its ``patches``, picture by picture.

    Raises:
        ValueError: the pictures have more or fewer visual tokens than the prompts.
    """
    family = family_of(model)
    entries = [len(entry) for entry in features]
    tokens = torch.cat(list(features))
    held = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if len(tokens) != held:
        raise ValueError(f"the pictures have {len(tokens)} visual tokens, the prompts hold {held}")
    coords = family.coords(model.config, inputs, entries, inputs["input_ids"])
    counts = [len(picture) for picture in coords]
    signals: dict[str, tuple[Tensor, ...]] = {}
    for name, values in patches.items():
        assert family.pack is not None
        packed = family.pack(model, values.reshape(*values.shape[:2], -1), inputs, entries)
        signals[name] = torch.split(packed.reshape(len(tokens), *values.shape[2:]), counts)
    return [
        ImageFeatures(picture, where.to(picture.device), {name: rows[index] for name, rows in signals.items()})
        for index, (picture, where) in enumerate(zip(torch.split(tokens, counts), coords, strict=True))
    ]


def collate(pictures: Sequence[ImageFeatures], query: Tensor, query_mask: Tensor) -> VisualTokens:
    """One padded batch of pictures with their questions ``(B, Q, D)`` and ``(B, Q)``."""

    def pad(rows: list[Tensor]) -> Tensor:
        return pad_sequence(rows, batch_first=True)

    return VisualTokens(
        tokens=pad([picture.tokens for picture in pictures]),
        mask=pad([torch.ones_like(picture.coords[:, 0], dtype=torch.bool) for picture in pictures]),
        coords=pad([picture.coords for picture in pictures]),
        query=query,
        query_mask=query_mask,
        signals={name: pad([picture.signals[name] for picture in pictures]) for name in pictures[0].signals},
    )


def samples_of(pictures: list[ImageFeatures], placeholder: Tensor) -> Tensor:
    """The row of ``placeholder (B, L)`` in which each picture stands, int64 on the CPU."""
    ends = placeholder.sum(1).cumsum(0).cpu()
    sizes = torch.tensor([len(picture.tokens) for picture in pictures])
    return torch.searchsorted(ends, sizes.cumsum(0))
