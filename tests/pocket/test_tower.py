"""What the tower is trained on."""

import numpy as np
import pytest
import torch

from tprl.data.scenes.scene import KINDS, STANDARD, make_scene
from tprl.pocket.labels import BACKGROUND, GLYPHS, GRID, IGNORE, SLOTS, UNITS, patch_owners
from tprl.pocket.pictures import GROUND, NUMBERED, Batches, make_batch, normalise
from tprl.pocket.tower import Tower, hidden_states, mark_loss, word_loss

TENS = [slot.name for slot in SLOTS].index("tens")


def test_every_second_picture_is_full_of_numbers_and_steps_go_on_where_they_stopped() -> None:
    batch = Batches(batch_size=4, first=3, last=5)[1]
    rng = np.random.default_rng((0, 3, 4))
    numbers = rng.integers(2**31, size=4).tolist()
    scenes = [make_scene("train", number, (STANDARD, NUMBERED)[i % 2]) for i, number in enumerate(numbers)]
    expected = make_batch(scenes, rng)
    for found, wanted in zip(batch, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    things = [batch.owners[i][batch.labels[TENS, i] > 0].unique() for i in (1, 3)]
    assert [len(owners) for owners in things] == [
        min(8, len(make_scene("train", numbers[i], NUMBERED).things)) for i in (1, 3)
    ]
    other = Batches(batch_size=4, first=3, last=5, seed=1)[1]
    assert not torch.equal(other.pixels, batch.pixels)


def test_all_patches_of_things_are_shown_and_some_ground_that_stands_for_the_rest() -> None:
    scenes = [make_scene("train", index) for index in (5, 6)]
    everything, some = make_batch(scenes), make_batch(scenes, np.random.default_rng(1))
    assert everything.patches.tolist() == [list(range(GRID**2))] * 2
    assert (everything.weights == 1).all()
    for b in range(2):
        shown = some.weights[b] > 0
        patches, owners = some.patches[b, shown], some.owners[b, shown]
        assert len(set(patches.tolist())) == len(patches)
        assert set((everything.owners[b] >= 0).nonzero()[:, 0].tolist()) <= set(patches.tolist())
        assert int((owners < 0).sum()) == GROUND
        assert some.weights[b].sum().item() == pytest.approx(GRID**2, rel=1e-5)
        assert torch.equal(owners, everything.owners[b, patches])
        assert torch.equal(some.labels[:, b, shown], everything.labels[:, b, patches])
        assert torch.equal(some.neighbours[b, shown], everything.neighbours[b, patches])
        assert torch.equal(some.glyphs[b, shown], everything.glyphs[b, patches])
        assert torch.equal(some.centres[b, shown], everything.centres[b, patches])
    other = make_batch(scenes, np.random.default_rng(2))
    assert not torch.equal(some.patches, other.patches)


def test_a_thing_s_area_is_known_on_each_of_its_patches() -> None:
    scene = make_scene("train", 5)
    batch, owners = make_batch([scene]), patch_owners(scene)
    assert batch.areas[0].tolist() == [int((owners == owner).sum()) if owner >= 0 else 0 for owner in owners]


def test_marks_are_taught_glyphs_kinds_areas_and_centres_patch_by_patch() -> None:
    scene = make_scene("train", 3, NUMBERED)
    batch = make_batch([scene])
    marks = torch.randn(1, batch.owners.shape[1], GLYPHS + len(KINDS) + 3, generator=torch.Generator().manual_seed(0))
    glyphs, kinds, areas, centres = [], [], [], []
    for patch, scores in enumerate(marks[0].double()):
        glyph, kind, area, centre = scores[:GLYPHS], scores[GLYPHS:-3], scores[-3], scores[-2:]
        owner = batch.owners[0, patch]
        if batch.glyphs[0, patch] != IGNORE:
            glyphs.append(-glyph.log_softmax(0)[batch.glyphs[0, patch]])
        if owner >= 0:
            kinds.append(-kind.log_softmax(0)[batch.labels[0, 0, patch] - 1])
            areas.append((area - (batch.owners[0] == owner).sum().double().log()) ** 2)
            x, y = scene.things[int(owner)].centre
            centres.append(((centre - torch.tensor([x / 192 - 1, y / 192 - 1])) ** 2).mean())
    parts = ((1, glyphs), (0.5, kinds), (0.5, areas), (2, centres))
    wanted = sum(weight * torch.stack(part).mean() for weight, part in parts)
    found = mark_loss(marks, batch)
    assert found.item() == pytest.approx(float(wanted), rel=1e-5)
    assert (batch.kinds == BACKGROUND).any()
    other = mark_loss(marks, batch._replace(owners=batch.owners.roll(1, 1), labels=batch.labels.roll(1, 2)))
    assert abs(other.item() - found.item()) > 1e-3


def test_words_are_taught_patch_by_patch_for_all_that_each_stands_for() -> None:
    batch = make_batch([make_scene("train", index) for index in (5, 6)], np.random.default_rng(0))
    units = 3 * torch.randn(*batch.patches.shape, UNITS, generator=torch.Generator().manual_seed(0))
    slot_weights = [slot.weight for slot in SLOTS]
    total, first = 0.0, 0
    for slot, weight, labels in zip(SLOTS, slot_weights, batch.labels, strict=True):
        loss, applies = 0.0, 0.0
        for b, patch in np.ndindex(*labels.shape):
            label, words = int(labels[b, patch]), units[b, patch, first : first + len(slot.words)].double()
            if label == IGNORE:
                continue
            stress = slot.stress[label - 1] if slot.stress and label > 0 else 1.0
            applies += stress * (label > 0)
            of_patch = -torch.cat([torch.tensor([-3.0]), 3 * words]).log_softmax(0)[label]
            for number, heard in enumerate(words, 1):
                of_patch += 0.02 * ((heard - 2.5) ** 2 if number == label else (heard + 3).clamp(min=0) ** 2)
            loss += float(batch.weights[b, patch] * stress * of_patch)
        total += weight * loss / max(1, applies)
        first += len(slot.words)
    found = word_loss(units, batch.labels, batch.weights, slot_weights).item()
    assert found == pytest.approx(total / sum(slot_weights), rel=1e-4)
    unweighted = word_loss(units, batch.labels, torch.ones_like(batch.weights), slot_weights).item()
    assert abs(unweighted - found) > 1e-2 * found


@torch.no_grad()
def test_all_patches_seen_at_once_are_what_the_model_sees() -> None:
    tower, batch = Tower(), make_batch([make_scene("val", 0)])
    wanted = tower.vision(normalise(batch.pixels), output_hidden_states=True)
    sight = tower(normalise(batch.pixels), batch.patches, batch.weights)
    for found, state in zip(sight.hidden, wanted.hidden_states, strict=True):
        torch.testing.assert_close(found, state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sight.presence, tower.presence(wanted.pooler_output), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_patches_weigh_the_same_in_either_attention_that_the_tower_is_trained_with() -> None:
    torch.manual_seed(0)
    tower, batch = Tower(), make_batch([make_scene("train", 5)], np.random.default_rng(0))
    seen = {}
    for attention in ("eager", "sdpa"):
        tower.vision.set_attn_implementation(attention)
        seen[attention] = hidden_states(tower.vision, normalise(batch.pixels), batch.patches, batch.weights)[-1]
    torch.testing.assert_close(seen["eager"], seen["sdpa"], atol=1e-4, rtol=1e-4)
    alike = hidden_states(tower.vision, normalise(batch.pixels), batch.patches, torch.ones_like(batch.weights))[-1]
    assert (alike - seen["sdpa"]).abs().max() > 1e-2
