"""How a frozen decoder of any family is called on packed rows: embeddings, positions, masks, and what is read once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tprl.lvlm.cut import Positions
from tprl.lvlm.families import BothWays
from tprl.lvlm.packing import Block, Packed, Prefix, pack
from tprl.lvlm.proportional import ATTENTIONS, additive


class Opening(DynamicCache):
    """Keys and values of one sequence, ``(1, heads, tokens, width)`` a layer, that all rows of any batch go on from.

    What follows sees them and is not kept: a pass of many rows would hold gigabytes in a large model.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        keys, values = (states.expand(len(key_states), -1, -1, -1) for states in (layer.keys, layer.values))
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


class RowReader:
    """A decoder that reads packed rows.

    Args:
        language: the decoder without its head; attention is to be "sdpa" or "eager".
        both_ways: what attends in both directions, see ``tprl.lvlm.packing.pack``.

    Attributes:
        positions: "original": kept tokens stay at their positions; "compact": positions count what is left.

    Raises:
        ValueError: the decoder attends by another implementation, which cannot take the masks of packed rows.
    """

    def __init__(self, language: PreTrainedModel, both_ways: BothWays) -> None:
        attention = language.config._attn_implementation
        if attention not in ATTENTIONS:
            raise ValueError(f"answers are scored with the attention 'sdpa' or 'eager', got {attention!r}")
        self.language, self.both_ways = language, both_ways
        self.positions: Positions = "original"
        self._opening: tuple[tuple[int, ...], Opening] | None = None

    def prepare(
        self, prefix: Prefix, kept: Tensor, keep_mask: Tensor, rows: Sequence[Sequence[Block]]
    ) -> tuple[Packed, dict[str, Any]]:
        """The rows as a batch, and what the decoder is to be called with; ``kept (K, D)`` are the kept tokens of all
        rows in reading order."""
        packed = pack(prefix, keep_mask.cpu(), rows, self.both_ways).to(self.language.device)
        if self.positions == "compact":
            if len(packed.positions) > 1:
                raise ValueError("positions 'compact' are not allowed where they are two-dimensional; 'original'")
            packed = replace(packed, positions=packed.places[None])
        embeds = self.language.get_input_embeddings()(packed.ids)
        embeds = embeds.masked_scatter(packed.visual[..., None], kept.to(embeds))
        inputs = {
            "inputs_embeds": embeds,
            "position_ids": position_rows(packed.positions),
            "attention_mask": self.masks(packed.mask, packed.places, packed.places, packed.bias),
        }
        if prefix.deep is not None:
            shown = keep_mask[:, : prefix.deep.shape[1]]  # as wide as the longest picture of these rows alone
            added = prefix.deep.to(keep_mask.device)[shown].to(embeds)
            inputs |= {"visual_pos_masks": packed.visual, "deepstack_visual_embeds": list(added.unbind(1))}
        return packed, inputs

    def after_opening(self, prefix: Prefix, inputs: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Prepared inputs without the text that all rows begin with, whose keys and values are given instead, and how
        many tokens that is. None where tokens before the picture see it."""
        opening = () if self.both_ways == "prompts" else prefix.opening()
        if not opening:
            return 0, inputs
        skip, masks = len(opening), inputs["attention_mask"]
        rest = {"inputs_embeds": inputs["inputs_embeds"][:, skip:], "position_ids": inputs["position_ids"][..., skip:]}
        if isinstance(masks, dict):
            rest["attention_mask"] = {layers: mask[:, :, skip:] for layers, mask in masks.items()}
        else:
            rest["attention_mask"] = masks[:, :, skip:]
        if "visual_pos_masks" in inputs:
            rest["visual_pos_masks"] = inputs["visual_pos_masks"][:, skip:]
        return skip, inputs | rest | {"past_key_values": self._read(opening)}

    def _read(self, opening: tuple[int, ...]) -> Opening:
        """Keys and values of an opening. The last one is remembered: most data have but one."""
        if self._opening is None or self._opening[0] != opening:
            ids = torch.tensor([opening], device=self.language.device)
            places, cache = torch.arange(len(opening), device=ids.device)[None], DynamicCache()
            causal = torch.ones(1, 1, len(opening), len(opening), dtype=torch.bool, device=ids.device).tril()
            masks = self.masks(causal, places, places)
            self.language(
                input_ids=ids, position_ids=places, attention_mask=masks, past_key_values=cache, use_cache=True
            )
            layers: list[Any] = cache.layers
            self._opening = opening, Opening([(layer.keys, layer.values) for layer in layers])
        return self._opening[1]

    def masks(self, mask: Tensor, queries: Tensor, keys: Tensor, bias: Tensor | None = None) -> Any:
        """An attention mask, bool ``(B, 1, Q, K)``, as the decoder takes it: one for every type of its layers.

        Args:
            queries: places of the queries in their sequences, ``(B, Q)``, by which sliding windows are counted.
            keys: those of the keys, ``(B, K)``.
            bias: ``(B, K)``, is added to the logits of attention to every key.
        """
        config = self.language.config
        window, types = (vars(config).get(name) for name in ("sliding_window", "layer_types"))
        if window is None:
            return self._values(mask, bias)
        near = (queries[:, :, None] - keys[:, None] < window)[:, None]
        sliding = self._values(mask & near, bias)
        return sliding if types is None else {"full_attention": self._values(mask, bias), "sliding_attention": sliding}

    def _values(self, mask: Tensor, bias: Tensor | None) -> Tensor:
        """A mask as the attention implementation takes it."""
        if bias is None and self.language.config._attn_implementation == "sdpa":
            return mask
        return additive(mask, bias, self.language.dtype)


def position_rows(positions: Tensor) -> Tensor:
    """Positions ``(P, B, L)`` as decoders take them: ``(B, L)`` where there is one row of them."""
    return positions[0] if len(positions) == 1 else positions
