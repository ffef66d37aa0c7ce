"""Anybody's data: a JSONL file of questions and a folder of pictures.

One JSON object a line, for example::

    {"image": "street/0001.jpg", "question": "How many cars are there?", "answer": "3", "family": "counting"}
    {"image": "street/0001.jpg", "question": "What is it?", "answers": ["bus", "bus", "coach"], "id": "q17"}
    {"image": "desk.png", "question": "Where is the cup?", "box": [120, 400, 260, 610], "box_scale": 1000}

``image`` is a path relative to the picture folder; ``./a.png`` and ``x/../a.png`` are ``a.png``, whatever ``x`` is.
Every record has one of ``answer`` (a text), ``answers`` (one text for each person asked, scored by VQA accuracy) and
``box`` (left, top, right, bottom, scored by IoU). A box is written in the numbers that the model is expected to answer
with, and ``answer`` beside it is how the model writes them, as they stand unless given. ``box_scale`` is the number
that stands for a whole side, 1 (fractions of the sides) unless given. Boxes in pixels have to be divided by the width
and height first. ``family`` groups the results ("all" unless given), and ``id`` names the question (the number of its
line unless given).
"""

import json
import posixpath
import struct
import warnings
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tprl.data.sample import Box, DataError, Sample
from tprl.data.splits import held_out

FIELDS = ("image", "question", "answer", "answers", "box", "box_scale", "family", "id")
SPLITS = ("train", "val", "test")

Line = tuple[int, Sample]


class Jsonl:
    """A JSONL file of questions, as the module's docstring describes it.

    Every line is checked at once. That pictures exist and are not empty is checked at once too, but they are decoded,
    to their end, only when they are used; with ``skip_bad`` before, since a sample cannot be skipped later.

    Args:
        path: the file.
        split: "test" is the whole file; "val" is the tenth of its pictures that ``held_out`` chooses, and "train" the
            rest, so that a file can be trained on. Questions to test with belong into a file of their own.
        n: at most so many samples; None for all.
        images: the picture folder; None is the folder of the file.
        skip_bad: leave out records that cannot be read, say so in a warning and list them in ``skipped``.

    Raises:
        DataError: the file is missing, a record cannot be read and is not to be skipped, or no sample is left. The
            message says which file and line.
        ValueError: the split is none of these.
    """

    def __init__(
        self, path: Path, split: str, n: int | None = None, images: Path | None = None, skip_bad: bool = False
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {SPLITS}")
        self.path, self.split, self.name = path, split, path.name
        self.folder = path.parent if images is None else images
        self.skipped: list[str] = []
        self._skip_bad = skip_bad
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        if not self.folder.is_dir():
            raise DataError(f"there is no picture folder {self.folder}")
        self._lines: dict[str, int] = {}
        lines = list(self._records())
        samples: list[Sample] = []
        for number, sample in self._of_split(lines):
            if len(samples) == n:
                break
            if self._has_picture(number, sample):
                samples.append(sample)
        self.samples: Sequence[Sample] = samples
        if self.skipped:
            warnings.warn(f"skipped {len(self.skipped)} bad records: {'; '.join(self.skipped[:5])}", stacklevel=2)
        if not samples:
            raise DataError(f"{path} has no sample for split {split!r} among its {len(lines)} readable records")

    def image(self, image_id: str) -> Image.Image:
        try:
            return read_image(self.folder / image_id)
        except DataError as error:
            raise DataError(f"{self.path}:{self._lines[image_id]}: {error}") from error

    def version(self, image_id: str) -> str:
        status = (self.folder / image_id).stat()
        return f":{status.st_size}:{status.st_mtime_ns}"

    def files(self) -> set[Path]:
        """The files of the pictures, each by the one path that it has however it is named."""
        return {(self.folder / image_id).resolve() for image_id in {sample.image_id for sample in self.samples}}

    def _records(self) -> Iterator[Line]:
        """The samples of all lines that can be read, with their line numbers."""
        ids: dict[str, int] = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    sample = parse_record(line, str(number))
                    if sample.sample_id in ids:
                        raise DataError(f"id {sample.sample_id!r} is taken by line {ids[sample.sample_id]}")
                except DataError as error:
                    self._bad(number, error)
                else:
                    ids[sample.sample_id] = number
                    self._lines.setdefault(sample.image_id, number)
                    yield number, sample

    def _of_split(self, lines: list[Line]) -> list[Line]:
        if self.split == "test":
            return lines
        val = held_out(sample.image_id for _, sample in lines)
        return [line for line in lines if (line[1].image_id in val) == (self.split == "val")]

    def _has_picture(self, number: int, sample: Sample) -> bool:
        path = self.folder / sample.image_id
        try:
            if not path.is_file():
                raise DataError(f"there is no picture {path}")
            if not path.stat().st_size:
                raise DataError(f"picture {path} is empty (zero bytes)")
            if self._skip_bad:
                read_image(path)
        except DataError as error:
            self._bad(number, error)
            return False
        except OSError as error:  # a name that is too long, a folder that may not be entered
            self._bad(number, DataError(f"cannot look for picture {path}: {error.strerror}"))
            return False
        return True

    def _bad(self, number: int, error: DataError) -> None:
        message = f"{self.path}:{number}: {error}"
        if not self._skip_bad:
            raise DataError(message) from error
        self.skipped.append(message)


def parse_record(line: bytes | str, default_id: str) -> Sample:
    """The sample that a line of JSON gives.

    Raises:
        DataError: it is no JSON object, a field is missing, unknown, empty, of the wrong type or no Unicode text, or
            the box is none.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise DataError("nested too deeply to be read") from error
    if not isinstance(record, dict):
        raise DataError(f"a record is a JSON object, got {record!r:.80}")
    if unknown := sorted(record.keys() - set(FIELDS)):
        raise DataError(f"unknown fields {unknown}; known are {list(FIELDS)}")
    given = [name for name in ("answer", "answers", "box") if name in record]
    if len(given) != 1 and given != ["answer", "box"]:
        raise DataError(f"a record has one of 'answer', 'answers' and 'box', this one has {given or 'none'}")
    if "box_scale" in record and "box" not in record:
        raise DataError("'box_scale' is of no use without 'box'")
    box, scale = None, 1.0
    if "box" in record:
        box, scale = _box(record)
        written = _text(record, "answer") if "answer" in record else " ".join(str(edge) for edge in record["box"])
        answers: tuple[str, ...] = (written,)
    elif "answer" in record:
        answers = (_text(record, "answer"),)
    else:
        answers = _texts(record, "answers")
    return Sample(
        sample_id=_text(record, "id") if "id" in record else default_id,
        image_id=posixpath.normpath(_text(record, "image")),  # one id a picture, so that no two splits share it
        question=_text(record, "question"),
        answers=answers,
        family=_text(record, "family") if "family" in record else "all",
        box=box,
        box_scale=scale,
    )


def read_image(path: Path) -> Image.Image:
    """The RGB picture in a file, decoded to its end and turned upright by its EXIF orientation.

    Raises:
        DataError: there is none, or it is empty, truncated, too large or no picture, or of 32 bits a pixel's channel,
            which say nothing of what is white.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"its pixels are numbers of 32 bits (mode {image.mode})")
            return image.convert("RGB")
    except (
        OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError
    ) as error:  # fmt: skip
        raise DataError(f"cannot read picture {path}: {error}") from error


