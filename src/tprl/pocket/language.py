"""Stages two and three of pocket-llava: the language model learns to answer from what the tower sees.

Many questions share one picture in one sequence: a question sees the picture and itself, and its positions start
right after the picture, exactly as if it had been asked alone. Stage two shows *symbolic pictures*: patches that
carry perfectly read words on a coarser grid, which is quick. Stage three shows real pictures through the tower.
No visual token is ever dropped.
"""

import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tprl.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, prefixed, save_checkpoint, with_prefix
from tprl.data.scenes import COLOURS, FAMILIES, KINDS, Scene, ask, make_scene
from tprl.lvlm.packing import IGNORE, Block, Packed, pack
from tprl.pocket.base import load_base
from tprl.pocket.labels import SLOTS, patch_labels


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

    def block(self, question: str, answer: str) -> Block:
        prompt = self._ids(self.between + question + self.turn)
        return Block(prompt + self._ids(answer + "<|im_end|>"), len(prompt))


@dataclass(frozen=True)
class Questions:
    """Questions about one picture: their families and their tokens."""

    families: list[str]
    blocks: list[Block]
    subjects: list[set[str]]


def draw_questions(
    scene: Scene, tokens: Tokens, rng: np.random.Generator, count: int, weights: dict[str, float]
) -> Questions:
    """Up to ``count`` different questions about ``scene``, families drawn with ``weights``."""
    drawn: dict[str, tuple[str, str]] = {}
    share = np.array(list(weights.values())) / sum(weights.values())
    for _ in range(3 * count):
        family = str(rng.choice(list(weights), p=share))
        asked = describe(scene, rng) if family == DESCRIBE else ask(scene, family, rng)
        if asked:
            drawn[asked[0]] = (family, asked[1])
        if len(drawn) == count:
            break
    return Questions(
        [family for family, _ in drawn.values()],
        [tokens.block(question, answer) for question, (_, answer) in drawn.items()],
        [subject(question) for question in drawn],
    )


def subject(question: str) -> set[str]:
    """The kinds that a question names, or, where it names none, the colours."""
    words = set(re.findall("[a-z]+", question))
    return words & KINDS.keys() or words & COLOURS.keys()


DESCRIBE = "describe"
"""A family of training only: all that is known of one thing, many supervised words for one look at the picture."""


