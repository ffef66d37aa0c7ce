"""Teaching the language model's attention where in the picture an answer stands."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tprl.data.scenes import COLOURS, KINDS
from tprl.lvlm.packing import Packed
from tprl.pocket.questions import Questions

LOOKING_LAYER, LOOKING_HEADS = 4, 3


class Looking:
    """Attention of some heads of one layer, recorded so that it can be taught where to look.

    The first layers of the base model hold a head that finds equal tokens, but none that fetches what stands there;
    those come much deeper. So the heads of ``LOOKING_LAYER`` that share its first key head are shown, from the
    labels of the scene, which patches an answer is to be read from.
    """

    def __init__(self, language: LlamaModel) -> None:
        self.attention = language.layers[LOOKING_LAYER].self_attn
        self.attention.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        self.hidden, self.rotary = kwargs["hidden_states"], kwargs["position_embeddings"]

    def loss(self, packed: Packed, relevant: Tensor, has_any: Tensor) -> Tensor:
        """Mean of ``-log(attention on relevant patches)`` over the places that predict an answer's token.

        Args:
            relevant: bool ``(questions, N)``.
        """
        attention = self.attention
        size = attention.head_dim
        heads = LOOKING_HEADS * size
        q = nn.functional.linear(self.hidden, attention.q_proj.weight[:heads]).unflatten(-1, (LOOKING_HEADS, size))
        k = nn.functional.linear(self.hidden, attention.k_proj.weight[:size]).unflatten(-1, (1, size))
        q, k = apply_rotary_pos_emb(q, k, *self.rotary, unsqueeze_dim=2)
        row, at = (packed.owners >= 0).nonzero(as_tuple=True)
        owner = packed.owners[row, at]
        chosen = has_any[owner]
        row, at, owner = row[chosen], at[chosen], owner[chosen]
        scores = torch.einsum("phd,pld->phl", q[row, at], k[row, :, 0]).float() * attention.scaling
        scores = scores.masked_fill(~packed.mask[row, 0, at][:, None], -torch.inf)
        start, stop = packed.visual.start, packed.visual.stop
        wanted = scores[..., start:stop].masked_fill(~relevant[owner][:, None], -torch.inf)
        return (scores.logsumexp(-1) - wanted.logsumexp(-1)).mean()


def relevant_patches(asked: list[Questions], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches each question speaks of, bool ``(questions, N)``, and whether there are any.

    Args:
        labels: patch labels ``(slots, B, N)``.
    """
    words = [*KINDS, *COLOURS]
    kind, colour = labels[0], labels[1]
    rows = []
    for number, questions in enumerate(asked):
        for named in questions.subjects:
            ids = [words.index(word) for word in sorted(named)]
            rows.append(
                torch.stack(
                    [kind[number] == i + 1 if i < len(KINDS) else colour[number] == i - len(KINDS) + 1 for i in ids]
                ).any(0)
            )
    relevant = torch.stack(rows)
    return relevant, relevant.any(1)