def _text(record: dict[str, Any], name: str) -> str:
    if name not in record:
        raise DataError(f"field {name!r} is missing")
    text = record[name]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"field {name!r} has to be a text that is not empty, got {text!r:.80}")
    return _unicode(text, name)


def _texts(record: dict[str, Any], name: str) -> tuple[str, ...]:
    texts = record[name]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"field {name!r} has to be a list of texts, none of them empty, got {texts!r:.80}")
    return tuple(_unicode(text, name) for text in texts)


def _unicode(text: str, name: str) -> str:
    """``text`` without the space around it. JSON can write half of a surrogate pair, which no file or digest takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"field {name!r} is no Unicode text: {error}") from error
    return text.strip()


def _box(record: dict[str, Any]) -> tuple[Box, float]:
    """The box as fractions, and its scale."""
    scale, edges = record.get("box_scale", 1), record["box"]
    if not _is_number(scale) or scale <= 0:
        raise DataError(f"field 'box_scale' has to be a number above 0, got {scale!r:.80}")
    if not isinstance(edges, list) or len(edges) != 4 or not all(_is_number(edge) for edge in edges):
        raise DataError(f"field 'box' has to be four numbers, left, top, right and bottom, got {edges!r:.80}")
    left, top, right, bottom = edges
    if not (0 <= left < right <= scale and 0 <= top < bottom <= scale):
        raise DataError(
            f"box {edges} is not 0 <= left < right <= {scale} and 0 <= top < bottom <= {scale}; "
            "'box_scale' is the number that stands for a whole side"
        )
    return (left / scale, top / scale, right / scale, bottom / scale), float(scale)


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # a whole number that no float is as large as
        return False
