"""Selectors led by how alike the visual tokens are, and by how they relate to the question."""

import torch
from torch import Tensor, nn

from tprl.selectors.base import cosine, in_parts, units
from tprl.types import Selection, VisualTokens


class DivPrune:
    """Max-min diversity, solved greedily (DivPrune, arXiv 2503.02175).

    ``max over S, |S| = T, of min over i != j in S of d_ij`` with ``d_ij = 1 - cos(V_i, V_j)``. The first token is the
    one farthest from its nearest neighbour, every further one the farthest from those already chosen.
    """

    name = "divprune"
    needs: frozenset[str] = frozenset()

    @in_parts
    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        distance = 1 - cosine(visual.tokens, visual.mask)
        rows = torch.arange(len(visual), device=budget.device)
        others = visual.mask[:, None] & ~torch.eye(visual.mask.shape[1], dtype=torch.bool, device=budget.device)
        nearest = distance.masked_fill(~others, torch.inf).amin(2)
        chosen = nearest.masked_fill(~visual.mask, -torch.inf).argmax(1)
        gap = torch.full_like(nearest, torch.inf).masked_fill(~visual.mask, -torch.inf)
        keep = torch.zeros_like(visual.mask)
        for step in range(int(budget.max())):
            keep[rows, chosen] |= step < budget
            gap = torch.minimum(gap, distance[rows, chosen])
            gap[rows, chosen] = -torch.inf
            chosen = gap.argmax(1)
        return Selection(keep)


class CDPruner:
    """The subset most diverse given the question (CDPruner, arXiv 2506.10967).

    Greedy MAP of a determinantal point process with the kernel ``L = diag(r) S diag(r)``: ``S`` holds the cosines of
    the visual tokens, ``r`` their relevance to the question, scaled to [0, 1] by minimum and maximum of the sample.
    Every step adds the token with the greatest ``log det(L_S+i) - log det(L_S)``, by updates of a Cholesky factor
    (Chen et al., arXiv 1709.05135).

    Differences: relevance is the cosine to the mean of the question's embeddings in the language model, as a CLIP
    text tower is not at hand in general; the released code, which has one, takes its cosine with a minus sign. Once
    the chosen tokens span all others, every determinant is 0 and the most relevant tokens come next.
    """

    name = "cdpruner"
    needs: frozenset[str] = frozenset()
    reads_question = True

    @in_parts
    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        relevance = _relevance(visual)
        kernel = relevance[:, :, None] * cosine(visual.tokens, visual.mask) * relevance[:, None]
        floor = 1e-5 * relevance.square()
        gain = relevance.square()
        rows = torch.arange(len(visual), device=budget.device)
        steps = int(budget.max())
        factor = kernel.new_zeros(len(visual), steps, visual.mask.shape[1])
        free = visual.mask.clone()
        keep = torch.zeros_like(visual.mask)
        for step in range(steps):
            score = torch.maximum(gain, floor).masked_fill(~free, -torch.inf)
            best, chosen = score.max(1)
            keep[rows, chosen] |= step < budget
            free[rows, chosen] = False
            past = factor[:, :step]
            known = (past[rows, :, chosen][:, None] @ past)[:, 0]
            # A row that ran out of tokens has no best one: it goes on with numbers that nobody reads.
            factor[:, step] = (kernel[rows, chosen] - known) / best.clamp(min=torch.finfo().tiny).sqrt()[:, None]
            gain = gain - factor[:, step].square()
        return Selection(keep)


def _relevance(visual: VisualTokens) -> Tensor:
    """Cosine of every token to the mean question embedding, scaled to (0, 1] in each row; ``(B, N)`` float32.

    All ones where the tokens are equally relevant, as in a row without a question.
    """
    count = visual.query_mask.sum(1, keepdim=True).clamp(min=1)
    query = visual.query.float().masked_fill(~visual.query_mask[..., None], 0).sum(1) / count
    cosines = (units(visual.tokens, visual.mask) @ nn.functional.normalize(query, dim=-1)[..., None])[..., 0]
    lowest = cosines.masked_fill(~visual.mask, torch.inf).amin(1, keepdim=True)
    highest = cosines.masked_fill(~visual.mask, -torch.inf).amax(1, keepdim=True)
    margin = 1e-6
    return ((cosines - lowest + margin) / (highest - lowest + margin)).masked_fill(~visual.mask, 0)
