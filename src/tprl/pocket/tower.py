"""Stage one of pocket-llava: the vision tower and the projector's words.

The tower (a CLIP vision transformer, random at first) is taught what every patch shows (see ``labels``), read off
by the first rows of the projector's first layer. Pre-activations are pushed to +1 for the right word and below -3
for the others, so that after the GELU one unit a slot stands and the projector's second layer, whose columns start
as word embeddings, turns a patch into the words that it shows. [CLS] is taught which kinds and colours are present,
so its attention means what it means in CLIP: where the things are.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import AttentionInterface, CLIPVisionConfig, CLIPVisionModel

from tprl.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, prefixed, save_checkpoint, with_prefix
from tprl.data.scenes import COLOURS, KINDS, SIDE, make_scene
from tprl.pocket.labels import GLYPHS, GRID, IGNORE, SLOTS, UNITS, anchors, glyph_labels, patch_labels, presence

TOWER = "tower.safetensors"
GLYPH_LAYER = 3
NONE_LOGIT = -1.0
SHARPNESS = 3.0


@dataclass(frozen=True)
class TowerConfig:
    """How the tower is trained; all randomness follows from ``seed`` and the step."""

    steps: int = 1500
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 0
    context_from: int = 300
    save_every: int = 100


class Tower(nn.Module):
    """The vision tower with its two read-outs: words of every patch, presence from [CLS]."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(vision_config())
        self.words = nn.Linear(self.vision.config.hidden_size, UNITS)
        nn.init.constant_(self.words.bias, NONE_LOGIT - 1)
        self.presence = nn.Linear(self.vision.config.hidden_size, len(KINDS) + len(COLOURS))
        self.marks = nn.Linear(self.vision.config.hidden_size, GLYPHS + 1)
        with torch.no_grad():
            positions = self.vision.get_parameter("embeddings.position_embedding.weight")
            positions[1:] = sincos_positions(GRID, positions.shape[1])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels ``(B, 3, SIDE, SIDE)`` to unit pre-activations ``(B, N, UNITS)``, presence logits, and, from the
        middle of the tower, ``(B, N, GLYPHS + 1)`` logits of the glyph on each patch and of a thing's centre there."""
        output = self.vision(pixels, output_hidden_states=True)
        middle = output.hidden_states[GLYPH_LAYER][:, 1:]
        return self.words(output.last_hidden_state[:, 1:]), self.presence(output.pooler_output), self.marks(middle)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=4,
        image_size=SIDE, patch_size=SIDE // GRID, hidden_act="gelu",
    )  # fmt: skip


