"""How good an answer's text is: exact match, VQA accuracy, or the overlap of boxes. Pure functions, scores in [0, 1].

Texts are compared whole, never by substring: "no" is in "nothing".
"""

import re
from collections.abc import Sequence

from tprl.data.sample import Box, Sample

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_INSIDE_WORDS = re.compile(r"['\u2019]|\.(?!\d)|(?<=\d),(?=\d)")
_FULL_WIDTH = "\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
_BETWEEN_WORDS = re.compile(rf"[;/\[\](){{}}\"\u201c\u201d=+\\_\-<>@`,?!*{_FULL_WIDTH}]|:(?!\d)|(?<!\d):")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?(?!\.?\w)", re.IGNORECASE)


def normalise_answer(text: str) -> str:
    """An answer as it is compared: lower case, number words to ten as digits, no punctuation, no articles.

    After the evaluation of VQA v2 (arXiv 1612.00837). Points of decimals stay, separators of thousands go. Differs in
    three things: apostrophes are dropped instead of restored; asterisks, full-width marks and colons outside of numbers
    are punctuation, too; and an answer that is nothing but articles keeps them, so that the choice "A" is not empty.
    One that is nothing but punctuation stays as it is.
    """
    text = text.strip().lower()
    words = _BETWEEN_WORDS.sub(" ", _INSIDE_WORDS.sub("", text)).split()
    told = [_DIGITS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(told or words) or text


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if ``answer`` equals one of ``references`` after ``normalise_answer``, else 0."""
    return float(normalise_answer(answer) in {normalise_answer(reference) for reference in references})


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA v2's accuracy against the answers of several people, in [0, 1].

    Leaving out one person at a time, the mean over people of ``min(matches among the others / 3, 1)``
    (arXiv 1612.00837). With two or three people, all of the others have to match instead of three, so that 1 can be
    reached; with one person it is ``exact``.

    Raises:
        ValueError: there are no references.
    """
    if not references:
        raise ValueError("an answer cannot be scored against no references")
    if len(references) == 1:
        return exact(answer, references)
    given = normalise_answer(answer)
    matches = [given == normalise_answer(reference) for reference in references]
    wanted = min(3, len(matches) - 1)
    return sum(min((sum(matches) - own) / wanted, 1.0) for own in matches) / len(matches)


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes ``(left, top, right, bottom)``, in [0, 1]; 0 where both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = _area(first) + _area(second) - shared
    return shared / union if union > 0 else 0.0


def parse_box(text: str, scale: float) -> Box | None:
    """The box that a text gives as four numbers, as fractions of the picture's sides.

    Args:
        text: for example "03 05 09 11", "[0.1, 0.2, 0.3, 0.4]" or '{"bbox_2d": [10, 20, 30, 40]}'.
        scale: the number that stands for a whole side.

    Returns:
        None where the text holds more or fewer than four numbers, or they are no box: right of left, below top.
    """
    numbers = [float(number) / scale for number in _NUMBER.findall(text)]
    if len(numbers) != 4:
        return None
    left, top, right, bottom = numbers
    return (left, top, right, bottom) if left < right and top < bottom else None


def score(sample: Sample, answer: str) -> float:
    """How good ``answer`` is for ``sample``, in [0, 1]: IoU where a box is asked for, else VQA accuracy, which is
    exact match where one answer is accepted. A text that gives no box scores 0, as a missed target does."""
    if sample.box is None:
        return vqa_accuracy(answer, sample.answers)
    found = parse_box(answer, sample.box_scale)
    return box_iou(found, sample.box) if found else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
