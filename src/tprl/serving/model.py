"""The encoder step of a served model: the vision tower, then the pruner with the question of the request."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor
from vllm.utils.torch_utils import set_default_torch_dtype

from tprl.lvlm.families import grid_coords
from tprl.lvlm.model import fingerprint
from tprl.lvlm.pictures import ImageFeatures, collate
from tprl.pruner import TokenPruner
from tprl.serving.request import KEY, QUERY, RATIO, Served, keep_count

logger = logging.getLogger(__name__)

TOWER_CACHE_BYTES = 256 * 2**20
"""Bound on the projected visual tokens that are remembered, so that many questions about one picture run its vision
tower once."""


class PrunedModel(ABC):
    """Before one of vLLM's multimodal models: ``embed_multimodal`` returns only the visual tokens that are kept.

    Raises:
        ValueError: ``--hf-overrides`` names no pruner or ratio, or the pruner was trained for another model.
    """

    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        with set_default_torch_dtype(torch.float32), torch.device("cpu"):
            pruner = TokenPruner.from_pretrained(Served.of(self.config).pruner, fingerprint(self.config.to_dict()))
        if pruner.config.proportional:
            logger.warning("vLLM's attention cannot be proportional: a kept token counts once, whatever it stands for")
        # In a tuple, since the checkpoint's loader would miss the weights of a submodule.
        self._pruner = (pruner.to(vllm_config.device_config.device),)
        self._tower_cache: LRUCache[bytes, Tensor] = LRUCache(TOWER_CACHE_BYTES, getsizeof=lambda tokens: tokens.nbytes)

    def embed_multimodal(self, **kwargs: Any) -> Sequence[Tensor]:
        """What is kept of every picture. The tower sees them one by one: memory is that of one picture, however many
        short requests the scheduler puts into a step, and no answer depends on what else is in it."""
        queries, ratios, keys = (kwargs.pop(name) for name in (QUERY, RATIO, KEY))
        kept = []
        for item, (query, ratio, key) in enumerate(zip(queries, ratios, keys, strict=True)):
            inputs = self._only(kwargs, item)
            tokens = self._encoded(key.numpy().tobytes(), inputs)
            kept.append(self._kept(tokens, self._grid(inputs, len(tokens)), query, float(ratio)))
        return kept

    @abstractmethod
    def _only(self, kwargs: Mapping[str, Any], item: int) -> dict[str, Any]:
        """What the stock ``embed_multimodal`` is given for one of the pictures."""

    @abstractmethod
    def _grid(self, inputs: Mapping[str, Any], count: int) -> tuple[int, int]:
        """Rows and columns of one picture's ``count`` visual tokens."""

    def _encoded(self, key: bytes, inputs: dict[str, Any]) -> Tensor:
        """Projected visual tokens ``(N, D)`` of one picture, remembered by its ``key``."""
        tokens: Tensor | None = self._tower_cache.get(key)
        if tokens is None:
            (tokens,) = super().embed_multimodal(**inputs)  # type: ignore[misc]
            if tokens.nbytes <= TOWER_CACHE_BYTES:
                self._tower_cache[key] = tokens
        return tokens

    def _kept(self, tokens: Tensor, grid: tuple[int, int], query: Tensor, ratio: float) -> Tensor:
        """The visual tokens ``(K, D)`` that are kept of ``(N, D)``, in raster order."""
        return tokens[self._choice(tokens, grid, query, ratio)]

    def _choice(self, tokens: Tensor, grid: tuple[int, int], query: Tensor, ratio: float) -> Tensor:
        """Indices of what is kept, int64 ``(K,)``, ascending. ``query (Q,)`` holds the question's token ids."""
        model: Any = self
        count = keep_count(len(tokens), ratio)
        if count == len(tokens):
            return torch.arange(count, device=tokens.device)
        # A picture without a question gets one word that is padding.
        asked = torch.ones(1, max(len(query), 1), dtype=torch.bool, device=tokens.device)
        if len(query) == 0:
            query, asked = query.new_zeros(1), ~asked
        embeds = model.language_model.embed_input_ids(query.to(tokens.device))
        visual = collate([ImageFeatures(tokens, grid_coords(*grid).to(tokens.device))], embeds[None], asked)
        (pruner,) = self._pruner
        mask = pruner.select(visual, torch.tensor([count], device=tokens.device)).keep_mask[0]
        return mask.nonzero()[:, 0]
