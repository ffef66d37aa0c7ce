"""What a decoder layer of transformers shows, at prefill, to whoever chooses tokens by it."""

import sys
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

_READ = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.head_dim", "self_attn.scaling")
"""What a view reads of a layer."""


def check_readable(decoder: PreTrainedModel) -> None:
    """Raise ValueError unless views of its layers show what ``decoder`` computes."""
    if faults := unreadable(decoder):
        raise ValueError(
            f"the language model {decoder.config.model_type!r} cannot be looked into, as methods inside it and text "
            f"attention do: {', '.join(faults)}"
        )


def unreadable(decoder: PreTrainedModel) -> list[str]:
    """What keeps views of its layers from showing what ``decoder`` computes: they attend and rotate as Llama does."""
    layers = list(cast(Any, decoder).layers)
    faults = [f"it has no {path}" for path in ("norm", "rotary_emb") if not _has(decoder, path)]
    faults += [f"a layer has no {path}" for path in _READ if not all(_has(layer, path) for layer in layers)]
    if any(_has(layer, "self_attn.sinks") for layer in layers):
        faults.append("its attention has sinks")
    if any(_has(layer, "self_attn.query_layernorm") for layer in layers):
        faults.append("its queries are normalised behind their rotation")
    if getattr(decoder.config, "clip_qkv", None) is not None:
        faults.append("its queries and keys are clipped")
    if not faults:
        rotates = all(getattr(layer.self_attn, "use_rope", True) for layer in layers)
        rotates = rotates and all(map(_rotates, {type(layer.self_attn) for layer in layers}))
        buffers = cast(Any, decoder).rotary_emb.named_buffers()
        widths = {2 * len(frequencies) for name, frequencies in buffers if name.endswith("inv_freq")}
        if not rotates or widths != {layer.self_attn.head_dim for layer in layers}:
            faults.append("its rotary embedding is not Llama's")
    return faults


def _has(module: nn.Module, path: str) -> bool:
    try:
        attrgetter(path)(module)
    except AttributeError:
        return False
    return True


def _rotates(attention: type[nn.Module]) -> bool:
    """Whether the code of an attention turns queries and keys by halves, as Llama's does."""
    modules = [sys.modules[kind.__module__] for kind in attention.__mro__]
    rotate = next((module.rotate_half for module in modules if hasattr(module, "rotate_half")), None)
    probe = torch.arange(4.0, device="cpu")
    return rotate is not None and torch.equal(rotate(probe), rotate_half(probe))


@dataclass(frozen=True)
class LayerView:
    """A decoder layer at prefill, see ``tprl.selectors.stages.LayerView``; attention is computed for the asked rows
    only."""

    layer: nn.Module
    entered: Tensor
    hidden: Tensor
    visual: Tensor
    last: Tensor
    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None

    @property
    def text(self) -> Tensor:
        return self._visible(self.last[:, None])[:, 0] & ~self.visual

    def attention(self, places: Tensor) -> Tensor:
        attention = cast(Any, self.layer).self_attn
        rows = torch.arange(len(places), device=places.device)[:, None]
        asking = tuple(part.expand(len(places), -1, -1)[rows, places] for part in self.rotary)
        queries = self._heads("q", self.hidden[rows, places], asking)
        keys = self._heads("k", self.hidden, self.rotary)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        scores = queries.float() @ keys.mT.float() * attention.scaling
        if (cap := getattr(attention, "attn_logit_softcapping", None)) is not None:
            scores = cap * (scores / cap).tanh()
        scores = scores.masked_fill(~self._visible(places)[:, None], -torch.inf)
        return cast(Tensor, scores.softmax(-1).mean(1))

    def keys(self) -> Tensor:
        return self._heads("k", self.hidden, self.rotary).transpose(1, 2).flatten(2).float()

    def _heads(self, kind: str, hidden: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
        """Queries or keys ``(B, heads, L, d)``, normalised where the family does so, and rotated."""
        layer = cast(Any, self.layer)
        attention = layer.self_attn
        states = attention.get_submodule(f"{kind}_proj")(layer.input_layernorm(hidden))
        states = states.unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, f"{kind}_norm"):
            states = attention.get_submodule(f"{kind}_norm")(states)
        states = states.transpose(1, 2)
        cos, sin = (part[:, None] for part in rotary)
        turned = rotate_half(states)
        return cast(Tensor, states * cos + turned * sin)

    def _visible(self, places: Tensor) -> Tensor:
        """Which tokens those at ``places (B, R)`` see, bool ``(B, R, L)``; without a mask, all up to themselves."""
        if self.mask is None:
            return torch.arange(self.hidden.shape[1], device=places.device) <= places[..., None]
        mask = self.mask.expand(len(places), *self.mask.shape[1:])[:, 0]
        mask = mask[torch.arange(len(places), device=places.device)[:, None], places]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@dataclass(frozen=True)
class CutView(LayerView):
    """The watched layer of a cut, see ``tprl.selectors.stages.LayerView``; ``norm`` is the decoder's final one."""

    cut: Tensor
    norm: nn.Module

    def normed(self) -> Tensor:
        return cast(Tensor, self.norm.forward(self.cut))  # past the hook, which is for the decoder's own call
