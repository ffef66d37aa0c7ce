"""What a question's last token attends to in the language model: the text-guided demonstrators' signal.

One whole prefill a picture, shared by its questions, so it is a teacher's signal and not a pruner's: to know it, one
has to pay for every visual token first.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from tprl.lvlm.in_model import LayerView
from tprl.lvlm.packing import Block, Prefix
from tprl.lvlm.reader import RowReader


@torch.no_grad()
def text_attention(reader: RowReader, prefix: Prefix, tokens: Tensor, blocks: list[Block]) -> Tensor:
    """Attention of every question's last prompt token to the visual tokens, mean over heads and over all decoder layers
    but the first quarter, which do not look for answers yet. What is asked for and what it is compared with are looked
    up in different layers.

    Args:
        reader: of the language model.
        prefix: what stands before the questions, one row.
        tokens: visual tokens of one picture, ``(N, D)``.
        blocks: ``Q`` questions about it.

    Returns:
        float32 ``(Q, N)``.
    """
    rows = [[block] for block in blocks] if reader.both_ways == "prompts" else [blocks]
    return torch.cat([_attention(reader, prefix, tokens, row) for row in rows])


def _attention(reader: RowReader, prefix: Prefix, tokens: Tensor, blocks: list[Block]) -> Tensor:
    """``text_attention`` of questions that share a row."""
    decoder: Any = reader.language
    everything = torch.ones(1, len(tokens), dtype=torch.bool, device=tokens.device)
    packed, inputs = reader.prepare(prefix, tokens, everything, [blocks])
    starts = torch.tensor([0, *(len(block.ids) for block in blocks)]).cumsum(0)[:-1]
    last = packed.start + starts + torch.tensor([block.answer_start - 1 for block in blocks])
    seen: list[Tensor] = []

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        none = torch.zeros_like(packed.visual)
        hidden, rotary = args[0], kwargs["position_embeddings"]
        view = LayerView(module, hidden, hidden, none, last[:1], rotary, kwargs["attention_mask"])
        seen.append(view.attention(last[None].to(hidden.device))[0, :, packed.visual[0]])

    with ExitStack() as hooks:
        for layer in decoder.layers[len(decoder.layers) // 4 :]:
            hooks.callback(layer.register_forward_pre_hook(watch, with_kwargs=True).remove)
        decoder(**inputs, use_cache=False)
    return torch.stack(seen).float().mean(0)
