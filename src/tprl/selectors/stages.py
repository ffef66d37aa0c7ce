"""The face of methods that prune at decoder layers, and what their budget can mean."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

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
        entered: ``(B, L, D)``, what entered the decoder.
        hidden: ``(B, L, D)``, what enters the layer.
        visual: bool ``(B, L)``, the visual tokens.
        text: bool ``(B, L)``, the other tokens of the prompt; neither padding nor what follows the prompt.
        last: int64 ``(B,)``, the place of the last prompt token.
    """

    @property
    def entered(self) -> Tensor: ...
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

    def normed(self) -> Tensor:
        """What enters the layer of the cut, after the decoder's final norm: ``(B, L, D)``."""
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

    def stage_budgets(self, layers: int, visual_tokens: Tensor, budget: Tensor) -> list[Tensor]:
        """How many visual tokens each stage of a decoder of ``layers`` layers leaves, of ``visual_tokens`` under
        ``budget``, which is what the last stage leaves unless the method says otherwise: int64, all of one shape."""
        ...

    def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
        """Which tokens stay: a mask ``(B, L)`` with ``budget (B,)`` visual tokens True in every row, all others
        without meaning; and, from methods that merge, the changed hidden states ``(B, L, D)``."""
        ...

    def layer_counts(self, layers: int, visual_tokens: int, budget: int) -> list[int]:
        """The visual tokens that each of ``layers`` decoder layers sees, for ``tprl.evaluate.flops.lvlm_flops``.

        Raises:
            ValueError: the decoder is too shallow, or ``budget`` is not between 0 and ``visual_tokens`` or out of the
                method's reach.
        """
        if not 0 <= budget <= visual_tokens:
            raise ValueError(f"budget {budget} is not allowed; 0 to the picture's {visual_tokens} visual tokens")
        left = self.stage_budgets(layers, torch.tensor([visual_tokens]), torch.tensor([budget]))
        counts = [visual_tokens] * layers
        for stage, count in zip(self.stages(layers), left, strict=True):
            counts[stage.drop :] = [int(count)] * (layers - stage.drop)
        return counts


class OnAverage(InModel):
    """A method whose budget is the mean over the layers of a decoder, as in the tables of PyramidDrop and SparseVLM.

    The last stage leaves as many tokens as that mean allows, at least one, and the others what the method makes of it.
    So under the same budget as much is computed as by a method that prunes before the language model. In a shallow
    decoder the layers that see every token can alone be more than a budget.

    Args:
        method: whose budget is what the last layers see.
    """

    def __init__(self, method: InModel) -> None:
        self.method, self.name = method, f"{method.name}-mean"

    def stages(self, layers: int) -> list[Stage]:
        return self.method.stages(layers)

    def stage_budgets(self, layers: int, visual_tokens: Tensor, budget: Tensor) -> list[Tensor]:
        """The stages' budgets of the method.

        Raises:
            ValueError: a layer sees more than ``budget`` tokens on average even if one token is left in the end.
        """
        drops = [stage.drop for stage in self.stages(layers)]
        last = torch.arange(1, max(int(visual_tokens.max()), 1) + 1, device=budget.device).expand(*budget.shape, -1)
        last = last.minimum(visual_tokens[..., None])
        left = self.method.stage_budgets(layers, visual_tokens[..., None], last)
        seen = drops[0] * visual_tokens[..., None] + sum(
            (end - start) * count for start, end, count in zip(drops, [*drops[1:], layers], left, strict=True)
        )
        if bool((seen[..., 0] > layers * budget).any()):
            worst = int((seen[..., 0] - layers * budget).argmax())
            raise ValueError(
                f"{self.name} cannot keep {budget[worst]} of a prompt's {visual_tokens[worst]} visual tokens a layer "
                f"on average: the first {drops[0]} of {layers} layers see all of them, so at least "
                f"{-(-int(seen[worst, 0]) // layers)} stay"
            )
        most = last.masked_fill(seen > layers * budget[..., None], 0).amax(-1)
        return self.method.stage_budgets(layers, visual_tokens, most)

    def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
        return self.method.select(stage, view, budget)
