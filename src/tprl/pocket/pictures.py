"""Training pictures of the vision tower, with all that their patches are known to show."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tprl.data.scenes.drawing import render
from tprl.data.scenes.scene import SIDE, STANDARD, Scene, SceneSettings, make_scene
from tprl.pocket.labels import (
    BACKGROUND,
    GRID,
    IGNORE,
    UNCLEAR,
    glyph_labels,
    patch_labels,
    patch_neighbours,
    patch_owners,
    presence,
)

GROUND = 48
"""Patches besides those of things that the tower is shown of a training picture, for all the others."""
NUMBERED = SceneSettings(card_share=1.0, number_share=1.0)
"""Every second training picture of the tower: digits are what takes it longest to read."""


class Batch(NamedTuple):
    """``B`` pictures and all that is known of ``M`` patches of each; where a picture has fewer, the rest is padding.

    Attributes:
        pixels: uint8 ``(B, SIDE, SIDE, 3)``.
        presence: float32 ``(B, kinds + colours)``, see ``labels.presence``.
        patches: int64 ``(B, M)``, which patches these are.
        weights: float32 ``(B, M)``, how many patches each stands for; 0 is padding.
        labels: int64 ``(slots, B, M)``, see ``patch_labels``.
        owners: int64 ``(B, M)``, see ``patch_owners``.
        neighbours: int64 ``(B, M)``, see ``patch_neighbours``.
        glyphs: int64 ``(B, M)``, see ``glyph_labels``.
        centres: float32 ``(B, M, 2)``, centre (x, y) of the thing that owns each patch, in [-1, 1]; 0 where none does.
    """

    pixels: Tensor
    presence: Tensor
    patches: Tensor
    weights: Tensor
    labels: Tensor
    owners: Tensor
    neighbours: Tensor
    glyphs: Tensor
    centres: Tensor

    @property
    def kinds(self) -> Tensor:
        """Number of the kind of the thing that owns each patch, int64 ``(B, M)``; ``BACKGROUND`` where none does."""
        return torch.where(self.owners >= 0, self.labels[0] - 1, BACKGROUND)

    @property
    def things(self) -> Tensor:
        """Whether each patch belongs to each thing, float32 ``(B, M, things)``."""
        return nn.functional.one_hot(self.owners.clamp(min=-1) + 1)[..., 1:].float()

    @property
    def areas(self) -> Tensor:
        """Patches of the thing that owns each patch, float32 ``(B, M)``; 0 where none does."""
        return (self.things @ self.things.sum(1)[..., None])[..., 0]


def make_batch(scenes: list[Scene], ground: np.random.Generator | None = None) -> Batch:
    """Draw ``scenes``.

    Args:
        ground: draws ``GROUND`` of each picture's patches besides those of things; all are shown unless given.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
    holds = torch.from_numpy(np.stack([presence(scene) for scene in scenes]))
    fills = (0, 0, IGNORE, UNCLEAR, -1, IGNORE, 0)
    pictures = [_patches(scene, ground) for scene in scenes]
    longest = max(len(patches) for patches, *_ in pictures)
    columns = [
        torch.stack([nn.functional.pad(facts, (0, longest - facts.shape[-1]), value=fill) for facts in column])
        for column, fill in zip(zip(*pictures, strict=True), fills, strict=True)
    ]
    patches, weights, labels, owners, neighbours, glyphs, centres = columns
    return Batch(
        pixels, holds, patches, weights, labels.transpose(0, 1), owners, neighbours, glyphs, centres.transpose(1, 2)
    )


def _patches(scene: Scene, ground: np.random.Generator | None) -> tuple[Tensor, ...]:
    """Of one picture, the fields of ``Batch`` from ``patches`` on."""
    owners = patch_owners(scene)
    patches, weights = np.arange(GRID**2), np.ones(GRID**2, np.float32)
    if ground:
        other = np.flatnonzero(owners < 0)
        drawn = ground.choice(other, GROUND, replace=False)
        patches = np.concatenate([np.flatnonzero(owners >= 0), drawn])
        weights = np.where(owners[patches] >= 0, 1.0, len(other) / GROUND).astype(np.float32)
    labels, glyphs = patch_labels(scene).astype(np.int64), glyph_labels(scene).astype(np.int64)
    neighbours = patch_neighbours(scene, owners)
    places = np.array([*(thing.centre for thing in scene.things), *[(SIDE / 2, SIDE / 2)] * 2], np.float32)
    centres = places[owners].T / (SIDE / 2) - 1
    facts = (labels[:, patches], owners[patches], neighbours[patches], glyphs[patches], centres[:, patches])
    return tuple(torch.from_numpy(array) for array in (patches, weights, *facts))


class Batches(Dataset[Batch]):
    """Batch ``step`` of freshly drawn training scenes, with some of their ground; what is drawn follows from
    ``(seed, step)``."""

    def __init__(self, batch_size: int, first: int, last: int, seed: int = 0) -> None:
        self.batch_size, self.first, self.last, self.seed = batch_size, first, last, seed

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.seed, 3, self.first + index))
        numbers = rng.integers(2**31, size=self.batch_size).tolist()
        scenes = [make_scene("train", n, NUMBERED if i % 2 else STANDARD) for i, n in enumerate(numbers)]
        return make_batch(scenes, rng)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 ``(B, H, W, 3)`` to float ``(B, 3, H, W)`` in [-1, 1], as the shipped image processor does."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
