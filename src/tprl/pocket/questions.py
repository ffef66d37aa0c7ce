"""Questions of the training scenes, tokenised as they follow a picture."""

import re
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from tprl.data.scenes import COLOURS, KINDS, Scene, ask
from tprl.lvlm.packing import Block


class Tokens:
    """The fixed pieces of the prompt around the picture."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        before, after = text.split("<image>")
        self.between, self.turn = after.split("?")
        self.before: list[int] = self._ids(before)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def block(self, question: str, answer: str) -> Block:
        prompt = self._ids(self.between + question + self.turn)
        return Block(prompt + self._ids(answer + "<|im_end|>"), len(prompt))


@dataclass(frozen=True)
class Questions:
    """Questions about one picture: their families and their tokens."""

    families: list[str]
    blocks: list[Block]
    subjects: list[set[str]]


def draw_questions(
    scene: Scene, tokens: Tokens, rng: np.random.Generator, count: int, weights: dict[str, float]
) -> Questions:
    """Up to ``count`` different questions about ``scene``, families drawn with ``weights``."""
    drawn: dict[str, tuple[str, str]] = {}
    share = np.array(list(weights.values())) / sum(weights.values())
    for _ in range(3 * count):
        family = str(rng.choice(list(weights), p=share))
        asked = describe(scene, rng) if family == DESCRIBE else ask(scene, family, rng)
        if asked:
            drawn[asked[0]] = (family, asked[1])
        if len(drawn) == count:
            break
    return Questions(
        [family for family, _ in drawn.values()],
        [tokens.block(question, answer) for question, (_, answer) in drawn.items()],
        [subject(question) for question in drawn],
    )


def subject(question: str) -> set[str]:
    """The kinds that a question names, or, where it names none, the colours."""
    words = set(re.findall("[a-z]+", question))
    return words & KINDS.keys() or words & COLOURS.keys()


DESCRIBE = "describe"
"""A family of training only: all that is known of one thing, many supervised words for one look at the picture."""


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """A ``DESCRIBE`` question about a thing that is alone of its kind, and its answer."""
    if not scene.singles:
        return None
    thing = scene.singles[int(rng.integers(len(scene.singles)))]
    near = scene.nearest(thing)
    facts = [
        thing.card.colour if thing.card else "none",
        str(thing.card.number) if thing.card and thing.card.number is not None else "none",
        thing.third(0) or "none",
        thing.third(1) or "none",
        near.kind if near else "none",
    ]
    return f"Describe the {thing.kind}.", " ".join(facts)
