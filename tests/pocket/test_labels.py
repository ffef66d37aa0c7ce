"""What the tower is taught, against the scene's own content."""

import numpy as np

from tprl.data.scenes.scene import COLOURS, DIRECTIONS, KINDS, SIDE, make_scene
from tprl.pocket.labels import (
    GLYPHS,
    GRID,
    IGNORE,
    SLOTS,
    TOPIC,
    TOPICS,
    glyph_labels,
    patch_labels,
    patch_topics,
    presence,
)

NAMES = [slot.name for slot in SLOTS]
PATCH = SIDE // GRID


def test_patches_know_the_thing_that_covers_them() -> None:
    for index in range(20):
        scene = make_scene("val", index)
        labels = patch_labels(scene).reshape(len(SLOTS), GRID, GRID)
        seen = set()
        for thing in scene.things:
            x, y = thing.centre
            row, column = int(y // PATCH), int(x // PATCH)
            found = dict(zip(NAMES, labels[:, row, column].tolist(), strict=True))
            assert list(KINDS)[found["kind"] - 1] == thing.kind
            assert found["colour"] == (list(COLOURS).index(thing.card.colour) + 1 if thing.card else 0)
            number = thing.card.number if thing.card else None
            digits = (0, 0) if number is None else (number // 10 + 1, number % 10 + 1)
            assert (found["tens"], found["ones"]) == digits
            assert found["count"] == scene.counts[thing.kind]
            about = (None, *DIRECTIONS.values())[(column + 2 * row) % 5]
            near = scene.nearest(thing, about)
            assert (
                SLOTS[TOPIC].words[found["topic"] - 1]
                == ("nearest", *(p.split()[0] for p in DIRECTIONS))[(column + 2 * row) % 5]
            )
            assert found["neighbour"] == (list(KINDS).index(near.kind) + 1 if near else IGNORE)
            seen.add(thing.kind)
        kinds = {list(KINDS)[label - 1] for label in labels[0].flatten() if label > 0}
        assert kinds == seen


def test_any_three_by_three_patches_speak_of_all_topics() -> None:
    topics = patch_topics().reshape(GRID, GRID)
    for row, column in np.ndindex(GRID - 2, GRID - 2):
        assert set(topics[row : row + 3, column : column + 3].flatten()) == set(range(len(TOPICS)))


def test_far_patches_are_background() -> None:
    scene = make_scene("val", 1)
    labels = patch_labels(scene)[0].reshape(GRID, GRID)
    covered = np.zeros((SIDE, SIDE), bool)
    for thing in scene.things:
        left, top, right, bottom = thing.region
        covered[top:bottom, left:right] = True
    empty = ~covered.reshape(GRID, PATCH, GRID, PATCH).any((1, 3))
    assert empty.any()
    assert (labels[empty] == 0).all()


def test_glyphs_lie_where_the_numbers_are_drawn() -> None:
    found = 0
    for index in range(30):
        scene = make_scene("val", index)
        labels = glyph_labels(scene).reshape(GRID, GRID)
        wanted = set()
        for thing in scene.things:
            if thing.card and thing.card.number is not None:
                tens, ones = divmod(thing.card.number, 10)
                wanted |= {1 + tens, 11 + ones}
                left, top, right, bottom = (edge // PATCH for edge in thing.card.box)
                inside = labels[top : bottom + 1, left : right + 1]
                assert {1 + tens, 11 + ones} <= set(inside.flatten().tolist())
                found += 1
        assert {label for label in labels.flatten().tolist() if label > 0} == wanted
        assert labels.max() < GLYPHS
    assert found > 20


def test_presence_lists_kinds_and_colours() -> None:
    scene = make_scene("val", 2)
    given = presence(scene)
    kinds = {kind for kind, there in zip(KINDS, given, strict=False) if there}
    colours = {colour for colour, there in zip(COLOURS, given[len(KINDS) :], strict=True) if there}
    assert kinds == {thing.kind for thing in scene.things}
    assert colours == {thing.card.colour for thing in scene.things if thing.card}
