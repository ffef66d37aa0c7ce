"""Prompts about one picture, as a model's own processor writes and tokenises them."""

import re
from functools import cached_property
from typing import Any, cast

from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

SQUARE = 256
"""Side in pixels of the picture by which the layout of pictures is learned."""


class Prompts:
    """The prompts of a model.

    Args:
        processor: the model's own.
        image_token_id: of a visual token's placeholder.
        plain: the form of a prompt where the processor has no chat template, see ``Family.prompt``.
    """

    def __init__(self, processor: ProcessorMixin, image_token_id: int, plain: str) -> None:
        self._processor, self._image_token_id, self._plain = processor, image_token_id, plain

    def text(self, question: str) -> str:
        """The prompt of one picture and a question about it, by the model's chat template, for its processor."""
        if self._is_plain:
            return self.placeholder + question
        return self._chat([_asked(question)], add_generation_prompt=True)

    @property
    def template(self) -> tuple[list[int], list[int]]:
        """What tokenizer and chat template make of a question and an answer; scores depend on it, tokens do not."""
        return self.ids("?", "!")

    def ids(self, question: str, answer: str | None = None, shown: str | None = None) -> tuple[list[int], list[int]]:
        """Token ids of the prompt of one picture and a question about it.

        Args:
            question: asked about the picture, which stands before it.
            answer: appended with the end of its turn; the second list begins with what it is without an answer. None:
                the prompt alone, ready for generation.
            shown: ``EncodedPicture.text`` of the picture; that of an empty square one unless given.

        Returns:
            The ids up to the picture's last visual token, each run of them as one placeholder, and those behind.

        Raises:
            ValueError: the question shows a picture, the template does not show one, or it rewrites the prompt once an
                answer follows.
        """
        self.check(question)
        tokenizer, placeholder = self._tokenizer, self.placeholder
        prompt, ending = self._dialogue(question, answer)
        if prompt.count(placeholder) != 1:
            raise ValueError(f"the chat template shows {prompt.count(placeholder)} pictures instead of 1: {prompt!r}")
        whole = prompt.replace(placeholder, self._empty_square if shown is None else shown)
        bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        ids = tokenizer(whole, add_special_tokens=not bos)["input_ids"]
        answered = tokenizer(whole + ending, add_special_tokens=not bos)["input_ids"] if ending else ids
        if answered[: len(ids)] != ids:  # the answer would melt into the end of the prompt
            answered = ids + tokenizer(ending, add_special_tokens=False)["input_ids"]
        behind = max(i for i, token in enumerate(ids) if token == self._image_token_id) + 1
        return ids[:behind], answered[behind:]

    def check(self, question: str) -> None:
        """Raise ValueError for a question that shows a picture itself."""
        for shown in (self.placeholder, self._image_token):
            if shown in question:
                raise ValueError(f"the question {question!r} contains {shown!r}, which is a picture; leave it out")

    def _dialogue(self, question: str, answer: str | None) -> tuple[str, str]:
        """A prompt as it is tokenised, its picture as one placeholder, and the answer with the end of its turn."""
        if self._is_plain:
            tokenizer = self._tokenizer
            prompt = self._plain.format(image=self.placeholder, bos=tokenizer.bos_token, question=question)
            return prompt, "" if answer is None else f"{answer}{tokenizer.eos_token}"
        if answer is None:
            return self.text(question), ""
        prompt, said = self._turn(question, answer)
        closing, end = self._closing
        return prompt, said.removesuffix(closing) + end

    def _turn(self, question: str, answer: str) -> tuple[str, str]:
        """A prompt and what the chat template makes of the answer, without the blanks behind it."""
        prompt = self.text(question)
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = self._chat([_asked(question), turn], add_generation_prompt=False).rstrip()
        if not whole.startswith(prompt):
            raise ValueError(f"the chat template rewrites the prompt {prompt!r} when an answer follows: {whole!r}")
        return prompt, whole.removeprefix(prompt)

    @cached_property
    def _closing(self) -> tuple[str, str]:
        """What the chat template writes behind an answer, and what ends it: the same if that is one token, else the end
        of the sequence, which templates of LLaVA leave out or spell in characters that the model never learnt to say.
        """
        tokenizer = self._tokenizer
        closing = self._turn("?", "!")[1].rpartition("!")[2]
        one = len(tokenizer(closing.strip(), add_special_tokens=False)["input_ids"]) == 1
        return closing, closing if one else str(tokenizer.eos_token)

    @cached_property
    def end_id(self) -> int:
        """Id of the token that ends an answer."""
        return self.ids("?", "!")[1][-1]

    def of_pictures(self, images: list[Image.Image]) -> tuple[BatchFeature, list[tuple[str, tuple[int, ...]]]]:
        """What the processor makes of pictures alone, and ``text`` and ``runs`` of each as in ``EncodedPicture``."""
        inputs = self._processor(
            text=[self.placeholder] * len(images),
            images=[[image] for image in images],
            padding=True,
            return_text_replacement_offsets=True,
        )
        shown = []
        run = re.compile(f"(?:{re.escape(self._image_token)})+")
        for (replaced,) in inputs.pop("text_replacement_offsets"):
            lengths = [len(found) // len(self._image_token) for found in run.findall(replaced["replacement"])]
            shown.append((run.sub(self._image_token, replaced["replacement"]), tuple(lengths)))
        return inputs.convert_to_tensors("pt"), shown

    @cached_property
    def template_ids(self) -> frozenset[int]:
        """Token ids of the chat template around an empty question, and of what stands between and around visual
        tokens; they are no part of a question."""
        before, after = self.ids("")
        return frozenset(before + after) - {self._image_token_id}

    @cached_property
    def _empty_square(self) -> str:
        """``EncodedPicture.text`` of a square picture, which has every kind of row and column that there is."""
        return self.of_pictures([Image.new("RGB", (SQUARE, SQUARE))])[1][0][0]

    @property
    def _is_plain(self) -> bool:
        """Whether prompts are made without a chat template."""
        return bool(self._plain) and cast(Any, self._processor).chat_template is None

    @property
    def placeholder(self) -> str:
        """The text that stands for one picture before the processor expands it."""
        return str(cast(Any, self._processor).image_token)

    @property
    def _image_token(self) -> str:
        """The text of one visual token's placeholder."""
        return str(self._tokenizer.convert_ids_to_tokens(self._image_token_id))

    def _chat(self, messages: list[Any], add_generation_prompt: bool) -> str:
        return self._processor.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return cast(PreTrainedTokenizerBase, cast(Any, self._processor).tokenizer)


def _asked(question: str) -> dict[str, Any]:
    """The turn of a user who asks about one picture."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
