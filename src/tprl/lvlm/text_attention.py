"""What a question attends to in the language model: the text-guided demonstrators' signal.

One whole prefill a picture, shared by its questions, so it is a teacher's signal and not a pruner's: to know it, one
has to pay for every visual token first.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from tprl.lvlm.layer_view import LayerView, check_readable
from tprl.lvlm.packing import Block, Prefix
from tprl.lvlm.reader import RowReader


@torch.no_grad()
def text_attention(reader: RowReader, prefix: Prefix, tokens: Tensor, blocks: list[Block]) -> Tensor:
    """The greatest attention, mean over heads, that any token of a prompt behind the picture pays to each visual token
    in any decoder layer but the first quarter, which do not look for answers yet. That of the last prompt token counts
    twice.

    What is asked for and what it is compared with are looked up in different layers and by different tokens, and what
    is looked at once is to count as much as what all look at.

    Args:
        reader: of the language model.
        prefix: what stands before the questions, one row.
        tokens: visual tokens of one picture, ``(N, D)``.
        blocks: ``Q`` questions about it.

    Returns:
        float32 ``(Q, N)``.

    Raises:
        ValueError: the language model's layers are not read as Llama's.
    """
    check_readable(reader.language)
    rows = [[block] for block in blocks] if reader.both_ways == "prompts" else [blocks]
    return torch.cat([_attention(reader, prefix, tokens, row) for row in rows])


def _attention(reader: RowReader, prefix: Prefix, tokens: Tensor, blocks: list[Block]) -> Tensor:
    """``text_attention`` of questions that share a row."""
    decoder: Any = reader.language
    everything = torch.ones(1, len(tokens), dtype=torch.bool, device=tokens.device)
    packed, inputs = reader.prepare(prefix, tokens, everything, [blocks])
    lengths = [block.answer_start for block in blocks]
    starts = packed.start + torch.tensor([0, *(len(block.ids) for block in blocks)]).cumsum(0)[:-1]
    asking = torch.cat([start + torch.arange(length) for start, length in zip(starts, lengths, strict=True)])
    places = asking[None].to(packed.visual.device)
    seen = torch.zeros(len(asking), len(tokens), device=places.device)

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        none, hidden = torch.zeros_like(packed.visual), args[0]
        view = LayerView(
            module, hidden, hidden, none, places[:, -1], kwargs["position_embeddings"], kwargs["attention_mask"]
        )
        torch.maximum(seen, view.attention(places)[0, :, packed.visual[0]], out=seen)

    with ExitStack() as hooks:
        for layer in decoder.layers[len(decoder.layers) // 4 :]:
            hooks.callback(layer.register_forward_pre_hook(watch, with_kwargs=True).remove)
        decoder(**inputs, use_cache=False)
    return torch.stack([torch.maximum(rows.amax(0), 2 * rows[-1]) for rows in seen.split(lengths)])
