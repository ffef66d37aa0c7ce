"""What the tower is trained on."""

import pytest
import torch

from tprl.data.scenes.scene import KINDS, STANDARD, make_scene
from tprl.pocket.labels import BACKGROUND, GLYPHS, IGNORE, SLOTS
from tprl.pocket.tower import NUMBERED, Batches, make_batch, mark_loss

TENS = [slot.name for slot in SLOTS].index("tens")


def test_every_second_picture_is_full_of_numbers_and_steps_go_on_where_they_stopped() -> None:
    batch = Batches(batch_size=4, first=3, last=5)[1]
    expected = make_batch([make_scene("train", 16 + i, (STANDARD, NUMBERED)[i % 2]) for i in range(4)])
    for found, wanted in zip(batch, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    things = [batch.owners[i][batch.labels[TENS, i] > 0].unique() for i in (1, 3)]
    assert [len(owners) for owners in things] == [
        min(8, len(make_scene("train", 16 + i, NUMBERED).things)) for i in (1, 3)
    ]


def test_marks_are_taught_glyphs_kinds_and_centres_patch_by_patch() -> None:
    batch = make_batch([make_scene("train", 3, NUMBERED)])
    marks = torch.randn(1, batch.owners.shape[1], GLYPHS + len(KINDS) + 1, generator=torch.Generator().manual_seed(0))
    glyphs, kinds, centres = [], [], []
    for patch, scores in enumerate(marks[0].double()):
        glyph, kind, centre = scores[:GLYPHS], scores[GLYPHS:-1], scores[-1].sigmoid()
        if batch.glyphs[0, patch] != IGNORE:
            glyphs.append(-glyph.log_softmax(0)[batch.glyphs[0, patch]])
        if batch.owners[0, patch] >= 0:
            kinds.append(-kind.log_softmax(0)[batch.labels[0, 0, patch] - 1])
        centres.append(-20 * centre.log() if batch.centres[0, patch] else -(1 - centre).log())
    wanted = sum(weight * torch.stack(part).mean() for weight, part in ((1, glyphs), (0.5, kinds), (0.25, centres)))
    found = mark_loss(marks, batch.glyphs, batch.kinds, batch.centres)
    assert found.item() == pytest.approx(float(wanted), rel=1e-5)
    assert (batch.kinds == BACKGROUND).any()
    other = mark_loss(marks, batch.glyphs, batch.kinds.roll(1, 1), batch.centres)
    assert abs(other.item() - found.item()) > 1e-3
