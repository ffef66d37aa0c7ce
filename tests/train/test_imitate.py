"""Demonstrations become targets, and targets become a policy."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch

from evaluate.world import World, tiny_lvlm
from tprl.config import ImitateStage, PpoStage, TrainConfig
from tprl.data.sample import Sample
from tprl.demonstrations import Demonstrations, MemoScore, Search
from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.text_attention import text_attention
from tprl.run import RunFolder
from tprl.train import imitate
from tprl.train.imitate import (
    DemonstrationSet,
    collect_demonstrations,
    imitate_stage,
    imitation_loss,
    survival_targets,
    unpruned_scores,
    worth_function,
)
from train.puzzle import COUNT, Puzzle, make_pruner


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> EncodedSamples:
    return EncodedSamples(tiny_lvlm(), World(), tmp_path_factory.mktemp("cache"))


def test_targets_are_the_share_of_later_states_that_hold_a_token() -> None:
    states = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]]).bool()
    expected = torch.tensor([[[1, 2 / 3, 1 / 3, 0], [1, 1 / 2, 0, 0], [1, 0, 0, 0]]])
    assert torch.allclose(survival_targets(states), expected)


def test_the_loss_is_that_of_the_tokens_held() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0], [3.0, 0.5, 9.0]])
    target = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]])
    state = torch.tensor([[True, True, True], [True, True, False]])
    terms = [
        -(y * torch.sigmoid(x).log() + (1 - y) * (1 - torch.sigmoid(x)).log())
        for x, y in zip(logits[state], target[state], strict=True)
    ]
    assert torch.allclose(imitation_loss(logits, target, state), torch.stack(terms).mean())


def test_imitating_teaches_which_token_the_question_names() -> None:
    """Of every other question, in an order of their own; the first state tells 3 tokens from 1, the second 1 of 3."""
    puzzle, pruner = cast(Any, Puzzle()), make_pruner()
    indices = torch.arange(0, len(puzzle), 2).flip(0)
    visual = puzzle.visual(indices.tolist())
    away = (torch.arange(COUNT) - puzzle.place(indices.tolist())[:, None]) % COUNT
    shown = DemonstrationSet(indices, torch.stack([away < size for size in (COUNT, 3, 1)], 1))
    config = TrainConfig(imitate=ImitateStage(batch=10, epochs=150, learning_rate=3e-3))
    with pytest.raises(ValueError, match="no demonstration has a positive return"):
        imitate_stage(pruner, puzzle, DemonstrationSet(indices[:0], shown.states[:0]), config)
    stage = imitate_stage(pruner, puzzle, shown, config)
    assert stage.steps == 2 * 150
    for step in range(stage.steps):
        stage.update(step)
    pruner.eval()
    found = pruner.select(visual, torch.ones(len(indices), dtype=torch.int64)).keep_mask
    assert (found & (away == 0)).any(1).float().mean() > 0.9
    with torch.no_grad():
        latents = pruner.encode(visual)
        first, second = (pruner.look(latents, visual, shown.states[:, t]).logits.sigmoid() for t in (0, 1))
    assert first[away == 0].mean() > 0.8
    assert 0.35 < first[(away > 0) & (away < 3)].mean() < 0.65  # kept by one of two steps
    assert second[(away > 0) & (away < 3)].mean() < 0.2


def test_scores_of_all_steps_come_in_one_call() -> None:
    puzzle = Puzzle()
    indices = [4, 1, 2]
    visual = puzzle.visual(indices)
    masks = torch.zeros(2, 3, 12, dtype=torch.bool)
    masks[0] = True
    masks[1, :, 0] = True
    masks[1, 1] = torch.nn.functional.one_hot(puzzle.place([1]), 12).bool()[0]
    for kind, lost in (("log_likelihood", -2.0), ("correct", 0.0)):
        best = 0.0 if kind == "log_likelihood" else 1.0
        scores = MemoScore(worth_function(puzzle, indices, visual.tokens, kind))(masks)  # type: ignore[arg-type]
        assert scores[0].tolist() == [best] * 3
        assert scores[1, 1] == best
        assert scores[1, 0] == (best if int(puzzle.place([4])) == 0 else lost)
        assert unpruned_scores(puzzle, indices, kind).tolist() == [best] * 3  # type: ignore[arg-type]


def test_what_a_demonstration_may_cost_is_a_setting_of_its_own(tmp_path: Path) -> None:
    data = EncodedSamples(tiny_lvlm(), World(), tmp_path / "cache")

    def liked(beta: float, of_ppo: float) -> list[int]:
        imitate = ImitateStage(demonstrations=24, teachers=("uniform",), budgets=(8, 4, 2), beta=beta)
        run = RunFolder(tmp_path / f"{beta}-{of_ppo}", {})
        return collect_demonstrations(
            run, data, TrainConfig(imitate=imitate, ppo=PpoStage(beta=of_ppo))
        ).indices.tolist()

    assert liked(100.0, 0.0) == list(range(24))
    strict = liked(0.0, 100.0)
    assert 0 < len(strict) < 24
    assert liked(0.0, 0.5) == strict
    assert len(list(data.folder.glob("demonstrations-*"))) == 2


@pytest.mark.parametrize(
    ("imitate", "ppo"),
    [
        ({"margin": 0.1}, {}), ({"budgets": (8, 4)}, {}), ({"teachers": ("divprune", "uniform")}, {}),
        ({"demonstrations": 7}, {}), ({}, {"score": "correct"}), ({}, {"gamma": 0.9}), ({}, {"alpha": 2.0}),
    ],
)  # fmt: skip
def test_demonstrations_are_remembered_by_all_that_they_depend_on(
    data: EncodedSamples, tmp_path: Path, imitate: dict[str, Any], ppo: dict[str, Any]
) -> None:
    def folders(imitate: dict[str, Any], ppo: dict[str, Any]) -> set[Path]:
        common = {"demonstrations": 8, "teachers": ("uniform", "divprune"), "budgets": (8, 4, 2)}
        config = TrainConfig(imitate=ImitateStage(**common | imitate), ppo=PpoStage(**ppo))
        collect_demonstrations(RunFolder(tmp_path, {}, resume=True), data, config)
        return set(data.folder.glob("demonstrations-*"))

    before = folders({}, {})
    assert folders({"learning_rate": 1.0, "epochs": 9}, {"beta": 9.0, "epochs": 9}) == before
    assert len(folders(imitate, ppo)) == len(before) + 1


def test_questions_about_one_picture_are_worth_what_each_is_by_itself(tmp_path: Path) -> None:
    data = EncodedSamples(tiny_lvlm(), World(), tmp_path)
    indices, rows = [2, 6, 0, 1], torch.arange(4)
    tokens = data.visual(indices).tokens
    masks = torch.tensor([[True, False] * 8]).expand(4, -1)
    alone = worth_function(data, indices, tokens, "log_likelihood")(rows, masks)
    together = worth_function(data, indices, tokens, "log_likelihood", torch.tensor([0, 1, 0, 0]))(rows, masks)
    torch.testing.assert_close(together, alone)
    wrong = worth_function(data, indices, tokens, "log_likelihood", torch.tensor([1, 0, 1, 1]))(rows, masks)
    assert (wrong - alone).abs().min() > 1e-4


def test_an_epoch_shows_every_demonstration_once() -> None:
    shown = DemonstrationSet(torch.arange(20), torch.ones(20, 2, COUNT, dtype=torch.bool))

    def order(seed: int) -> list[list[int]]:
        config = TrainConfig(imitate=ImitateStage(batch=5, epochs=2), seed=seed)
        stage = imitate_stage(make_pruner(), cast(Any, Puzzle()), shown, config)
        return [(stage.update(step), stage.batch["samples"].tolist())[1] for step in range(stage.steps)]

    seen = order(0)
    first, second = sorted(chain(*seen[:4])), sorted(chain(*seen[4:]))
    assert first == second == list(range(20))
    assert seen[:4] != seen[4:]
    assert order(1) != seen


def test_each_row_has_its_own_questions_attention(data: EncodedSamples) -> None:
    indices = [5, 0, 6, 3]
    visual = data.visual(indices)
    signal = imitate._text_attention(data, indices, visual)
    for row, index in enumerate(indices):
        alone = text_attention(data.scorer.reader, data.prefix([index]), visual.tokens[row], [data.block(index)])
        torch.testing.assert_close(signal[row], alone[0])
    assert (signal[0] - signal[2]).abs().max() > 1e-4


def test_seed_and_margin_reach_the_teachers(data: EncodedSamples, tmp_path: Path) -> None:
    def shown(*teachers: str, seed: int = 0, margin: float = 0.0) -> torch.Tensor:
        settings = ImitateStage(demonstrations=8, teachers=teachers, margin=margin, budgets=(8, 4, 2), beta=9.0)
        run = RunFolder(tmp_path, {}, resume=True)
        return collect_demonstrations(run, data, TrainConfig(imitate=settings, seed=seed)).states

    assert not torch.equal(shown("random"), shown("random", seed=1))
    assert torch.equal(shown("uniform", "divprune", margin=1e9), shown("uniform"))
    assert not torch.equal(shown("uniform", "divprune"), shown("uniform"))


def test_shards_of_demonstrations_are_one_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, found = ImitateStage(demonstrations=20, teachers=("uniform", "divprune"), budgets=(8, 4), beta=0.3), []
    for size in (64, 6):
        monkeypatch.setattr(imitate, "SHARD", size)
        data = EncodedSamples(tiny_lvlm(), World(), tmp_path / str(size))
        run = RunFolder(tmp_path / f"run-{size}", {})
        found.append(collect_demonstrations(run, data, TrainConfig(imitate=settings)))
    assert torch.equal(found[0].indices, found[1].indices)
    assert torch.equal(found[0].states, found[1].states)


@pytest.mark.parametrize("kind", ["log_likelihood", "correct"])
def test_what_the_reward_likes_is_kept_as_its_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Literal["log_likelihood", "correct"]
) -> None:
    """A return of 0 is not liked; sample 2 is won by the second teacher and sample 4 by the search."""
    data, asked = EncodedSamples(tiny_lvlm(), World(), tmp_path / "cache"), {}
    states = torch.rand(5, 3, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    given = Demonstrations(states, torch.tensor([-1.0, 0.0, 0.1, -0.1, 2.0]), torch.tensor([1, 1, 1, 0, 2]))

    def watched(*passed: Any) -> Demonstrations:
        _, visual, budgets, unpruned, score, *rest = passed
        asked.update(budgets=budgets, unpruned=unpruned, whole=score(visual.mask[None])[0], rest=rest)
        return given

    monkeypatch.setattr(imitate, "demonstrate", watched)
    settings = ImitateStage(
        demonstrations=5, teachers=("uniform", "divprune", "search"), margin=0.7, beta=0.4, budgets=(4, 2),
        search_rounds=5, search_children=3,
    )  # fmt: skip
    run = RunFolder(tmp_path / "run", {})
    config = TrainConfig(imitate=settings, ppo=PpoStage(score=kind, alpha=3.0, beta=9.0, gamma=0.6), seed=8)
    shown = collect_demonstrations(run, data, config)
    assert shown.indices.tolist() == [2, 4]
    assert torch.equal(shown.states, states[[2, 4]])
    said = json.loads((run.folder / "metrics.jsonl").read_text())
    wins = {name: said[f"won_by_{name}"] for name in settings.teachers}
    assert (said["liked"], wins) == (2, {"uniform": 0, "divprune": 1, "search": 1})
    assert asked["budgets"] == (4, 2)
    assert asked["rest"] == [3.0, 0.4, 0.6, 0.7, Search(5, 3, 8)]
    own = data.unpruned.correct.float() if kind == "correct" else data.unpruned.log_prob
    assert torch.equal(asked["unpruned"], own[:5])
    torch.testing.assert_close(asked["whole"], own[:5])


def test_demonstrations_are_remembered_by_what_they_are_made_with() -> None:
    samples = [Sample(str(i), str(i), "what ?", ("cat",), "all") for i in range(3)]
    searching = ImitateStage(teachers=("uniform", "search"))

    def key(settings: ImitateStage, seed: int = 0, template: str = "a", answers: tuple[str, ...] = ("cat",)) -> str:
        own = [replace(samples[0], answers=answers), *samples[1:]]
        lvlm = SimpleNamespace(prompts=SimpleNamespace(template=template))
        data = SimpleNamespace(lvlm=lvlm, samples=own)
        return imitate._key(cast(Any, data), 3, TrainConfig(imitate=settings, seed=seed))

    other = [
        key(searching, seed=1), key(searching, template="b"), key(searching, answers=("dog",)),
        key(replace(searching, search_rounds=3)), key(replace(searching, search_children=3)),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tprl.__version__", "0.0.1")
        other.append(key(searching))
    assert len({key(searching), *other}) == 7
    plain = replace(searching, teachers=("uniform",))
    assert key(plain, seed=1) == key(plain)


def test_a_damaged_shard_of_demonstrations_is_made_anew(tmp_path: Path) -> None:
    data, run = EncodedSamples(tiny_lvlm(), World(), tmp_path / "cache"), RunFolder(tmp_path / "run", {})
    config = TrainConfig(imitate=ImitateStage(demonstrations=8, teachers=("uniform",), budgets=(8, 4), beta=9.0))
    before = collect_demonstrations(run, data, config)
    (path,) = data.folder.glob("demonstrations-*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    after = collect_demonstrations(run, data, config)
    assert torch.equal(after.indices, before.indices)
    assert torch.equal(after.states, before.states)


def test_a_loss_is_the_mean_over_steps_and_its_gradient_is_limited() -> None:
    puzzle, pruner = cast(Any, Puzzle()), make_pruner()
    with torch.no_grad():
        for weight in pruner.policy.actor.parameters():
            weight.mul_(20)
    indices = torch.arange(5)
    away = (torch.arange(COUNT) - puzzle.place(indices.tolist())[:, None]) % COUNT
    states = torch.stack([away < size for size in (COUNT, 3, 1)], 1)
    visual, targets = puzzle.visual(indices.tolist()), survival_targets(states)
    latents, losses = pruner.encode(visual), []
    for t in range(2):
        logits = pruner.look(latents, visual, states[:, t]).logits
        losses.append(imitation_loss(logits, targets[:, t], states[:, t]).item())
    stage = imitate_stage(pruner, puzzle, DemonstrationSet(indices, states), TrainConfig())
    said = stage.update(0)
    assert said["loss"] == pytest.approx(sum(losses) / 2)
    assert said["first_step_loss"] == pytest.approx(losses[0])
    assert abs(losses[0] - losses[1]) > 0.01
    left = [weight.grad.square().sum() for weight in pruner.policy.parameters() if weight.grad is not None]
    assert said["grad_norm"] > 2
    assert torch.stack(left).sum().sqrt() == pytest.approx(1, abs=1e-4)


def test_the_rate_rises_and_falls() -> None:
    """It reaches its height in twenty updates and ends near a twentieth of it."""
    shown = DemonstrationSet(torch.arange(20), torch.ones(20, 2, COUNT, dtype=torch.bool))
    config = TrainConfig(imitate=ImitateStage(batch=5, epochs=10, learning_rate=1e-3))
    stage = imitate_stage(make_pruner(), cast(Any, Puzzle()), shown, config)
    for step, share in ((0, 0.05), (19, 1 - 0.95 * 19 / 40), (39, 1 - 0.95 * 39 / 40)):
        stage.update(step)
        assert stage.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * share)
