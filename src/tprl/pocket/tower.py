"""Stage one of pocket-llava: the vision tower and the projector's words.

The tower (a CLIP vision transformer, random at first) is taught what every patch shows (see ``labels``), read off
by the first rows of the projector's first layer. Pre-activations are pushed to ``LOUDNESS`` for the right word and
below -3 for the others, so that after the GELU one unit a slot stands and the projector's second layer, whose columns
start as word embeddings, turns a patch into the words that it shows. [CLS] is taught which kinds and colours are
present, so its attention means what it means in CLIP: where the things are.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPVisionModel

from tprl.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, prefixed, save_checkpoint, with_prefix
from tprl.data.scenes.scene import COLOURS, KINDS
from tprl.pocket.labels import BACKGROUND, GLYPHS, GRID, IGNORE, SLOTS, TOPICS, UNITS, patch_topics
from tprl.pocket.looking import tower_looking_loss
from tprl.pocket.model import unrounded, vision_config
from tprl.pocket.pictures import Batch, Batches, normalise
from tprl.pocket.precision import fastest_attention, mixed_precision
from tprl.pocket.words import LOUDNESS

TOWER = "tower.safetensors"
MIDDLE = 4
"""After how many layers kinds, glyphs, areas and centres are to be known: look-ups need the layers above."""
NONE_LOGIT = -1.0
SHARPNESS = 3.0


@dataclass(frozen=True)
class TowerConfig:
    """How the tower is trained; all randomness follows from ``seed`` and the step."""

    steps: int = 2400
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 0
    context_from: int = 300
    save_every: int = 50


class Sight(NamedTuple):
    """What the tower sees in pictures.

    Attributes:
        units: pre-activations of the words, ``(B, N, UNITS)``.
        presence: logits of what the picture holds, ``(B, kinds + colours)``, from [CLS].
        marks: ``(B, N, GLYPHS + kinds + 3)`` from the middle: logits of the glyph on each patch and of the kind of its
            thing, the logarithm of how many patches that covers, and its centre.
        hidden: hidden states of all layers, ``(B, 1 + N, D)`` each.
    """

    units: Tensor
    presence: Tensor
    marks: Tensor
    hidden: tuple[Tensor, ...]


class Tower(nn.Module):
    """The vision tower with its two read-outs: words of every patch, presence from [CLS]."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(vision_config())
        self.words = nn.Linear(self.vision.config.hidden_size, UNITS)
        nn.init.constant_(self.words.bias, NONE_LOGIT - 1)
        self.presence = nn.Linear(self.vision.config.hidden_size, len(KINDS) + len(COLOURS))
        self.marks = nn.Linear(self.vision.config.hidden_size, GLYPHS + len(KINDS) + 3)
        with torch.no_grad():
            positions = self.vision.get_parameter("embeddings.position_embedding.weight")
            positions[1:] = sincos_positions(GRID, positions.shape[1])
            positions[1:] += 0.2 * torch.randn(len(TOPICS), positions.shape[1])[patch_topics()]

    def forward(self, pixels: Tensor, patches: Tensor, weights: Tensor) -> Sight:
        """Pixels ``(B, 3, SIDE, SIDE)``, normalised, and which patches of them to see, see ``Batch``."""
        hidden = hidden_states(self.vision, pixels, patches, weights)
        marks = self.marks(hidden[MIDDLE][:, 1:])
        present = self.presence(self.vision.get_submodule("post_layernorm")(hidden[-1][:, 0]))
        return Sight(self.words(hidden[-1][:, 1:]), present, marks, hidden)


