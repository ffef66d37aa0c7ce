"""Where the tower's heads are taught to look, against the scene, patch by patch and head by head."""

from typing import Any

import numpy as np
import pytest
import torch

from tprl.data.scenes.questions import FAMILIES
from tprl.data.scenes.scene import DIRECTIONS, KINDS, Scene, make_scene
from tprl.pocket.base import load_base
from tprl.pocket.labels import BACKGROUND, GRID, patch_labels, patch_neighbours, patch_owners
from tprl.pocket.looking import ALIKE, TOWER_LOOKS, relevant_patches, tower_looking_loss
from tprl.pocket.pictures import Batch, make_batch, normalise
from tprl.pocket.questions import Tokens, draw_questions
from tprl.pocket.tower import Tower


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene("train", index) for index in range(2)]


@pytest.fixture(scope="module")
def batch(scenes: list[Scene]) -> Batch:
    return make_batch(scenes)


def test_labels_are_those_of_the_owner(scenes: list[Scene]) -> None:
    for scene in scenes:
        owners, labels = patch_owners(scene), patch_labels(scene)
        for patch in np.flatnonzero(owners >= 0):
            assert list(KINDS)[labels[0, patch] - 1] == scene.things[owners[patch]].kind
        assert (labels[0, owners == BACKGROUND] == 0).all()


def test_neighbours_are_the_scene_s(scenes: list[Scene]) -> None:
    for scene in scenes:
        owners = patch_owners(scene)
        neighbours = patch_neighbours(scene, owners)
        for patch, owner in enumerate(owners):
            there = scene.nearest(scene.things[owner], direction_of(patch)) if owner >= 0 else None
            assert neighbours[patch] == (scene.things.index(there) if there else -1)


def direction_of(patch: int) -> tuple[int, int] | None:
    """Of the neighbour that a patch speaks of; None is the nearest."""
    row, column = divmod(patch, GRID)
    return (None, *DIRECTIONS.values())[(column + 2 * row) % 5]


def slow_loss(attentions: Any, scenes: list[Scene]) -> float:
    """The loss from the attention ``(B, heads, 1 + N, 1 + N)`` of all layers."""
    heads = []
    for number, taught in TOWER_LOOKS.items():
        for head, looked_for in taught.items():
            losses = []
            for b, scene in enumerate(scenes):
                owners = patch_owners(scene)
                for patch in np.flatnonzero(owners >= 0):
                    thing, attention = scene.things[owners[patch]], attentions[number][b, head, 1 + patch].double()
                    if looked_for == ALIKE:
                        alike = [n for n, other in enumerate(scene.things) if other.kind == thing.kind]
                        logs = attention[0].log() + sum(attention[on(owners, n)].sum().log() for n in alike)
                        off = attention[0].log().item() + np.log(1 + len(alike))
                        losses.append(off**2 - logs.item() / (1 + len(alike)))
                        continue
                    there = scene.nearest(thing, direction_of(int(patch)))
                    if there:
                        losses.append(-attention[on(owners, scene.things.index(there))].sum().log().item())
            heads.append(np.mean(losses))
    of_cls = [
        -attention[0][on(patch_owners(scene), n)].sum().log().item()
        for b, scene in enumerate(scenes)
        for attention in attentions[-1][b].double()
        for n in range(len(scene.things))
    ]
    return float(np.mean([*heads, np.mean(of_cls)]))


def on(owners: np.ndarray, thing: int) -> np.ndarray:
    """Where the patches of ``thing`` stand behind [CLS]."""
    return 1 + np.flatnonzero(owners == thing)


def random_tower() -> Tower:
    torch.manual_seed(0)
    tower = Tower()
    with torch.no_grad():
        for parameter in tower.vision.encoder.parameters():
            parameter.mul_(2)  # else all attention is nearly even, and many a mistake would not show
    return tower


