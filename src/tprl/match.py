"""How well each visual token matches the words of the question: the policy's language-guided input.

A projector puts what a patch shows near the words for it, so the cosine of a visual token to the embedding of a word
that the question names says much of whether the question needs it, before anything is learned. Ours, not the paper's:
there the policy has to find such matches through latents that were compressed without the question.
"""

import torch
from torch import Tensor, nn

from tprl.selectors.base import units
from tprl.types import VisualTokens

MATCHES = 3


def question_match(visual: VisualTokens) -> Tensor:
    """Standard scores of every visual token within its picture, float32 ``(B, N, MATCHES)``, 0 at padding.

    The first is of its greatest cosine to a word of the question. The others are the greatest and the second greatest,
    over those words, of the standard score of its cosine to the word, so that a word near all tokens hides no other,
    and a token that matches two words ("left", "dog") stands out among those that match one. The second greatest is 0
    where the question has one word, all are where there is none.
    """
    if visual.query.shape[1] == 0:
        return visual.tokens.new_zeros(*visual.mask.shape, MATCHES, dtype=torch.float32)
    cosines = units(visual.tokens, visual.mask) @ units(visual.query, visual.query_mask).mT
    words = visual.query_mask[:, None]
    nearest = cosines.masked_fill(~words, -1).amax(2, keepdim=True)
    apart = standard_scores(cosines, visual.mask).masked_fill(~words, -torch.inf)
    best = nn.functional.pad(apart, (0, 1), value=-torch.inf).topk(2, dim=2).values
    return torch.cat([standard_scores(nearest, visual.mask), best.masked_fill(best.isinf(), 0)], 2)


def standard_scores(values: Tensor, mask: Tensor) -> Tensor:
    """``values (B, N, K)`` less their mean, by their standard deviation, along ``N`` over real tokens; 0 elsewhere."""
    real = mask[..., None]
    count = real.sum(1, keepdim=True)
    centred = (values - (values * real).sum(1, keepdim=True) / count) * real
    return centred / (centred.square().sum(1, keepdim=True) / count).sqrt().clamp(min=1e-6)
