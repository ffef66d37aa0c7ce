"""The contact sheet."""

import numpy as np
import pytest
from PIL import Image

from tprl.data.sample import Sample
from tprl.data.sheet import WIDTH, _choose, _wrap, contact_sheet


class Plain:
    """Pictures of one colour each, wide and tall."""

    name, split = "plain", "test"
    colours = ((200, 30, 30), (30, 200, 30), (30, 30, 200))

    def __init__(self) -> None:
        box = (0.25, 0.25, 0.75, 0.75)
        self.samples = [
            Sample("0", "0", "Which colour is it?", ("red",), "colour"),
            Sample("1", "0", "Which colour is it?", ("red",), "colour"),
            Sample("2", "1", "Which colour is it? " * 30, ("green",), "colour"),
            Sample("3", "2", "Where is it?", ("1 1 3 3",), "grounding", box, 4),
        ]

    def image(self, image_id: str) -> Image.Image:
        return Image.new("RGB", (40, 20) if image_id == "1" else (20, 40), self.colours[int(image_id)])

    def version(self, image_id: str) -> str:
        return ""


class NoFont:
    """Every character is ten pixels wide."""

    def getlength(self, text: str) -> int:
        return 10 * len(text)


def test_every_chosen_picture_is_on_the_sheet() -> None:
    source = Plain()
    sheet = contact_sheet(source, 10)
    assert sheet.mode == "RGB"
    pixels = np.asarray(sheet).reshape(-1, 3)
    counts = [(pixels == colour).all(1).sum() for colour in source.colours]
    half = WIDTH * WIDTH / 2
    assert counts[:2] == pytest.approx([2 * half, half], rel=0.02)
    assert 0.9 * half < counts[2] < half  # its target box is drawn on it
    assert sheet.size[0] > contact_sheet(source, 1).size[0]


def test_families_take_turns_and_pictures_repeat_late() -> None:
    assert [sample.sample_id for sample in _choose(Plain().samples, 9)] == ["0", "3", "2", "1"]
    assert [sample.sample_id for sample in _choose(Plain().samples, 2)] == ["0", "3"]


def test_lines_fit() -> None:
    font = NoFont()
    assert _wrap("one two three", font, 70) == ["one two", "three"]  # type: ignore[arg-type]
    long = _wrap("one two three four five six seven", font, 80, most=2)  # type: ignore[arg-type]
    assert long == ["one two", "thre ..."]
    assert _wrap("Donaudampfschiff", font, 80) == ["Dona ..."]  # type: ignore[arg-type]


def test_shows_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        contact_sheet(Plain(), 0)
