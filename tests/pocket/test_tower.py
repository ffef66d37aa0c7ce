"""What the tower is trained on."""

import torch

from tprl.data.scenes.scene import STANDARD, make_scene
from tprl.pocket.labels import SLOTS
from tprl.pocket.tower import NUMBERED, Batches, make_batch

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
