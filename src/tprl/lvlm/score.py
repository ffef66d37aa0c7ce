"""How well a frozen language model answers from a subset of the visual tokens: one teacher-forced pass, batched.

Where an answer has one accepted text, greedy generation yields it exactly when every token of it is the most likely
one under teacher forcing, so accuracy needs no generation token by token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tprl.lvlm.cut import Positions
from tprl.lvlm.families import BothWays
from tprl.lvlm.in_model import dropping
from tprl.lvlm.packing import IGNORE, Block, Packed, Prefix, pack
from tprl.selectors import InModel

PADDING = 0.1
"""Share of a pass that padding stays below."""


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


class Opening(DynamicCache):
    """Keys and values of one sequence, ``(1, heads, tokens, width)`` a layer, that all rows of any batch go on from;
    what follows sees them and is not kept."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        keys, values = (states.expand(len(key_states), -1, -1, -1) for states in (layer.keys, layer.values))
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)


class AnswerScorer:
    """Scores answers under a frozen LVLM from given visual tokens.

    Args:
        language: the decoder without its head; attention is to be "sdpa" or "eager".
        head: hidden states to vocabulary logits.
        both_ways: what attends in both directions, see ``tprl.lvlm.packing.pack``.
        tokens_per_pass: bound on tokens, padding included, in one forward pass; bounds memory.

    Attributes:
        positions: "original": kept tokens stay at their positions; "compact": positions count what is left.

    Raises:
        ValueError: the decoder attends by another implementation, which cannot take the masks of packed rows.
    """

    def __init__(
        self,
        language: PreTrainedModel,
        head: nn.Module,
        both_ways: BothWays = "nothing",
        tokens_per_pass: int = 8192,
    ) -> None:
        attention = language.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"answers are scored with the attention 'sdpa' or 'eager', got {attention!r}")
        self.language, self.head, self.both_ways, self.tokens_per_pass = language, head, both_ways, tokens_per_pass
        self.positions: Positions = "original"
        self._shown = self._slots = 0
        self._openings: dict[tuple[int, ...], Opening] = {}

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
        if self.both_ways == "prompts":  # a picture looks different to each question, so each gets a row
            given = [row for row, blocks in enumerate(rows) for _ in blocks]
            rows = [[block] for blocks in rows for block in blocks]
        else:
            given = list(range(len(rows)))
        firsts = torch.tensor([0, *(len(blocks) for blocks in rows)]).cumsum(0)
        log_prob, correct = torch.zeros(int(firsts[-1])), torch.zeros(int(firsts[-1]), dtype=torch.bool)
        pictures = torch.arange(len(keep_mask)) if pictures is None else pictures
        before = prefix.shown(keep_mask.cpu()).sum(1)[given]
        for chosen in self._passes(before, rows):
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
        for chosen in self._passes(prefix.shown(keep_mask.cpu()).sum(1), rows):
            chosen_rows = [rows[i] for i in chosen]
            kept = _kept(tokens, torch.tensor(chosen), keep_mask[chosen])
            texts = self._greedy(prefix[chosen], kept, keep_mask[chosen], chosen_rows, end, limit, within)
            for i, answer in zip(chosen, texts, strict=True):
                answers[i] = answer[: answer.index(end)] if end in answer else answer
        return answers

    def prepare(
        self, prefix: Prefix, kept: Tensor, keep_mask: Tensor, rows: Sequence[Sequence[Block]]
    ) -> tuple[Packed, dict[str, Any]]:
        """The rows as a batch, and what the language model is to be called with; ``kept (K, D)`` are the kept tokens
        of all rows in reading order."""
        packed = pack(prefix, keep_mask.cpu(), rows, self.both_ways).to(self.language.device)
        if self.positions == "compact":
            if len(packed.positions) > 1:
                raise ValueError("positions 'compact' are not allowed where they are two-dimensional; 'original'")
            packed = replace(packed, positions=packed.places[None])
        embeds = self.language.get_input_embeddings()(packed.ids)
        embeds = embeds.masked_scatter(packed.visual[..., None], kept.to(embeds))
        inputs = {
            "inputs_embeds": embeds,
            "position_ids": _rows(packed.positions),
            "attention_mask": self._masks(packed.mask, packed.places, packed.places),
        }
        if prefix.deep is not None:
            added = prefix.deep.to(keep_mask.device)[keep_mask].to(embeds)
            inputs |= {"visual_pos_masks": packed.visual, "deepstack_visual_embeds": list(added.unbind(1))}
        return packed, inputs

    def _opening(self, prefix: Prefix) -> tuple[int, ...]:
        """The tokens of text that all rows begin with."""
        if self.both_ways == "prompts":  # they see the picture
            return ()
        alike = (prefix.real & ~prefix.visual & (prefix.ids == prefix.ids[:1])).all(0)
        return tuple(prefix.ids[0, : int(alike.int().cumprod(0).sum())].tolist())

    def _read(self, opening: tuple[int, ...]) -> Opening:
        """Keys and values of an opening, computed once and for all."""
        if opening not in self._openings:
            ids = torch.tensor([opening], device=self.language.device)
            places, cache = torch.arange(len(opening), device=ids.device)[None], DynamicCache()
            causal = torch.ones(1, 1, len(opening), len(opening), dtype=torch.bool, device=ids.device).tril()
            masks = self._masks(causal, places, places)
            self.language(
                input_ids=ids, position_ids=places, attention_mask=masks, past_key_values=cache, use_cache=True
            )
            layers: list[Any] = cache.layers
            self._openings[opening] = Opening([(layer.keys, layer.values) for layer in layers])
        return self._openings[opening]

    def _after(self, opening: tuple[int, ...], inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs without the opening, whose keys and values are given instead."""
        if not opening:
            return inputs
        skip, masks = len(opening), inputs["attention_mask"]
        rest = {"inputs_embeds": inputs["inputs_embeds"][:, skip:], "position_ids": inputs["position_ids"][..., skip:]}
        if isinstance(masks, dict):
            rest["attention_mask"] = {layers: mask[:, :, skip:] for layers, mask in masks.items()}
        else:
            rest["attention_mask"] = masks[:, :, skip:]
        if "visual_pos_masks" in inputs:
            rest["visual_pos_masks"] = inputs["visual_pos_masks"][:, skip:]
        return inputs | rest | {"past_key_values": self._read(opening)}

    def _masks(self, mask: Tensor, queries: Tensor, keys: Tensor) -> Any:
        """An attention mask, bool ``(B, 1, Q, K)``, as the language model takes it: one for every type of its layers.

        Args:
            queries: places of the queries in their sequences, ``(B, Q)``, by which sliding windows are counted.
            keys: those of the keys, ``(B, K)``.
        """
        config = self.language.config
        window, types = (vars(config).get(name) for name in ("sliding_window", "layer_types"))
        if window is None:
            return self._values(mask)
        near = (queries[:, :, None] - keys[:, None] < window)[:, None]
        sliding = self._values(mask & near)
        return sliding if types is None else {"full_attention": self._values(mask), "sliding_attention": sliding}

    def _values(self, mask: Tensor) -> Tensor:
        """A mask as the attention implementation takes it."""
        if self.language.config._attn_implementation == "sdpa":
            return mask
        dtype = self.language.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def _passes(self, before: Tensor, rows: Sequence[Sequence[Block]]) -> list[list[int]]:
        """Rows grouped by length: a pass holds ``tokens_per_pass`` at most, and less than ``PADDING`` of it is padding,
        rows longer than a pass apart."""
        text = torch.tensor([sum(len(block.ids) for block in blocks) for blocks in rows])
        lengths = (before + text).tolist()
        passes: list[list[int]] = []
        held = longest = 0
        for i in sorted(range(len(rows)), key=lambda row: -lengths[row]):
            size = (len(passes[-1]) + 1) * longest if passes else self.tokens_per_pass + 1
            if size <= self.tokens_per_pass and held + lengths[i] > (1 - PADDING) * size:
                passes[-1].append(i)
                held += lengths[i]
            else:
                passes.append([i])
                held = longest = lengths[i]
            self._shown += lengths[i]
        self._slots += sum(len(chosen) * lengths[chosen[0]] for chosen in passes)
        return passes

    def padding_share(self) -> float:
        """Share of padding in what the language model was shown since this was asked last, in [0, 1]."""
        share = 1 - self._shown / max(1, self._slots)
        self._shown = self._slots = 0
        return share

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
        budgets = torch.full_like(places, within.budget)
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
        packed, inputs = self.prepare(prefix, kept, keep_mask, rows)
        opening = () if within else self._opening(prefix)
        with self._dropping(within, packed, rows):
            hidden = self.language(**self._after(opening, inputs), use_cache=bool(opening)).last_hidden_state
        places = packed.targets != IGNORE
        logits = self.head(hidden[places[:, len(opening) :]]).float()
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
        packed, inputs = self.prepare(prefix, kept, keep_mask, rows)
        device = packed.ids.device
        row = torch.arange(len(rows), device=device)
        last = (packed.start + torch.tensor([len(blocks[0].ids) - 1 for blocks in rows])).to(device)
        cache = DynamicCache()
        with self._dropping(within, packed, rows):
            hidden = self.language(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
            visible, places = packed.mask[row, 0, last], packed.places
            position, place = packed.positions[:, row, last], packed.places[row, last]
            chosen = self.head(hidden[row, last]).argmax(1)
            answers, ended = [chosen], chosen == end
            while len(answers) < limit and not bool(ended.all()):
                visible = nn.functional.pad(visible, (0, 1), value=True)
                position, place = position + 1, place + 1
                places = torch.cat([places, place[:, None]], 1)
                hidden = self.language(
                    input_ids=chosen[:, None],
                    position_ids=_rows(position[..., None]),
                    attention_mask=self._masks(visible[:, None, None], place[:, None], places),
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


def _rows(positions: Tensor) -> Tensor:
    """Positions ``(P, B, L)`` as language models take them: ``(B, L)`` where there is one row of them."""
    return positions[0] if len(positions) == 1 else positions
