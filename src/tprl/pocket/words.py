"""Visual words: what the projector's second layer makes of the units of its first."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tprl.pocket.labels import IGNORE, SLOTS

LOUDNESS = 2.5
"""Pre-activation of the right word of a slot; those of all others are below -3."""


def word_columns(embeddings: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Where the projector's second layer starts: one column ``(D,)`` for every unit of ``SLOTS``, ``(D, UNITS)``.

    A word is its token embedding, scaled so that what questions name stands out. Of all slots but the kind, only what
    sets a word apart from the others of its slot is kept, since embeddings of digits or
    colours are much alike; slots without a direction of their own are turned by a signed permutation of the embedding's
    dimensions, which keeps norms and angles.
    """
    generator = torch.Generator().manual_seed(0)
    width, columns = embeddings.shape[1], []
    for slot in SLOTS:
        ids = [
            tokenizer(" " + word if len(word) > 1 else word, add_special_tokens=False)["input_ids"]
            for word in slot.words
        ]
        if any(len(token) != 1 for token in ids):
            raise ValueError(f"slot {slot.name}: every word must be one token, got {ids}")
        words = embeddings[torch.tensor(ids)[:, 0]]
        if slot is not SLOTS[0]:
            apart = words - words.mean(0)
            words = apart * (words.norm(dim=1).mean() / apart.norm(dim=1, keepdim=True))
        if not slot.own_direction:
            signs = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1
            words = words[:, torch.randperm(width, generator=generator)] * signs
        columns.append(words * slot.gain)
    return torch.cat(columns).T / nn.functional.gelu(torch.tensor(LOUDNESS))


def blank_word(embeddings: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What stands in every visual token besides its words, ``(D,)``."""
    (token,) = tokenizer(" empty", add_special_tokens=False)["input_ids"]
    return embeddings[token]


def symbolic_units(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Units of a perfect tower for patch labels ``(slots, B, N)``: ``LOUDNESS`` for the word, -3 elsewhere; where
    a label has no opinion a random word (or none) stands, as a tower's guess would."""
    units = []
    blank = labels[0] == IGNORE
    for slot, label in zip(SLOTS, labels, strict=True):
        count = len(slot.words)
        guess = torch.randint(0, count + 1, label.shape, generator=generator)
        label = torch.where(blank, 0, torch.where(label == IGNORE, guess, label))
        units.append(nn.functional.one_hot(label, count + 1)[..., 1:])
    return torch.cat(units, -1).float() * (LOUDNESS + 3) - 3
