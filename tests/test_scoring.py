"""Scores of answers, against cases worked out by hand and slow obvious computations."""

from itertools import product

import pytest

from tprl.data.sample import Sample
from tprl.scoring import box_iou, exact, normalise_answer, parse_box, score, vqa_accuracy

NORMALISED = {
    " Yes. ": "yes",
    "The red bus": "red bus",
    "an apple, a pear": "apple pear",
    "two dogs": "2 dogs",
    "none": "0",
    "No": "no",
    "nothing": "nothing",
    "$1,000.50": "$1000.50",
    "3.5": "3.5",
    "it's": "its",
    "it\u2019s": "its",
    "\u201cred\u201d": "red",
    "well-known": "well known",
    "U.S.A.": "usa",
    "a": "a",
    "(A)": "a",
    "A.": "a",
    "(B)": "b",
    "The": "the",
    "$.99": "$.99",
    ".5 m.": ".5 m",
    "?": "?",
    "10:30": "10:30",
    "Colour: **red**": "colour red",
    "\u732b\u3002": "\u732b",
    "": "",
}


@pytest.mark.parametrize(("text", "expected"), NORMALISED.items())
def test_normalise(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@pytest.mark.parametrize("text", NORMALISED)
def test_normalise_twice_is_once(text: str) -> None:
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


def test_exact_compares_whole_texts() -> None:
    assert exact("No.", ["no"]) == 1
    assert exact("nothing", ["no"]) == 0
    assert exact("no", ["nothing"]) == 0
    assert exact("red bus", ["red"]) == 0
    assert exact("Two", ["one", "2"]) == 1
    assert exact("", ["?"]) == 0
    assert exact("A.", ["A"]) == exact("B.", ["B"]) == 1
    assert exact(".5", ["5"]) == 0


def leave_one_out(answer: str, references: list[str]) -> float:
    """VQA v2's rule, written out."""
    accuracies = []
    for i in range(len(references)):
        others = references[:i] + references[i + 1 :]
        accuracies.append(min(1, len([other for other in others if other == answer]) / 3))
    return sum(accuracies) / len(accuracies)


def test_vqa_accuracy_is_the_rule_of_vqa_v2() -> None:
    assert vqa_accuracy("bus", ["bus"] * 2 + ["coach"] * 8) == pytest.approx(0.6)
    assert vqa_accuracy("bus", ["bus"] * 3 + ["coach"] * 7) == pytest.approx(0.9)
    assert vqa_accuracy("bus", ["bus"] * 4 + ["coach"] * 6) == 1
    for count in (4, 5, 10):
        for right in range(count + 1):
            references = ["bus"] * right + ["coach"] * (count - right)
            assert vqa_accuracy("Bus!", references) == pytest.approx(leave_one_out("bus", references))


def test_vqa_accuracy_of_few_people_can_reach_one() -> None:
    assert vqa_accuracy("bus", ["bus"]) == 1
    assert vqa_accuracy("bus", ["bus", "bus"]) == 1
    assert vqa_accuracy("bus", ["bus", "coach"]) == 0.5
    assert vqa_accuracy("bus", ["bus", "bus", "coach"]) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert vqa_accuracy("train", ["bus", "coach"]) == 0
    with pytest.raises(ValueError, match="no references"):
        vqa_accuracy("bus", [])


def test_box_iou_counts_cells() -> None:
    """On a grid of 6 x 6, intersection and union are numbers of cells."""

    def cells(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
        return set(product(range(box[0], box[2]), range(box[1], box[3])))

    boxes = [(0, 0, 3, 3), (1, 1, 4, 5), (3, 0, 6, 2), (0, 0, 6, 6), (2, 2, 3, 3), (5, 5, 6, 6)]
    for first, second in product(boxes, boxes):
        expected = len(cells(first) & cells(second)) / len(cells(first) | cells(second))
        assert box_iou(first, second) == pytest.approx(expected)
    assert box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


@pytest.mark.parametrize(
    ("text", "scale", "expected"),
    [
        ("03 06 12 24", 24, (0.125, 0.25, 0.5, 1.0)),
        ("[0.1, .2, 0.3, 0.4]", 1, (0.1, 0.2, 0.3, 0.4)),
        ('{"bbox_2d": [10, 20, 30, 40], "label": "cup"}', 100, (0.1, 0.2, 0.3, 0.4)),
        ("<box>(10,20),(30,40)</box>.", 100, (0.1, 0.2, 0.3, 0.4)),
        ("1e-05 0 0.5 1", 1, (1e-05, 0, 0.5, 1)),
        ("1E-05 0 0.5 1", 1, (1e-05, 0, 0.5, 1)),
        ("-10 0 30 40", 100, (-0.1, 0, 0.3, 0.4)),
        ("03 06 12", 24, None),
        ("03 06 12 24 1", 24, None),
        ("12 06 03 24", 24, None),
        ("03 24 12 24", 24, None),
        ("12 06 12 24", 24, None),
        ("the cup", 24, None),
        ("1px 2px 3px 4px", 24, None),
        ("0.1x 0.2x 0.3x 0.4x", 24, None),
        ("", 24, None),
    ],
)
def test_parse_box(text: str, scale: float, expected: tuple[float, ...] | None) -> None:
    assert parse_box(text, scale) == (expected and pytest.approx(expected))


def test_score_goes_by_the_sample() -> None:
    one = Sample("1", "p", "Is there a dog?", ("no",), "existence")
    people = Sample("2", "p", "What is it?", ("bus", "bus", "coach", "coach"), "open")
    box = Sample("3", "p", "Where is it?", ("06 06 12 12",), "grounding", (0.25, 0.25, 0.5, 0.5), 24)
    assert score(one, "No!") == 1
    assert score(one, "nothing") == 0
    assert score(people, "bus") == pytest.approx((1 / 3 + 1 / 3 + 2 / 3 + 2 / 3) / 4)
    assert score(box, "06 06 12 12") == 1
    assert score(box, "06 06 12 18") == pytest.approx(0.5)
    assert score(box, "there") == 0
