"""Pictures of what a pruner kept, and of where it looked."""

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FADE = 0.78
"""How far dropped patches go towards white."""
HEAT = "inferno"
"""Matplotlib's colour map of keep probabilities."""
SIDE = 480
"""Longer side of a drawn picture in pixels."""
GAP = 8
"""Pixels between two pictures in a row."""


def spread(coords: Tensor, values: Tensor) -> Tensor:
    """The values of visual tokens on a grid over the picture, float32 ``(rows, columns)``.

    There are as many rows and columns as tokens have different ones. Each cell takes the value of the nearest token,
    the greatest of those that lie there: tokens on one regular grid get a cell each, and pictures that are shown in
    several resolutions have no holes.

    Args:
        coords: ``(N, 2)``, row and column of the tokens' centres in [0, 1].
        values: ``(N,)``.
    """
    coords, values = coords.float().cpu(), values.float().cpu()
    rows, columns = (len(coords[:, axis].unique()) for axis in (0, 1))
    cells = torch.cartesian_prod((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns)
    distance = torch.cdist(cells, coords, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance <= distance.amin(1, keepdim=True) + 1e-6
    return values.expand_as(nearest).masked_fill(~nearest, -torch.inf).amax(1).view(rows, columns)


def draw_kept(image: Image.Image, coords: Tensor, keep: Tensor, caption: str = "") -> Image.Image:
    """The picture with every dropped patch faded to white.

    Args:
        image: RGB.
        coords: ``(N, 2)``, row and column of the patches' centres in [0, 1].
        keep: bool ``(N,)``.
        caption: written above the picture where it is not empty.
    """
    image = _sized(image)
    mask = Image.fromarray(spread(coords, keep).numpy().astype(np.uint8) * 255)
    faded = Image.blend(image, Image.new("RGB", image.size, "white"), FADE)
    drawn = Image.composite(image, faded, mask.resize(image.size, Image.Resampling.NEAREST))
    return headed(drawn, caption) if caption else drawn


def draw_heat(image: Image.Image, coords: Tensor, probs: Tensor) -> Image.Image:
    """The picture under a map of probabilities: dark where a patch is not needed, glowing where it is.

    Args:
        image: RGB.
        coords: ``(N, 2)``, row and column of the patches' centres in [0, 1].
        probs: ``(N,)``, in [0, 1].
    """
    image = _sized(image)
    heat = matplotlib.colormaps[HEAT](spread(coords, probs).numpy(), bytes=True)[..., :3]
    glow = Image.fromarray(heat).resize(image.size, Image.Resampling.BICUBIC)
    return Image.blend(image.convert("L").convert("RGB"), glow, 0.65)


def headed(picture: Image.Image, text: str, size: int = 13) -> Image.Image:
    """A picture under a line of text, in as many lines as its width asks for.

    Args:
        size: of the letters in pixels.
    """
    font = ImageFont.load_default(size)
    lines, room = [""], picture.width - 8
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= room or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    head = len(lines) * (size + 5) + 6
    framed = Image.new("RGB", (picture.width, head + picture.height), "white")
    ImageDraw.Draw(framed).multiline_text((4, 3), "\n".join(lines), fill="black", font=font, spacing=5)
    framed.paste(picture, (0, head))
    return framed


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures in one row on white."""
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + GAP
    return row


def _sized(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)
