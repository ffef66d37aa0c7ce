"""Pictures of what a pruner kept."""

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

FADE = 0.78
"""How far dropped patches go towards white."""
SIDE = 480
"""Longer side of a drawn picture in pixels."""


def draw_kept(image: Image.Image, coords: Tensor, keep: Tensor, caption: str = "") -> Image.Image:
    """The picture with every dropped patch faded to white.

    Args:
        image: RGB.
        coords: ``(N, 2)``, row and column of the patches' centres in [0, 1], on one regular grid.
        keep: bool ``(N,)``.
        caption: written under the picture where it is not empty.
    """
    rows, columns = (len(coords[:, axis].unique()) for axis in (0, 1))
    kept = np.zeros((rows, columns), bool)
    places = (coords * coords.new_tensor([rows, columns])).long().cpu().numpy()
    kept[places[:, 0], places[:, 1]] = keep.cpu().numpy()
    scale = SIDE / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    mask = Image.fromarray(kept.astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    faded = Image.blend(image, Image.new("RGB", image.size, "white"), FADE)
    drawn = Image.composite(image, faded, mask)
    if not caption:
        return drawn
    framed = Image.new("RGB", (drawn.width, drawn.height + 24), "white")
    framed.paste(drawn, (0, 0))
    ImageDraw.Draw(framed).text((4, drawn.height + 6), caption, fill="black", font_size=13)
    return framed


def side_by_side(pictures: list[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures in one row on white."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row