def test_the_loss_is_that_of_the_tower_s_own_attention(scenes: list[Scene], batch: Batch) -> None:
    tower = random_tower()
    tower.vision.set_attn_implementation("eager")
    output = tower.vision(normalise(batch.pixels), output_hidden_states=True, output_attentions=True)
    loss = tower_looking_loss(tower.vision, output.hidden_states, batch)
    assert loss.item() == pytest.approx(slow_loss(output.attentions, scenes), rel=1e-4)
    wrong = torch.where(batch.neighbours >= 0, (batch.neighbours + 1) % 4, -1)
    other = tower_looking_loss(tower.vision, output.hidden_states, batch._replace(neighbours=wrong))
    assert abs(other.item() - loss.item()) > 1e-2


def test_a_patch_that_stands_for_two_is_looked_at_as_two(scenes: list[Scene], batch: Batch) -> None:
    """Showing every patch of the ground twice, or once with twice the weight, is the same."""
    tower = random_tower()
    drawn = [torch.cat([torch.arange(GRID**2), (owners < 0).nonzero()[:, 0]]) for owners in batch.owners]
    fewest = min(len(patches) for patches in drawn)
    at = torch.stack([patches[:fewest] for patches in drawn])
    twice = Batch(
        batch.pixels,
        batch.presence,
        at,
        torch.ones(at.shape),
        torch.stack([batch.labels[:, b, at[b]] for b in range(len(scenes))], 1),
        batch.owners.gather(1, at),
        batch.neighbours.gather(1, at),
        batch.glyphs.gather(1, at),
        torch.stack([batch.centres[b, at[b]] for b in range(len(scenes))]),
    )
    weights = torch.stack([torch.bincount(patches, minlength=GRID**2) for patches in at]).float()
    losses = []
    for shown in (batch._replace(weights=weights), twice):
        hidden = tower(normalise(shown.pixels), shown.patches, shown.weights).hidden
        losses.append(tower_looking_loss(tower.vision, hidden, shown).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    plain = tower(normalise(batch.pixels), batch.patches, batch.weights).hidden
    assert tower_looking_loss(tower.vision, plain, batch).item() != pytest.approx(losses[0], rel=1e-3)


def test_it_teaches_the_queries_and_keys_of_the_taught_heads_alone(batch: Batch) -> None:
    torch.manual_seed(0)
    tower = Tower()
    hidden = tower(normalise(batch.pixels), batch.patches, batch.weights).hidden
    detached = tuple(state.detach() for state in hidden)
    tower_looking_loss(tower.vision, detached, batch).backward()
    last = len(tower.vision.encoder.layers) - 1
    for number, layer in enumerate(tower.vision.encoder.layers):
        gradient = layer.self_attn.q_proj.weight.grad
        taught = TOWER_LOOKS.get(number, {})
        if not taught:
            assert gradient is None
            continue
        by_head = gradient.unflatten(0, (4, -1)).abs().sum((1, 2)) > 0
        assert by_head.nonzero()[:, 0].tolist() == (sorted(taught) if number < last else [0, 1, 2, 3])
        assert layer.self_attn.v_proj.weight.grad is None


def test_an_answer_stands_where_its_thing_speaks_of_what_is_asked() -> None:
    scenes = [make_scene("train", index) for index in range(12)]
    tokens = Tokens(load_base()[1])
    rng = np.random.default_rng(0)
    asked = [draw_questions(scene, tokens, rng, 40, dict.fromkeys(FAMILIES, 1.0)) for scene in scenes]
    labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes], 1)).long()
    relevant, has_any = relevant_patches(asked, labels)
    number, narrowed = 0, 0
    for scene, questions in zip(scenes, asked, strict=True):
        owners = patch_owners(scene)
        for family, subjects in zip(questions.families, questions.subjects, strict=True):
            named = [
                n
                for n, thing in enumerate(scene.things)
                if thing.kind in subjects or (thing.card and thing.card.colour in subjects)
            ]
            wanted = np.isin(owners, named)
            if family in ("nearest", "relation"):
                assert set(np.flatnonzero(relevant[number])) < set(np.flatnonzero(wanted))
                assert len({direction_of(int(p)) for p in np.flatnonzero(relevant[number])}) <= 1
                narrowed += 1
            else:
                assert np.array_equal(relevant[number], wanted)
            assert has_any[number] == relevant[number].any()
            number += 1
    assert narrowed > 10
    assert has_any.any()
    assert not has_any.all()
