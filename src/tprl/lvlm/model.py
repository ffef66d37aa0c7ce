"""A vision-language model of transformers, seen as this package sees it: pictures and questions as embeddings."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from tprl.lvlm.families import family_of
from tprl.lvlm.pictures import EncodedPicture, ImageFeatures, collate, encode
from tprl.lvlm.processors import load_processor
from tprl.lvlm.prompts import Prompts
from tprl.types import VisualTokens


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
        """Load the model and the processor that stand at a path or on the Hub.

        Raises:
            ValueError: the model's family is not known, or its processor needs a package that is missing.
        """
        family_of(AutoConfig.from_pretrained(name_or_path))
        model: Any = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype)
        return cls(model.to(device).eval(), load_processor(name_or_path, model.config))

    @cached_property
    def prompts(self) -> Prompts:
        """How its processor writes prompts.

        Raises:
            ValueError: there is no processor.
        """
        if self.processor is None:
            raise ValueError("this Lvlm was made without a processor, which pictures and questions need")
        return Prompts(self.processor, self.model.config.image_token_id, self.family.prompt)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def width(self) -> int:
        """Width ``D`` of the language model's embeddings."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def has_places(self) -> bool:
        """Whether positions are two-dimensional (M-RoPE), so that pictures have ``EncodedPicture.places``."""
        return hasattr(self.model.base_model, "get_rope_index")

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
        inputs, shown = self.prompts.of_pictures(images)
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

    @torch.no_grad()
    def question_embeds(self, questions: list[str]) -> tuple[Tensor, Tensor]:
        """Input embeddings of the questions' own tokens, as they are in a prompt: without chat template or special
        tokens, and without words that the template holds too, since they cannot be told from the template's.

        Returns:
            ``(B, Q, D)`` in the model's dtype, zero where padded, and the bool mask ``(B, Q)``.
        """
        others = self.prompts.template_ids | {self.model.config.image_token_id}
        prompts = [chain(*self.prompts.ids(question)) for question in questions]
        ids = [torch.tensor([i for i in row if i not in others], dtype=torch.int64) for row in prompts]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in ids], batch_first=True).to(self.device)
        padded = pad_sequence(ids, batch_first=True).to(self.device)
        return self.model.get_input_embeddings()(padded) * mask[..., None], mask

    def visual_tokens(self, features: Sequence[ImageFeatures], questions: list[str]) -> VisualTokens:
        """One padded batch of pictures, each with its question."""
        query, query_mask = self.question_embeds(questions)
        return collate(features, query, query_mask)


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
