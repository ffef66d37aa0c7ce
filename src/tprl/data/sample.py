"""A question about a picture, and where such questions come from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

Box = tuple[float, float, float, float]

UNSAID_SCALE = 24
"""The ``box_scale`` of scenes. Digests leave it out: results are kept by those of before it was part of them."""


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    Attributes:
        sample_id: unique within its source.
        image_id: names the picture; several samples may share one.
        question: the text put to the model, without any chat template.
        answers: accepted answers, best first; several give VQA accuracy.
        family: the kind of question, for per-family results.
        box: for grounding, the target ``(left, top, right, bottom)`` as fractions of the picture's sides.
        box_scale: for grounding, the number that stands for a whole side in the model's answer.
    """

    sample_id: str
    image_id: str
    question: str
    answers: tuple[str, ...]
    family: str
    box: Box | None = None
    box_scale: float = 1.0


class Source(Protocol):
    """A named, ordered, reproducible set of samples and the pictures they speak of."""

    name: str
    split: str
    samples: Sequence[Sample]

    def image(self, image_id: str) -> Image.Image:
        """The RGB picture called ``image_id``; raises DataError where it cannot be read."""
        ...

    def version(self, image_id: str) -> str:
        """A text that changes where the picture called ``image_id`` may have changed; "" where none ever does."""
        ...


class DataError(ValueError):
    """A record or a picture that cannot be read; the message names it."""


def samples_digest(source: Source) -> str:
    """A digest that changes with any question, answer, box, box scale or picture."""
    samples = "\n".join(
        f"{s.image_id}{source.version(s.image_id)}\t{s.question}\t{s.answers}\t{s.box}{_scale(s)}"
        for s in source.samples
    )
    return hashlib.sha256(samples.encode()).hexdigest()[:16]


def _scale(sample: Sample) -> str:
    """What a digest says of the box scale; nothing where there is no box to scale."""
    if sample.box is None or sample.box_scale == UNSAID_SCALE:
        return ""
    return f"\t{float(sample.box_scale)}"
