"""Stages two and three of pocket-llava: the language model learns to answer from what the tower sees.

Many questions share one picture in one sequence: a question sees the picture and itself, and its positions start
right after the picture, exactly as if it had been asked alone. Stage two shows *symbolic pictures*: patches that
carry perfectly read words on a coarser grid, which is quick. Stage three shows real pictures through the tower.
No visual token is ever dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedTokenizerBase

from tprl.data.scenes import FAMILIES, Scene, ask
from tprl.pocket.labels import SLOTS, UNITS

IGNORE = -100


@dataclass(frozen=True)
class Questions:
    """Tokenised questions and answers about one picture each, to be packed behind it.

    Attributes:
        ids: token ids of every block: question, assistant's turn, answer, end of turn.
        answer_starts: where the answer begins in each block.
    """

    ids: list[list[int]]
    answer_starts: list[int]


class Tokens:
    """The fixed pieces of the prompt around the picture."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        before, after = text.split("<image>")
        self.between, self.turn = after.split("?")
        self.before: list[int] = self._ids(before)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def block(self, question: str, answer: str) -> tuple[list[int], int]:
        prompt = self._ids(self.between + question + self.turn)
        return prompt + self._ids(answer + "<|im_end|>"), len(prompt)


def draw_questions(scene: Scene, tokens: Tokens, rng: np.random.Generator, count: int, weights: Sequence[float]) -> Questions:
    """Up to ``count`` questions about ``scene``, families drawn with ``weights``."""
    drawn: dict[str, str] = {}
    share = np.array(weights) / sum(weights)
    for _ in range(3 * count):
        asked = ask(scene, FAMILIES[int(rng.choice(len(FAMILIES), p=share))], rng)
        if asked:
            drawn[asked[0]] = asked[1]
        if len(drawn) == count:
            break
    blocks = [tokens.block(question, answer) for question, answer in drawn.items()]
    return Questions([ids for ids, _ in blocks], [start for _, start in blocks])


@dataclass(frozen=True)
class Packed:
    """A batch of pictures with their questions behind them, without the pictures themselves.

    ``ids (B, L)`` int64 (0 where a visual token goes), ``positions (B, L)``, ``mask (B, 1, L, L)`` bool,
    ``targets (B, L)``: the next token where it belongs to an answer, else ``IGNORE``; ``visual`` the slice of the
    picture's tokens in the sequence.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    visual: slice


def pack(before: list[int], visual_count: int, batch: list[Questions]) -> Packed:
    """Lay out prefix, picture and questions of every picture in one padded batch."""
    start = len(before) + visual_count
    length = start + max(sum(map(len, questions.ids)) for questions in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    positions = torch.arange(length).repeat(len(batch), 1)
    block = torch.full((len(batch), length), -1)
    targets = torch.full((len(batch), length), IGNORE)
    ids[:, : len(before)] = torch.tensor(before)
    block[:, :start] = 0
    for row, questions in enumerate(batch):
        at = start
        for number, (tokens, answer_start) in enumerate(zip(questions.ids, questions.answer_starts, strict=True), 1):
            end = at + len(tokens)
            ids[row, at:end] = torch.tensor(tokens)
            positions[row, at:end] = torch.arange(start, start + len(tokens))
            block[row, at:end] = number
            targets[row, at + answer_start - 1 : end - 1] = torch.tensor(tokens[answer_start:])
            at = end
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = block[:, :, None] == block[:, None, :]
    mask = (same | (block[:, None, :] == 0)) & causal
    return Packed(ids, positions, mask[:, None], targets, slice(len(before), start))


def answer_loss(language: LlamaModel, head: nn.Linear, visual: Tensor, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the answers' tokens.

    Args:
        visual: ``(B, N, D)`` projected visual tokens.

    Returns:
        The mean loss, and for every answer token whether it is the most likely one and its row-major place in
        ``packed.targets``.
    """
    embeds = language.get_input_embeddings()(packed.ids)
    embeds = torch.cat([embeds[:, : packed.visual.start], visual.to(embeds.dtype), embeds[:, packed.visual.stop :]], 1)
    hidden = language(
        inputs_embeds=embeds, position_ids=packed.positions, attention_mask=packed.mask, use_cache=False
    ).last_hidden_state
    places = (packed.targets != IGNORE).flatten().nonzero()[:, 0]
    targets = packed.targets.flatten()[places]
    logits = head(hidden.flatten(0, 1)[places]).float()
    return nn.functional.cross_entropy(logits, targets), logits.argmax(1) == targets, places


