"""Methods that drop visual tokens inside the language model, by what its own layers show at prefill."""

import torch
from torch import Tensor, nn

from tprl.selectors.base import top, units
from tprl.selectors.stages import InModel, LayerView, Stage
from tprl.types import Selection


class _OneCut(InModel):
    """A method that watches decoder layer ``layer - 1``, counted from 0, and cuts once behind it."""

    def __init__(self, layer: int | None = None) -> None:
        if layer is not None and layer < 1:
            raise ValueError(f"layer {layer} is not allowed; at least 1 layer has to see every token")
        self.layer = layer

    def stages(self, layers: int) -> list[Stage]:
        layer = max(1, _scaled(2, layers)) if self.layer is None else self.layer
        if layer >= layers:
            raise ValueError(f"layer {layer} is not allowed in a decoder of {layers} layers; 1 to {layers - 1}")
        return [Stage(layer - 1, layer)]

    def stage_budgets(self, layers: int, visual_tokens: Tensor, budget: Tensor) -> list[Tensor]:
        return [budget]


class FastV(_OneCut):
    """The tokens that the last prompt token attends to most in an early layer (FastV, arXiv 2403.06764).

    ``s_j = mean over heads of softmax(q_last k_j / sqrt(d))`` in decoder layer ``layer - 1``; the top ``T`` stay, once,
    for all layers from ``layer`` on. Kept tokens keep their order and their position ids, as in the released code.

    Args:
        layer: number of layers that see every token, at least 1; the published 2 of 32, scaled to the depth, unless
            given.

    Raises:
        ValueError: ``layer`` is less than 1.
    """

    name = "fastv"

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

    def stage_budgets(self, layers: int, visual_tokens: Tensor, budget: Tensor) -> list[Tensor]:
        return [*(_between(visual_tokens, budget, part) for part in (1 / 3, 2 / 3)), budget]

    def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
        return Selection(_attended(view, budget))


class SparseVLM(InModel):
    """The tokens that telling words attend to; some of the others are recycled (SparseVLM, arXiv 2410.04417).

    Raters are the words behind the picture with ``R_i >= mean(R)``, where ``R_i = mean over j of softmax over i of
    (V_j X_i)`` compares visual tokens ``V`` and words ``X`` as they enter the language model. A visual token's score
    is the attention that it gets from them in the layer about to run, mean over raters and heads. The highest stay.
    The best 30 % of the others are clustered by density peaks: centres are those with the greatest
    ``rho_i delta_i``, ``rho_i = exp(-mean of d_ij^2 over the K nearest j)``, ``delta_i`` the distance to the nearest
    denser token, and every other one joins the nearest centre. One token for ten recycled ones remains.

    A fixed budget changes two things. The paper lets the rank of the attention say how many tokens go; here, as in the
    tables of the paper, the numbers are given: of ``N`` tokens the stages leave ``N (T / N)^(2/5)``,
    ``N (T / N)^(2/3)`` and ``T``; for ``T = 110`` of 576 these are 297, 191 and 110, where 300, 200 and 110 are
    published for 192 tokens on average. The stages published for fewer, 303, 110 and 36 for 128 and 66, 30 and 17 for
    64, follow no one rule; for the same ``T`` these are 190, 91 and 36, and 141, 55 and 17. And recycled tokens take
    places within the budget instead of coming on top.
    ``T`` is what the last layers see; see ``layer_counts``.

    Differences: layers 2, 6 and 15 of 32 are scaled to the depth, and what enters them is cut, not what leaves them.
    ``R`` is taken at every stage over the visual tokens that are left. A cluster becomes the mean of its tokens, as in
    the released code (the paper's sum leaves the scale that the model knows), and stands where its centre stood.
    Distances are divided by ``sqrt(D)``, and ``K`` is 5.
    """

    name = "sparsevlm"
    neighbours = 5

    def stages(self, layers: int) -> list[Stage]:
        if layers < 4:
            raise ValueError(f"{self.name} cuts a decoder three times; this one has {layers} layers, at least 4 needed")
        cuts = [0]
        for layer in (2, 6, 15):
            cuts.append(max(cuts[-1] + 1, _scaled(layer, layers)))
        return [Stage(cut, cut) for cut in cuts[1:]]

    def stage_budgets(self, layers: int, visual_tokens: Tensor, budget: Tensor) -> list[Tensor]:
        return [*(_between(visual_tokens, budget, part) for part in (2 / 5, 2 / 3)), budget]

    def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
        scores = self._scores(view)
        clusters = torch.minimum(_share(view.visual.sum(1) - budget, 3), (budget - 1).clamp(min=0))
        keep = top(scores, view.visual, budget - clusters)
        dropped = view.visual & ~keep
        recycled = top(scores, dropped, _share(dropped.sum(1), 30))
        if not bool(recycled.any()):
            return Selection(keep)
        places, real = _places(recycled)
        at = places[..., None].expand(-1, -1, view.hidden.shape[2])
        hidden = view.hidden.gather(1, at)
        distance = torch.cdist(hidden.float(), hidden.float()) / hidden.shape[2] ** 0.5
        centre = density_peaks(distance, real, clusters, self.neighbours)
        home = distance.masked_fill(~centre[:, None], torch.inf).argmin(2)
        home = torch.where(centre, torch.arange(home.shape[1], device=home.device), home)
        member = nn.functional.one_hot(home, home.shape[1]).float() * real[..., None]
        means = (member.mT @ hidden.float() / member.sum(1).clamp(min=1)[..., None]).to(hidden.dtype)
        merged = view.hidden.scatter(1, at, torch.where(centre[..., None], means, hidden))
        return Selection(keep.scatter(1, places, keep.gather(1, places) | centre), merged)

    def _scores(self, view: LayerView) -> Tensor:
        """Of all tokens, float32 ``(B, L)``. Where no word is behind the picture, the last token is the rater."""
        places, real = _places(_behind(view))
        words = view.entered.gather(1, places[..., None].expand(-1, -1, view.entered.shape[2]))
        likeness = (view.entered.float() @ words.mT.float()).masked_fill(~real[:, None], -torch.inf).softmax(2)
        relevance = likeness.masked_fill(~view.visual[..., None], 0).sum(1)
        raters = real & (relevance >= relevance.sum(1, keepdim=True) / real.sum(1, keepdim=True))
        none = ~raters.any(1, keepdim=True)
        places, raters = torch.cat([places, view.last[:, None]], 1), torch.cat([raters, none], 1)
        attention = view.attention(places).masked_fill(~raters[..., None], 0)
        return attention.sum(1) / raters.sum(1, keepdim=True)


