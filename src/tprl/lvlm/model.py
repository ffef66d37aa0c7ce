"""A vision-language model of transformers, seen as this package sees it: pictures and questions as embeddings."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, BatchFeature, PreTrainedModel, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from tprl.lvlm.families import family_of
from tprl.lvlm.processors import load_processor
from tprl.lvlm.signals import recorded_tower
from tprl.types import VisualTokens

SQUARE = 256
"""Side in pixels of the picture by which the layout of pictures is learned."""


@dataclass(frozen=True)
class ImageFeatures:
    """One picture as the language model is shown it.

    Attributes:
        tokens: projected visual tokens, ``(n, D)`` in the model's dtype.
        coords: float32 ``(n, 2)``, row and column of each token's centre in the picture, in [0, 1].
        signals: those of ``TOWER_SIGNALS`` that were asked for, float32 ``(n, ...)``.
    """

    tokens: Tensor
    coords: Tensor
    signals: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EncodedPicture(ImageFeatures):
    """One picture with all that a language model needs to see it in a prompt.

    Attributes:
        text: what the processor puts in the place of the picture, each run of visual tokens as one placeholder.
        runs: how many visual tokens each run has.
        places: int64 ``(n, 3)``, positions of the visual tokens counted from the first of them, where a family's
            positions are two-dimensional (M-RoPE).
        deep: ``(n, K, D)``, what is added to the visual tokens after each of the first ``K`` decoder layers.
    """

    text: str
    runs: tuple[int, ...]
    places: Tensor | None = None
    deep: Tensor | None = None


class Lvlm:
    """A model, its processor and the facts of its family.

    Args:
        model: of one of ``FAMILIES``.
        processor: the model's own; without one, only ``width`` and ``fingerprint`` can be had.

    Raises:
        ValueError: the model's family is not known.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin | None = None) -> None:
        self.family = family_of(model)
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
    ) -> "Lvlm":
        """Load the model and the processor that stand at a path or on the Hub."""
        model: Any = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype)
        return cls(model.to(device).eval(), load_processor(name_or_path, model.config))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def width(self) -> int:
        """Width ``D`` of the language model's embeddings."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that are equal where a pruner fitted to one model fits the other: same family, same
        widths, same vision tower, same layout of the visual tokens. It says nothing about weights."""
        return fingerprint(self.model.config.to_dict())

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image], signals: frozenset[str] = frozenset()) -> list[EncodedPicture]:
        """Pictures as projected visual tokens.

        Args:
            images: RGB pictures; one batch for the vision tower.
            signals: which of ``TOWER_SIGNALS`` to compute besides.

        Raises:
            ValueError: there is no processor, or a signal is not one that the tower gives, or the processor cuts a
                picture into several.
        """
        inputs, shown = self._process(images)
        inputs = inputs.to(self.device, self.model.dtype)
        pictures, output = encode(self.model, inputs, signals)
        if len(pictures) != len(images):
            raise ValueError(
                f"the processor makes {len(pictures)} pictures of {len(images)}; switch off that it crops them"
            )
        places: Sequence[Tensor | None] = [None] * len(images)
        positions = cast(Any, self.model)._prepare_position_ids_for_generation(inputs["input_ids"], {**inputs})
        if positions.ndim == 3:
            visual = inputs["input_ids"] == self.model.config.image_token_id
            rows = [positions[-3:, row, columns].T for row, columns in enumerate(visual)]
            places = [row - row[0] for row in rows]
        deep: Sequence[Tensor | None] = [None] * len(images)
        if (layers := output.get("deepstack_features")) is not None:
            added = torch.stack([torch.cat(list(layer)) for layer in layers], 1)
            deep = torch.split(added, [len(picture.tokens) for picture in pictures])
        return [
            EncodedPicture(
                picture.tokens, picture.coords, picture.signals, text=text, runs=runs, places=places[i], deep=deep[i]
            )
            for i, (picture, (text, runs)) in enumerate(zip(pictures, shown, strict=True))
        ]

    def _process(self, images: list[Image.Image]) -> tuple[BatchFeature, list[tuple[str, tuple[int, ...]]]]:
        """What the processor makes of pictures alone, and ``text`` and ``runs`` of each as in ``EncodedPicture``."""
        inputs = self._processor()(
            text=[self._placeholder] * len(images),
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

    @torch.no_grad()
    def question_embeds(self, questions: list[str]) -> tuple[Tensor, Tensor]:
        """Input embeddings of the questions' own tokens, as they are in a prompt: without chat template or special
        tokens, and without words that the template holds too, since they cannot be told from the template's.

        Returns:
            ``(B, Q, D)`` in the model's dtype, zero where padded, and the bool mask ``(B, Q)``.
        """
        others = self.template_ids | {self.model.config.image_token_id}
        prompts = [chain(*self.prompt_ids(question)) for question in questions]
        ids = [torch.tensor([i for i in row if i not in others], dtype=torch.int64) for row in prompts]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], batch_first=True).to(self.device)
        padded = pad_sequence(ids, batch_first=True).to(self.device)
        return self.model.get_input_embeddings()(padded) * mask[..., None], mask

    def prompt_text(self, question: str) -> str:
        """The prompt of one picture and a question about it, by the model's chat template, for its processor."""
        if self._is_plain:
            return self._placeholder + question
        return self._chat([_asked(question)], add_generation_prompt=True)

    def prompt_ids(
        self, question: str, answer: str | None = None, shown: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids of the prompt of one picture and a question about it.

        Args:
            question: asked about the picture, which stands before it.
            answer: appended with the end of its turn; the second list begins with what it is without an answer. None:
                the prompt alone, ready for generation.
            shown: ``EncodedPicture.text`` of the picture; that of an empty square one unless given.

        Returns:
            The ids up to the picture's last visual token, each run of them as one placeholder, and those behind.

        Raises:
            ValueError: the template does not show one picture, or rewrites the prompt once an answer follows.
        """
        tokenizer, placeholder = self._tokenizer(), self._placeholder
        prompt, ending = self._dialogue(question, answer)
        if prompt.count(placeholder) != 1:
            raise ValueError(f"the chat template shows {prompt.count(placeholder)} pictures instead of 1: {prompt!r}")
        whole = prompt.replace(placeholder, self._empty_square if shown is None else shown)
        bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        ids = tokenizer(whole, add_special_tokens=not bos)["input_ids"]
        answered = tokenizer(whole + ending, add_special_tokens=not bos)["input_ids"] if ending else ids
        if answered[: len(ids)] != ids:  # the answer would melt into the end of the prompt
            answered = ids + tokenizer(ending, add_special_tokens=False)["input_ids"]
        behind = max(i for i, token in enumerate(ids) if token == self.model.config.image_token_id) + 1
        return ids[:behind], answered[behind:]

    def _dialogue(self, question: str, answer: str | None) -> tuple[str, str]:
        """A prompt as it is tokenised, its picture as one placeholder, and the answer with the end of its turn."""
        if self._is_plain:
            tokenizer = self._tokenizer()
            prompt = self.family.prompt.format(image=self._placeholder, bos=tokenizer.bos_token, question=question)
            return prompt, "" if answer is None else f"{answer}{tokenizer.eos_token}"
        if answer is None:
            return self.prompt_text(question), ""
        prompt, said = self._turn(question, answer)
        closing, end = self._closing
        return prompt, said.removesuffix(closing) + end

    def _turn(self, question: str, answer: str) -> tuple[str, str]:
        """A prompt and what the chat template makes of the answer, without the blanks behind it."""
        prompt = self.prompt_text(question)
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
        tokenizer = self._tokenizer()
        closing = self._turn("?", "!")[1].rpartition("!")[2]
        one = len(tokenizer(closing.strip(), add_special_tokens=False)["input_ids"]) == 1
        return closing, closing if one else str(tokenizer.eos_token)

    @cached_property
    def end_id(self) -> int:
        """Id of the token that ends an answer."""
        return self.prompt_ids("?", "!")[1][-1]

    def visual_tokens(self, features: Sequence[ImageFeatures], questions: list[str]) -> VisualTokens:
        """One padded batch of pictures, each with its question."""
        query, query_mask = self.question_embeds(questions)
        return collate(features, query, query_mask)

    @cached_property
    def template_ids(self) -> frozenset[int]:
        """Token ids of the chat template around an empty question, and of what stands between and around visual
        tokens; they are no part of a question."""
        before, after = self.prompt_ids("")
        return frozenset(before + after) - {self.model.config.image_token_id}

    @cached_property
    def _empty_square(self) -> str:
        """``EncodedPicture.text`` of a square picture, which has every kind of row and column that there is."""
        return self._process([Image.new("RGB", (SQUARE, SQUARE))])[1][0][0]

    @property
    def _is_plain(self) -> bool:
        """Whether prompts are made without a chat template."""
        return bool(self.family.prompt) and cast(Any, self._processor()).chat_template is None

    @property
    def _placeholder(self) -> str:
        """The text that stands for one picture before the processor expands it."""
        return str(cast(Any, self._processor()).image_token)

    @property
    def _image_token(self) -> str:
        """The text of one visual token's placeholder."""
        return str(self._tokenizer().convert_ids_to_tokens(self.model.config.image_token_id))

    def _chat(self, messages: list[Any], add_generation_prompt: bool) -> str:
        return self._processor().apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def _processor(self) -> ProcessorMixin:
        if self.processor is None:
            raise ValueError("this Lvlm was made without a processor, which pictures and questions need")
        return self.processor

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return cast(PreTrainedTokenizerBase, cast(Any, self._processor()).tokenizer)


def _asked(question: str) -> dict[str, Any]:
    """The turn of a user who asks about one picture."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}


def encode(
    model: PreTrainedModel, inputs: Mapping[str, Any], signals: frozenset[str] = frozenset()
) -> tuple[list[ImageFeatures], Any]:
    """Every picture of a batch in the order of its visual tokens, and the model's own output that holds them.

    Args:
        inputs: what ``forward`` takes, with the pictures and ``input_ids``.
    """
    encoder = cast(Any, model.base_model).get_image_features
    taken = inspect.signature(encoder).parameters
    with recorded_tower(model, signals) as patches:
        output = encoder(**{name: value for name, value in inputs.items() if name in taken}, return_dict=True)
    return split_pictures(model, inputs, output.pooler_output, patches), output


def split_pictures(
    model: PreTrainedModel, inputs: Mapping[str, Any], features: Sequence[Tensor], patches: Mapping[str, Tensor]
) -> list[ImageFeatures]:
    """A model's image features, and what its tower recorded of its ``patches``, picture by picture."""
    family = family_of(model)
    entries = [len(entry) for entry in features]
    tokens = torch.cat(list(features))
    coords = family.coords(model.config, inputs, entries, inputs["input_ids"])
    counts = [len(picture) for picture in coords]
    signals: dict[str, tuple[Tensor, ...]] = {}
    for name, values in patches.items():
        assert family.pack is not None
        packed = family.pack(model, values.reshape(*values.shape[:2], -1), inputs, entries)
        signals[name] = torch.split(packed.reshape(len(tokens), *values.shape[2:]), counts)
    return [
        ImageFeatures(picture, where.to(picture.device), {name: rows[index] for name, rows in signals.items()})
        for index, (picture, where) in enumerate(zip(torch.split(tokens, counts), coords, strict=True))
    ]


def collate(pictures: Sequence[ImageFeatures], query: Tensor, query_mask: Tensor) -> VisualTokens:
    """One padded batch of pictures with their questions ``(B, Q, D)`` and ``(B, Q)``."""

    def pad(rows: list[Tensor]) -> Tensor:
        return pad_sequence(rows, batch_first=True)

    return VisualTokens(
        tokens=pad([picture.tokens for picture in pictures]),
        mask=pad([torch.ones_like(picture.coords[:, 0], dtype=torch.bool) for picture in pictures]),
        coords=pad([picture.coords for picture in pictures]),
        query=query,
        query_mask=query_mask,
        signals={name: pad([picture.signals[name] for picture in pictures]) for name in pictures[0].signals},
    )


_FIT_KEYS = frozenset(
    {
        *("model_type", "text_config", "vision_config", "hidden_size", "num_hidden_layers", "depth", "embed_dim"),
        *("image_size", "patch_size", "vision_feature_layer", "vision_feature_select_strategy", "image_grid_pinpoints"),
        *("spatial_merge_size", "scale_factor", "downsample_ratio", "mm_tokens_per_image", "image_seq_length"),
    }
)


def fingerprint(config: dict[str, Any]) -> str:
    """See ``Lvlm.fingerprint``; of a model's configuration as a dictionary."""

    def kept(part: dict[str, Any]) -> dict[str, Any]:
        return {
            key: kept(value) if isinstance(value, dict) else value for key, value in part.items() if key in _FIT_KEYS
        }

    return hashlib.sha256(json.dumps(kept(config), sort_keys=True).encode()).hexdigest()[:16]