def word_columns(embeddings: Tensor, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Tensor:
    """Where the projector's second layer starts: one column ``(D,)`` for every unit of ``SLOTS``, ``(D, UNITS)``.

    A word is its token embedding, scaled so that what questions name stands out; slots without a direction of
    their own are turned by a signed permutation of the embedding's dimensions, which keeps norms and angles.
    """
    generator = torch.Generator().manual_seed(seed)
    width, columns = embeddings.shape[1], []
    for slot in SLOTS:
        ids = [tokenizer(" " + word if len(word) > 1 else word, add_special_tokens=False)["input_ids"] for word in slot.words]
        if any(len(token) != 1 for token in ids):
            raise ValueError(f"slot {slot.name}: every word must be one token, got {ids}")
        words = embeddings[torch.tensor(ids)[:, 0]]
        if not slot.own_direction:
            signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1
            words = words[:, torch.randperm(width, generator=generator)] * signs
        columns.append(words * slot.gain)
    return torch.cat(columns).T / nn.functional.gelu(torch.tensor(1.0))


def symbolic_units(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Units of a perfect tower for patch labels ``(slots, B, N)``: about +1 for the word, below -3 elsewhere;
    where a label has no opinion a random word (or none) stands, as a tower's guess would."""
    units = []
    for slot, label in zip(SLOTS, labels, strict=True):
        count = len(slot.words)
        guess = torch.randint(0, count + 1, label.shape, generator=generator)
        label = torch.where(label == IGNORE, guess, label)
        units.append(nn.functional.one_hot(label, count + 1)[..., 1:])
    stacked = torch.cat(units, -1).float()
    assert stacked.shape[-1] == UNITS
    return stacked * 4 - 3


@dataclass(frozen=True)
class LanguageConfig:
    """How the language model is trained; all randomness follows from ``seed`` and the step."""

    steps: int
    pictures: int = 6
    questions: int = 16
    learning_rate: float = 1e-3
    seed: int = 0


def run_symbolic(steps: int, grid: int, lr: float, out: str) -> None:
    import json
    import sys
    import time
    from collections import defaultdict

    from peft import LoraConfig, get_peft_model

    from tprl.data.scenes import make_scene
    from tprl.pocket.base import load_base
    from tprl.pocket.labels import patch_labels
    from tprl.pocket.tower import schedule

    model, tokenizer = load_base()
    columns = word_columns(model.get_input_embeddings().weight.detach(), tokenizer)
    blank = model.get_input_embeddings().weight.detach()[tokenizer(" empty", add_special_tokens=False)["input_ids"][0]]
    lora = LoraConfig(
        r=64, lora_alpha=64, target_modules="all-linear", modules_to_save=["input_layernorm", "post_attention_layernorm", "norm"]
    )
    torch.manual_seed(0)
    model.to(torch.bfloat16)
    peft = get_peft_model(model, lora)
    params = [p for p in peft.parameters() if p.requires_grad]
    print(sum(p.numel() for p in params), {str(p.dtype) for p in params})
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = Tokens(tokenizer)
    weights = json.loads(sys.argv[5])
    base = peft.get_base_model()
    clock, hits = time.perf_counter(), defaultdict(list)
    for step in range(steps):
        rng = np.random.default_rng((5, step))
        scenes = [make_scene("train", step * 6 + i) for i in range(6)]
        labels = torch.from_numpy(np.stack([patch_labels(s, grid) for s in scenes], 1)).long()
        units = symbolic_units(labels, torch.Generator().manual_seed(step))
        visual = nn.functional.gelu(units) @ columns.T + blank
        questions = [draw_questions(s, tokens, rng, 16, weights) for s in scenes]
        packed = pack(tokens.before, grid * grid, questions)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 30)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right, places = answer_loss(base.model, base.lm_head, visual, packed)
        peft.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        # per family
        flat = dict(zip(places.tolist(), right.tolist()))
        length = packed.ids.shape[1]
        for row, q in enumerate(questions):
            at = packed.visual.stop
            for ids, start in zip(q.ids, q.answer_starts):
                ok = all(flat[row * length + at + i] for i in range(start - 1, len(ids) - 1))
                text = tokenizer.decode(ids[1:3]).strip() + (tokenizer.decode(ids[3:4]) if ids[1]==3718 or True else "")
                key = text.split()
                key = " ".join(key[:1] if key[0] in ("Is",) else key[:3])
                key = key + (" pos" if tokenizer.decode(ids[3:4]) not in (" a"," an") and key=="Is" else "")
                hits[key].append(ok)
                at += len(ids)
        if (step + 1) % 10 == 0:
            print(step + 1, round(loss.item(), 3), round((time.perf_counter() - clock) / 10, 2), packed.ids.shape,
                  {k: round(float(np.mean(v)), 2) for k, v in sorted(hits.items())}, flush=True)
            clock, hits = time.perf_counter(), defaultdict(list)


if __name__ == "__main__":
    import sys

    run_symbolic(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
