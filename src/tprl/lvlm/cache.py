"""Samples as a frozen LVLM sees them, computed once and kept on disk.

Pictures become visual tokens in shards of bounded size; a shard is read slice by slice, never whole. The cache is
keyed by everything that its content depends on, so another model, other data or another dtype make another cache.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tprl.checkpoint import load_checkpoint, save_checkpoint, save_tensors
from tprl.data.sample import Sample, Source
from tprl.lvlm.families import FAMILIES
from tprl.lvlm.model import ImageFeatures, Lvlm
from tprl.lvlm.packing import Block
from tprl.lvlm.score import AnswerScorer, AnswerScores, Within
from tprl.progress import track
from tprl.scoring import score
from tprl.types import VisualTokens

SHARD_PICTURES = 128
ENCODE_BATCH = 16
ANSWER_LIMIT = 32
"""Tokens after which a generated answer is cut off."""


@dataclass(frozen=True)
class _Place:
    shard: int
    first: int
    last: int


class EncodedSamples:
    """A source's samples, ready for pruning and scoring.

    Args:
        lvlm: the frozen model.
        source: where the samples come from.
        folder: parent of all caches; this one gets a folder named by its key.
        signals: what selectors will need besides the tokens.
    """

    def __init__(self, lvlm: Lvlm, source: Source, folder: Path, signals: frozenset[str] = frozenset()) -> None:
        if not lvlm.family.packs:
            known = [family.name for family in FAMILIES.values() if family.packs and family.around is not None]
            raise ValueError(
                f"answers of {lvlm.family.name} cannot be scored in packed rows yet, so it can be pruned, but neither "
                f"trained for nor evaluated; families that can: {', '.join(known)}"
            )
        self.lvlm, self.source = lvlm, source
        self.samples: Sequence[Sample] = source.samples
        self.image_ids = list(dict.fromkeys(sample.image_id for sample in self.samples))
        self.signals = frozenset(signals)
        key = {
            "weights": weights_digest(lvlm),
            "dtype": str(lvlm.model.dtype),
            "source": [source.name, source.split],
            "images": hashlib.sha256("\n".join(self.image_ids).encode()).hexdigest(),
            "pixels": hashlib.sha256(source.image(self.image_ids[0]).tobytes()).hexdigest(),
            "signals": sorted(self.signals),
        }
        self.folder = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._build()
        self.scorer = AnswerScorer(lvlm.model.model.language_model, lvlm.model.lm_head, lvlm.prompt_ids("?")[0])
        self.questions: dict[str, list[int]] = {image_id: [] for image_id in self.image_ids}
        for index, sample in enumerate(self.samples):
            self.questions[sample.image_id].append(index)
        self._blocks: dict[int, Block] = {}
        self._unpruned: AnswerScores | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def visual(self, indices: Sequence[int]) -> VisualTokens:
        """The padded batch of samples ``indices``: pictures and their questions."""
        features = [self.features(self.samples[i].image_id) for i in indices]
        visual = self.lvlm.visual_tokens(features, [self.samples[i].question for i in indices])
        return visual.to(self.lvlm.device)

    def features(self, image_id: str) -> ImageFeatures:
        """One picture's tokens, places and signals, read from its shard."""
        place = self._places[image_id]
        with safe_open(self._shard(place.shard), "pt") as file:
            parts = {name: file.get_slice(name)[place.first : place.last] for name in file.keys()}  # noqa: SIM118
        return ImageFeatures(parts.pop("tokens"), parts.pop("coords"), parts)

    def block(self, index: int) -> Block:
        """Question and reference answer of a sample, tokenised, as they follow the picture."""
        if index not in self._blocks:
            sample = self.samples[index]
            _, prompt = self.lvlm.prompt_ids(sample.question)
            _, whole = self.lvlm.prompt_ids(sample.question, sample.answers[0])
            self._blocks[index] = Block(whole, len(prompt))
        return self._blocks[index]

    def score(
        self, indices: Sequence[int], tokens: Tensor, keep_mask: Tensor, within: Within | None = None
    ) -> AnswerScores:
        """Scores of the reference answers of samples ``indices`` from the kept tokens, one row each."""
        return self.scorer.score(tokens, keep_mask, [[self.block(i)] for i in indices], within)

    def accuracy(
        self, indices: Sequence[int], tokens: Tensor, keep_mask: Tensor, within: Within | None = None
    ) -> Tensor:
        """How right the greedy answers to samples ``indices`` are, one row each.

        Where one text is accepted, 1 exactly if greedy decoding yields it, which one teacher-forced pass tells. Boxes
        and samples with several accepted answers are answered token by token and scored by ``tprl.scoring.score``.

        Args:
            tokens: ``(B, N, D)``.
            keep_mask: bool ``(B, N)``.
            within: drops more tokens inside the language model.

        Returns:
            float32 ``(B,)`` in [0, 1].
        """
        result = torch.zeros(len(indices))
        told = torch.tensor([self._one_text(i) for i in indices], dtype=torch.bool, device=keep_mask.device)
        if bool(told.any()):
            rows = [[self.block(i)] for i in indices if self._one_text(i)]
            result[told.cpu()] = self.scorer.score(tokens[told], keep_mask[told], rows, within).correct.float()
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
            result = self.scorer.score(tokens[full], keep_mask[full], blocks).correct.float()
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
        ids = self.scorer.generate(tokens, keep_mask, prompts, blocks[0].ids[-1], ANSWER_LIMIT, within)
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
            scores = self.scorer.score(pad_sequence(shown, True), pad_sequence(masks, True), rows)
            at = torch.tensor([i for image_id in chosen for i in self.questions[image_id]])
            log_prob[at], correct[at] = scores.log_prob, scores.correct
        return AnswerScores(log_prob, correct)

    def _shard(self, number: int) -> Path:
        return self.folder / f"tokens-{number:05d}.safetensors"

    def _build(self) -> None:
        """Encode the pictures whose shards are missing; an interrupted build goes on where it stopped."""
        self._places: dict[str, _Place] = {}
        starts = range(0, len(self.image_ids), SHARD_PICTURES)
        for number, start in enumerate(track(starts, f"encoding {self.source.name}/{self.source.split}")):
            image_ids = self.image_ids[start : start + SHARD_PICTURES]
            if not self._shard(number).exists():
                self._write(number, image_ids)
            with safe_open(self._shard(number), "pt") as file:
                offsets = json.loads(file.metadata()["offsets"])
            for image_id, first, last in zip(image_ids, offsets, offsets[1:], strict=False):
                self._places[image_id] = _Place(number, first, last)

    def _write(self, number: int, image_ids: list[str]) -> None:
        features: list[ImageFeatures] = []
        for start in range(0, len(image_ids), ENCODE_BATCH):
            images = [self.source.image(image_id) for image_id in image_ids[start : start + ENCODE_BATCH]]
            features += self.lvlm.encode_images(images, self.signals)
        offsets = [0]
        for picture in features:
            offsets.append(offsets[-1] + len(picture.tokens))
        tensors = {"tokens": torch.cat([f.tokens for f in features]), "coords": torch.cat([f.coords for f in features])}
        for name in features[0].signals:
            tensors[name] = torch.cat([f.signals[name] for f in features])
        save_tensors(self._shard(number), tensors, {"offsets": json.dumps(offsets)})


def weights_digest(lvlm: Lvlm) -> str:
    """A digest that changes with any weight that matters: names, shapes, sums and absolute sums."""
    digest = hashlib.sha256()
    for name, weight in lvlm.model.state_dict().items():
        values = weight.detach().double()
        digest.update(
            f"{name} {tuple(weight.shape)} {values.sum().item():.9g} {values.abs().sum().item():.9g}".encode()
        )
    return digest.hexdigest()[:16]
