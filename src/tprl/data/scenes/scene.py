"""What a scene is, and how one is composed: a pure function of (split, index, settings).

Things stand on a jittered 4 x 4 grid over a cluttered background and never overlap, some lie on a coloured card, some
cards carry a number.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SIDE = 384
"""Side of every picture in pixels."""
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

DIRECTIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Phrase and unit vector (x, y), y pointing down."""

BACKGROUNDS = ("shapes", "tiles")

THIRDS = (("left", "center", "right"), ("top", "middle", "bottom"))

SPLIT_SEEDS = {"train": 11, "val": 22, "test": 33}
TEXT_HEIGHT = 28
"""Size of the numbers on cards in pixels."""
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


STANDARD = SceneSettings()


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


def make_scene(split: str, index: int, settings: SceneSettings = STANDARD) -> Scene:
    """Scene ``index`` of ``split``; equal arguments give equal scenes, and splits share none."""
    rng = np.random.default_rng((SPLIT_SEEDS[split], index))
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
    height = size + 2 * margin + (TEXT_HEIGHT - 4 if number is not None else 0)
    left = origin[0] + int(rng.integers(0, CELL - width + 1))
    top = origin[1] + int(rng.integers(0, CELL - height + 1))
    box = (left + margin, top + margin, left + margin + size, top + margin + size)
    card = Card((left, top, left + width, top + height), colour, number) if colour else None
    return Thing(kind, box, card)