def describe(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """A ``DESCRIBE`` question about a thing that is alone of its kind, and its answer."""
    if not scene.singles:
        return None
    thing = scene.singles[int(rng.integers(len(scene.singles)))]
    near = scene.nearest(thing)
    facts = [
        thing.card.colour if thing.card else "none",
        str(thing.card.number) if thing.card and thing.card.number is not None else "none",
        thing.third(0) or "none",
        thing.third(1) or "none",
        near.kind if near else "none",
    ]
    return f"Describe the {thing.kind}.", " ".join(facts)


LOOKING_LAYER, LOOKING_HEADS = 4, 3


class Looking:
    """Attention of some heads of one layer, recorded so that it can be taught where to look.

    The first layers of the base model hold a head that finds equal tokens, but none that fetches what stands there;
    those come much deeper. So the heads of ``LOOKING_LAYER`` that share its first key head are shown, from the
    labels of the scene, which patches an answer is to be read from.
    """

    def __init__(self, language: LlamaModel) -> None:
        self.attention = language.layers[LOOKING_LAYER].self_attn
        self.attention.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        self.hidden, self.rotary = kwargs["hidden_states"], kwargs["position_embeddings"]

    def loss(self, packed: Packed, relevant: Tensor, has_any: Tensor) -> Tensor:
        """Mean of ``-log(attention on relevant patches)`` over the places that predict an answer's token.

        Args:
            relevant: bool ``(questions, N)``.
        """
        attention = self.attention
        size = attention.head_dim
        heads = LOOKING_HEADS * size
        q = nn.functional.linear(self.hidden, attention.q_proj.weight[:heads]).unflatten(-1, (LOOKING_HEADS, size))
        k = nn.functional.linear(self.hidden, attention.k_proj.weight[:size]).unflatten(-1, (1, size))
        q, k = apply_rotary_pos_emb(q, k, *self.rotary, unsqueeze_dim=2)
        row, at = (packed.owners >= 0).nonzero(as_tuple=True)
        owner = packed.owners[row, at]
        chosen = has_any[owner]
        row, at, owner = row[chosen], at[chosen], owner[chosen]
        scores = torch.einsum("phd,pld->phl", q[row, at], k[row, :, 0]).float() * attention.scaling
        scores = scores.masked_fill(~packed.mask[row, 0, at][:, None], -torch.inf)
        start, stop = packed.visual.start, packed.visual.stop
        wanted = scores[..., start:stop].masked_fill(~relevant[owner][:, None], -torch.inf)
        return (scores.logsumexp(-1) - wanted.logsumexp(-1)).mean()


def answer_loss(language: LlamaModel, head: nn.Linear, visual: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers' tokens.

    Args:
        visual: ``(B, N, D)`` projected visual tokens.

    Returns:
        The mean loss, and bool ``(questions,)``: whether every token of the answer is the most likely one.
    """
    embeds = language.get_input_embeddings()(packed.ids)
    embeds = torch.cat([embeds[:, : packed.visual.start], visual.to(embeds.dtype), embeds[:, packed.visual.stop :]], 1)
    hidden = language(
        inputs_embeds=embeds, position_ids=packed.positions, attention_mask=packed.mask, use_cache=False
    ).last_hidden_state
    places = packed.targets != IGNORE
    targets, owners = packed.targets[places], packed.owners[places]
    logits = head(hidden[places]).float()
    wrong = torch.zeros(int(owners.max()) + 1).index_add(0, owners, (logits.argmax(1) != targets).float())
    return nn.functional.cross_entropy(logits, targets), wrong == 0


def word_columns(embeddings: Tensor, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Tensor:
    """Where the projector's second layer starts: one column ``(D,)`` for every unit of ``SLOTS``, ``(D, UNITS)``.

    A word is its token embedding, scaled so that what questions name stands out; slots without a direction of
    their own are turned by a signed permutation of the embedding's dimensions, which keeps norms and angles.
    """
    generator = torch.Generator().manual_seed(seed)
    width, columns = embeddings.shape[1], []
    for slot in SLOTS:
        ids = [
            tokenizer(" " + word if len(word) > 1 else word, add_special_tokens=False)["input_ids"]
            for word in slot.words
        ]
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
    blank = labels[0] == IGNORE
    for slot, label in zip(SLOTS, labels, strict=True):
        count = len(slot.words)
        guess = torch.randint(0, count + 1, label.shape, generator=generator)
        label = torch.where(blank, 0, torch.where(label == IGNORE, guess, label))
        units.append(nn.functional.one_hot(label, count + 1)[..., 1:])
    return torch.cat(units, -1).float() * 4 - 3


def relevant_patches(asked: list[Questions], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches each question speaks of, bool ``(questions, N)``, and whether there are any.

    Args:
        labels: patch labels ``(slots, B, N)``.
    """
    words = [*KINDS, *COLOURS]
    kind, colour = labels[0], labels[1]
    rows = []
    for number, questions in enumerate(asked):
        for named in questions.subjects:
            ids = [words.index(word) for word in sorted(named)]
            rows.append(
                torch.stack([
                    kind[number] == i + 1 if i < len(KINDS) else colour[number] == i - len(KINDS) + 1 for i in ids
                ]).any(0)
            )
    relevant = torch.stack(rows)
    return relevant, relevant.any(1)


@dataclass(frozen=True)
class Phase:
    """A stretch of the curriculum.

    Attributes:
        until: the step at which it ends.
        grid: visual tokens a side.
        weights: families asked, and how often.
        ramp: (from, to) gain of every slot but the kind, linear over the phase.
        pictures: in a batch.
    """

    until: int
    grid: int
    weights: dict[str, float]
    ramp: tuple[float, float]
    pictures: int = 6


_EVEN = dict.fromkeys(FAMILIES, 1.0)
CURRICULUM = (
    Phase(100, 6, {"existence": 1.0}, (0.0, 0.0)),
    Phase(300, 6, {"existence": 1.0, "describe": 4.0, "attribute": 2.0, "position": 1.0, "reverse": 1.0}, (1.0, 1.0)),
    Phase(450, 6, _EVEN | {"describe": 2.0}, (1.0, 1.0)),
    Phase(600, 12, _EVEN | {"describe": 1.0}, (1.0, 1.0)),
)


@dataclass(frozen=True)
class LanguageConfig:
    """How the language model is trained; all randomness follows from ``seed`` and the step."""

    steps: int
    questions: int = 16
    learning_rate: float = 5e-4
    seed: int = 0
    save_every: int = 50


def train_language(run: Path, config: LanguageConfig) -> Iterator[dict[str, float]]:
    model, tokenizer = load_base()
    torch.manual_seed(config.seed)
    embeddings = model.get_input_embeddings().weight.requires_grad_(False)
    columns = word_columns(embeddings, tokenizer)
    kinds = len(SLOTS[0].words)
    blank = embeddings[tokenizer(" empty", add_special_tokens=False)["input_ids"][0]]
    tokens = Tokens(tokenizer)
    looking = Looking(model.model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    path, start = run / "language.safetensors", 0
    if path.exists():
        tensors, meta = load_checkpoint(path)
        model.load_state_dict(with_prefix(tensors, "model."), strict=False)
        load_optimizer(optimizer, tensors)
        start = meta["step"]
    hits: dict[str, list[bool]] = defaultdict(list)
    clock, losses, looks = time.perf_counter(), [], []
    for step in range(start, config.steps):
        first = 0
        for phase in CURRICULUM:
            if step < phase.until:
                break
            first = phase.until
        rng = np.random.default_rng((config.seed, 5, step))
        scenes = [make_scene("train", int(i)) for i in rng.integers(2**31, size=phase.pictures)]
        labels = torch.from_numpy(np.stack([patch_labels(scene, phase.grid, 0.2) for scene in scenes], 1)).long()
        units = symbolic_units(labels, torch.Generator().manual_seed(step))
        gain = phase.ramp[0] + (phase.ramp[1] - phase.ramp[0]) * min(1, (step - first) / (phase.until - first))
        scaled = torch.cat([columns[:, :kinds], columns[:, kinds:] * gain], 1)
        visual = nn.functional.gelu(units) @ scaled.T + blank
        asked = [draw_questions(scene, tokens, rng, config.questions, phase.weights) for scene in scenes]
        everything = torch.arange(phase.grid**2).repeat(len(scenes), 1)
        packed = pack(tokens.before, everything, everything >= 0, phase.grid**2, [q.blocks for q in asked])
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (step + 1) / 20)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = answer_loss(model.model, model.lm_head, visual, packed)
            looked = looking.loss(packed, *relevant_patches(asked, labels))
        model.zero_grad()
        (loss + 0.5 * looked).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        looks.append(looked.item())
        for family, hit in zip([f for q in asked for f in q.families], right.tolist(), strict=True):
            hits[family].append(hit)
        if (step + 1) % 10 == 0:
            scores = {family: float(np.mean(hits[family])) for family in (*FAMILIES, DESCRIBE) if hits[family]}
            seconds = (time.perf_counter() - clock) / 10
            yield {"step": step + 1, "seconds_per_step": seconds, "loss": float(np.mean(losses)), "look": float(np.mean(looks)), **scores}
            hits.clear()
            clock, losses, looks = time.perf_counter(), [], []
        if (step + 1) % config.save_every == 0:
            own = {name: p for name, p in model.named_parameters() if p.requires_grad}
            state = prefixed(own.items(), "model.") | optimizer_tensors(optimizer)
            save_checkpoint(path, state, {"step": step + 1})


if __name__ == "__main__":
    run = Path(sys.argv[1])
    run.mkdir(parents=True, exist_ok=True)
    with (run / "language.jsonl").open("a") as log:
        for metrics in train_language(run, LanguageConfig(int(sys.argv[2]))):
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            print({k: round(v, 3) for k, v in metrics.items()}, flush=True)
