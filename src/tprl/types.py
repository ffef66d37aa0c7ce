"""The tensors that travel through the package, named and shaped once.

``B`` batch, ``N`` visual tokens, ``Q`` question tokens, ``D`` width of the language model. Masks are True where
real and True where kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualTokens:
    """What a language model is about to be shown of a batch of pictures, and what it will be asked.

    Attributes:
        tokens: projected visual tokens, float ``(B, N, D)``; padding at the end of a row is zero.
        mask: bool ``(B, N)``, True where a token is real.
        coords: float32 ``(B, N, 2)``, row and column of a token's centre in its picture, each in [0, 1].
        query: embeddings of the question's own tokens, float ``(B, Q, D)``, no chat template among them.
        query_mask: bool ``(B, Q)``.
        signals: what selectors need besides, by name; see ``SIGNALS``.
    """

    tokens: Tensor
    mask: Tensor
    coords: Tensor
    query: Tensor
    query_mask: Tensor
    signals: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch, count, width = self.tokens.shape
        expected = {"mask": (batch, count), "coords": (batch, count, 2)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}, expected {shape}")
        if self.query.shape[::2] != (batch, width) or self.query_mask.shape != self.query.shape[:2]:
            raise ValueError(
                f"query {tuple(self.query.shape)} and query_mask {tuple(self.query_mask.shape)} "
                f"do not fit tokens {tuple(self.tokens.shape)}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, rows: int) -> list["VisualTokens"]:
        """Of ``rows`` rows each, but for the last, in order."""
        return [self._each(itemgetter(slice(first, first + rows))) for first in range(0, len(self), rows)]

    def to(self, device: torch.device | str) -> "VisualTokens":
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "VisualTokens":
        changed = {name: change(getattr(self, name)) for name in ("tokens", "mask", "coords", "query", "query_mask")}
        return VisualTokens(**changed, signals={name: change(signal) for name, signal in self.signals.items()})


SIGNALS = {
    "cls_attention": "(B, N): attention of the vision tower's [CLS] token to every patch in the layer whose features "
    "are used, mean over heads; towers without [CLS]: the mean attention that a patch receives",
    "tower_keys": "(B, N, K): keys of the vision tower's last used layer, mean over heads",
    "text_attention": "(B, N): the greatest attention of a token behind the picture to every visual token in the "
    "language model, from one recorded prefill, see tprl.lvlm.text_attention",
}
"""Signals that a selector may ask for; only those asked for are computed."""


@dataclass(frozen=True)
class Selection:
    """A selector's decision.

    Attributes:
        keep_mask: bool ``(B, N)``, True where a token is kept.
        tokens: float ``(B, N, D)``, the changed tokens, from selectors that merge.
        sizes: float32 ``(B, N)``, at least 1: how many tokens a kept one stands for, itself among them, from selectors
            that want it attended to as that many, see ``tprl.sizes``.
    """

    keep_mask: Tensor
    tokens: Tensor | None = None
    sizes: Tensor | None = None
