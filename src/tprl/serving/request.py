"""What a request asks of the pruner: vLLM's processors with a question and a keep ratio beside every picture.

Both travel as arguments of the processor, which vLLM hashes together with the picture into the one key that its
processor cache, its encoder cache and its prefix cache share. So a cached picture answers only the same question at
the same ratio.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from tprl.lvlm.model import Lvlm

QUERY, RATIO, KEY = "query_ids", "keep_ratio", "picture_key"
"""Of every picture: ids of the question's own tokens ``(Q,)``, the share to keep, and what the picture is known by."""


@dataclass(frozen=True)
class Served:
    """What the server is told in ``--hf-overrides``.

    Attributes:
        pruner: folder or Hub id of a ``TokenPruner``.
        keep_ratio: share of the visual tokens that is kept where a request does not say.
    """

    pruner: str
    keep_ratio: float

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Served":
        """What a model's configuration says.

        Raises:
            ValueError: one of the two is missing or not allowed.
        """
        if missing := {"pruner", RATIO} - vars(config).keys():
            raise ValueError(f"--hf-overrides must give 'pruner' and 'keep_ratio'; {sorted(missing)} missing")
        return cls(str(config.pruner), checked_ratio(config.keep_ratio))


def checked_ratio(value: Any) -> float:
    """``value`` as a keep ratio.

    Raises:
        ValueError: it is not a number more than 0 and at most 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"keep_ratio {value!r} is not allowed; a number more than 0 and at most 1")
    return float(value)


def keep_count(total: int, ratio: float) -> int:
    """How many of a picture's ``total`` visual tokens are kept: the nearest number, one at least."""
    return max(1, round(total * ratio))


class PicturesOnly:
    """Before one of vLLM's processing infos: no videos, and room for pictures that are not pruned."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        info: Any = self
        return {"image": info.get_max_image_tokens()}


class PrunedProcessor(ABC):
    """Before one of vLLM's multimodal processors: adds what ``PrunedModel`` needs, and lays out only as many
    placeholders as are kept."""

    info: Any

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        given = inputs.hf_processor_mm_kwargs
        ratio = checked_ratio(given.get(RATIO, self._served.keep_ratio))
        question = [token for token in inputs.prompt if token not in self._no_question]
        asked = {**given, RATIO: ratio, QUERY: question}
        return super().apply(replace(inputs, hf_processor_mm_kwargs=asked), timing_ctx)  # type: ignore[misc]

    @cached_property
    def _served(self) -> Served:
        return Served.of(self.info.get_hf_config())

    @cached_property
    def _no_question(self) -> frozenset[int]:
        """Ids that are no part of a question, as ``tprl.prune`` tells them; the model's weights are not needed."""
        config = self.info.get_hf_config()
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        return Lvlm(model, self.info.get_hf_processor()).prompts.template_ids | {config.image_token_id}

    @abstractmethod
    def _pictures(self, processed: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
        """All that the vision tower is given of each picture."""

    def _call_hf_processor(self, hf_data: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        return super()._call_hf_processor(hf_data, _stock(hf_kwargs))  # type: ignore[misc]

    def _postprocess_hf_mm_data(self, mm_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any], processed: Any) -> Any:
        processed = super()._postprocess_hf_mm_data(  # type: ignore[misc]
            mm_inputs, _stock(hf_processor_mm_kwargs), processed
        )
        if "image_embeds" in processed:
            raise ValueError("a server that prunes takes pictures, not embeddings of them")
        if "pixel_values" in processed:
            keys = [_key(picture) for picture in self._pictures(processed)]
            processed[QUERY] = [torch.tensor(hf_processor_mm_kwargs[QUERY], dtype=torch.long)] * len(keys)
            processed[RATIO] = torch.tensor([hf_processor_mm_kwargs[RATIO]] * len(keys), dtype=torch.float64)
            processed[KEY] = torch.stack(keys)
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        from vllm.multimodal.inputs import MultiModalFieldConfig

        fields = super()._get_mm_fields_config(hf_inputs, _stock(hf_processor_mm_kwargs))  # type: ignore[misc]
        return {
            **fields,
            QUERY: MultiModalFieldConfig.batched("image"),
            RATIO: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            KEY: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        whole = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, _stock(hf_processor_mm_kwargs), out_mm_kwargs
        )
        ratio = hf_processor_mm_kwargs[RATIO]
        return [
            replace(update, replacement=_shortened(update.replacement, ratio))
            for update in whole
            if update.modality == "image"
        ]


def _stock(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that vLLM's own processors know."""
    return {name: value for name, value in kwargs.items() if name not in (QUERY, RATIO)}


def _shortened(placeholders: Callable[[int], list[int]], ratio: float) -> Callable[[int], list[int]]:
    """The placeholders of picture ``item`` of which only the kept share is laid out."""

    def kept(item: int) -> list[int]:
        whole = placeholders(item)
        return whole[: keep_count(len(whole), ratio)]

    return kept


def _key(picture: tuple[Tensor, ...]) -> Tensor:
    """SHA-256 of a picture, int64 ``(4,)``."""
    digest = hashlib.sha256()
    for part in picture:
        digest.update(str(part.shape).encode())
        digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64)
