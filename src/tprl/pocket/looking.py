"""Teaching attention where to look: the tower's heads where a thing's neighbours and its likes are, the language
model's heads where in the picture an answer stands."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tprl.data.scenes.scene import COLOURS, KINDS
from tprl.lvlm.packing import Packed
from tprl.pocket.labels import TOPIC
from tprl.pocket.pictures import Batch
from tprl.pocket.questions import Questions

LOOKING_LAYERS, LOOKING_KEY_HEADS = (4, 5, 6), 2


class Looking:
    """Attention of some heads of some layers, recorded so that it can be taught where to look.

    The first layers of the base model hold a head that finds equal tokens, but none that fetches what stands there;
    those come much deeper. So the heads of ``LOOKING_LAYERS`` that share the first ``LOOKING_KEY_HEADS`` key heads are
    shown, from the labels of the scene, which patches an answer is to be read from. One key head's values would be too
    narrow for all that a patch says.
    """

    def __init__(self, language: LlamaModel) -> None:
        self.recorded: dict[Any, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        layers: Any = language.layers
        for layer in LOOKING_LAYERS:
            layers[layer].self_attn.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        self.recorded[module] = kwargs["hidden_states"], kwargs["position_embeddings"]

    def loss(self, packed: Packed, relevant: Tensor, has_any: Tensor) -> Tensor:
        """Mean of ``-log(attention on relevant patches)`` over the places that predict an answer's token.

        Args:
            relevant: bool ``(questions, N)``.
            has_any: bool ``(questions,)``; questions without relevant patches are left out.
        """
        losses = []
        for row, owners in enumerate(packed.owners):
            at = (owners >= 0).nonzero()[:, 0]
            at = at[has_any[owners[at]]]
            visible = packed.mask[row, 0, at]
            wanted = torch.zeros_like(visible)
            wanted[:, packed.visual[row]] = relevant[owners[at]]
            for attention, (hidden, (cos, sin)) in self.recorded.items():
                size, shared = attention.head_dim, attention.num_key_value_groups
                keys, queries = LOOKING_KEY_HEADS * size, LOOKING_KEY_HEADS * size * shared
                q = nn.functional.linear(hidden[row, at], attention.q_proj.weight[:queries]).unflatten(-1, (-1, size))
                k = nn.functional.linear(hidden[row], attention.k_proj.weight[:keys]).unflatten(-1, (-1, size))
                q, _ = apply_rotary_pos_emb(q, q, cos[row, at], sin[row, at])
                k, _ = apply_rotary_pos_emb(k, k, cos[row], sin[row])
                scores = torch.einsum("pgsd,lgd->gspl", q.unflatten(1, (-1, shared)), k).float() * attention.scaling
                everything = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
                losses.append(everything - scores.masked_fill(~wanted, -torch.inf).logsumexp(-1))
        return torch.cat(losses, -1).mean()


NEIGHBOUR, ALIKE = "neighbour", "alike"
TOWER_LOOKS = {4: {0: NEIGHBOUR, 1: ALIKE}, 5: {0: NEIGHBOUR, 1: ALIKE}}
"""What each taught head of the tower looks for, by layer and head, up to the last layer; the others stay free."""


def tower_looking_loss(vision: CLIPVisionModel, hidden: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """How far the heads of ``TOWER_LOOKS`` are from looking where the answer stands, mean over the heads, each over
    the patches of things; and how far [CLS] in the last layer is from looking at every thing alike.

    A head for neighbours is to spend its attention on the one that the patch speaks of, wherever on it:
    ``-log(attention there)``. A head that counts is to spread it evenly over the things alike, wherever on each and
    however large it is, and [CLS], from whose share the number can be read: cross-entropy, and the squared error of
    that share's logarithm.

    Args:
        hidden: the hidden states of all layers, ``(B, 1 + M, D)`` each, [CLS] first.
    """
    bias = nn.functional.pad(batch.weights, (1, 0), value=1.0).log()[:, None]
    things, of_thing = batch.things, batch.owners >= 0
    kinds_of_things = (things * batch.kinds[..., None]).amax(1)
    alike = (kinds_of_things[:, None] == batch.kinds[..., None]).float() * (things.sum(1) > 0)[:, None]
    layers: Any = vision.get_submodule("encoder.layers")
    losses: list[Tensor] = []
    for number, heads in TOWER_LOOKS.items():
        layer = layers[number]
        states, size = layer.layer_norm1(hidden[number]), layer.self_attn.head_dim
        # Apart, since the gradient of a slice is as large as what it was cut from.
        queries = layer.self_attn.q_proj(states).float().unflatten(-1, (-1, size)).unbind(2)
        keys = layer.self_attn.k_proj(states).float().unflatten(-1, (-1, size)).unbind(2)
        for head, looked_for in heads.items():
            scores = queries[head][:, 1:] @ keys[head].mT * layer.self_attn.scale
            logs = (scores + bias).log_softmax(-1)
            if looked_for == ALIKE:
                on_things = (logs[..., 1:].exp() @ things).clamp(min=1e-12).log()
                among = 1 + alike.sum(-1)
                found = logs[..., 0] + (alike * on_things).sum(-1)
                off = logs[..., 0] + among.log()
                losses.append((off.square() - found / among)[of_thing].mean())
            else:
                picture, patch = (batch.neighbours >= 0).nonzero(as_tuple=True)
                neighbour = batch.neighbours[picture, patch]
                there = batch.owners[picture] == neighbour[:, None]
                losses.append(-logs[picture, patch, 1:].masked_fill(~there, -torch.inf).logsumexp(-1).mean())
        if layer is layers[-1]:  # whose [CLS] is what some pruners choose by
            scores = torch.stack([q[:, 0, None] @ k.mT for q, k in zip(queries, keys, strict=True)])
            attention = (scores * layer.self_attn.scale + bias).softmax(-1)
            on_things = (attention[..., 1:] @ things)[:, :, 0]
            losses.append(-on_things[:, things.sum(1) > 0].log().mean())
    return torch.stack(losses).mean()


def relevant_patches(asked: list[Questions], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches answer each question, bool ``(questions, N)``, and whether there are any: those of the things that
    it names, of these only the ones that speak of the neighbour that it asks for.

    Args:
        labels: patch labels ``(slots, B, N)``.
    """
    words = [*KINDS, *COLOURS]
    kind, colour, speaks_of = labels[0], labels[1], labels[TOPIC]
    rows = []
    for number, questions in enumerate(asked):
        for named, topic in zip(questions.subjects, questions.topics, strict=True):
            ids = [words.index(word) for word in sorted(named)]
            of_named = torch.stack(
                [kind[number] == i + 1 if i < len(KINDS) else colour[number] == i - len(KINDS) + 1 for i in ids]
            ).any(0)
            rows.append(of_named if topic is None else of_named & (speaks_of[number] == topic + 1))
    relevant = torch.stack(rows)
    return relevant, relevant.any(1)
