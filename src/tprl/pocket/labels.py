"""What the vision tower of pocket-llava is taught to know about every patch, and as which words.

Each *slot* is one fact about the thing that covers a patch: its kind, its card's colour, the digits on the card,
how many of its kind there are, where it stands, what is next to it, its box. A slot has a small vocabulary; one
hidden unit of the projector's first layer stands for one word of one slot.
"""

from dataclasses import dataclass

import numpy as np

from tprl.data.scenes.questions import BOX_SCALE
from tprl.data.scenes.scene import COLOURS, DIRECTIONS, KINDS, SIDE, THIRDS, Scene, Thing

GRID = 24
"""Visual tokens a side."""
IGNORE = -100
NONE = 0
"""Label of a patch to which a slot does not apply; word ``i`` of a slot is label ``i + 1``."""


@dataclass(frozen=True)
class Slot:
    """One fact about a patch.

    Attributes:
        name: for messages and metrics.
        words: its vocabulary, each a single token of the language model.
        own_direction: whether the word keeps its own direction in embedding space (the kind and the colour, which
            questions name) or is turned by a rotation of the slot's, so that "4" as tens and "4" as ones differ.
        context: whether the fact takes other things than the patch's own, and is taught only once those are known.
        weight: of the slot in the tower's loss.
        gain: length of the slot's word embeddings in a visual token, against the language model's own.
        stress: how much each word weighs in the slot's loss; all alike where it is empty.
    """

    name: str
    words: tuple[str, ...]
    own_direction: bool = False
    context: bool = False
    weight: float = 1.0
    gain: float = 0.6
    stress: tuple[float, ...] = ()


TOPICS = ("nearest", *DIRECTIONS)
"""What a patch may say of its thing's neighbours. Every patch speaks of one of these alone: of all five at once, the
language model did not learn to tell them apart."""
_DIGITS = tuple("0123456789")
_EDGES = ("left", "top", "right", "bottom")

SLOTS = (
    Slot("kind", tuple(KINDS), own_direction=True, weight=4.0, gain=3.0),
    Slot("colour", tuple(COLOURS), own_direction=True, gain=1.5),
    Slot("tens", _DIGITS, weight=8.0, gain=0.8),
    Slot("ones", _DIGITS, weight=8.0, gain=0.8),
    Slot("count", tuple("1234"), context=True, weight=30.0, gain=0.8, stress=(0.5, 1.0, 1.5, 2.0)),
    Slot("column", THIRDS[0], weight=0.5),
    Slot("row", THIRDS[1], weight=0.5),
    Slot("topic", tuple(topic.split()[0] for topic in TOPICS), own_direction=True, weight=4.0, gain=1.5),
    Slot("neighbour", tuple(KINDS), context=True, weight=12.0, gain=2.0),
    *(Slot(f"box {edge} tens", tuple("012"), weight=0.25, gain=0.4) for edge in _EDGES),
    *(Slot(f"box {edge} ones", _DIGITS, weight=0.25, gain=0.4) for edge in _EDGES),
)
UNITS = sum(len(slot.words) for slot in SLOTS)
TOPIC, NEIGHBOUR = (next(i for i, slot in enumerate(SLOTS) if slot.name == name) for name in ("topic", "neighbour"))
BACKGROUND, UNCLEAR = -1, -2


def patch_owners(scene: Scene, grid: int = GRID, least: float = 1 / 3) -> np.ndarray:
    """Number of the thing in ``scene.things`` that every patch belongs to, int64 ``(grid * grid,)``, raster order.

    A patch belongs to the thing whose region covers more than ``least`` of it, and is ``BACKGROUND`` below a tenth;
    between the two it is ``UNCLEAR``. Every thing has at least the patch that it covers most.
    """
    owners = np.full((grid, grid), BACKGROUND)
    coverage = np.zeros((grid, grid))
    patch = SIDE // grid
    edges = np.arange(grid + 1) * patch
    for number, thing in enumerate(scene.things):
        left, top, right, bottom = thing.region
        wide = np.clip(np.minimum(edges[1:], right) - np.maximum(edges[:-1], left), 0, patch) / patch
        high = np.clip(np.minimum(edges[1:], bottom) - np.maximum(edges[:-1], top), 0, patch) / patch
        share = high[:, None] * wide[None, :]
        owners[share > np.maximum(coverage, min(least, share.max() - 1e-6))] = number
        coverage = np.maximum(coverage, share)
    owners[(coverage >= 0.1) & (coverage <= least)] = UNCLEAR
    return owners.reshape(-1)


