"""easy-VQA: questions about the colour and shape of one figure, an outside data set that comes as a Python package.

4,000 training pictures with 38,575 questions and 1,000 test pictures with 9,673, each 64 x 64 pixels.
https://github.com/vzhou842/easy-VQA, MIT licence.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tprl.data.jsonl import read_image
from tprl.data.sample import Sample
from tprl.data.splits import held_out

FAMILIES = ("existence", "absence", "colour", "shape")
SPLITS = ("train", "val", "test")


class EasyVqa:
    """The ``easy-vqa`` source, in the package's own order.

    "test" is the package's own; "val" is the tenth of its training pictures that ``held_out`` chooses, and "train"
    the rest, so no two splits share a picture.

    Args:
        split: "train", "val" or "test".
        n: at most so many samples; None for all.

    Raises:
        ValueError: the split is none of these.
    """

    name = "easy-vqa"

    def __init__(self, split: str, n: int | None = None) -> None:
        import easy_vqa

        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {SPLITS}")
        self.split = split
        folder = "test" if split == "test" else "train"
        if split == "test":
            rows, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
        else:
            rows, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
        self._paths = {f"{folder}/{number}": Path(path) for number, path in paths.items()}
        if split != "test":
            val = held_out(self._paths)
            self._paths = {name: path for name, path in self._paths.items() if (name in val) == (split == "val")}
        samples = [
            Sample(f"{folder}/{index}", f"{folder}/{number}", question, (answer,), question_family(question))
            for index, (question, answer, number) in enumerate(zip(*rows, strict=True))
            if f"{folder}/{number}" in self._paths
        ]
        self.samples: Sequence[Sample] = samples[:n]

    def image(self, image_id: str) -> Image.Image:
        return read_image(self._paths[image_id])

    def version(self, image_id: str) -> str:
        return ""


def question_family(question: str) -> str:
    """Which of ``FAMILIES`` a question belongs to: what is asked for, or, of yes and no, whether it is negated."""
    words = set(question.rstrip("?").split())
    if "what" in words:
        return "colour" if "color" in words else "shape"
    return "absence" if words & {"not", "no"} else "existence"
