"""Stage three of pocket-llava: projector and language model learn on real pictures, seen by a frozen tower.

The projector starts as what stages one and two agreed on: the tower's read-out of words, and the words' embeddings.
What both stages taught them goes on beside the answers, so that neither side forgets. Every one of the 576 visual
tokens is always shown.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from tprl.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, prefixed, save_checkpoint, with_prefix
from tprl.data.scenes.questions import FAMILIES
from tprl.data.scenes.scene import make_scene
from tprl.lvlm.packing import pack
from tprl.pocket.base import embeddings_of, image_token_id, load_base
from tprl.pocket.labels import GRID, SLOTS, UNITS
from tprl.pocket.language import LANGUAGE, answer_loss, competing
from tprl.pocket.looking import Looking, relevant_patches
from tprl.pocket.model import add_delta, new_llava
from tprl.pocket.pictures import Batches, make_batch, normalise
from tprl.pocket.precision import fastest_attention, mixed_precision
from tprl.pocket.questions import DESCRIBE, Tokens, draw_questions
from tprl.pocket.tower import TOWER, Tower, TowerConfig, schedule, word_accuracy, word_loss
from tprl.pocket.words import blank_word, word_columns

JOINT = "joint.safetensors"
RENEWAL_BATCHES = 2
"""Batches of pictures that the projector is fitted on, 576 patches each, for 257 numbers a unit."""
FAMILY_WEIGHTS = dict.fromkeys((*FAMILIES, DESCRIBE), 1.0) | {
    "existence": 0.5, "reverse": 1.5, "comparison": 0.7, "position": 0.4,
    "grounding": 0.3, DESCRIBE: 0.1, "reading": 3.0, "counting": 4.0, "nearest": 2.0, "relation": 2.0,
}  # fmt: skip
"""What is hard is asked more often; boxes and descriptions seldom, since the loss is a mean over tokens and they have
many."""


@dataclass(frozen=True)
class JointConfig:
    """How the whole is trained; all randomness follows from ``seed`` and the step."""

    steps: int = 500
    pictures: int = 5
    questions: int = 30
    language_rate: float = 2e-4
    projector_rate: float = 2e-4
    warmup_steps: int = 30
    seed: int = 0
    save_every: int = 50


def start(run: Path) -> tuple[LlavaForConditionalGeneration, Tokens]:
    """The model as stages one and two in ``run`` left its parts."""
    base, tokenizer = load_base()
    language, _ = load_checkpoint(run / LANGUAGE)
    base.load_state_dict(with_prefix(language, "model."), strict=False)
    tower = Tower()
    tower.load_state_dict(with_prefix(load_checkpoint(run / TOWER)[0], "model."))
    llava = new_llava(base, image_token_id(tokenizer))
    llava.model.vision_tower.load_state_dict(tower.vision.state_dict())
    projector = llava.model.multi_modal_projector
    embeddings = embeddings_of(base)
    with torch.no_grad():
        projector.linear_1.weight.normal_(0, 0.02)[:UNITS] = tower.words.weight
        projector.linear_1.bias.zero_()[:UNITS] = tower.words.bias
        projector.linear_2.weight.zero_()[:, :UNITS] = word_columns(embeddings, tokenizer)
        projector.linear_2.bias.copy_(blank_word(embeddings, tokenizer))
    return llava, Tokens(tokenizer)


def start_from(delta: Path, run: Path) -> tuple[LlavaForConditionalGeneration, Tokens]:
    """The model of a file of differences, with the language model and the tower that ``run`` holds, if any."""
    base, tokenizer = load_base()
    llava = new_llava(base, image_token_id(tokenizer))
    add_delta(llava, load_file(delta))
    if (run / LANGUAGE).exists():
        learned = with_prefix(load_checkpoint(run / LANGUAGE)[0], "model.model.")
        llava.model.language_model.load_state_dict(learned, strict=False)  # the embeddings are the base's
    if (run / TOWER).exists():
        tower = Tower()
        tower.load_state_dict(with_prefix(load_checkpoint(run / TOWER)[0], "model."))
        renew_tower(llava, tower)
    return llava, Tokens(tokenizer)


@torch.no_grad()
def renew_tower(llava: LlavaForConditionalGeneration, tower: Tower) -> None:
    """Put in a tower that learned on by itself, so that the language model finds what it knows.

    The words come with the tower. The projector's other units are fitted by least squares to say of some training
    pictures what they said with the old tower.
    """
    vision, units = llava.model.vision_tower, llava.model.multi_modal_projector.linear_1
    before, after = [], []
    pictures = Batches(TowerConfig.batch_size, 0, RENEWAL_BATCHES)
    for number in range(RENEWAL_BATCHES):
        pixels = normalise(pictures[number].pixels)
        before.append(units(vision(pixels).last_hidden_state[:, 1:])[..., UNITS:].flatten(0, 1))
        hidden = tower.vision(pixels).last_hidden_state[:, 1:].flatten(0, 1)
        after.append(nn.functional.pad(hidden, (0, 1), value=1.0))
    # In float32 the solver takes the least directions of so many rows for noise and drops them.
    fitted = torch.linalg.lstsq(torch.cat(after).double(), torch.cat(before).double()).solution.T.float()
    vision.load_state_dict(tower.vision.state_dict())
    units.weight.copy_(torch.cat([tower.words.weight, fitted[:, :-1]]))
    units.bias.copy_(torch.cat([tower.words.bias, fitted[:, -1]]))


def load_weights(llava: LlavaForConditionalGeneration, tensors: dict[str, Tensor]) -> None:
    """Put in what a checkpoint of this stage holds: all but the base model's embeddings.

    Raises:
        ValueError: the checkpoint holds other weights.
    """
    missing, unexpected = llava.load_state_dict(with_prefix(tensors, "model."), strict=False)
    if wrong := [name for name in missing if "embed_tokens" not in name and name != "lm_head.weight"] + unexpected:
        raise ValueError(f"this is no checkpoint of the whole model: {wrong[0]!r} and {len(wrong) - 1} more do not fit")


def train_joint(run: Path, config: JointConfig, delta: Path | None = None) -> Iterator[dict[str, float]]:
    """Train, or go on training, the whole in ``run``; yields metrics every 10 steps.

    Args:
        delta: start from these weights, and the language model and the tower in ``run`` as far as it holds them.
    """
    torch.manual_seed(config.seed)
    llava, tokens = start_from(delta, run) if delta else start(run)
    vision, projector = llava.model.vision_tower, llava.model.multi_modal_projector
    language = llava.model.language_model
    vision.set_attn_implementation(fastest_attention())
    vision.requires_grad_(False)
    language.get_input_embeddings().weight.requires_grad_(False)
    looking = Looking(language)
    own = [p for p in llava.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in language.parameters() if p.requires_grad], "rate": config.language_rate},
        {"params": list(projector.parameters()), "rate": config.projector_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    path, first = run / JOINT, 0
    if path.exists():
        tensors, meta = load_checkpoint(path)
        load_weights(llava, tensors)
        load_optimizer(optimizer, tensors)
        first = meta["step"]
    prefix = tokens.prefix(config.pictures, GRID**2)
    everything = torch.ones(config.pictures, GRID**2, dtype=torch.bool)
    seen: dict[str, list[float]] = defaultdict(list)
    clock = time.perf_counter()
    for step in range(first, config.steps):
        rng = np.random.default_rng((config.seed, 7, step))
        scenes = [make_scene("train", int(i)) for i in rng.integers(2**31, size=config.pictures)]
        batch = make_batch(scenes)
        asked = [draw_questions(scene, tokens, rng, config.questions, FAMILY_WEIGHTS) for scene in scenes]
        packed = pack(prefix, everything, [questions.blocks for questions in asked])
        vocabulary = competing(packed, tokens.answer_words, llava.lm_head.out_features, rng)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(step, config.warmup_steps, config.steps)
        with mixed_precision():
            units = projector.linear_1(vision(normalise(batch.pixels)).last_hidden_state[:, 1:])
            visual = projector.linear_2(projector.act(units))
            answered, right = answer_loss(language, llava.lm_head, visual, packed, vocabulary)
            looked = looking.loss(packed, *relevant_patches(asked, batch.labels))
        units = units[..., :UNITS]
        words = word_loss(units, batch.labels, batch.weights, [slot.weight for slot in SLOTS])
        optimizer.zero_grad()
        (answered + 0.3 * looked + 0.5 * words).backward()
        if not torch.isfinite(nn.utils.clip_grad_norm_(own, 1.0)):
            raise FloatingPointError(f"the gradient is not finite at step {step}")
        optimizer.step()
        for name, loss in {"loss": answered, "look": looked, "words": words}.items():
            seen[name].append(loss.item())
        for name, share in word_accuracy(units, batch.labels).items():
            seen["see " + name].append(share)
        for family, hit in zip([f for questions in asked for f in questions.families], right.tolist(), strict=True):
            seen[family].append(hit)
        if (step + 1) % 10 == 0:
            seconds = (time.perf_counter() - clock) / 10
            yield {"step": step + 1, "seconds_per_step": seconds} | {
                name: float(np.mean(v)) for name, v in seen.items()
            }
            seen.clear()
            clock = time.perf_counter()
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            unlike_base = {name: p for name, p in llava.named_parameters() if "embed_tokens" not in name}
            state = prefixed(unlike_base, "model.") | optimizer_tensors(optimizer)
            save_checkpoint(path, state, {"step": step + 1, "steps": config.steps})
