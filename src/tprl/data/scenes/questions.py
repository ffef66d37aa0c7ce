"""Questions about scenes, whose answers are known by construction.

Ten families mirror the field's benchmarks. Each first draws the answer that it would like (yes or no, one to four, top
or bottom) and asks only where the scene offers it, so no answer prior passes.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from tprl.data.sample import Box
from tprl.data.scenes.scene import DIRECTIONS, KINDS, SIDE, THIRDS, Scene

FAMILIES = (
    "existence", "attribute", "reverse", "counting", "comparison", "reading",
    "nearest", "position", "relation", "grounding",
)  # fmt: skip

BOX_SCALE = 24
"""Grounding answers count in 24ths of the side, one visual token of pocket-llava."""


def ask(scene: Scene, family: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """A question of ``family`` about ``scene`` and its answer, or None where the scene offers none."""
    return _FAMILIES[family](scene, rng)


def box_text(box: tuple[int, int, int, int]) -> str:
    """A pixel box as the answer text of a grounding question, for example "03 05 09 11"."""
    return " ".join(f"{round(edge / SIDE * BOX_SCALE):02d}" for edge in box)


def parse_box(text: str) -> Box:
    """The inverse of ``box_text``, as fractions of the side."""
    left, top, right, bottom = (int(edge) / BOX_SCALE for edge in text.split())
    return left, top, right, bottom


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
