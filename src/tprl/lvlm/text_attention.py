"""What a question's last token attends to in the middle of the language model: the text-guided demonstrators' signal.

One whole prefill a picture, shared by its questions, so it is a teacher's signal and not a pruner's: to know it, one
has to pay for every visual token first.
"""

from typing import Any

import torch
from torch import Tensor

from tprl.lvlm.in_model import LayerView
from tprl.lvlm.packing import Block, pack
from tprl.lvlm.score import AnswerScorer


@torch.no_grad()
def text_attention(scorer: AnswerScorer, tokens: Tensor, blocks: list[Block], layer: int | None = None) -> Tensor:
    """Attention of every question's last prompt token to the visual tokens, mean over heads.

    Args:
        scorer: of the language model.
        tokens: visual tokens of one picture, ``(N, D)``.
        blocks: ``Q`` questions about it.
        layer: decoder layer that is watched; the middle one unless given, since early ones do not look for answers yet.

    Returns:
        float32 ``(Q, N)``.
    """
    decoder: Any = scorer.language
    watched = decoder.layers[len(decoder.layers) // 2 if layer is None else layer]
    everything = torch.arange(len(tokens))[None]
    packed = pack(scorer.before, everything, everything >= 0, len(tokens), [blocks])
    starts = torch.tensor([0, *(len(block.ids) for block in blocks)]).cumsum(0)[:-1]
    last = packed.visual.stop + starts + torch.tensor([block.answer_start - 1 for block in blocks])
    seen: list[Tensor] = []

    def watch(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        none = torch.zeros_like(packed.ids, dtype=torch.bool)
        view = LayerView(module, args[0], none, last[:1], kwargs["position_embeddings"], kwargs["attention_mask"])
        seen.append(view.attention(last[None].to(args[0].device))[0, :, packed.visual])

    hook = watched.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        embeds = decoder.get_input_embeddings()(packed.ids.to(decoder.device))
        embeds[:, packed.visual] = tokens.to(embeds)
        decoder(
            inputs_embeds=embeds,
            position_ids=packed.positions.to(decoder.device),
            attention_mask=packed.mask.to(decoder.device),
            use_cache=False,
        )
    finally:
        hook.remove()
    return seen[0].float()
