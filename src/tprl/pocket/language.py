"""Stage two of pocket-llava: the language model learns to answer from what a perfect tower would see.

Many questions share one picture in one sequence: a question sees the picture and itself, and its positions start
right after the picture, exactly as if it had been asked alone. The pictures are *symbolic*: patches that carry
perfectly read words on a coarser grid, which is quick. Stage three (``joint``) shows real ones. No visual token is ever
dropped.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaModel

from tprl.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, prefixed, save_checkpoint, with_prefix
from tprl.data.scenes.questions import FAMILIES
from tprl.data.scenes.scene import make_scene
from tprl.lvlm.packing import IGNORE, Packed, pack
from tprl.pocket.base import embeddings_of, image_token_id, load_base
from tprl.pocket.labels import SLOTS, patch_labels
from tprl.pocket.looking import Looking, relevant_patches
from tprl.pocket.model import add_delta, new_llava
from tprl.pocket.precision import mixed_precision
from tprl.pocket.questions import DESCRIBE, Tokens, draw_questions
from tprl.pocket.tower import schedule
from tprl.pocket.words import blank_word, symbolic_units, word_columns


def answer_loss(
    language: LlamaModel, head: nn.Linear, visual: Tensor, packed: Packed, vocabulary: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers' tokens.

    Args:
        visual: ``(B, N, D)`` projected visual tokens.
        vocabulary: int64, ascending; the token ids that compete. Most of a short pass's time would go into the logits
            of all.

    Returns:
        The mean loss, and bool ``(questions,)``: whether every token of the answer is the most likely one.
    """
    embeds = language.get_input_embeddings()(packed.ids)
    embeds = embeds.masked_scatter(packed.visual[..., None], visual.to(embeds.dtype))
    hidden = language(
        inputs_embeds=embeds, position_ids=packed.positions[0], attention_mask=packed.mask, use_cache=False
    ).last_hidden_state
    places = packed.targets != IGNORE
    targets, owners = packed.targets[places], packed.owners[places]
    logits = nn.functional.linear(hidden[places], head.weight[vocabulary]).float()
    targets = torch.searchsorted(vocabulary, targets)
    wrong = torch.zeros(int(owners.max()) + 1).index_add(0, owners, (logits.argmax(1) != targets).float())
    return nn.functional.cross_entropy(logits, targets), wrong == 0


LANGUAGE = "language.safetensors"
LEAST = 0.1
"""Share of a coarse patch that a thing has to cover to own it: little, so that most have patches of all topics."""
RIVALS = 2048
"""Random words that compete with the answers' words in one update."""


