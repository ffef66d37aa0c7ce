"""Where the tower's heads are taught to look, against the scene, patch by patch and head by head."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tprl.data.scenes.scene import DIRECTIONS, KINDS, Scene, make_scene
from tprl.pocket.labels import BACKGROUND, GRID, LOOKUPS, anchors, patch_labels, patch_neighbours, patch_owners
from tprl.pocket.looking import CLS_SHARE, COUNT, TOWER_LOOKS, tower_looking_loss
from tprl.pocket.tower import Batch, Tower, make_batch, normalise


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene("train", index) for index in range(2)]


@pytest.fixture(scope="module")
def batch(scenes: list[Scene]) -> Batch:
    return make_batch(scenes)


def test_labels_are_those_of_the_owner(scenes: list[Scene]) -> None:
    for scene in scenes:
        owners, labels, centres = patch_owners(scene), patch_labels(scene), anchors(scene)
        for patch in np.flatnonzero(owners >= 0):
            assert list(KINDS)[labels[0, patch] - 1] == scene.things[owners[patch]].kind
        assert (labels[0, owners == BACKGROUND] == 0).all()
        assert sorted(owners[centres]) == list(range(len(scene.things)))


def test_neighbours_are_the_scene_s(scenes: list[Scene]) -> None:
    for scene in scenes:
        owners = patch_owners(scene)
        neighbours = patch_neighbours(scene, owners)
        assert neighbours.shape == (len(LOOKUPS), GRID**2)
        for patch, owner in enumerate(owners):
            for row, direction in enumerate((None, *DIRECTIONS.values())):
                there = scene.nearest(scene.things[owner], direction) if owner >= 0 else None
                assert neighbours[row, patch] == (scene.things.index(there) if there else -1)


def slow_loss(weights: dict[tuple[int, int], Tensor], scenes: list[Scene]) -> float:
    """The loss from attention weights ``(B, N, 1 + N)`` of every taught head."""
    losses = []
    for number, heads in TOWER_LOOKS.items():
        for head, looked_for in heads.items():
            for b, scene in enumerate(scenes):
                owners = patch_owners(scene)
                for patch in np.flatnonzero(owners >= 0):
                    thing, attention = scene.things[owners[patch]], weights[number, head][b, patch].double()
                    if looked_for == COUNT:
                        alike = [
                            1 + np.flatnonzero(owners == n) for n, t in enumerate(scene.things) if t.kind == thing.kind
                        ]
                        logs = CLS_SHARE * attention[0].log() + sum(attention[on].sum().log() for on in alike)
                        losses.append(-logs.item() / (CLS_SHARE + len(alike)))
                        continue
                    direction = None if looked_for == "nearest" else DIRECTIONS[looked_for]
                    there = scene.nearest(thing, direction)
                    if there:
                        on_it = 1 + np.flatnonzero(owners == scene.things.index(there))
                        losses.append(-attention[on_it].sum().log().item())
    return float(np.mean(losses))


def test_the_loss_is_that_of_the_tower_s_own_attention(scenes: list[Scene], batch: Batch) -> None:
    torch.manual_seed(0)
    tower = Tower()
    with torch.no_grad():
        for parameter in tower.vision.encoder.parameters():
            parameter.mul_(2)  # else all attention is nearly even, and many a mistake would not show
    tower.vision.set_attn_implementation("eager")
    output = tower.vision(normalise(batch.pixels), output_hidden_states=True, output_attentions=True)
    loss = tower_looking_loss(tower.vision, output.hidden_states, batch.owners, batch.neighbours, batch.kinds)
    weights = {
        (number, head): output.attentions[number][:, head, 1:]
        for number, heads in TOWER_LOOKS.items()
        for head in heads
    }
    assert loss.item() == pytest.approx(slow_loss(weights, scenes), rel=1e-4)
    other = tower_looking_loss(tower.vision, output.hidden_states, batch.owners, batch.neighbours.flip(1), batch.kinds)
    assert abs(other.item() - loss.item()) > 1e-2


def test_it_teaches_the_queries_and_keys_of_the_taught_heads_alone(batch: Batch) -> None:
    torch.manual_seed(0)
    tower = Tower()
    hidden = tower(normalise(batch.pixels)).hidden
    detached = tuple(state.detach() for state in hidden)
    tower_looking_loss(tower.vision, detached, batch.owners, batch.neighbours, batch.kinds).backward()
    for number, layer in enumerate(tower.vision.encoder.layers):
        gradient = layer.self_attn.q_proj.weight.grad
        taught = TOWER_LOOKS.get(number, {})
        if not taught:
            assert gradient is None
            continue
        by_head = gradient.unflatten(0, (4, -1)).abs().sum((1, 2)) > 0
        assert by_head.nonzero()[:, 0].tolist() == sorted(taught)
        assert layer.self_attn.v_proj.weight.grad is None
