"""How the projector words what the tower reads."""

import torch
from torch import nn

from tprl.data.scenes.scene import KINDS, make_scene
from tprl.pocket.base import embeddings_of, load_base
from tprl.pocket.labels import IGNORE, SLOTS, patch_labels
from tprl.pocket.words import symbolic_units, word_columns


@torch.no_grad()
def test_a_perfectly_read_kind_is_its_word_at_the_slot_s_gain() -> None:
    model, tokenizer = load_base()
    embeddings = embeddings_of(model)
    columns, kinds = word_columns(embeddings, tokenizer), len(KINDS)
    labels = torch.from_numpy(patch_labels(make_scene("val", 0))).long()[:, None]
    units = symbolic_units(labels, torch.Generator().manual_seed(0))
    visual = nn.functional.gelu(units[..., :kinds]) @ columns[:, :kinds].T
    seen = 0
    for patch, label in enumerate(labels[0, 0].tolist()):
        if label > 0 and label != IGNORE:
            (token,) = tokenizer(" " + list(KINDS)[label - 1], add_special_tokens=False)["input_ids"]
            word = SLOTS[0].gain * embeddings[token]
            assert (visual[0, patch] - word).norm() < 0.1 * word.norm()
            seen += 1
    assert seen > 20
