"""Questions of the training scenes, tokenised as they follow a picture."""

import re
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tprl.data.scenes.questions import ask
from tprl.data.scenes.scene import COLOURS, DIRECTIONS, KINDS, Scene
from tprl.lvlm.packing import Block, Prefix, make_prefix
from tprl.pocket.labels import SLOTS, TOPICS


class Tokens:
    """The fixed pieces of the prompt around the picture."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        asked: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        text = str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
        before, after = text.split("<image>")
        self.between, self.turn = after.split("?")
        self.before: list[int] = self._ids(before)
        self.image_id = int(cast(Any, tokenizer).convert_tokens_to_ids("<image>"))
        self.answer_words = torch.tensor([i for slot in SLOTS for word in slot.words for i in self._ids(word)])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prefix(self, pictures: int, visual_tokens: int) -> Prefix:
        """What stands before the questions about so many pictures of so many visual tokens."""
        return make_prefix([[*self.before, self.image_id]] * pictures, self.image_id, [[visual_tokens]] * pictures)

    def block(self, question: str, answer: str) -> Block:
        prompt = self._ids(self.between + question + self.turn)
        return Block(prompt + self._ids(answer + "<|im_end|>"), len(prompt))


@dataclass(frozen=True)
class Questions:
    """Questions about one picture: their families, their tokens, and what they ask about."""

    families: list[str]
    blocks: list[Block]
    subjects: list[set[str]]
    topics: list[int | None]


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
        [topic(question) for question in drawn],
    )


def subject(question: str) -> set[str]:
    """The kinds that a question names, or, where it names none, the colours."""
    words = set(re.findall("[a-z]+", question))
    return words & KINDS.keys() or words & COLOURS.keys()


def topic(question: str) -> int | None:
    """Which of ``TOPICS`` a question asks for, if any."""
    return next((number for number, phrase in enumerate(TOPICS) if phrase in question), None)


DESCRIBE = "describe"
"""A family of training only: all that is known of one thing, many supervised words for one look at the picture."""


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """A ``DESCRIBE`` question about a thing, named by its kind or by its card, and its answer."""
    carded = [thing for thing in scene.things if thing.card]
    by_card = bool(carded) and rng.random() < 0.5
    things = carded if by_card else scene.singles
    if not things:
        return None
    thing = things[int(rng.integers(len(things)))]
    facts = [thing.kind] if by_card else []
    if thing.card:
        facts += [] if by_card else [thing.card.colour]
        facts += [] if thing.card.number is None else [str(thing.card.number)]
    facts += [place for place in (thing.third(0), thing.third(1)) if place]
    facts += [f"near {near.kind}" for near in [scene.nearest(thing)] if near]
    for phrase, direction in DIRECTIONS.items():
        found = scene.nearest(thing, direction)
        facts += [f"{phrase} {found.kind}"] if found else []
    named = f"what lies on the {thing.card.colour} card" if by_card and thing.card else f"the {thing.kind}"
    return f"Describe {named}.", ", ".join(facts)
