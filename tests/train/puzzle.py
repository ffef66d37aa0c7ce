"""A world small enough to see through: every question needs exactly one token, which its words tell."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tprl.config import PrunerConfig
from tprl.lvlm.score import AnswerScores
from tprl.pruner import TokenPruner
from tprl.types import VisualTokens

COUNT, WIDTH = 12, 16
LOST = -2.0


class Puzzle:
    """Stands where ``EncodedSamples`` stands, with a picture a question. The log-likelihood is 0 where the needed token
    is kept, else ``LOST``."""

    def __init__(self, questions: int = 40) -> None:
        generator = torch.Generator().manual_seed(3)
        self.names = torch.nn.functional.normalize(torch.randn(COUNT, WIDTH, generator=generator), dim=1) * 3
        self.needed = torch.randint(COUNT, (questions,), generator=generator)
        self.order = torch.stack([torch.randperm(COUNT, generator=generator) for _ in range(questions)])
        self.image_ids = list(range(questions))
        self.unpruned = AnswerScores(torch.zeros(questions), torch.ones(questions, dtype=torch.bool))
        self.accuracy_unpruned = torch.ones(questions)

    def __len__(self) -> int:
        return len(self.needed)

    def visual(self, indices: Sequence[int]) -> VisualTokens:
        tokens = self.names[self.order[list(indices)]]
        rows = (torch.arange(COUNT) + 0.5) / COUNT
        coords = torch.stack([rows, torch.full_like(rows, 0.5)], 1).expand(len(indices), -1, -1)
        query = self.names[self.needed[list(indices)]][:, None]
        ones = torch.ones(len(indices), COUNT, dtype=torch.bool)
        return VisualTokens(tokens, ones, coords, query, torch.ones(len(indices), 1, dtype=torch.bool))

    def place(self, indices: Sequence[int]) -> Tensor:
        """Where the needed token lies, ``(B,)``."""
        return (self.order[list(indices)] == self.needed[list(indices)][:, None]).int().argmax(1)

    def score(
        self,
        indices: Sequence[int],
        tokens: Tensor,
        keep_mask: Tensor,
        within: None = None,
        pictures: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> AnswerScores:
        assert pictures is None or torch.equal(tokens[pictures], self.visual(indices).tokens)
        found = keep_mask.gather(1, self.place(indices)[:, None])[:, 0]
        return AnswerScores(torch.where(found, 0.0, LOST), found)

    def accuracy(self, *given: Any, **named: Any) -> Tensor:
        return self.score(*given, **named).correct.float()


def make_pruner(seed: int = 0) -> TokenPruner:
    torch.manual_seed(seed)
    return TokenPruner(
        PrunerConfig(
            latent=16,
            autoencoder_hidden=32,
            policy_hidden=32,
            policy_layers=2,
            policy_heads=2,
            width=WIDTH,
            fingerprint="puzzle",
        )
    )
