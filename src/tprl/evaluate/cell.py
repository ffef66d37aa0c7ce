"""What is measured of one method: the score of every question and the tokens that the language model saw."""

from dataclasses import dataclass
from statistics import fmean

import torch

from tprl import processes
from tprl.evaluate.methods import Method
from tprl.lvlm.cache import EncodedSamples
from tprl.progress import track

QUESTIONS_AT_ONCE = 64


@dataclass(frozen=True)
class Cell:
    """What was measured of one method under one budget, or without pruning, or without a picture.

    Attributes:
        scores: of every sample, in [0, 1].
        kept: visual tokens that the language model saw for every sample; mean over its layers where those differ.
        selector_flops: FLOPs of choosing for one sample.
    """

    scores: list[float]
    kept: list[float]
    selector_flops: int = 0


def score_pictures(encoded: EncodedSamples, method: Method | None, title: str, blind: bool = False) -> Cell:
    """All questions about a picture see the same tokens: those that ``method`` keeps, or all, or none."""
    scores, kept = torch.zeros(len(encoded)), torch.zeros(len(encoded), dtype=torch.int64)
    for visual, indices, pictures in encoded.in_turns(title):
        tokens, keep_mask, sizes = visual.tokens, visual.mask, None
        if blind:
            tokens, keep_mask = tokens[:, :0], keep_mask[:, :0]
        elif method is not None:
            selection = method.select(visual)
            keep_mask = selection.keep_mask
            tokens = tokens if selection.tokens is None else selection.tokens
            sizes = None if selection.sizes is None else selection.sizes[pictures]
        scores[indices] = encoded.accuracy(indices, tokens, keep_mask[pictures], pictures=pictures, sizes=sizes)
        kept[indices] = keep_mask.sum(1).cpu()[pictures]
    return Cell(processes.total(scores).tolist(), processes.total(kept).tolist())


def score_questions(encoded: EncodedSamples, method: Method, title: str) -> Cell:
    """Scores of all samples, each of which sees tokens of its own."""
    layers = encoded.lvlm.model.config.get_text_config().num_hidden_layers
    scores, kept = torch.zeros(len(encoded)), torch.zeros(len(encoded), dtype=torch.float64)
    for start in track(range(0, len(encoded), QUESTIONS_AT_ONCE)[processes.mine()], title):
        indices = range(start, min(start + QUESTIONS_AT_ONCE, len(encoded)))
        visual = encoded.visual(indices)
        selection = method.select(visual)
        tokens = visual.tokens if selection.tokens is None else selection.tokens
        scores[indices] = encoded.accuracy(indices, tokens, selection.keep_mask, method.within, sizes=selection.sizes)
        counts = selection.keep_mask.sum(1).tolist()
        seen = [fmean(method.layer_counts(layers, count) or [count]) for count in counts]
        kept[indices] = torch.tensor(seen, dtype=torch.float64)
    return Cell(processes.total(scores).tolist(), processes.total(kept).tolist())
