"""Methods that drop visual tokens inside the language model, by what its own layers show at prefill."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tprl.selectors.base import top, units
from tprl.types import Selection


@dataclass(frozen=True)
class Stage:
    """One cut: decoder layer ``watch`` shows what counts, ``drop`` is the first layer that sees fewer tokens.

    ``watch`` is ``drop`` or the layer before it: a method may look at the layer that is still to run.
    """

    watch: int
    drop: int


class LayerView(Protocol):
    """What a decoder layer shows at prefill of a batch of sequences, as far as they are still held.

    Attributes:
        hidden: ``(B, L, D)``, what enters the layer.
        visual: bool ``(B, L)``, the visual tokens.
        text: bool ``(B, L)``, the other tokens of the prompt; neither padding nor what follows the prompt.
        last: int64 ``(B,)``, the place of the last prompt token.
    """

    @property
    def hidden(self) -> Tensor: ...
    @property
    def visual(self) -> Tensor: ...
    @property
    def text(self) -> Tensor: ...
    @property
    def last(self) -> Tensor: ...

    def attention(self, places: Tensor) -> Tensor:
        """Attention of the tokens at ``places`` (int64 ``(B, R)``) in this layer, mean over heads: float32
        ``(B, R, L)``."""
        ...

    def keys(self) -> Tensor:
        """The layer's rotated keys, all heads of a token one after the other: float32 ``(B, L, K)``."""
        ...


@runtime_checkable
class InModel(Protocol):
    """A method that prunes at one or several decoder layers.

    Attributes:
        name: as tables and the command line call it.
    """

    name: str

    def stages(self, layers: int) -> list[Stage]:
        """Where a decoder of ``layers`` layers is cut, first to last.

        Raises:
            ValueError: the decoder is too shallow.
        """
        ...

    def stage_budgets(self, visual_tokens: Tensor, budget: Tensor) -> list[Tensor]:
        """How many visual tokens each stage leaves, int64 ``(B,)`` each, of ``visual_tokens (B,)``; the last stage
        leaves ``budget (B,)``."""
        ...

    def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
        """Which tokens stay: a mask ``(B, L)`` with ``budget (B,)`` visual tokens True in every row, all others
        without meaning; and, from methods that merge, the changed hidden states ``(B, L, D)``."""
        ...

    def layer_counts(self, layers: int, visual_tokens: int, budget: int) -> list[int]:
        """The visual tokens that each of ``layers`` decoder layers sees, for ``tprl.evaluate.flops.lvlm_flops``.

        Raises:
            ValueError: the decoder is too shallow, or ``budget`` is not between 0 and ``visual_tokens``.
        """
        if not 0 <= budget <= visual_tokens:
            raise ValueError(f"budget {budget} is not allowed; 0 to the picture's {visual_tokens} visual tokens")
        left = self.stage_budgets(torch.tensor([visual_tokens]), torch.tensor([budget]))
        counts = [visual_tokens] * layers
        for stage, count in zip(self.stages(layers), left, strict=True):
            counts[stage.drop :] = [int(count)] * (layers - stage.drop)
        return counts


class FastV(InModel):
    """The tokens that the last prompt token attends to most in an early layer (FastV, arXiv 2403.06764).

    ``s_j = mean over heads of softmax(q_last k_j / sqrt(d))`` in decoder layer ``layer - 1``, counted from 0; the top
    ``T`` stay, once, for all layers from ``layer`` on. K = 2 is the paper's setting. Kept tokens keep their order and
    their position ids, as in the released code.

    Args:
        layer: number of layers that see every token, at least 1.

    Raises:
        ValueError: ``layer`` is less than 1.
    """

    name = "fastv"

    def __init__(self, layer: int = 2) -> None:
        _check_layer(layer)
        self.layer = layer

    def stages(self, layers: int) -> list[Stage]:
        _check_layer(self.layer, layers)
        return [Stage(self.layer - 1, self.layer)]

    def stage_budgets(self, visual_tokens: Tensor, budget: Tensor) -> list[Tensor]:
        return [budget]

    def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
        return Selection(_attended(view, budget))


