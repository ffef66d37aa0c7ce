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

from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from tprl.lvlm.held import Held
from tprl.lvlm.layer_view import CutView, check_readable
from tprl.selectors.stages import InModel, Stage


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
    _held: list[Held] = field(default_factory=list)
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
                kwargs = {**kwargs, "attention_mask": held.attention_mask(kwargs["attention_mask"], hidden.shape[1])}
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
            held = Held.of(self.kept[-1] | ~_padded(self.visual, hidden.shape[1]))
            self._held.append(held)
            hidden, kwargs = held.gather(hidden), held.shorten(whole)
        return (hidden, *others), kwargs

    def after(self, norm: nn.Module, args: Any) -> Any:
        """The pre-hook of the final norm: what is left goes back to its place, zeros stand between."""
        self._entered = None
        return (self._held[-1].scatter(args[0]),) if self._prefilling else args

    def _held_at(self, layer: int) -> Held | None:
        """What ``layer`` sees by the cuts made so far; None is everything."""
        cuts = [held for stage, held in zip(self.stages, self._held, strict=False) if stage.drop <= layer]
        return cuts[-1] if cuts else None

    def _choose(self, hidden: Tensor, held: Held | None) -> Tensor:
        """Let the method choose from ``hidden`` by what the watched layer shows. ``hidden``, changed if it merges."""
        assert self._watched is not None
        layer, seen, given = self._watched
        self._watched = None
        number, last, entered = len(self.kept), self.last, cast(Tensor, self._entered)
        visual = self.kept[-1] if self.kept else _padded(self.visual, hidden.shape[1])
        if held is not None:
            visual, last = held.gather(visual) & held.mask, (held.index < last[:, None]).sum(1)
            entered = held.gather(entered)
        rotary, mask = given["position_embeddings"], given["attention_mask"]
        view = CutView(layer, entered, seen, visual, last, rotary, mask, hidden, self.norm)
        selection = self.method.select(number, view, self.budgets[number])
        keep = selection.keep_mask & visual
        self.kept.append(keep if held is None else held.scatter(keep))
        return hidden if selection.tokens is None else selection.tokens


def check_first_cut(model: PreTrainedModel, method: InModel, least: int = 1) -> None:
    """Raise ValueError if ``method`` cannot look into the language model of ``model``, or cuts it before its layer
    ``least`` or one that takes visual features, as Qwen3-VL's first ones do."""
    decoder: Any = cast(Any, model).get_decoder()
    check_readable(decoder)
    least = max(least, len(model.config.vision_config.to_dict().get("deepstack_visual_indexes") or []))
    first = method.stages(len(decoder.layers))[0].drop
    if first < least:
        raise ValueError(f"{method.name} cuts before layer {first}; at least {least} layers of this model see all")


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
        ValueError: a budget is out of range or of the method's reach, the decoder is too shallow for the method, its
            layers are not read as Llama's, or it attends by an implementation other than "sdpa" and "eager"; or, when
            the decoder is called, its cache is static or visual features enter it after the first cut.

    Example:
        >>> with dropping(decoder, FastV(), visual=visual, last=last, budgets=budgets) as dropped:
        ...     hidden = decoder(inputs_embeds=embeds, position_ids=positions, attention_mask=mask).last_hidden_state
        >>> dropped.kept[-1]
    """
    check_readable(decoder)
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