def competing(packed: Packed, answer_words: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """Token ids that compete in one update, ascending: the answers' own, ``answer_words``, and ``RIVALS`` others."""
    others = torch.from_numpy(rng.integers(size, size=RIVALS))
    known = torch.cat([packed.targets[packed.targets != IGNORE], answer_words, others])
    return torch.from_numpy(np.unique(known.numpy()))


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


_EVEN = dict.fromkeys((*FAMILIES, DESCRIBE), 1.0)
_LOOKUPS = {"existence": 1.0, "describe": 4.0, "attribute": 2.0, "position": 1.0, "reverse": 1.0}
_HARD = _EVEN | {"existence": 0.5, "position": 0.5, "reading": 2.0, "nearest": 2.0, "relation": 3.0, "describe": 2.0}
CURRICULUM = (
    Phase(100, 6, {"existence": 1.0}, (0.0, 0.0)),
    Phase(300, 6, _LOOKUPS, (1.0, 1.0)),
    Phase(1000, 12, _HARD, (1.0, 1.0)),
)


@dataclass(frozen=True)
class LanguageConfig:
    """How the language model is trained; all randomness follows from ``seed`` and the step."""

    steps: int = CURRICULUM[-1].until
    questions: int = 16
    learning_rate: float = 7e-4
    seed: int = 0
    save_every: int = 50


def phase_of(step: int) -> tuple[Phase, int]:
    """The phase of a step and the step at which it began; the last phase goes on for ever."""
    starts = [0, *(phase.until for phase in CURRICULUM[:-1])]
    number = next((n for n, phase in enumerate(CURRICULUM) if step < phase.until), len(CURRICULUM) - 1)
    return CURRICULUM[number], starts[number]


def train_language(run: Path, config: LanguageConfig, delta: Path | None = None) -> Iterator[dict[str, float]]:
    """Train, or go on training, the language model in ``run``; yields metrics every 10 steps.

    Args:
        delta: start from these weights, with the last phase of the curriculum, instead of from the base model.
    """
    model, tokenizer = load_base()
    began = 0
    if delta:
        learned = new_llava(model, image_token_id(tokenizer))
        add_delta(learned, load_file(delta))
        model.model.load_state_dict(learned.model.language_model.state_dict())
        began = CURRICULUM[-2].until
    torch.manual_seed(config.seed)
    embeddings = embeddings_of(model).requires_grad_(False)
    columns = word_columns(embeddings, tokenizer)
    kinds = len(SLOTS[0].words)
    blank = blank_word(embeddings, tokenizer)
    tokens = Tokens(tokenizer)
    looking = Looking(model.model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    path, start = run / LANGUAGE, began
    if path.exists():
        tensors, meta = load_checkpoint(path)
        model.load_state_dict(with_prefix(tensors, "model."), strict=False)
        load_optimizer(optimizer, tensors)
        start = meta["step"]
    hits: dict[str, list[bool]] = defaultdict(list)
    clock, losses, looks = time.perf_counter(), [], []
    for step in range(start, config.steps):
        phase, first = phase_of(step)
        rng = np.random.default_rng((config.seed, 5, step))
        scenes = [make_scene("train", int(i)) for i in rng.integers(2**31, size=phase.pictures)]
        labels = torch.from_numpy(np.stack([patch_labels(scene, phase.grid, LEAST) for scene in scenes], 1)).long()
        units = symbolic_units(labels, torch.Generator().manual_seed(step))
        gain = phase.ramp[0] + (phase.ramp[1] - phase.ramp[0]) * min(1, (step - first) / (phase.until - first))
        scaled = torch.cat([columns[:, :kinds], columns[:, kinds:] * gain], 1)
        visual = nn.functional.gelu(units) @ scaled.T + blank
        asked = [draw_questions(scene, tokens, rng, config.questions, phase.weights) for scene in scenes]
        everything = torch.ones(len(scenes), phase.grid**2, dtype=torch.bool)
        packed = pack(tokens.prefix(*everything.shape), everything, [q.blocks for q in asked])
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step - began, 20, config.steps - began)
        vocabulary = competing(packed, tokens.answer_words, len(embeddings), rng)
        with mixed_precision():
            loss, right = answer_loss(model.model, model.lm_head, visual, packed, vocabulary)
            looked = looking.loss(packed, *relevant_patches(asked, labels))
        model.zero_grad()
        (loss + 0.5 * looked).backward()
        if not torch.isfinite(nn.utils.clip_grad_norm_(parameters, 1.0)):
            raise FloatingPointError(f"the gradient is not finite at step {step}")
        optimizer.step()
        losses.append(loss.item())
        looks.append(looked.item())
        for family, hit in zip([f for q in asked for f in q.families], right.tolist(), strict=True):
            hits[family].append(hit)
        if (step + 1) % 10 == 0:
            scores = {family: float(np.mean(hits[family])) for family in (*FAMILIES, DESCRIBE) if hits[family]}
            seconds = (time.perf_counter() - clock) / 10
            yield {
                "step": step + 1,
                "seconds_per_step": seconds,
                "loss": float(np.mean(losses)),
                "look": float(np.mean(looks)),
                **scores,
            }
            hits.clear()
            clock, losses, looks = time.perf_counter(), [], []
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            own = {name: p for name, p in model.named_parameters() if p.requires_grad}
            state = prefixed(own, "model.") | optimizer_tensors(optimizer)
            save_checkpoint(path, state, {"step": step + 1})
