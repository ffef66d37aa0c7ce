"""LLaVA in vLLM, pruned. Positions are compact: vLLM numbers a prompt's tokens one after the other."""

import re
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tprl.serving.model import PrunedModel
from tprl.serving.request import PicturesOnly, PrunedProcessor

_TOWER = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")


class PrunedLlavaInfo(PicturesOnly, LlavaProcessingInfo):
    pass


class PrunedLlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    def _pictures(self, processed: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
        return [(pixels,) for pixels in processed["pixel_values"]]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=PrunedLlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlava(PrunedModel, LlavaForConditionalGeneration):
    def _only(self, kwargs: Mapping[str, Any], item: int) -> dict[str, Any]:
        return {"pixel_values": kwargs["pixel_values"][item][None]}

    def _grid(self, inputs: Mapping[str, Any], count: int) -> tuple[int, int]:
        return isqrt(count), isqrt(count)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Also of checkpoints of transformers 5, whose towers have no ``vision_model`` in their names."""
        loaded: set[str] = super().load_weights(
            (_TOWER.sub(r"\1vision_model.", name), weight) for name, weight in weights
        )
        return loaded