def patch_labels(scene: Scene, grid: int = GRID, least: float = 1 / 3) -> np.ndarray:
    """Labels of every patch, int16 ``(slots, grid * grid)``: those of the thing that owns it, see ``patch_owners``,
    and of the one neighbour that it speaks of."""
    owners = patch_owners(scene, grid, least)
    of_things = [_facts(scene, thing) for thing in scene.things]
    table = np.array([*of_things, [IGNORE] * len(SLOTS), [NONE] * len(SLOTS)], np.int16)
    labels: np.ndarray = table[owners].T
    of_thing, neighbours = owners >= 0, patch_neighbours(scene, owners, grid)
    labels[TOPIC, of_thing] = patch_topics(grid)[of_thing] + 1
    labels[NEIGHBOUR, neighbours >= 0] = table[neighbours[neighbours >= 0], 0]
    return labels


def patch_topics(grid: int = GRID) -> np.ndarray:
    """Which of ``TOPICS`` every patch speaks of, int64 ``(grid * grid,)``; any 3 x 3 patches hold all five."""
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    topics: np.ndarray = (columns + 2 * rows) % len(TOPICS)
    return topics


def patch_neighbours(scene: Scene, owners: np.ndarray, grid: int = GRID) -> np.ndarray:
    """Number of the thing that each patch is to name: the neighbour, by the patch's topic, of its owner; int64
    ``(N,)``, -1 where there is none.

    Args:
        owners: see ``patch_owners``.
    """
    numbers = {id(thing): number for number, thing in enumerate(scene.things)}
    found = [
        [numbers.get(id(scene.nearest(thing, direction)), -1) for direction in (None, *DIRECTIONS.values())]
        for thing in scene.things
    ]
    table = np.array([*found, [-1] * len(TOPICS), [-1] * len(TOPICS)])
    neighbours: np.ndarray = table[owners, patch_topics(grid)]
    return neighbours


GLYPHS = 21
"""Nothing, ten digits as tens, ten digits as ones."""


def glyph_labels(scene: Scene) -> np.ndarray:
    """Which digit's ink each patch shows, int16 ``(GRID * GRID,)``: 0 for none, 1 to 10 for tens, 11 to 20 for ones;
    ``IGNORE`` where too little of it is seen. Most background is ignored too, so that digits weigh enough."""
    patch = SIDE // GRID
    labels = np.full((GRID, GRID), IGNORE, np.int16)
    seen = np.zeros((GRID, GRID))
    edges = np.arange(GRID + 1) * patch
    for thing in scene.things:
        left, top, right, bottom = thing.region
        rows, columns = slice(top // patch, -(-bottom // patch)), slice(left // patch, -(-right // patch))
        labels[rows, columns] = 0
    for thing in scene.things:
        if thing.card is None or thing.card.number is None:
            continue
        centre, top = (thing.card.box[0] + thing.card.box[2]) / 2, thing.box[3] + 1
        high = np.clip(np.minimum(edges[1:], top + 22) - np.maximum(edges[:-1], top), 0, patch) / patch
        for place, digit in enumerate(divmod(thing.card.number, 10)):
            start = centre + 16 * (place - 1)
            wide = np.clip(np.minimum(edges[1:], start + 16) - np.maximum(edges[:-1], start), 0, patch) / patch
            share = high[:, None] * wide[None, :]
            own = share > np.maximum(seen, 0.2)
            labels[own] = 1 + 10 * place + digit
            labels[(share > 0.02) & ~own & (seen == 0)] = IGNORE
            seen = np.maximum(seen, share * (share > 0.02))
    return labels.reshape(-1)


def presence(scene: Scene) -> np.ndarray:
    """Which kinds and colours the picture holds, float32 ``(len(KINDS) + len(COLOURS),)``: what [CLS] is taught."""
    colours = {thing.card.colour for thing in scene.things if thing.card}
    return np.array([kind in scene.counts for kind in KINDS] + [c in colours for c in COLOURS], np.float32)


def _facts(scene: Scene, thing: Thing) -> list[int]:
    """The label of every slot for ``thing``, in the order of ``SLOTS``; what differs from patch to patch is open."""
    card = thing.card
    number = card.number if card else None

    def third(axis: int) -> int:
        place = thing.third(axis)
        return THIRDS[axis].index(place) + 1 if place else IGNORE

    box = [round(edge / SIDE * BOX_SCALE) for edge in thing.box]
    return [
        list(KINDS).index(thing.kind) + 1,
        list(COLOURS).index(card.colour) + 1 if card else NONE,
        number // 10 + 1 if number is not None else NONE,
        number % 10 + 1 if number is not None else NONE,
        scene.counts[thing.kind],
        third(0),
        third(1),
        IGNORE,
        IGNORE,
        *(edge // 10 + 1 for edge in box),
        *(edge % 10 + 1 for edge in box),
    ]
