"""How well a frozen language model answers from a subset of the visual tokens: one teacher-forced pass, batched.

Where an answer has one accepted text, greedy generation yields it exactly when every token of it is the most likely
one under teacher forcing, so accuracy needs no generation token by token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tprl.lvlm.families import BothWays
from tprl.lvlm.in_model import dropping
from tprl.lvlm.packing import IGNORE, Block, Packed, Prefix
from tprl.lvlm.passes import Passes
from tprl.lvlm.reader import RowReader, position_rows
from tprl.selectors import InModel


@dataclass(frozen=True)
class AnswerScores:
    """Scores of ``Q`` reference answers.

    Attributes:
        log_prob: float32 ``(Q,)``, mean log-probability in nats of the answer's tokens, end of turn included.
        correct: bool ``(Q,)``, True where greedy decoding would give exactly the answer.
    """

    log_prob: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Within:
    """A method that drops visual tokens inside the language model, and the budget that it works to; of pictures with
    fewer tokens all are kept."""

    method: InModel
    budget: int


class AnswerScorer:
    """Scores answers under a frozen LVLM from given visual tokens.

    Args:
        language: the decoder without its head, see ``RowReader``.
        head: hidden states to vocabulary logits.
        both_ways: what attends in both directions, see ``tprl.lvlm.packing.pack``.
        tokens_per_pass: bound on tokens, padding included, in one forward pass; bounds memory.

    Attributes:
        reader: calls the decoder.
        passes: which rows it reads together.
    """

    def __init__(
        self,
        language: PreTrainedModel,
        head: nn.Module,
        both_ways: BothWays = "nothing",
        tokens_per_pass: int = 8192,
    ) -> None:
        self.reader, self.passes = RowReader(language, both_ways), Passes(tokens_per_pass)
        self.language, self.head = language, head

    @torch.no_grad()
    def score(
        self,
        prefix: Prefix,
        tokens: Tensor,
        keep_mask: Tensor,
        rows: Sequence[Sequence[Block]],
        within: Within | None = None,
        pictures: Tensor | None = None,
    ) -> AnswerScores:
        """Score every block of every row, in reading order.

        Args:
            prefix: what stands before the blocks of each of ``B`` rows.
            tokens: visual tokens of ``P`` pictures, ``(P, N, D)``.
            keep_mask: bool ``(B, N)``.
            rows: the questions about each row's kept tokens, each with its answer.
            within: drops more of them inside the language model; then a row holds one question.
            pictures: int64 ``(B,)``, the picture of each row; each has its own where None.

        Raises:
            ValueError: ``within`` is given and a row holds several questions.
        """
        if self.reader.both_ways == "prompts":  # a picture looks different to each question, so each gets a row
            given = [row for row, blocks in enumerate(rows) for _ in blocks]
            rows = [[block] for blocks in rows for block in blocks]
        else:
            given = list(range(len(rows)))
        firsts = torch.tensor([0, *(len(blocks) for blocks in rows)]).cumsum(0)
        log_prob, correct = torch.zeros(int(firsts[-1])), torch.zeros(int(firsts[-1]), dtype=torch.bool)
        pictures = torch.arange(len(keep_mask)) if pictures is None else pictures
        before = prefix.shown(keep_mask.cpu()).sum(1)[given]
        for chosen in self.passes.group(_lengths(before, rows)):
            source = [given[i] for i in chosen]
            kept = _kept(tokens, pictures[source], keep_mask[source])
            scores = self._pass(prefix[source], kept, keep_mask[source], [rows[i] for i in chosen], within)
            at = torch.cat([torch.arange(int(firsts[i]), int(firsts[i + 1])) for i in chosen])
            log_prob[at], correct[at] = scores.log_prob, scores.correct
        return AnswerScores(log_prob, correct)

    @torch.no_grad()
    def generate(
        self,
        prefix: Prefix,
        tokens: Tensor,
        keep_mask: Tensor,
        prompts: list[list[int]],
        end: int,
        limit: int,
        within: Within | None = None,
    ) -> list[list[int]]:
        """Greedy answers, ``limit`` tokens at most, without the ``end`` token that closes them.

        Args:
            prefix: what stands before the prompts.
            tokens: ``(B, N, D)``.
            keep_mask: bool ``(B, N)``.
            prompts: token ids after the picture, up to where the answer begins.
            within: drops more visual tokens inside the language model.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        rows = [[Block(prompt, len(prompt))] for prompt in prompts]
        for chosen in self.passes.group(_lengths(prefix.shown(keep_mask.cpu()).sum(1), rows)):
            chosen_rows = [rows[i] for i in chosen]
            kept = _kept(tokens, torch.tensor(chosen), keep_mask[chosen])
            texts = self._greedy(prefix[chosen], kept, keep_mask[chosen], chosen_rows, end, limit, within)
            for i, answer in zip(chosen, texts, strict=True):
                answers[i] = answer[: answer.index(end)] if end in answer else answer
        return answers

    @contextmanager
    def _dropping(self, within: Within | None, packed: Packed, rows: Sequence[Sequence[Block]]) -> Iterator[None]:
        """While it is open, the language model prunes the batch as ``within`` says."""
        if within is None:
            yield
            return
        if any(len(blocks) != 1 for blocks in rows):
            raise ValueError(f"{within.method.name} prunes for one question a row, got {[len(b) for b in rows]}")
        last = packed.start + torch.tensor([blocks[0].answer_start - 1 for blocks in rows])
        places = last.to(packed.visual.device)
        budgets = packed.visual.sum(1).clamp(max=within.budget)
        with dropping(self.language, within.method, visual=packed.visual, last=places, budgets=budgets):
            yield

    def _pass(
        self,
        prefix: Prefix,
        kept: Tensor,
        keep_mask: Tensor,
        rows: Sequence[Sequence[Block]],
        within: Within | None,
    ) -> AnswerScores:
        packed, inputs = self.reader.prepare(prefix, kept, keep_mask, rows)
        skipped, inputs = (0, inputs) if within else self.reader.after_opening(prefix, inputs)
        with self._dropping(within, packed, rows):
            hidden = self.language(**inputs, use_cache=skipped > 0).last_hidden_state
        places = packed.targets != IGNORE
        logits = self.head(hidden[places[:, skipped:]]).float()
        targets, owners = packed.targets[places], packed.owners[places].cpu()
        log_probs = logits.log_softmax(1).gather(1, targets[:, None])[:, 0].cpu()
        wrong = (logits.argmax(1) != targets).float().cpu()
        empty = torch.zeros(int(owners.max()) + 1)
        lengths = empty.index_add(0, owners, torch.ones(len(owners)))
        return AnswerScores(empty.index_add(0, owners, log_probs) / lengths, empty.index_add(0, owners, wrong) == 0)

    def _greedy(
        self,
        prefix: Prefix,
        kept: Tensor,
        keep_mask: Tensor,
        rows: list[list[Block]],
        end: int,
        limit: int,
        within: Within | None,
    ) -> list[list[int]]:
        packed, inputs = self.reader.prepare(prefix, kept, keep_mask, rows)
        device = packed.ids.device
        row = torch.arange(len(rows), device=device)
        last = (packed.start + torch.tensor([len(blocks[0].ids) - 1 for blocks in rows])).to(device)
        cache = DynamicCache()
        with self._dropping(within, packed, rows):
            hidden = self.language(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
            visible, places, bias = packed.mask[row, 0, last], packed.places, packed.bias
            position, place = packed.positions[:, row, last], packed.places[row, last]
            chosen = self.head(hidden[row, last]).argmax(1)
            answers, ended = [chosen], chosen == end
            while len(answers) < limit and not bool(ended.all()):
                visible = nn.functional.pad(visible, (0, 1), value=True)
                position, place = position + 1, place + 1
                places = torch.cat([places, place[:, None]], 1)
                bias = None if bias is None else nn.functional.pad(bias, (0, 1))
                hidden = self.language(
                    input_ids=chosen[:, None],
                    position_ids=position_rows(position[..., None]),
                    attention_mask=self.reader.masks(visible[:, None, None], place[:, None], places, bias),
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                chosen = self.head(hidden[:, 0]).argmax(1)
                answers.append(chosen)
                ended |= chosen == end
        return torch.stack(answers, 1).tolist()


def _kept(tokens: Tensor, pictures: Tensor, keep_mask: Tensor) -> Tensor:
    """The kept tokens of rows in reading order, ``(K, D)``; no row's dropped ones are copied."""
    row, column = keep_mask.nonzero(as_tuple=True)
    return tokens[pictures.to(row.device)[row], column]


def _lengths(before: Tensor, rows: Sequence[Sequence[Block]]) -> list[int]:
    """Tokens of every row, of which ``before (B,)`` stand before its blocks."""
    return [held + sum(len(block.ids) for block in row) for held, row in zip(before.tolist(), rows, strict=True)]
