"""easy-VQA's splits and families."""

import pytest

from tprl.data import load_source
from tprl.data.easy_vqa import FAMILIES, EasyVqa, question_family

COLOURS = {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}


@pytest.fixture(scope="module")
def splits() -> dict[str, EasyVqa]:
    return {split: EasyVqa(split) for split in ("train", "val", "test")}


def test_splits_share_no_picture_and_lose_no_question(splits: dict[str, EasyVqa]) -> None:
    pictures = {split: {sample.image_id for sample in source.samples} for split, source in splits.items()}
    assert {split: len(names) for split, names in pictures.items()} == {"train": 3600, "val": 400, "test": 1000}
    assert len(set.union(*pictures.values())) == 5000
    assert len(splits["train"].samples) + len(splits["val"].samples) == 38575
    assert len(splits["test"].samples) == 9673
    assert len({sample.sample_id for source in splits.values() for sample in source.samples}) == 38575 + 9673


def test_no_picture_is_in_two_splits_under_two_names(splits: dict[str, EasyVqa]) -> None:
    pixels = {
        split: {source._paths[sample.image_id].read_bytes() for sample in source.samples}
        for split, source in splits.items()
    }
    assert not pixels["train"] & pixels["val"]
    assert not (pixels["train"] | pixels["val"]) & pixels["test"]


def test_answers_fit_families(splits: dict[str, EasyVqa]) -> None:
    answers: dict[str, set[str]] = {family: set() for family in FAMILIES}
    for sample in splits["test"].samples:
        answers[sample.family].update(sample.answers)
    yes_no = {"yes", "no"}
    assert answers == {"existence": yes_no, "absence": yes_no, "colour": COLOURS, "shape": SHAPES}


def test_pictures_show_the_answers(splits: dict[str, EasyVqa]) -> None:
    """The figure's colour, which is the most frequent colour far from the pale background, is the answer."""
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
    asked = [s for s in splits["val"].samples if s.family == "colour" and s.answers[0] in colours][:20]
    for sample in asked:
        picture = splits["val"].image(sample.image_id)
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
        dark = [(count, colour) for count, colour in picture.getcolors(4096) or [] if min(colour) < 150]
        assert max(dark)[1] == colours[sample.answers[0]]


@pytest.mark.parametrize(
    ("question", "family"),
    [
        ("what is the blue shape?", "shape"),
        ("what color is the shape?", "colour"),
        ("what is the color of the circle?", "colour"),
        ("is there a triangle?", "existence"),
        ("is there not a red shape in the image?", "absence"),
        ("is no circle present?", "absence"),
    ],
)
def test_question_family(question: str, family: str) -> None:
    assert question_family(question) == family


def test_first_n_and_unknown_names() -> None:
    assert list(load_source("easy-vqa", "test", 7).samples) == list(EasyVqa("test").samples)[:7]
    with pytest.raises(ValueError, match="'dev' is not one of"):
        load_source("easy-vqa", "dev")
    with pytest.raises(ValueError, match=r"'coco' is not one of scenes, .*, easy-vqa or the path of a \.jsonl file"):
        load_source("coco", "test")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        load_source("easy-vqa", "test", 0)
    with pytest.raises(ValueError, match="scenes never end"):
        load_source("scenes", "test")
