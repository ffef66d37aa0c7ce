"""Scenes: every answer against a slow and obvious reading of the scene, and what the questions give away."""

import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from tprl.data import SCENES, load_source
from tprl.data.sample import Sample
from tprl.data.scenes.drawing import render
from tprl.data.scenes.questions import BOX_SCALE, FAMILIES, ask, box_text, parse_box
from tprl.data.scenes.scene import COLOURS, KINDS, SIDE, Scene, SceneSettings, Thing, make_scene
from tprl.data.scenes.source import Scenes

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def source() -> Scenes:
    return Scenes("test", 12000)


def centre(thing: Thing) -> tuple[float, float]:
    return (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2


def the(scene: Scene, kind: str) -> Thing:
    """The one thing of its kind."""
    (thing,) = [thing for thing in scene.things if thing.kind == kind]
    return thing


def clearly_nearest(thing: Thing, others: list[Thing]) -> str:
    """The kind of the nearest, which has to be nearer than all others by a quarter."""
    others = sorted(others, key=lambda other: math.dist(centre(thing), centre(other)))
    distances = [math.dist(centre(thing), centre(other)) for other in others]
    assert len(distances) == 1 or distances[1] >= 1.25 * distances[0]
    return others[0].kind


def answer(scene: Scene, question: str) -> str:
    """What a patient reader of the scene's content answers, for every family but grounding."""
    kinds = [thing.kind for thing in scene.things]
    if match := re.fullmatch(r"Is there an? (\w+) in the picture\?", question):
        return "yes" if match[1] in kinds else "no"
    if match := re.fullmatch(r"What colour is the card under the (\w+)\?", question):
        return the(scene, match[1]).card.colour
    if match := re.fullmatch(r"What lies on the (\w+) card\?", question):
        (thing,) = [thing for thing in scene.things if thing.card and thing.card.colour == match[1]]
        return thing.kind
    if match := re.fullmatch(r"How many (\w+) drawings are there\?", question):
        return str(kinds.count(match[1]))
    if match := re.fullmatch(r"Are there more (\w+) than (\w+) drawings\?", question):
        first, second = kinds.count(match[1]), kinds.count(match[2])
        assert first != second
        assert first
        assert second
        return "yes" if first > second else "no"
    if match := re.fullmatch(r"What number is on the card under the (\w+)\?", question):
        return str(the(scene, match[1]).card.number)
    if match := re.fullmatch(r"What is nearest to the (\w+)\?", question):
        thing = the(scene, match[1])
        return clearly_nearest(thing, [other for other in scene.things if other is not thing])
    if match := re.fullmatch(r"What is (left of|right of|above|below) the (\w+)\?", question):
        thing = the(scene, match[2])
        towards = {"right of": 0, "below": 90, "left of": 180, "above": -90}[match[1]]
        there = []
        for other in scene.things:
            x, y = centre(other)[0] - centre(thing)[0], centre(other)[1] - centre(thing)[1]
            turn = math.degrees(math.atan2(y, x)) - towards
            if other is not thing and abs((turn + 180) % 360 - 180) <= math.degrees(math.atan(0.6)) + 1e-9:
                there.append(other)
        return clearly_nearest(thing, there)
    for axis, names in ((0, ("left", "center", "right")), (1, ("top", "middle", "bottom"))):
        choice = ("on the left, in the center or on the right", "at the top, in the middle or at the bottom")[axis]
        if match := re.fullmatch(rf"Is the (\w+) {choice}\?", question):
            place = centre(the(scene, match[1]))[axis]
            assert min(abs(place - SIDE / 3), abs(place - 2 * SIDE / 3)) >= 10
            return names[0] if place < SIDE / 3 else names[1] if place < 2 * SIDE / 3 else names[2]
    raise AssertionError(f"nobody understands {question!r}")


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right(source: Scenes, family: str) -> None:
    asked = [sample for sample in source.samples if sample.family == family]
    assert len(asked) > 500
    for sample in asked:
        scene = make_scene("test", int(sample.image_id))
        if family == "grounding":
            match = re.fullmatch(r"Where is the (\w+)\? Give its box\.", sample.question)
            edges = the(scene, match[1]).box
            assert sample.box_scale == BOX_SCALE
            assert sample.box == parse_box(sample.answers[0])
            assert np.abs(np.array(sample.box) * SIDE - edges).max() <= SIDE / BOX_SCALE / 2
        else:
            assert sample.answers == (answer(scene, sample.question),)
            assert sample.box is None


def test_the_reader_notices_a_changed_scene() -> None:
    """The negative control: with the things swapped, answers about places are no longer right."""
    wrong = Counter()
    for sample in Scenes("test", 600).samples:
        if sample.family in ("nearest", "relation", "position", "reading", "attribute"):
            scene = make_scene("test", int(sample.image_id))
            boxes, cards = [t.box for t in scene.things], [t.card for t in scene.things]
            things = [
                Thing(t.kind, box, card) for t, box, card in zip(scene.things, boxes[::-1], cards[::-1], strict=True)
            ]
            try:
                wrong[answer(Scene(tuple(things), "shapes", 0), sample.question) != sample.answers[0]] += 1
            except (AssertionError, AttributeError, IndexError):
                wrong[True] += 1
    assert wrong[True] > wrong[False]


def share(samples: list[Sample]) -> list[float]:
    counts = Counter(sample.answers[0] for sample in samples)
    return [count / len(samples) for _, count in counts.most_common()]


def test_no_answer_prior(source: Scenes) -> None:
    """Yes and no are even to four standard errors; elsewhere the most frequent answer stays rare."""
    families = defaultdict(list)
    for sample in source.samples:
        families[sample.family].append(sample)
    for family in ("existence", "comparison"):
        samples = families.pop(family)
        assert abs(share(samples)[0] - 0.5) < 4 * math.sqrt(0.25 / len(samples))
    most = {
        "attribute": 0.16, "reverse": 0.06, "counting": 0.33, "reading": 0.04, "nearest": 0.06, "relation": 0.06,
        "grounding": 0.03,
    }  # fmt: skip
    for axis in ("left", "top"):
        assert share([sample for sample in families["position"] if axis in sample.question])[0] < 0.42
    del families["position"]
    assert families.keys() == most.keys()
    for family, samples in families.items():
        assert share(samples)[0] < most[family], family


def test_a_kind_gives_no_yes_away(source: Scenes) -> None:
    """Which kind is asked for says nothing about yes and no: chi-square over kinds, 40 degrees of freedom at most."""
    for family in ("existence", "comparison"):
        table = defaultdict(Counter)
        for sample in source.samples:
            if sample.family == family:
                table[re.search(r"(?:an?|more) (\w+)", sample.question)[1]][sample.answers[0]] += 1
        assert len(table) == len(KINDS)
        chi = sum((row["yes"] - row["no"]) ** 2 / (row["yes"] + row["no"]) for row in table.values())
        assert chi < 85  # p = 5e-5


def test_equal_arguments_give_equal_scenes() -> None:
    assert Scenes("val", 50).samples == Scenes("val", 50).samples
    assert Scenes("val", 20).samples == Scenes("val", 50).samples[:20]
    first, second = (np.asarray(Scenes("val", 5).image("3")) for _ in range(2))
    assert (first == second).all()
    assert first.shape == (SIDE, SIDE, 3)
    assert (first != np.asarray(Scenes("val", 5).image("4"))).any()


def test_splits_share_no_scene() -> None:
    scenes = [make_scene(split, index) for split in SPLITS for index in range(1500)]
    assert len({scene.things for scene in scenes}) == len(scenes)
    assert len({np.asarray(render(make_scene(split, 0))).tobytes() for split in SPLITS}) == len(SPLITS)


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_things_stand_apart_within_the_picture() -> None:
    assert overlap((0, 0, 5, 5), (4, 4, 9, 9))
    assert not overlap((0, 0, 5, 5), (5, 0, 9, 5))
    for index in range(1500):
        scene = make_scene("train", index)
        assert 4 <= len(scene.things) <= 9
        colours = [thing.card.colour for thing in scene.things if thing.card]
        numbers = [thing.card.number for thing in scene.things if thing.card and thing.card.number is not None]
        assert len(set(colours)) == len(colours)
        assert len(set(numbers)) == len(numbers)
        assert set(colours) <= COLOURS.keys()
        assert all(10 <= number <= 99 for number in numbers)
        for i, thing in enumerate(scene.things):
            left, top, right, bottom = thing.region
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            assert left <= thing.box[0]
            assert top <= thing.box[1]
            assert right >= thing.box[2]
            assert bottom >= thing.box[3]
            assert not any(overlap(thing.region, other.region) for other in scene.things[:i])


def test_cards_and_numbers_are_as_frequent_as_asked() -> None:
    for index in range(50):
        full = make_scene("train", index, SceneSettings(max_objects=16, card_share=1, number_share=1))
        cards = [thing.card for thing in full.things if thing.card]
        assert len(cards) == min(len(full.things), len(COLOURS))
        assert all(card.number is not None for card in cards)
        plain = make_scene("train", index, SceneSettings(number_share=0)).things
        assert all(thing.card is None or thing.card.number is None for thing in plain)
        assert not any(thing.card for thing in make_scene("train", index, SceneSettings(card_share=0)).things)


@pytest.mark.parametrize("name", ["card_share", "number_share"])
@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_a_share(name: str, share: float) -> None:
    with pytest.raises(ValueError, match=rf"\[0, 1\], got {share}"):
        SceneSettings(**{name: share})


def test_pictures_show_the_things() -> None:
    """A picture differs from its background within the things and their cards, and nowhere else."""
    for index in range(4):
        scene = make_scene("test", index)
        empty = render(Scene((), scene.background, scene.background_seed))
        changed = (np.asarray(render(scene)) != np.asarray(empty)).any(2)
        for thing in scene.things:
            left, top, right, bottom = thing.region
            assert changed[top:bottom, left:right].mean() > 0.1
            changed[top : bottom + 1, left : right + 1] = False  # Pillow draws a card's last row and column too
        assert not changed.any()


def test_unseen_background_shows_the_same_things_elsewhere() -> None:
    seen, unseen = Scenes("test", 40), Scenes("test", 40, SceneSettings(background="tiles"))
    assert seen.samples == unseen.samples
    difference = np.asarray(seen.image("0")) != np.asarray(unseen.image("0"))
    outside = np.ones((SIDE, SIDE), bool)
    for thing in make_scene("test", 0).things:
        left, top, right, bottom = thing.region
        outside[top : bottom + 1, left : right + 1] = False
    assert difference.any(2)[outside].mean() > 0.9


def test_box_text_and_back() -> None:
    assert box_text((0, 16, 100, 384)) == "00 01 06 24"
    assert parse_box("00 01 06 24") == (0, 1 / 24, 0.25, 1)
    for thing in make_scene("test", 1).things:
        text = box_text(thing.box)
        again = tuple(round(edge * SIDE) for edge in parse_box(text))
        assert box_text(again) == text
        assert again[0] < again[2]
        assert again[1] < again[3]


def test_few_and_many_things() -> None:
    for settings in (SceneSettings(1, 1), SceneSettings(16, 16), SceneSettings(2, 3)):
        for index in range(30):
            scene = make_scene("train", index, settings)
            assert settings.min_objects <= len(scene.things) <= settings.max_objects
    lonely = make_scene("train", 0, SceneSettings(1, 1))
    rng = np.random.default_rng(0)
    assert [ask(lonely, family, rng) for family in ("comparison", "nearest", "relation")] == [None] * 3
    assert len(Scenes("train", 17, SceneSettings(1, 1)).samples) == 17


def test_bad_settings() -> None:
    for low, high in ((0, 4), (5, 4), (4, 17)):
        with pytest.raises(ValueError, match=f"got {low} and {high}"):
            SceneSettings(low, high)
    with pytest.raises(ValueError, match="'sea' is not one of"):
        SceneSettings(background="sea")
    with pytest.raises(ValueError, match="'dev' is not one of"):
        Scenes("dev", 1)


def test_named_scenes_show_what_training_never_does() -> None:
    plain, crowded, tiles = (load_source(name, "test", 200) for name in ("scenes", "scenes-crowded", "scenes-tiles"))
    assert [source.name for source in (plain, crowded, tiles)] == ["scenes", "scenes-crowded", "scenes-tiles"]
    for sample in crowded.samples:
        scene = make_scene("test", int(sample.image_id), SCENES["scenes-crowded"])
        assert 10 <= len(scene.things) <= 14
    assert max(len(make_scene("train", index).things) for index in range(300)) == 9
    assert list(tiles.samples) == list(plain.samples)  # the same things lie on another background
    assert tiles.image("0") != plain.image("0")
    assert {make_scene("train", index).background for index in range(20)} == {"shapes"}
