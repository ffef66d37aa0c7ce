"""What one visitor of the page does: look at a picture, ask, and compare what methods keep."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from tprl.config import ImitateStage
from tprl.data.jsonl import read_image
from tprl.data.sample import DataError
from tprl.demo.steps import Stepwise
from tprl.evaluate.answers import Answered, answered
from tprl.evaluate.methods import Method, make_methods
from tprl.lvlm.model import Lvlm
from tprl.pruner import TokenPruner

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 25_000_000
SIDE = 1024
"""Longer side in pixels to which larger pictures are shrunk, so that models that take any size stay within bounds."""
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_QUESTION = 300
STEPS = len(ImitateStage().budgets)
"""Steps in which the policy was shown how to prune."""

Mode = Literal["budget", "threshold", "steps"]


@dataclass(frozen=True)
class Amount:
    """How much is to stay.

    Attributes:
        mode: "budget": the likeliest ``budget`` tokens. "threshold": those with a keep probability above ``threshold``.
            "steps": what is held after ``step`` of ``STEPS`` steps to ``budget``.
    """

    mode: Mode
    budget: int
    threshold: float
    step: int


@dataclass(frozen=True)
class Column:
    """What one method does: its name ("" is the whole model), and its answer or why there is none."""

    name: str
    answered: Answered | None
    refusal: str = ""


class Visit:
    """A picture and what was asked about it; answers are kept, since sliders go back and forth.

    Args:
        lvlm: answers; two visits of one model may not ask at once.
        pruner: the policy; None where only peers are compared.
        image: RGB.

    Attributes:
        questions: that were asked, the latest first.
    """

    def __init__(self, lvlm: Lvlm, pruner: TokenPruner | None, image: Image.Image) -> None:
        self.lvlm, self.pruner, self.image = lvlm, pruner, image
        [self._encoded] = lvlm.encode_images([image])
        self.questions: list[str] = []
        self._answers: dict[tuple[str, Method | None], Answered] = {}

    @property
    def total(self) -> int:
        """Visual tokens of the picture."""
        return len(self._encoded.tokens)

    @property
    def coords(self) -> Tensor:
        """Where they stand, as ``ImageFeatures.coords``."""
        return self._encoded.coords

    def compare(self, question: str, amount: Amount, peer: str) -> list[Column]:
        """The whole model, the policy (where there is one), and a peer that keeps as many tokens as the policy.

        Args:
            peer: of ``SELECTORS`` or ``IN_MODEL``.

        Raises:
            ValueError: the question is empty or too long, or the peer is not known.
        """
        question = checked(question)
        self.questions = [question, *(asked for asked in self.questions if asked != question)]
        columns = [Column("", self._ask(question, None))]
        count = min(amount.budget, self.total)
        if self.pruner is not None:
            own = self._ask(question, _policy(self.pruner, amount, count))
            columns.append(Column(self.pruner.name, own))
            count = len(own.kept)
        try:
            columns.append(Column(peer, self._ask(question, _peer(peer, count))))
        except ValueError as error:
            columns.append(Column(peer, None, str(error)))
        return columns

    def keep_probs(self, question: str) -> Tensor:
        """Where the policy looks: float32 ``(N,)``, keep probabilities on the CPU."""
        assert self.pruner is not None
        visual = self.lvlm.visual_tokens([self._encoded], [question])
        with torch.no_grad():
            return self.pruner.keep_probs(visual)[0].cpu()

    def _ask(self, question: str, method: Method | None) -> Answered:
        key = (question, method)
        if key not in self._answers:
            self._answers[key] = answered(self.lvlm, self.image, question, method)
        return self._answers[key]


def checked(question: str) -> str:
    """The question without space around it.

    Raises:
        ValueError: it is empty or longer than ``MAX_QUESTION``.
    """
    question = question.strip()
    if not question:
        raise ValueError("The question is empty; ask something about the picture.")
    if len(question) > MAX_QUESTION:
        raise ValueError(f"The question has {len(question)} characters; at most {MAX_QUESTION} are allowed.")
    return question


def read_upload(path: Path) -> Image.Image:
    """The RGB picture in a visitor's file, at most ``SIDE`` pixels wide and high.

    Raises:
        ValueError: it is no whole JPEG, PNG or WebP, or has too many bytes or pixels; the message is for the visitor.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} is too large; at most {MAX_BYTES // 2**20} MiB are allowed.")
    try:
        with Image.open(path, formats=FORMATS) as header:
            width, height = header.size
        if width * height > MAX_PIXELS:
            raise ValueError(
                f"{path.name} has {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are allowed."
            )
        image = read_image(path)
    except (OSError, Image.DecompressionBombError, DataError) as error:
        raise ValueError(f"{path.name} cannot be read as a picture; it has to be a whole JPEG, PNG or WebP.") from error
    image.thumbnail((SIDE, SIDE))
    return image


def _policy(pruner: TokenPruner, amount: Amount, budget: int) -> Method:
    if amount.mode == "threshold":
        return Method(pruner.name, pruner, None, amount.threshold)
    selector = Stepwise(pruner, STEPS, amount.step) if amount.mode == "steps" else pruner
    return Method(pruner.name, selector, budget)


@lru_cache(maxsize=1024)
def _peer(name: str, budget: int) -> Method:
    """Always the same object, since answers are kept by method."""
    [method] = make_methods((name,), (budget,), None, None, False, 0)
    return method