class Dart(_OneCut):
    """The tokens least like a few pivots (DART, arXiv 2502.11494).

    Pivots: the 4 visual tokens and the 4 tokens behind the picture whose keys in layer ``layer - 1`` have the greatest
    L1 norm. The visual pivots stay; then every pivot in turn adds the same number of visual tokens, those of lowest
    cosine to it among the hidden states that enter layer ``layer``, from which on only these stay. Cosines are taken
    behind the decoder's final norm, as in the released code. 4 + 4 pivots are the published setting; the first ones add
    one token more where the numbers do not divide.

    Args:
        layer: number of layers that see every token, at least 1; the published 2 of 32, scaled to the depth, unless
            given.

    Raises:
        ValueError: ``layer`` is less than 1.
    """

    name = "dart"
    pivots = 4

    def select(self, stage: int, view: LayerView, budget: Tensor) -> Selection:
        norms = view.keys().abs().sum(2)
        keep = top(norms, view.visual, budget.clamp(max=self.pivots))
        others = top(norms, _behind(view), torch.full_like(budget, self.pivots))
        pivots, exists = [], []
        for group in (keep, others):
            order = norms.masked_fill(~group, -torch.inf).argsort(dim=1, descending=True, stable=True)
            pivots.append(order[:, : self.pivots])
            exists.append(torch.arange(pivots[-1].shape[1], device=norms.device) < group.sum(1, keepdim=True))
        pivot, real = torch.cat(pivots, 1), torch.cat(exists, 1)
        count, rest = real.sum(1, keepdim=True).clamp(min=1), (budget - keep.sum(1))[:, None]
        share = (rest // count + (real.cumsum(1) <= rest % count)) * real
        hidden = units(view.normed(), torch.ones_like(view.visual))
        rows = torch.arange(len(hidden), device=hidden.device)
        for number in range(pivot.shape[1]):
            cosines = (hidden @ hidden[rows, pivot[:, number], :, None])[..., 0]
            keep = keep | top(-cosines, view.visual & ~keep, share[:, number])
        return Selection(keep)


def _attended(view: LayerView, budget: Tensor) -> Tensor:
    """The ``budget`` visual tokens that the last prompt token attends to most."""
    return top(view.attention(view.last[:, None])[:, 0], view.visual, budget)


def _behind(view: LayerView) -> Tensor:
    """The prompt's tokens behind the picture, bool ``(B, L)``."""
    return view.text & (view.visual.flip(1).cumsum(1).flip(1) == 0)


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``mask (B, L)`` is True, ascending and filled up to the longest row with places where it is not: int64
    ``(B, R)``, and bool ``(B, R)``, True where it is."""
    places = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return places, mask.gather(1, places)


def _between(visual_tokens: Tensor, budget: Tensor, part: float) -> Tensor:
    """``N (T / N)^part``, rounded, int64."""
    return (visual_tokens * (budget / visual_tokens.clamp(min=1)) ** part).round().long()


def _share(count: Tensor, percent: int) -> Tensor:
    """``percent`` of ``count``, rounded up."""
    return -(-percent * count // 100)


def density_peaks(distance: Tensor, among: Tensor, count: Tensor, neighbours: int) -> Tensor:
    """The ``count (B,)`` tokens that are dense and far from denser ones (Rodriguez and Laio, Science 344, 2014; density
    by nearest neighbours). The first of equally dense ones counts as the denser.

    Args:
        distance: ``(B, L, L)``.
        among: bool ``(B, L)``, the candidates.
        neighbours: K, or all others where there are fewer.

    Returns:
        bool ``(B, L)``.
    """
    itself = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    apart = distance.masked_fill(~among[:, None] | ~among[..., None] | itself, torch.inf)
    nearest = apart.topk(min(neighbours, distance.shape[1]), largest=False).values
    squares = nearest.square().masked_fill(nearest.isinf(), 0).sum(2) / (~nearest.isinf()).sum(2).clamp(min=1)
    rank = squares.argsort(dim=1, stable=True).argsort(1)
    denser = rank[:, None] < rank[..., None]
    farthest = apart.masked_fill(apart.isinf(), 0).amax((1, 2))[:, None]
    delta = torch.minimum(apart.masked_fill(~denser, torch.inf).amin(2), farthest)
    return top(delta * (-squares).exp(), among, count)


def _scaled(layer: int, layers: int) -> int:
    """``layer`` of the 32 that the published settings are for, in a decoder of ``layers``."""
    return round(layers * layer / 32)
