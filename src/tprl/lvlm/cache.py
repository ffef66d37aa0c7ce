"""Samples as a frozen LVLM sees them, computed once and kept on disk.

Pictures become visual tokens in shards (``tprl.lvlm.shards``). The cache is keyed by everything that its content
depends on, so another model, another processor, other data or another dtype make another cache.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tprl.checkpoint import load_checkpoint, save_checkpoint
from tprl.clock import phase
from tprl.data.sample import Sample, Source
from tprl.lvlm.model import EncodedPicture, Lvlm
from tprl.lvlm.packing import Block, Prefix, make_prefix
from tprl.lvlm.score import AnswerScorer, AnswerScores, Within
from tprl.lvlm.shards import Shards
from tprl.progress import track
from tprl.scoring import score
from tprl.types import VisualTokens

ANSWER_LIMIT = 32
"""Tokens after which a generated answer is cut off."""


class EncodedSamples:
    """A source's samples, ready for pruning and scoring.

    Args:
        lvlm: the frozen model.
        source: where the samples come from.
        folder: parent of all caches; this one gets a folder named by its key.
        signals: what selectors will need besides the tokens.
    """

    def __init__(self, lvlm: Lvlm, source: Source, folder: Path, signals: frozenset[str] = frozenset()) -> None:
        self.lvlm, self.source = lvlm, source
        self.samples: Sequence[Sample] = source.samples
        self.image_ids = list(dict.fromkeys(sample.image_id for sample in self.samples))
        self.signals = frozenset(signals)
        key = {
            "weights": weights_digest(lvlm),
            "dtype": str(lvlm.model.dtype),
            "processor": cast(Any, lvlm.processor).image_processor.to_json_string(),
            "source": [source.name, source.split],
            "images": hashlib.sha256("\n".join(self.image_ids).encode()).hexdigest(),
            "pixels": hashlib.sha256(source.image(self.image_ids[0]).tobytes()).hexdigest(),
            "signals": sorted(self.signals),
        }
        self.folder = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shards = Shards(lvlm, source, self.image_ids, self.folder, self.signals)
        self._image_id = int(lvlm.model.config.image_token_id)
        model = cast(Any, lvlm.model)
        self.scorer = AnswerScorer(model.get_decoder(), model.get_output_embeddings(), lvlm.family.both_ways)
        self.questions: dict[str, list[int]] = {image_id: [] for image_id in self.image_ids}
        for index, sample in enumerate(self.samples):
            self.questions[sample.image_id].append(index)
        self._prompts: dict[int, tuple[list[int], Block]] = {}
        self._unpruned: AnswerScores | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @phase("read")
    def visual(self, indices: Sequence[int]) -> VisualTokens:
        """The padded batch of samples ``indices``: pictures and their questions."""
        features = [self.features(self.samples[i].image_id) for i in indices]
        visual = self.lvlm.visual_tokens(features, [self.samples[i].question for i in indices])
        return visual.to(self.lvlm.device)

    def features(self, image_id: str) -> EncodedPicture:
        """One picture as the language model is shown it."""
        return self._shards.picture(image_id)

    def block(self, index: int) -> Block:
        """Question and reference answer of a sample, tokenised, as they follow the picture."""
        return self._prompt(index)[1]

    def text_tokens(self, index: int) -> int:
        """How many tokens of a sample's prompt are not visual."""
        before, block = self._prompt(index)
        return len(before) - before.count(self._image_id) + block.answer_start

    def prefix(self, indices: Sequence[int], pictures: bool = True) -> Prefix:
        """What stands before the questions of samples ``indices``, one row each.

        Args:
            pictures: False leaves the pictures out, as if they had no visual tokens.
        """
        before = [self._prompt(i)[0] for i in indices]
        if not pictures:
            text = [[token for token in row if token != self._image_id] for row in before]
            return make_prefix(text, self._image_id, [()] * len(text))
        runs = [self._shards.places[self.samples[i].image_id].runs for i in indices]
        if not self._shards.stored & {"places", "deep"}:
            return make_prefix(before, self._image_id, runs)
        shown = [self.features(self.samples[i].image_id) for i in indices]
        places = [picture.places for picture in shown if picture.places is not None]
        deep = [picture.deep for picture in shown if picture.deep is not None]
        return make_prefix(before, self._image_id, runs, places, pad_sequence(deep, True) if deep else None)

    def _prompt(self, index: int) -> tuple[list[int], Block]:
        """A sample's prompt up to the last visual token, see ``Lvlm.prompt_ids``, and its block."""
        if index not in self._prompts:
            sample = self.samples[index]
            shown = self._shards.places[sample.image_id].text
            before, prompt = self.lvlm.prompt_ids(sample.question, None, shown)
            _, whole = self.lvlm.prompt_ids(sample.question, sample.answers[0], shown)
            self._prompts[index] = before, Block(whole, len(prompt))
        return self._prompts[index]

    def score(
        self,
        indices: Sequence[int],
        tokens: Tensor,
        keep_mask: Tensor,
        within: Within | None = None,
        pictures: Tensor | None = None,
    ) -> AnswerScores:
        """Scores of the reference answers of samples ``indices`` from the kept tokens. Samples that look at the same
        tokens of one picture are read in one row.

        Args:
            tokens: ``(P, N, D)``.
            keep_mask: bool ``(B, N)``.
            within: drops more tokens inside the language model.
            pictures: int64 ``(B,)``, the row of ``tokens`` that each sample looks at; each has its own where None.
        """
        given = range(len(indices)) if pictures is None else pictures.tolist()
        if within is not None:
            return self._scored(indices, tokens, keep_mask, [[self.block(i)] for i in indices], within, pictures)
        bits = np.packbits(keep_mask.cpu().numpy(), axis=1)
        shared: dict[tuple[int, bytes], list[int]] = {}
        for place, picture in enumerate(given):
            shared.setdefault((picture, bits[place].tobytes()), []).append(place)
        rows = list(shared.values())
        first = [places[0] for places in rows]
        blocks = [[self.block(indices[place]) for place in places] for places in rows]
        firsts, looked_at = (
            [indices[place] for place in first],
            torch.tensor([given[place] for place in first], dtype=torch.int64),
        )
        scores = self._scored(firsts, tokens, keep_mask[first], blocks, None, looked_at)
        back = torch.tensor([place for places in rows for place in places], dtype=torch.int64).argsort()
        return AnswerScores(scores.log_prob[back], scores.correct[back])

    @phase("score")
    def _scored(
        self,
        firsts: Sequence[int],
        tokens: Tensor,
        keep_mask: Tensor,
        rows: Sequence[Sequence[Block]],
        within: Within | None = None,
        pictures: Tensor | None = None,
    ) -> AnswerScores:
        """Scores of rows whose first questions are those of samples ``firsts``."""
        return self.scorer.score(self.prefix(firsts, tokens.shape[1] > 0), tokens, keep_mask, rows, within, pictures)

    def accuracy(
        self, indices: Sequence[int], tokens: Tensor, keep_mask: Tensor, within: Within | None = None
    ) -> Tensor:
        """How right the greedy answers to samples ``indices`` are, one row each.

        Where one text is accepted, 1 exactly if greedy decoding yields it, which one teacher-forced pass tells. Boxes
        and samples with several accepted answers are answered token by token and scored by ``tprl.scoring.score``.

        Args:
            tokens: ``(B, N, D)``; where ``N`` is 0, the prompts are asked without any picture.
            keep_mask: bool ``(B, N)``.
            within: drops more tokens inside the language model.

        Returns:
            float32 ``(B,)`` in [0, 1].
        """
        result = torch.zeros(len(indices))
        told = torch.tensor([self._one_text(i) for i in indices], dtype=torch.bool, device=keep_mask.device)
        if bool(told.any()):
            chosen = [i for i in indices if self._one_text(i)]
            result[told.cpu()] = self.score(chosen, tokens[told], keep_mask[told], within).correct.float()
        asked = [i for i in indices if not self._one_text(i)]
        if asked:
            answers = self.answers(asked, tokens[~told], keep_mask[~told], within)
            scores = [score(self.samples[i], answer) for i, answer in zip(asked, answers, strict=True)]
            result[~told.cpu()] = torch.tensor(scores)
        return result

    def picture_accuracy(self, image_ids: Sequence[str], tokens: Tensor, keep_mask: Tensor) -> tuple[list[int], Tensor]:
        """``accuracy`` of all samples on some pictures, where what is kept depends on the picture alone, so that its
        questions share one row.

        Args:
            tokens: ``(P, N, D)``, a row a picture.
            keep_mask: bool ``(P, N)``.

        Returns:
            The samples' indices, and float32 in [0, 1] for each.
        """
        told = [[i for i in self.questions[image_id] if self._one_text(i)] for image_id in image_ids]
        asked = [(row, i) for row, image_id in enumerate(image_ids) for i in self.questions[image_id]]
        asked = [(row, i) for row, i in asked if not self._one_text(i)]
        indices, result = [i for row in told for i in row], torch.zeros(0)
        if indices:
            full = [row for row, questions in enumerate(told) if questions]
            blocks = [[self.block(i) for i in told[row]] for row in full]
            firsts = [told[row][0] for row in full]
            result = self._scored(firsts, tokens[full], keep_mask[full], blocks).correct.float()
        if asked:
            rows = [row for row, _ in asked]
            generated = self.accuracy([i for _, i in asked], tokens[rows], keep_mask[rows])
            indices, result = indices + [i for _, i in asked], torch.cat([result, generated])
        return indices, result

    def answers(
        self, indices: Sequence[int], tokens: Tensor, keep_mask: Tensor, within: Within | None = None
    ) -> list[str]:
        """The greedy answers to samples ``indices`` as texts, one row each; arguments as for ``accuracy``."""
        blocks = [self.block(i) for i in indices]
        prompts = [block.ids[: block.answer_start] for block in blocks]
        prefix, end = self.prefix(indices, tokens.shape[1] > 0), blocks[0].ids[-1]
        ids = self.scorer.generate(prefix, tokens, keep_mask, prompts, end, ANSWER_LIMIT, within)
        tokenizer = cast(Any, self.lvlm.processor).tokenizer
        return [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]

    def _one_text(self, index: int) -> bool:
        sample = self.samples[index]
        return sample.box is None and len(sample.answers) == 1

    @property
    def unpruned(self) -> AnswerScores:
        """Scores of all samples with every token kept; computed once, questions on one picture together."""
        if self._unpruned is None:
            text = "\n".join(f"{s.image_id}\t{s.question}\t{s.answers[0]}" for s in self.samples)
            path = self.folder / f"unpruned-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
            if not path.exists():
                scores = self.score_shared(dict.fromkeys(self.image_ids), "unpruned answers")
                save_checkpoint(path, {"log_prob": scores.log_prob, "correct": scores.correct}, {})
            self._unpruned = AnswerScores(**load_checkpoint(path)[0])
        return self._unpruned

    def score_shared(
        self, keep: dict[str, Tensor | None], label: str, tokens: dict[str, Tensor] | None = None
    ) -> AnswerScores:
        """Scores of all samples where the kept tokens depend on the picture alone, so its questions share one row.

        Args:
            keep: keep mask ``(n,)`` of every picture; None keeps all.
            label: what the progress bar says.
            tokens: changed tokens of pictures, from selectors that merge.
        """
        log_prob, correct = torch.zeros(len(self)), torch.zeros(len(self), dtype=torch.bool)
        for start in track(range(0, len(self.image_ids), 8), label):
            chosen = self.image_ids[start : start + 8]
            shown = [tokens[i] if tokens and i in tokens else self.features(i).tokens for i in chosen]
            given = [keep[i] for i in chosen]
            masks = [
                torch.ones(len(part), dtype=torch.bool) if mask is None else mask
                for mask, part in zip(given, shown, strict=True)
            ]
            rows = [[self.block(i) for i in self.questions[image_id]] for image_id in chosen]
            firsts = [self.questions[image_id][0] for image_id in chosen]
            scores = self._scored(firsts, pad_sequence(shown, True), pad_sequence(masks, True), rows)
            at = torch.tensor([i for image_id in chosen for i in self.questions[image_id]])
            log_prob[at], correct[at] = scores.log_prob, scores.correct
        return AnswerScores(log_prob, correct)


def weights_digest(lvlm: Lvlm) -> str:
    """A digest that changes with any weight that matters: names, shapes, sums and absolute sums."""
    digest = hashlib.sha256()
    for name, weight in lvlm.model.state_dict().items():
        values = weight.detach().double()
        digest.update(
            f"{name} {tuple(weight.shape)} {values.sum().item():.9g} {values.abs().sum().item():.9g}".encode()
        )
    return digest.hexdigest()[:16]