class PyramidDrop(InModel):
    """Fewer tokens the deeper the layer, by the last prompt token's attention (PyramidDrop, arXiv 2410.17247).

    Before the layers at a quarter, half and three quarters of the depth (8, 16 and 24 of 32, as published) the visual
    tokens with the highest attention in the layer that is about to run stay. Of ``N`` tokens stage ``s`` leaves
    ``N (T / N)^(s / 3)``: for ``T = N / 8`` these are the published 50, 25 and 12.5 %. ``T`` is what the last quarter
    of the layers sees, so the model computes far more than with ``T`` tokens from the start; see ``layer_counts``.
    """

    name = "pyramiddrop"

    def stages(self, layers: int) -> list[Stage]:
        if layers < 4:
            raise ValueError(
                f"{self.name} cuts a decoder into quarters; this one has {layers} layers, at least 4 needed"
            )
        return [Stage(layer, layer) for layer in (round(layers * quarter / 4) for quarter in (1, 2, 3))]

    def stage_budgets(self, visual_tokens: Tensor, budget: Tensor) -> list[Tensor]:
        share = budget / visual_tokens.clamp(min=1)
        return [*((visual_tokens * share ** (stage / 3)).round().long() for stage in (1, 2)), budget]

    def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
        return Selection(_attended(view, budget))


class Dart(InModel):
    """The tokens least like a few pivots (DART, arXiv 2502.11494).

    Pivots: the 4 visual tokens and the 4 tokens behind the picture whose keys have the greatest L1 norm. The visual
    pivots stay; then every pivot in turn adds the same number of visual tokens, those of lowest cosine to it among the
    hidden states that enter layer ``layer``, from which on only these stay. Layer 2 and 4 + 4 pivots are the published
    setting; the first pivots add one token more where the numbers do not divide.

    Differences: keys and hidden states are those that layer ``layer`` sees, before its norm.

    Args:
        layer: number of layers that see every token, at least 1.

    Raises:
        ValueError: ``layer`` is less than 1.
    """

    name = "dart"
    pivots = 4

    def __init__(self, layer: int = 2) -> None:
        _check_layer(layer)
        self.layer = layer

    def stages(self, layers: int) -> list[Stage]:
        _check_layer(self.layer, layers)
        return [Stage(self.layer, self.layer)]

    def stage_budgets(self, visual_tokens: Tensor, budget: Tensor) -> list[Tensor]:
        return [budget]

    def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
        norms = view.keys().abs().sum(2)
        behind = view.text & (view.visual.flip(1).cumsum(1).flip(1) == 0)
        keep = top(norms, view.visual, budget.clamp(max=self.pivots))
        others = top(norms, behind, torch.full_like(budget, self.pivots))
        pivots, exists = [], []
        for group in (keep, others):
            order = norms.masked_fill(~group, -torch.inf).argsort(dim=1, descending=True, stable=True)
            pivots.append(order[:, : self.pivots])
            exists.append(torch.arange(pivots[-1].shape[1], device=norms.device) < group.sum(1, keepdim=True))
        pivot, real = torch.cat(pivots, 1), torch.cat(exists, 1)
        count, rest = real.sum(1, keepdim=True).clamp(min=1), (budget - keep.sum(1))[:, None]
        share = (rest // count + (real.cumsum(1) <= rest % count)) * real
        hidden = units(view.hidden, torch.ones_like(view.visual))
        rows = torch.arange(len(hidden), device=hidden.device)
        for number in range(pivot.shape[1]):
            cosines = (hidden @ hidden[rows, pivot[:, number], :, None])[..., 0]
            keep = keep | top(-cosines, view.visual & ~keep, share[:, number])
        return Selection(keep)


def _attended(view: LayerView, budget: Tensor) -> Tensor:
    """The ``budget`` visual tokens that the last prompt token attends to most."""
    return top(view.attention(view.last[:, None])[:, 0], view.visual, budget)


def _check_layer(layer: int, layers: int | None = None) -> None:
    """Raise ValueError unless a decoder, of ``layers`` layers if given, can be cut before layer ``layer``."""
    if layer < 1:
        raise ValueError(f"layer {layer} is not allowed; at least 1 layer has to see every token")
    if layers is not None and layer >= layers:
        raise ValueError(f"layer {layer} is not allowed in a decoder of {layers} layers; 1 to {layers - 1}")