def sincos_positions(grid: int, width: int) -> Tensor:
    """2-D sine-cosine positions ``(grid * grid, width)``, so that offsets are linear maps from the start."""
    frequencies = torch.pi / grid * torch.logspace(0, 1.3, width // 4) / 2
    angles = torch.arange(grid)[:, None] * frequencies[None]
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = axis.repeat_interleave(grid, 0), axis.repeat(grid, 1)
    return torch.cat([rows, columns], 1) * 0.3


def word_loss(units: Tensor, labels: Tensor, weights: list[float]) -> Tensor:
    """Cross-entropy a slot over its words and an implicit "none" at ``NONE_LOGIT``, plus the margins.

    Things and background weigh the same however much of the picture they cover.

    Args:
        units: pre-activations ``(P, UNITS)`` float.
        labels: ``(slots, P)`` int64, 0 = none, ``IGNORE`` = no opinion.
    """
    none = units.new_full((len(units), 1), NONE_LOGIT)
    total = units.new_zeros(())
    for weight, block, label in zip(weights, units.split([len(s.words) for s in SLOTS], 1), labels, strict=True):
        logits = torch.cat([none, block], 1)
        loss = nn.functional.cross_entropy(SHARPNESS * logits, label, ignore_index=IGNORE, reduction="none")
        right = nn.functional.one_hot(label.clamp(min=0), logits.shape[1])[:, 1:].bool()
        margin = torch.where(right, (block - 1) ** 2, (block + 3).clamp(min=0) ** 2).sum(1)
        total = total + weight * (loss + 0.02 * margin * (label != IGNORE)).sum() / (label > 0).sum().clamp(min=1)
    return total / sum(weights)


def mark_loss(marks: Tensor, glyphs: Tensor, centres: Tensor) -> Tensor:
    """Cross-entropy of the glyphs and of the things' centres on patches.

    Args:
        marks: ``(B, N, GLYPHS + 1)`` logits, see ``Tower``.
        glyphs: int64 ``(B, N)``.
        centres: bool ``(B, N)``.
    """
    marks = marks.float()
    glyph = nn.functional.cross_entropy(marks[..., :GLYPHS].flatten(0, 1), glyphs.flatten(), ignore_index=IGNORE)
    rare = marks.new_tensor(20.0)
    centre = nn.functional.binary_cross_entropy_with_logits(marks[..., GLYPHS], centres.float(), pos_weight=rare)
    return glyph + 0.25 * centre


def word_accuracy(units: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right words a slot, over the patches to which the slot applies."""
    none = units.new_full((len(units), 1), NONE_LOGIT)
    scores = {}
    for slot, block, label in zip(SLOTS, units.split([len(s.words) for s in SLOTS], 1), labels, strict=True):
        applies = label > 0
        guess = torch.cat([none, block], 1)[applies].argmax(1)
        scores[slot.name] = (guess == label[applies]).float().mean().item()
    return scores


class _Batches(Dataset[tuple[Tensor, ...]]):
    """Batch ``step`` of freshly drawn training scenes: pixels uint8, labels, glyphs, centres, presence."""

    def __init__(self, split: str, batch_size: int, first: int, last: int) -> None:
        self.split, self.batch_size, self.first, self.last = split, batch_size, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        start = (self.first + index) * self.batch_size
        scenes = [make_scene(self.split, i) for i in range(start, start + self.batch_size)]
        pixels = np.stack([np.asarray(scene.render()) for scene in scenes])
        labels = np.stack([patch_labels(scene) for scene in scenes], 1)
        glyphs = np.stack([glyph_labels(scene) for scene in scenes])
        centres = np.stack([anchors(scene) for scene in scenes])
        present = np.stack([presence(scene) for scene in scenes])
        return tuple(torch.from_numpy(array) for array in (pixels, labels, glyphs, centres, present))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 ``(B, H, W, 3)`` to float ``(B, 3, H, W)`` in [-1, 1], as the shipped image processor does."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attention as two matrix products: PyTorch's fused one has a slow backward pass in bfloat16 on CPUs."""
    weights = ((query * scaling) @ key.transpose(-1, -2)).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def train_tower(run: Path, config: TowerConfig) -> Iterator[dict[str, float]]:
    """Train, or go on training, the tower in ``run``; yields the metrics of every logged step."""
    torch.manual_seed(config.seed)
    tower = Tower()
    decayed = [p for p in tower.parameters() if p.ndim > 1]
    others = [p for p in tower.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    path, start = run / TOWER, 0
    if path.exists():
        tensors, meta = load_checkpoint(path)
        tower.load_state_dict(with_prefix(tensors, "model."))
        load_optimizer(optimizer, tensors)
        start = meta["step"]
    AttentionInterface.register("plain", plain_attention)
    tower.vision.set_attn_implementation("plain")

    @torch.compile
    def losses(
        pixels: Tensor, labels: Tensor, glyphs: Tensor, centres: Tensor, present: Tensor, weights: list[float]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            units, presence_logits, marks = tower(pixels)
        units = units.float().flatten(0, 1)
        cls_loss = nn.functional.binary_cross_entropy_with_logits(presence_logits.float(), present)
        return word_loss(units, labels, weights), cls_loss, mark_loss(marks, glyphs, centres), units.detach()

    loader = DataLoader(_Batches("train", config.batch_size, start, config.steps), batch_size=None, num_workers=1)
    clock = time.perf_counter()
    for step, (pixels, labels, glyphs, centres, present) in enumerate(loader, start):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config.warmup_steps, config.steps)
        flat = labels.long().flatten(1)
        weights = [slot.weight * (step >= config.context_from or not slot.context) for slot in SLOTS]
        loss, cls_loss, marked, units = losses(normalise(pixels), flat, glyphs.long(), centres, present, weights)
        optimizer.zero_grad()
        (loss + cls_loss + 2 * marked).backward()
        norm = nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"the gradient is not finite at step {step}")
        optimizer.step()
        if (step + 1) % 20 == 0:
            scores = word_accuracy(units, flat)
            yield {
                "step": step + 1,
                "seconds_per_step": (time.perf_counter() - clock) / 20,
                "loss": loss.item(),
                "cls_loss": cls_loss.item(),
                "mark_loss": marked.item(),
                **scores,
            }
            clock = time.perf_counter()
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            state = prefixed(tower.state_dict().items(), "model.") | optimizer_tensors(optimizer)
            save_checkpoint(path, state, {"step": step + 1})


def schedule(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, a plateau, and over the last fifth a linear way down to a fiftieth."""
    return max(0.02, min(1.0, (step + 1) / warmup, 5 * (steps - step) / steps))
