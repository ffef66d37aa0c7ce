"""Dropping visual tokens inside a decoder of transformers, while it runs.

Hooks on the decoder's layers shorten the hidden states where a method says so, and with them the rotary embeddings,
position ids and masks that the later layers are given; a hook on the final norm puts what is left back at its place.
Positions stay those of the whole sequence, so the later layers compute what they would if nobody could attend to the
dropped tokens. In a cache the later layers are shorter than the first ones, and masks of decoding steps are cut to fit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.models.llama.modeling_llama import rotate_half

from tprl.selectors.stages import InModel, Stage


@dataclass(frozen=True)
class _Held:
    """The columns of the whole sequence that a layer still sees.

    Attributes:
        index: int64 ``(B, L')``, ascending. Rows that hold fewer than the others are filled up with dropped columns.
        real: bool ``(B, L')``, False at those, which nobody else may see.
        length: ``L``, of the whole sequence.
    """

    index: Tensor
    real: Tensor
    length: int

    @classmethod
    def of(cls, held: Tensor) -> "_Held":
        """From bool ``(B, L)``."""
        count = int(held.sum(1).max())
        index = held.int().argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
        return cls(index, held.gather(1, index), held.shape[1])

    def extended(self, length: int) -> "_Held":
        """The same with all columns from ``self.length`` to ``length``."""
        more = self._columns(self.length, length)
        return _Held(torch.cat([self.index, more], 1), torch.cat([self.real, torch.ones_like(more).bool()], 1), length)

    def cropped(self, length: int) -> "_Held":
        """The same without the columns from ``length`` on, if there are any.

        Raises:
            ValueError: some of those are dropped.
        """
        behind = self._columns(min(length, self.length), self.length)
        left = self.index.shape[1] - behind.shape[1]
        if not torch.equal(self.index[:, left:], behind):
            raise ValueError(
                "a pruned model's cache can be cropped behind its pictures only, with prompts padded on the left; "
                "start again without it"
            )
        return _Held(self.index[:, :left], self.real[:, :left], self.length - behind.shape[1])

    def _columns(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self.index.device).expand(len(self.index), -1)

    def gather(self, values: Tensor, dim: int = 1) -> Tensor:
        """Of ``values (B or 1, ..., L, ...)`` what is held, along ``dim``."""
        values = values.expand(len(self.index), *values.shape[1:])
        index = self.index.view(len(self.index), *[1] * (dim - 1), -1, *[1] * (values.ndim - dim - 1))
        return values.gather(dim, index.expand(*values.shape[:dim], -1, *values.shape[dim + 1 :]))

    def scatter(self, values: Tensor) -> Tensor:
        """``values (B, L', ...)`` at their places in the whole sequence, ``(B, L, ...)``, zero at dropped ones."""
        real = self.real.view(*self.real.shape, *[1] * (values.ndim - 2))
        index = self.index.view(real.shape).expand_as(values)
        whole = values.new_zeros(len(values), self.length, *values.shape[2:])
        return whole.scatter(1, index, values.masked_fill(~real, 0))

    def shorten(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a layer is given besides the hidden states, for the held columns."""
        short = {**kwargs, "attention_mask": self.mask(kwargs["attention_mask"], self.length)}
        short["position_embeddings"] = tuple(self.gather(part) for part in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            short["position_ids"] = self.gather(kwargs["position_ids"])
        return short

    def mask(self, mask: Tensor | None, queries: int) -> Tensor | None:
        """An attention mask ``(B or 1, H, Q, length)`` without the dropped columns, and rows unless ``queries`` are
        the tokens of a later step. None is a plain causal mask."""
        later = queries != self.length
        if mask is None:
            if bool(self.real.all()):
                return None
            device = self.index.device
            mask = torch.ones(queries, self.length, dtype=torch.bool, device=device).tril(self.length - queries)
            mask = mask[None, None]
        elif mask.ndim != 4 or mask.shape[-1] != self.length:
            raise ValueError(
                f"the attention mask of a layer has shape {tuple(mask.shape)} where (B, 1, {queries}, {self.length}) "
                "is needed: pruning inside the model works with the attention implementations 'sdpa' and 'eager', and "
                "while the prompt and the answer fit into a sliding window"
            )
        mask = self.gather(mask, 3)
        hidden = ~self.real[:, None, None]
        if not later:
            mask = self.gather(mask, 2)
            hidden = hidden & ~torch.eye(self.index.shape[1], dtype=torch.bool, device=mask.device)
        return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


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


@dataclass
class Dropping:
    """What happens to the sequences of a batch in a decoder; ``dropping`` makes it.

    Attributes:
        visual: bool ``(B, L)``, True where a visual token stands.
        last: int64 ``(B,)``, the place of the last prompt token.
        norm: the decoder's final one.
        budgets: for every stage, the visual tokens that it leaves, int64 ``(B,)``.
        kept: after a prefill, for every stage which visual tokens it left, bool ``(B, L)``.
    """

    method: InModel
    visual: Tensor
    last: Tensor
    norm: nn.Module
    stages: list[Stage]
    budgets: list[Tensor]
    kept: list[Tensor] = field(default_factory=list)
    _held: list[_Held] = field(default_factory=list)
    _entered: Tensor | None = None
    _watched: tuple[nn.Module, Tensor, dict[str, Any]] | None = None
    _prefilling: bool = True

    def start(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The pre-hook of the decoder."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, StaticCache):
            raise ValueError("pruning inside the model needs a cache that grows, such as DynamicCache; got StaticCache")
        deep, first = len(kwargs.get("deepstack_visual_embeds") or []), self.stages[0].drop
        if deep > first:
            raise ValueError(
                f"layer {first} is not allowed: visual features enter this decoder's first {deep} layers, so at least "
                f"{deep} layers have to see every token"
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        self._prefilling = past == 0
        if self._prefilling:
            self.kept, self._held = [], []
        self._held = [held.cropped(past) for held in self._held]

    def before(self, number: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """The pre-hook of decoder layer ``number``."""
        hidden, *others = args
        if not self._prefilling:
            if (held := self._held_at(number)) is not None:
                held = held.extended(int(kwargs["past_key_values"].get_seq_length()))
                kwargs = {**kwargs, "attention_mask": held.mask(kwargs["attention_mask"], hidden.shape[1])}
            return args, kwargs
        if number == 0:
            self._entered = hidden
        whole, held = kwargs, self._held_at(number)
        kwargs = whole if held is None else held.shorten(whole)
        for stage in self.stages[len(self._held) :]:
            if number == stage.watch:
                self._watched = layer, hidden, kwargs
            if number < stage.drop:
                break
            hidden = self._choose(hidden, held)
            hidden = hidden if held is None else held.scatter(hidden)
            held = _Held.of(self.kept[-1] | ~_padded(self.visual, hidden.shape[1]))
            self._held.append(held)
            hidden, kwargs = held.gather(hidden), held.shorten(whole)
        return (hidden, *others), kwargs

    def after(self, norm: nn.Module, args: Any) -> Any:
        """The pre-hook of the final norm: what is left goes back to its place, zeros stand between."""
        self._entered = None
        return (self._held[-1].scatter(args[0]),) if self._prefilling else args

    def _held_at(self, layer: int) -> _Held | None:
        """What ``layer`` sees by the cuts made so far; None is everything."""
        cuts = [held for stage, held in zip(self.stages, self._held, strict=False) if stage.drop <= layer]
        return cuts[-1] if cuts else None

    def _choose(self, hidden: Tensor, held: _Held | None) -> Tensor:
        """Let the method choose from ``hidden`` by what the watched layer shows. ``hidden``, changed if it merges."""
        assert self._watched is not None
        layer, seen, given = self._watched
        self._watched = None
        number, last, entered = len(self.kept), self.last, cast(Tensor, self._entered)
        visual = self.kept[-1] if self.kept else _padded(self.visual, hidden.shape[1])
        if held is not None:
            visual, last = held.gather(visual) & held.real, (held.index < last[:, None]).sum(1)
            entered = held.gather(entered)
        rotary, mask = given["position_embeddings"], given["attention_mask"]
        view = CutView(layer, entered, seen, visual, last, rotary, mask, hidden, self.norm)
        selection = self.method.select(number, view, self.budgets[number])
        keep = selection.keep_mask & visual
        self.kept.append(keep if held is None else held.scatter(keep))
        return hidden if selection.tokens is None else selection.tokens


@contextmanager
def dropping(
    decoder: PreTrainedModel, method: InModel, *, visual: Tensor, last: Tensor, budgets: Tensor
) -> Iterator[Dropping]:
    """While it is open, ``decoder`` drops visual tokens of the sequences that it is given, as ``method`` says.

    The first call is the prefill of a batch; calls on the cache that it filled go on from there. Without a cache every
    call is a prefill, and what a sequence has beyond ``visual`` is kept. The output has the length of the input:
    hidden states are those of the pruned decoder, and zero at visual tokens that did not reach the end.

    Args:
        decoder: a language model without head that has ``layers`` and a final ``norm``. It may be called with a bool
            or additive mask ``(B, 1, L, L)``, a mask ``(B, L)`` or none; attention is to be "sdpa" or "eager".
        method: of ``tprl.selectors.IN_MODEL`` or ``ON_AVERAGE``.
        visual: bool ``(B, L)``, True where a visual token stands; padding is none.
        last: int64 ``(B,)``, the place of each row's last prompt token. Later tokens decide nothing.
        budgets: int64 ``(B,)``, how many visual tokens of a row reach the last layer, or what else the method takes for
            its budget: 0 to as many as the row has.

    Raises:
        ValueError: a budget is out of range or of the method's reach, the decoder is too shallow for the method or
            attends by an implementation other than "sdpa" and "eager"; or, when the decoder is called, its cache is
            static or visual features enter it after the first cut.

    Example:
        >>> with dropping(decoder, FastV(), visual=visual, last=last, budgets=budgets) as dropped:
        ...     hidden = decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=mask).last_hidden_state
        >>> dropped.kept[-1]
    """
    counts = visual.sum(1)
    if budgets.shape != counts.shape or bool(((budgets < 0) | (budgets > counts)).any()):
        raise ValueError(
            f"budgets must be one a row and lie between 0 and the number of visual tokens {counts.tolist()}, "
            f"got {budgets.tolist()}"
        )
    layers = cast(nn.ModuleList, decoder.layers)
    stages = method.stages(len(layers))
    left, norm = method.stage_budgets(len(layers), counts, budgets), cast(nn.Module, decoder.norm)
    with resumed(decoder, Dropping(method, visual, last, norm, stages, left)) as dropped:
        yield dropped


@contextmanager
def resumed(decoder: PreTrainedModel, dropped: Dropping) -> Iterator[Dropping]:
    """Open a ``dropping`` again, for calls on a cache that was filled in it."""
    implementation = decoder.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"attention {implementation!r} is not allowed for pruning inside the model; 'sdpa' or 'eager'")
    layers, norm = cast(nn.ModuleList, decoder.layers), cast(nn.Module, decoder.norm)
    hooks = [decoder.register_forward_pre_hook(dropped.start, with_kwargs=True)]
    hooks += [
        layer.register_forward_pre_hook(partial(dropped.before, number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    hooks.append(norm.register_forward_pre_hook(dropped.after))
    try:
        yield dropped
    finally:
        for hook in hooks:
            hook.remove()


def _padded(mask: Tensor, length: int) -> Tensor:
    """``mask (B, L)`` with False up to ``length``."""
    return nn.functional.pad(mask, (0, length - mask.shape[1]))
