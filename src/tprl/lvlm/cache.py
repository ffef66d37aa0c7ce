"""Samples as a frozen LVLM sees them, computed once and kept on disk.

Pictures become visual tokens in shards (``tprl.lvlm.shards``). The cache is keyed by the model, the dtype, the
processor, the pictures' names and versions and the first one's pixels, so where any of these differs there is another.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import tprl
from tprl import processes
from tprl.checkpoint import load_checkpoint, make_once, save_checkpoint
from tprl.clock import phase
from tprl.data.sample import Sample, Source
from tprl.lvlm.model import Lvlm
from tprl.lvlm.packing import Block, Prefix, make_prefix
from tprl.lvlm.pictures import EncodedPicture
from tprl.lvlm.score import AnswerScorer, AnswerScores, Within
from tprl.lvlm.shards import Shards
from tprl.progress import track
from tprl.scoring import score
from tprl.types import VisualTokens

ANSWER_LIMIT = 32
"""Tokens after which a generated answer is cut off."""
PICTURES_AT_ONCE = 8
"""That are judged together, each with all questions about it."""


class EncodedSamples:
    """A source's samples, ready for pruning and scoring.

    Args:
        lvlm: the frozen model.
        source: where the samples come from.
        folder: parent of all caches; this one gets a folder named by its key.
        signals: what selectors will need besides the tokens.

    Raises:
        ValueError: a question shows a picture itself.
    """

    def __init__(self, lvlm: Lvlm, source: Source, folder: Path, signals: frozenset[str] = frozenset()) -> None:
        self.lvlm, self.source = lvlm, source
        self.samples: Sequence[Sample] = source.samples
        for sample in self.samples:
            lvlm.prompts.check(sample.question)
        self.image_ids = list(dict.fromkeys(sample.image_id for sample in self.samples))
        self.signals = frozenset(signals)
        key = {
            "weights": weights_digest(lvlm),
            "dtype": str(lvlm.model.dtype),
            "model": lvlm.fingerprint,
            "processor": cast(Any, lvlm.processor).to_json_string(),
            "source": [source.name, source.split],
            "images": hashlib.sha256("\n".join(i + source.version(i) for i in self.image_ids).encode()).hexdigest(),
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

    def __len__(self) -> int:
        return len(self.samples)

    @phase("read")
    def visual(self, indices: Sequence[int]) -> VisualTokens:
        """The padded batch of samples ``indices``: pictures and their questions."""
        features = [self.features(self.samples[i].image_id) for i in indices]
        visual = self.lvlm.visual_tokens(features, [self.samples[i].question for i in indices])
        return visual.to(self.lvlm.device)

    def by_picture(self, image_ids: Sequence[str]) -> tuple[VisualTokens, list[int], Tensor]:
        """Some pictures, a row each, with the first question about each; the indices of all samples about them; and
        the row of each sample's picture, int64."""
        asked = [self.questions[image_id] for image_id in image_ids]
        rows = [row for row, questions in enumerate(asked) for _ in questions]
        visual = self.visual([questions[0] for questions in asked])
        return visual, [i for questions in asked for i in questions], torch.tensor(rows)

    def in_turns(self, title: str) -> Iterator[tuple[VisualTokens, list[int], Tensor]]:
        """This process's share of all samples, some pictures at a time; see ``by_picture``."""
        for start in track(range(0, len(self.image_ids), PICTURES_AT_ONCE)[processes.mine()], title):
            yield self.by_picture(self.image_ids[start : start + PICTURES_AT_ONCE])

    def features(self, image_id: str) -> EncodedPicture:
        """One picture as the language model is shown it."""
        return self._shards.picture(image_id)

    def visual_tokens(self, image_id: str) -> int:
        """How many visual tokens a picture has."""
        place = self._shards.places[image_id]
        return place.last - place.first

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
        """A sample's prompt up to the last visual token, see ``Prompts.ids``, and its block."""
        if index not in self._prompts:
            sample = self.samples[index]
            shown = self._shards.places[sample.image_id].text
            before, prompt = self.lvlm.prompts.ids(sample.question, None, shown)
            _, whole = self.lvlm.prompts.ids(sample.question, sample.answers[0], shown)
            self._prompts[index] = before, Block(whole, len(prompt))
        return self._prompts[index]

    @phase("score")
    def score(
        self,
        indices: Sequence[int],
        tokens: Tensor,
        keep_mask: Tensor,
        within: Within | None = None,
        pictures: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> AnswerScores:
        """Scores of the reference answers of samples ``indices`` from the kept tokens. Samples that look at the same
        tokens of one picture share a row, unless ``within`` is given.

        Args:
            tokens: ``(P, N, D)``.
            keep_mask: bool ``(B, N)``.
            within: drops more tokens inside the language model.
            pictures: int64 ``(B,)``, the row of ``tokens`` that each sample looks at; each has its own where None.
            sizes: ``(B, N)`` of the kept tokens, see ``tprl.types.Selection``; the same for those that share a row.
        """
        given = list(range(len(indices))) if pictures is None else pictures.tolist()
        bits = np.packbits(keep_mask.cpu().numpy(), axis=1)
        shared: dict[tuple[Any, ...], list[int]] = {}
        for place, picture in enumerate(given):
            alone = place if within else None  # a method inside the language model prunes for one question
            shared.setdefault((picture, bits[place].tobytes(), alone), []).append(place)
        rows = list(shared.values())
        first = [places[0] for places in rows]
        blocks = [[self.block(indices[place]) for place in places] for places in rows]
        looked_at = torch.tensor([given[place] for place in first], dtype=torch.int64)
        prefix = self.prefix([indices[place] for place in first], tokens.shape[1] > 0)
        prefix = replace(prefix, sizes=None if sizes is None else sizes[first])
        scores = self.scorer.score(prefix, tokens, keep_mask[first], blocks, within, looked_at)
        back = torch.tensor([place for places in rows for place in places], dtype=torch.int64).argsort()
        return AnswerScores(scores.log_prob[back], scores.correct[back])

    def accuracy(
        self,
        indices: Sequence[int],
        tokens: Tensor,
        keep_mask: Tensor,
        within: Within | None = None,
        pictures: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """How right the greedy answers to samples ``indices`` are, see ``tprl.scoring.score``; arguments of ``score``.

        Where one text is accepted, a teacher-forced pass tells those that say just that. The others may say the same in
        other words, so they are answered token by token, and so are boxes and samples with several accepted answers.
        Where ``N`` is 0, the prompts are asked without any picture.

        Returns:
            float32 ``(B,)`` in [0, 1].
        """
        result = torch.zeros(len(indices))
        pictures = torch.arange(len(indices)) if pictures is None else pictures
        told = torch.tensor([self._one_text(i) for i in indices], dtype=torch.bool)
        if bool(told.any()):
            chosen = [i for i in indices if self._one_text(i)]
            own = None if sizes is None else sizes[told]
            result[told] = self.score(chosen, tokens, keep_mask[told], within, pictures[told], own).correct.float()
        asked = result == 0
        if bool(asked.any()):
            chosen = [i for i, ask in zip(indices, asked.tolist(), strict=True) if ask]
            own = None if sizes is None else sizes[asked]
            answers = self.answers(chosen, tokens[pictures[asked]], keep_mask[asked], within, own)
            scores = [score(self.samples[i], answer) for i, answer in zip(chosen, answers, strict=True)]
            result[asked] = torch.tensor(scores)
        return result

    def answers(
        self,
        indices: Sequence[int],
        tokens: Tensor,
        keep_mask: Tensor,
        within: Within | None = None,
        sizes: Tensor | None = None,
    ) -> list[str]:
        """The greedy answers to samples ``indices`` as texts, one row each.

        Args:
            tokens: ``(B, N, D)``.
            keep_mask: bool ``(B, N)``.
            within: drops more tokens inside the language model.
            sizes: ``(B, N)`` of the kept tokens.
        """
        prompts = [block.ids[: block.answer_start] for block in map(self.block, indices)]
        prefix = replace(self.prefix(indices, tokens.shape[1] > 0), sizes=sizes)
        ids = self.scorer.generate(prefix, tokens, keep_mask, prompts, self.lvlm.prompts.end_id, ANSWER_LIMIT, within)
        tokenizer = cast(Any, self.lvlm.processor).tokenizer
        return [tokenizer.decode(answer, skip_special_tokens=True) for answer in ids]

    def _one_text(self, index: int) -> bool:
        sample = self.samples[index]
        return sample.box is None and len(sample.answers) == 1

    @cached_property
    def unpruned(self) -> AnswerScores:
        """Scores of all samples with every token kept."""

        def judge(*asked: Any) -> Tensor:
            scores = self.score(*asked)
            return torch.stack([scores.log_prob, scores.correct.float()], 1)

        log_prob, correct = self._with_every_token("scores", 2, judge).unbind(1)
        return AnswerScores(log_prob, correct.bool())

    @cached_property
    def accuracy_unpruned(self) -> Tensor:
        """``accuracy`` of all samples with every token kept."""
        return self._with_every_token("accuracy", 1, lambda *asked: self.accuracy(*asked)[:, None])[:, 0]

    def _with_every_token(self, name: str, figures: int, judge: Callable[..., Tensor]) -> Tensor:
        """What ``judge`` says of all samples, float32 ``(len(self), figures)``: kept on disk, and computed by all
        processes together, of questions on one picture at a time.

        Args:
            judge: given what ``score`` and ``accuracy`` are given.
        """
        about = [tprl.__version__, self.lvlm.prompts.template, [asdict(sample) for sample in self.samples]]
        path = self.folder / f"{name}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.safetensors"
        if not processes.agreed(path.exists()):
            judged = torch.zeros(len(self), figures)
            for visual, indices, pictures in self.in_turns(f"unpruned {name}"):
                judged[indices] = judge(indices, visual.tokens, visual.mask[pictures], None, pictures)
            judged = processes.total(judged)
            if processes.is_first():  # another run may be saving the same
                make_once(path, lambda: save_checkpoint(path, {name: judged}, {}))
            processes.meet()
        return load_checkpoint(path)[0][name]


def weights_digest(lvlm: Lvlm) -> str:
    """A digest that changes with any weight that matters: names, shapes, sums and absolute sums."""
    digest = hashlib.sha256()
    for name, weight in lvlm.model.state_dict().items():
        values = weight.detach().double()
        digest.update(
            f"{name} {tuple(weight.shape)} {values.sum().item():.9g} {values.abs().sum().item():.9g}".encode()
        )
    return digest.hexdigest()[:16]


def processor_digest(lvlm: Lvlm) -> str:
    """A digest that changes with what a model is shown: the processor's settings, its chat template, and how features
    become visual tokens."""
    shown = [cast(Any, lvlm.processor).to_json_string(), lvlm.prompts.template, lvlm.fingerprint]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
