"""Methods that drop visual tokens inside the language model, by what its own layers show at prefill."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tprl.selectors.base import top
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
        if layer < 1:
            raise ValueError(f"layer {layer} is not allowed; at least 1 layer has to see every token")
        self.layer = layer

    def stages(self, layers: int) -> list[Stage]:
        if self.layer >= layers:
            raise ValueError(f"layer {self.layer} is not allowed in a decoder of {layers} layers; 1 to {layers - 1}")
        return [Stage(self.layer - 1, self.layer)]

    def stage_budgets(self, visual_tokens: Tensor, budget: Tensor) -> list[Tensor]:
        return [budget]

    def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
        return Selection(top(view.attention(view.last[:, None])[:, 0], view.visual, budget))
