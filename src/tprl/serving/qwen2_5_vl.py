"""Qwen2.5-VL in vLLM, pruned. Positions are the original ones: a kept token keeps its row and column in M-RoPE.

Which tokens are kept is known only after the encoder step, the positions of a request before it. So a picture's tokens
first all get the position of its beginning; what each is away from there travels in extra channels behind its
embedding, and is added in the step in which the token is read.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from tprl.serving.channels import from_channels, to_channels
from tprl.serving.model import PrunedModel
from tprl.serving.request import PicturesOnly, PrunedProcessor


class PrunedQwenInfo(PicturesOnly, Qwen2_5_VLProcessingInfo):
    pass


class PrunedQwenProcessor(PrunedProcessor, Qwen2_5_VLMultiModalProcessor):
    def _pictures(self, processed: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
        return list(zip(_patches(processed), processed["image_grid_thw"], strict=True))


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwenProcessor, info=PrunedQwenInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class PrunedQwen2_5_VL(PrunedModel, Qwen2_5_VLForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.is_multimodal_pruning_enabled:
            raise ValueError("--video-pruning-rate is not allowed with a pruner of pictures")
        self._moves: tuple[Tensor, Tensor] | None = None

    def _only(self, kwargs: Mapping[str, Any], item: int) -> dict[str, Any]:
        return {"pixel_values": _patches(kwargs)[item], "image_grid_thw": kwargs["image_grid_thw"][item][None]}

    def _grid(self, inputs: Mapping[str, Any], count: int) -> tuple[int, int]:
        return self._merged(inputs["image_grid_thw"][0])

    def _merged(self, grid: Tensor) -> tuple[int, int]:
        """Rows and columns of visual tokens, from rows and columns of patches."""
        merge = self.config.vision_config.spatial_merge_size
        _, rows, columns = grid.tolist()
        return rows // merge, columns // merge

    def _kept(self, tokens: Tensor, grid: tuple[int, int], query: Tensor, ratio: float) -> Tensor:
        """What is kept, and in more channels how far it is from the picture's beginning in time, row, column."""
        index = self._choice(tokens, grid, query, ratio)
        moves = torch.stack([torch.zeros_like(index), index // grid[1], index % grid[1]], 1)
        return torch.cat([tokens[index], to_channels(moves, tokens.dtype)], 1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions ``(3, L)`` of a prompt with its pictures' tokens at the beginning of each, and how much further
        the token behind the prompt stands than the prompt is long."""
        parts: list[Tensor] = []
        column = place = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            text = feature.mm_position.offset - column
            parts += [place + torch.arange(text), torch.full((feature.mm_position.length,), place + text)]
            column += text + feature.mm_position.length
            place += text + max(self._merged(feature.data["image_grid_thw"].data))
        text = len(input_tokens) - column
        parts.append(place + torch.arange(text))
        return torch.cat(parts).expand(3, -1), place + text - len(input_tokens)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Embeddings of a step's tokens; where its visual tokens have to move is kept for ``forward``."""
        self._moves = None
        if multimodal_embeddings:
            assert is_multimodal is not None
            width = self.config.get_text_config().hidden_size
            moves = from_channels(torch.cat([embeds[:, width:] for embeds in multimodal_embeddings])).T
            self._moves = is_multimodal.nonzero()[:, 0].to(moves.device), moves
            multimodal_embeddings = [embeds[:, :width] for embeds in multimodal_embeddings]
        embedded: Tensor = super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self._moves is not None:
            columns, moves = self._moves
            positions[:, columns] += moves  # in place: this is the buffer that vLLM fills anew for every step
            self._moves = None
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)


def _patches(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Every picture's patches, of which all pictures' make one tensor."""
    return tuple(inputs["pixel_values"].split(inputs["image_grid_thw"].prod(1).tolist()))