def hidden_states(vision: CLIPVisionModel, pixels: Tensor, patches: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """What ``vision`` makes of some patches of pictures, layer by layer, ``(B, 1 + M, D)`` each, [CLS] first.

    A patch of weight w is attended to as w such patches would be, so a few can stand for many alike.

    Args:
        pixels: ``(B, 3, SIDE, SIDE)``, normalised.
        patches, weights: see ``Batch``.
    """
    layers: Any = vision
    states = layers.pre_layrnorm(layers.embeddings(pixels))
    chosen = states[:, 1:].gather(1, patches[..., None].expand(-1, -1, states.shape[-1]))
    hidden = [torch.cat([states[:, :1], chosen], 1)]
    bias = nn.functional.pad(weights, (1, 0), value=1.0).log().to(states.dtype)
    mask = bias[:, None, None].expand(-1, 1, bias.shape[1], -1)
    for layer in layers.encoder.layers:
        hidden.append(layer(hidden[-1], mask))
    return tuple(hidden)


def sincos_positions(grid: int, width: int) -> Tensor:
    """2-D sine-cosine positions ``(grid * grid, width)``, so that offsets are linear maps from the start."""
    frequencies = torch.pi / grid * torch.logspace(0, 1.3, width // 4) / 2
    angles = torch.arange(grid)[:, None] * frequencies[None]
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis.repeat_interleave(grid, 0), axis.repeat(grid, 1)
    return torch.cat([rows, columns], 1) * 0.3


def word_loss(units: Tensor, labels: Tensor, patch_weights: Tensor, slot_weights: list[float]) -> Tensor:
    """Cross-entropy a slot over its words and an implicit "none" at ``NONE_LOGIT``, plus the margins.

    A slot's loss is a sum over patches by how many it applies to, both weighted by the slot's ``stress``.

    Args:
        units: pre-activations ``(B, M, UNITS)``.
        labels: int64 ``(slots, B, M)``, 0 = none, ``IGNORE`` = no opinion.
        patch_weights: ``(B, M)``, how many patches each stands for.
    """
    units, labels, patch_weights = units.float().flatten(0, 1), labels.flatten(1), patch_weights.flatten()
    none = units.new_full((len(units), 1), NONE_LOGIT)
    total = units.new_zeros(())
    blocks = units.split([len(slot.words) for slot in SLOTS], 1)
    for slot, weight, block, label in zip(SLOTS, slot_weights, blocks, labels, strict=True):
        logits = torch.cat([none, block], 1)
        loss = nn.functional.cross_entropy(SHARPNESS * logits, label, ignore_index=IGNORE, reduction="none")
        right = nn.functional.one_hot(label.clamp(min=0), logits.shape[1])[:, 1:].bool()
        margin = torch.where(right, (block - LOUDNESS) ** 2, (block + 3).clamp(min=0) ** 2).sum(1)
        stress = units.new_tensor((1.0, *(slot.stress or [1.0] * len(slot.words))))[label.clamp(min=0)]
        wrong = (loss + 0.02 * margin * (label != IGNORE)) @ (patch_weights * stress)
        total = total + weight * wrong / (stress * (label > 0)).sum().clamp(min=1)
    return total / sum(slot_weights)


def mark_loss(marks: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the glyphs and the kinds on patches, and squared error of the logarithms of areas and of
    centres.

    Args:
        marks: see ``Sight``.
    """
    glyph, kind, area, centre = marks.float().flatten(0, 1).split([GLYPHS, len(KINDS), 1, 2], 1)
    areas = batch.areas.flatten()
    of_thing = areas > 0
    glyph_loss = nn.functional.cross_entropy(glyph, batch.glyphs.flatten(), ignore_index=IGNORE)
    kind_loss = nn.functional.cross_entropy(kind, batch.kinds.flatten(), ignore_index=BACKGROUND)
    area_loss = nn.functional.mse_loss(area[of_thing, 0], areas[of_thing].log())
    centre_loss = nn.functional.mse_loss(centre[of_thing], batch.centres.flatten(0, 1)[of_thing])
    return glyph_loss + 0.5 * kind_loss + 0.5 * area_loss + 2 * centre_loss


@torch.no_grad()
def word_accuracy(units: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right words a slot, over the patches to which the slot applies.

    Args:
        units: ``(B, N, UNITS)``.
        labels: ``(slots, B, N)``.
    """
    units, labels = units.flatten(0, 1), labels.flatten(1)
    none = units.new_full((len(units), 1), NONE_LOGIT)
    scores = {}
    for slot, block, label in zip(SLOTS, units.split([len(s.words) for s in SLOTS], 1), labels, strict=True):
        applies = label > 0
        guess = torch.cat([none, block], 1)[applies].argmax(1)
        scores[slot.name] = (guess == label[applies]).float().mean().item()
    return scores


def tower_losses(sight: Sight, vision: CLIPVisionModel, batch: Batch, weights: list[float]) -> dict[str, Tensor]:
    """What the tower is taught, by name; their sum is its loss.

    Args:
        weights: of the slots.
    """
    return {
        "words": word_loss(sight.units, batch.labels, batch.weights, weights),
        "presence": nn.functional.binary_cross_entropy_with_logits(sight.presence.float(), batch.presence),
        "marks": 2 * mark_loss(sight.marks, batch),
        "looking": tower_looking_loss(vision, sight.hidden, batch),
    }


def shipped_tower(delta: Path) -> Tower:
    """The tower of a file of differences, with fresh read-outs of presence and marks."""
    tower, tensors = Tower(), unrounded(load_file(delta))
    tower.vision.load_state_dict(with_prefix(tensors, "model.vision_tower."))
    words = with_prefix(tensors, "model.multi_modal_projector.linear_1.")
    tower.words.load_state_dict({name: tensor[:UNITS] for name, tensor in words.items()})
    return tower


def train_tower(run: Path, config: TowerConfig, delta: Path | None = None) -> Iterator[dict[str, float]]:
    """Train, or go on training, the tower in ``run``; yields the metrics of every logged step.

    Args:
        delta: start from these weights instead of random ones.
    """
    torch.manual_seed(config.seed)
    tower = shipped_tower(delta) if delta else Tower()
    own = list(tower.parameters())
    groups = [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    path, start = run / TOWER, 0
    if path.exists():
        tensors, meta = load_checkpoint(path)
        tower.load_state_dict(with_prefix(tensors, "model."))
        load_optimizer(optimizer, tensors)
        start = meta["step"]
    tower.vision.set_attn_implementation(fastest_attention())
    loader = DataLoader(Batches(config.batch_size, start, config.steps, config.seed), batch_size=None, num_workers=1)
    seen: dict[str, list[float]] = defaultdict(list)
    clock = time.perf_counter()
    for step, batch in enumerate(loader, start):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config.warmup_steps, config.steps)
        context = step >= config.context_from or delta is not None
        weights = [slot.weight * (context or not slot.context) for slot in SLOTS]
        with mixed_precision():
            sight = tower(normalise(batch.pixels), batch.patches, batch.weights)
            losses = tower_losses(sight, tower.vision, batch, weights)
            if not context:
                del losses["looking"]
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        if not torch.isfinite(nn.utils.clip_grad_norm_(own, 1.0)):
            raise FloatingPointError(f"the gradient is not finite at step {step}")
        optimizer.step()
        scores = {name: loss.item() for name, loss in losses.items()} | word_accuracy(sight.units, batch.labels)
        for name, score in scores.items():
            seen[name].append(score)
        if (step + 1) % 20 == 0:
            seconds = (time.perf_counter() - clock) / 20
            yield {"step": step + 1, "seconds_per_step": seconds} | {n: float(np.mean(v)) for n, v in seen.items()}
            seen.clear()
            clock = time.perf_counter()
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            state = prefixed(tower.state_dict(), "model.") | optimizer_tensors(optimizer)
            save_checkpoint(path, state, {"step": step + 1})


def schedule(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, a plateau, and over the last fifth a linear way down to a fiftieth."""
    return max(0.02, min(1.0, (step + 1) / warmup, 5 * (steps - step) / steps))
