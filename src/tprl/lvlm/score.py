"""How well a frozen language model answers from a subset of the visual tokens: one teacher-forced pass, batched.

Where an answer has one accepted text, greedy generation yields it exactly when every token of it is the most likely
one under teacher forcing, so accuracy needs no generation token by token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tprl.lvlm.in_model import dropping
from tprl.lvlm.packing import IGNORE, Block, Packed, kept_indices, pack
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
    """A method that drops visual tokens inside the language model, and the budget that it works to."""

    method: InModel
    budget: int


class AnswerScorer:
    """Scores answers under a frozen LVLM from given visual tokens.

    Args:
        language: the decoder without its head.
        head: hidden states to vocabulary logits.
        before: token ids in front of the picture, the same for every question.
        tokens_per_pass: bound on tokens, padding included, in one forward pass; bounds memory.
    """

    def __init__(
        self, language: PreTrainedModel, head: nn.Module, before: list[int], tokens_per_pass: int = 8192
    ) -> None:
        self.language, self.head, self.before, self.tokens_per_pass = language, head, before, tokens_per_pass

    @torch.no_grad()
    def score(
        self, tokens: Tensor, keep_mask: Tensor, rows: list[list[Block]], within: Within | None = None
    ) -> AnswerScores:
        """Score every block of every row, in reading order.

        Args:
            tokens: visual tokens ``(B, N, D)``; an expanded view will do for a shared picture.
            keep_mask: bool ``(B, N)``.
            rows: the questions about each row's kept tokens, each with its answer.
            within: drops more of them inside the language model; then a row holds one question.

        Raises:
            ValueError: ``within`` is given and a row holds several questions.
        """
        firsts = torch.tensor([0, *(len(blocks) for blocks in rows)]).cumsum(0)
        log_prob, correct = torch.zeros(int(firsts[-1])), torch.zeros(int(firsts[-1]), dtype=torch.bool)
        for chosen in self._passes(keep_mask, rows):
            chosen_rows = [rows[i] for i in chosen]
            scores = self._pass(tokens[chosen], keep_mask[chosen], chosen_rows, within)
            at = torch.cat([torch.arange(int(firsts[i]), int(firsts[i + 1])) for i in chosen])
            log_prob[at], correct[at] = scores.log_prob, scores.correct
        return AnswerScores(log_prob, correct)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        keep_mask: Tensor,
        prompts: list[list[int]],
        end: int,
        limit: int,
        within: Within | None = None,
    ) -> list[list[int]]:
        """Greedy answers, ``limit`` tokens at most, without the ``end`` token that closes them.

        Args:
            tokens: ``(B, N, D)``.
            keep_mask: bool ``(B, N)``.
            prompts: token ids after the picture, up to where the answer begins.
            within: drops more visual tokens inside the language model.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        rows = [[Block(prompt, len(prompt))] for prompt in prompts]
        for chosen in self._passes(keep_mask, rows):
            chosen_rows = [rows[i] for i in chosen]
            texts = self._greedy(tokens[chosen], keep_mask[chosen], chosen_rows, end, limit, within)
            for i, answer in zip(chosen, texts, strict=True):
                answers[i] = answer[: answer.index(end)] if end in answer else answer
        return answers

    def _passes(self, keep_mask: Tensor, rows: list[list[Block]]) -> list[list[int]]:
        """Rows grouped by length: a pass holds ``tokens_per_pass`` at most, and no row is mostly padding."""
        text = torch.tensor([sum(len(block.ids) for block in blocks) for blocks in rows])
        lengths = (len(self.before) + keep_mask.sum(1).cpu() + text).tolist()
        passes: list[list[int]] = []
        for i in sorted(range(len(rows)), key=lambda row: -lengths[row]):
            longest = lengths[passes[-1][0]] if passes else 0
            if 2 * lengths[i] >= longest > 0 and (len(passes[-1]) + 1) * longest <= self.tokens_per_pass:
                passes[-1].append(i)
            else:
                passes.append([i])
        return passes

    def _embed(self, tokens: Tensor, keep_mask: Tensor, rows: list[list[Block]]) -> tuple[Packed, Tensor]:
        """The rows as a batch of input embeddings ``(B, L, D)``, on the language model's device."""
        indices, real = kept_indices(keep_mask)
        packed = pack(self.before, indices.cpu(), real.cpu(), keep_mask.shape[1], rows)
        tensors = {f.name: getattr(packed, f.name) for f in fields(packed) if f.name != "visual"}
        packed = replace(packed, **{name: tensor.to(self.language.device) for name, tensor in tensors.items()})
        embeds = self.language.get_input_embeddings()(packed.ids)
        visual = tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1])).to(embeds.dtype)
        embeds = torch.cat([embeds[:, : packed.visual.start], visual, embeds[:, packed.visual.stop :]], 1)
        return packed, embeds

    @contextmanager
    def _dropping(
        self, within: Within | None, packed: Packed, keep_mask: Tensor, rows: list[list[Block]]
    ) -> Iterator[None]:
        """While it is open, the language model prunes the batch as ``within`` says."""
        if within is None:
            yield
            return
        if any(len(blocks) != 1 for blocks in rows):
            raise ValueError(f"{within.method.name} prunes for one question a row, got {[len(b) for b in rows]}")
        visual = torch.zeros_like(packed.ids, dtype=torch.bool)
        visual[:, packed.visual] = kept_indices(keep_mask)[1]
        last = [packed.visual.stop + blocks[0].answer_start - 1 for blocks in rows]
        places = torch.tensor(last, device=visual.device)
        budgets = torch.full_like(places, within.budget)
        with dropping(self.language, within.method, visual=visual, last=places, budgets=budgets):
            yield

    def _pass(self, tokens: Tensor, keep_mask: Tensor, rows: list[list[Block]], within: Within | None) -> AnswerScores:
        packed, embeds = self._embed(tokens, keep_mask, rows)
        with self._dropping(within, packed, keep_mask, rows):
            hidden = self.language(
                inputs_embeds=embeds, position_ids=packed.positions, attention_mask=packed.mask, use_cache=False
            ).last_hidden_state
        places = packed.targets != IGNORE
        logits = self.head(hidden[places]).float()
        targets, owners = packed.targets[places], packed.owners[places].cpu()
        log_probs = logits.log_softmax(1).gather(1, targets[:, None])[:, 0].cpu()
        wrong = (logits.argmax(1) != targets).float().cpu()
        empty = torch.zeros(int(owners.max()) + 1)
        lengths = empty.index_add(0, owners, torch.ones(len(owners)))
        return AnswerScores(empty.index_add(0, owners, log_probs) / lengths, empty.index_add(0, owners, wrong) == 0)

    def _greedy(
        self,
        tokens: Tensor,
        keep_mask: Tensor,
        rows: list[list[Block]],
        end: int,
        limit: int,
        within: Within | None,
    ) -> list[list[int]]:
        packed, embeds = self._embed(tokens, keep_mask, rows)
        row = torch.arange(len(rows), device=embeds.device)
        last = packed.visual.stop + torch.tensor([len(blocks[0].ids) for blocks in rows], device=embeds.device) - 1
        cache = DynamicCache()
        with self._dropping(within, packed, keep_mask, rows):
            hidden = self.language(
                inputs_embeds=embeds,
                position_ids=packed.positions,
                attention_mask=packed.mask,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            visible, position = packed.mask[row, 0, last], packed.positions[row, last]
            chosen = self.head(hidden[row, last]).argmax(1)
            answers, ended = [chosen], chosen == end
            while len(answers) < limit and not bool(ended.all()):
                visible = nn.functional.pad(visible, (0, 1), value=True)
                position = position + 1
                hidden = self.language(
                    input_ids=chosen[:, None],
                    position_ids=position[:, None],
                    attention_mask=visible[:, None, None],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                chosen = self.head(hidden[:, 0]).argmax(1)
                answers.append(chosen)
                ended |= chosen == end
        return torch.stack(answers, 1).tolist()
