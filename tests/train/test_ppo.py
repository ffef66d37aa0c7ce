"""PPO against slow re-statements, and whether it solves a puzzle."""

from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, Literal, cast

import pytest
import torch

from tprl import processes
from tprl.config import PpoStage, TrainConfig
from tprl.lvlm.score import AnswerScores
from tprl.rewards import generalised_advantages
from tprl.train import ppo
from tprl.train.ppo import Rollouts, advantages, by_question, describe, improve, ppo_loss, ppo_stage, roll_out
from train.puzzle import COUNT, Puzzle, make_pruner

SETTINGS = PpoStage(horizon=3, gamma=0.99, questions=6, rollouts=4, minibatch=24, update_epochs=1, discount=0.8)
INDICES = list(range(6))


def rollouts(settings: PpoStage = SETTINGS, seed: int = 0) -> tuple[Any, Rollouts]:
    pruner = make_pruner()
    return pruner, roll_out(pruner, cast(Any, Puzzle()), INDICES, settings, torch.Generator().manual_seed(seed))


def test_the_action_that_acted_is_the_action_that_is_stored() -> None:
    _, rolled = rollouts()
    trajectory = rolled.trajectory
    assert torch.equal(trajectory.actions, trajectory.states[:, 1:])
    assert (trajectory.actions.sum(-1) >= 1).all()
    assert not (trajectory.actions & ~trajectory.states[:, :-1]).any()


def test_scores_are_those_of_each_episodes_own_question() -> None:
    _, rolled = rollouts()
    place = Puzzle().place([INDICES[int(row)] for row in rolled.rows])
    for t in range(SETTINGS.horizon):
        found = rolled.trajectory.states[torch.arange(len(place)), t + 1, place]
        assert torch.equal(rolled.trajectory.scores[:, t + 1], torch.where(found, 0.0, -2.0))


def test_ratios_are_one_before_the_first_step() -> None:
    pruner, rolled = rollouts()
    pruner.train()
    everyone = torch.arange(len(rolled.rows))
    advantage, target = advantages(rolled, SETTINGS)
    _, metrics = ppo_loss(pruner, rolled, everyone, advantage, target, SETTINGS)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["clip_fraction"] == 0
    assert metrics["effective_sample_size"] == pytest.approx(1, abs=1e-4)
    _, other = ppo_loss(pruner, rolled, everyone, advantage, target, replace(SETTINGS, discount=0.5))
    assert other["approx_kl"] > 1e-2  # re-scored with another discount than drawn with


@pytest.mark.parametrize("baseline", ["group", "critic"])
def test_the_loss_equals_a_loop_over_tokens(baseline: Literal["group", "critic"]) -> None:
    settings = replace(SETTINGS, baseline=baseline, entropy_coeff=0.3, value_coeff=0.7)
    pruner, rolled = rollouts(settings)
    with torch.no_grad():
        for weight in pruner.policy.actor.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([3, 0, 17, 8])
    advantage, target = advantages(rolled, settings)
    loss, metrics = ppo_loss(pruner, rolled, chosen, advantage[chosen], target[chosen], settings)
    gains, entropies, errors, clipped = [], [], [], 0
    for episode in chosen.tolist():
        question = int(rolled.rows[episode])
        for t in range(SETTINGS.horizon):
            state = rolled.trajectory.states[episode, t]
            one = Puzzle().visual([INDICES[question]])
            output = pruner.look(pruner.encode(one), one, state[None])
            errors.append((output.state_value[0].item() - target[episode, t].item()) ** 2)
            surprise = []
            for i in range(COUNT):
                if not state[i]:
                    continue
                probability = SETTINGS.discount**t * torch.sigmoid(output.logits[0, i].detach().double())
                surprise.append(-float(probability * probability.log() + (1 - probability) * (1 - probability).log()))
                kept = bool(rolled.trajectory.actions[episode, t, i])
                new = torch.log(probability if kept else 1 - probability)
                ratio = float((new - rolled.log_probs[episode, t, i]).exp())
                gain = float(advantage[episode, t])
                gains.append(min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain))
                clipped += abs(ratio - 1) > 0.2
            entropies.append(sum(surprise) / len(surprise))
    assert metrics["clip_fraction"] == pytest.approx(clipped / len(gains), abs=1e-6)
    assert clipped
    entropy, error = sum(entropies) / len(entropies), sum(errors) / len(errors)
    expected = -sum(gains) / len(gains) - 0.3 * entropy + (0.7 * error if baseline == "critic" else 0)
    assert entropy > 0.1
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("max_kl", "passes"), [(1e-12, 1), (1e9, 3)])
def test_a_policy_that_has_gone_far_enough_is_left_alone(max_kl: float, passes: int) -> None:
    settings = replace(SETTINGS, minibatch=8, update_epochs=3, max_kl=max_kl)
    pruner, rolled = rollouts(settings)
    optimizer = torch.optim.Adam(pruner.policy.parameters(), lr=1e-4)
    metrics = improve(pruner, optimizer, rolled, settings, torch.Generator().manual_seed(0))
    assert metrics["updates"] == passes * len(rolled.rows) / 8


def test_metrics_of_a_round_by_hand() -> None:
    _, rolled = rollouts()
    said, trajectory = describe(rolled), rolled.trajectory
    lost = removed = 0.0
    for scores, counts in zip(trajectory.scores.tolist(), trajectory.counts.tolist(), strict=True):
        lost += scores[0] - scores[-1]
        removed += sum((before - after) / before for before, after in pairwise(counts))
    assert said["score_lost"] == pytest.approx(lost / len(rolled.rows))
    assert said["score_lost"] > 0
    assert said["score"] == pytest.approx(sum(scores[-1] for scores in trajectory.scores.tolist()) / len(rolled.rows))
    assert said["reward"] == pytest.approx(sum(map(sum, trajectory.rewards.tolist())) / len(rolled.rows), abs=1e-6)
    assert said["removed"] == pytest.approx(removed / len(rolled.rows))
    assert said["kept_3"] == pytest.approx(sum(counts[-1] for counts in trajectory.counts.tolist()) / len(rolled.rows))


def test_group_advantages_compare_episodes_of_one_question() -> None:
    _, rolled = rollouts()
    raw = rolled.trajectory.rewards
    returns = torch.stack([sum(0.99 ** (k - t) * raw[:, k] for k in range(t, 3)) for t in range(3)], 1)
    expected = torch.empty_like(returns)
    for episode, question in enumerate(rolled.rows.tolist()):
        others = [e for e, q in enumerate(rolled.rows.tolist()) if q == question and e != episode]
        expected[episode] = returns[episode] - returns[others].mean(0)
    expected = (expected - expected.mean()) / (expected.std() + 1e-6)
    assert torch.allclose(advantages(rolled, SETTINGS)[0], expected, atol=1e-5)


@pytest.mark.parametrize("baseline", ["group", "critic"])
def test_ppo_learns_which_token_is_needed(baseline: Literal["group", "critic"]) -> None:
    puzzle = Puzzle()
    settings = PpoStage(
        epochs=60,
        questions=20,
        rollouts=8,
        minibatch=80,
        baseline=baseline,
        actor_learning_rate=3e-3,
        horizon=2,
        beta=2.0,
    )
    pruner = make_pruner()
    stage = ppo_stage(pruner, cast(Any, puzzle), TrainConfig(ppo=settings))
    history = [stage.update(step) for step in range(settings.epochs)]
    assert history[-1]["reward"] > history[0]["reward"] + 0.3
    indices = list(range(len(puzzle)))
    probs = pruner.keep_probs(puzzle.visual(indices))
    needed = probs[torch.arange(len(indices)), puzzle.place(indices)]
    assert needed.mean() > 2 * probs.mean()


def test_every_process_gets_an_episode_of_every_minibatch_and_a_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 episodes in minibatches of 14 are two, of 8 and 7; those of a question may all end with one subset."""
    monkeypatch.setattr(processes, "count", lambda: 8)
    config = TrainConfig(ppo=replace(SETTINGS, questions=5, rollouts=3, minibatch=14))
    with pytest.raises(ValueError, match="minibatches of 14 of 15 episodes, the smallest of 7 cannot be shared by 8"):
        ppo_stage(make_pruner(), cast(Any, Puzzle()), config)
    config = replace(config, ppo=replace(config.ppo, minibatch=15))
    with pytest.raises(ValueError, match="if those of a question are all the same, 5 cannot be shared by 8 processes"):
        ppo_stage(make_pruner(), cast(Any, Puzzle()), config)
    monkeypatch.setattr(processes, "count", lambda: 5)
    ppo_stage(make_pruner(), cast(Any, Puzzle()), config)


def test_an_update_changes_the_policy_alone() -> None:
    pruner, rolled = rollouts()
    before = {name: weight.clone() for name, weight in pruner.state_dict().items()}
    optimizer = torch.optim.AdamW([{"params": list(pruner.policy.parameters())}], lr=1e-3)
    improve(pruner, optimizer, rolled, SETTINGS, torch.Generator().manual_seed(0))
    changed = {name for name, weight in pruner.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert all(name.startswith("policy.") for name in changed)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_whole_questions(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: count)
    rows = torch.arange(6).repeat(4)
    drawn = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:23]
    order = by_question(drawn, rows)
    assert order.sort().values.tolist() == drawn.sort().values.tolist()

    def looks(episodes: torch.Tensor) -> int:
        return sum(len(rows[episodes[rank::count]].unique()) for rank in range(count))

    assert 6 <= looks(order) < 6 + count
    assert count == 1 or looks(drawn) > 6 + count


def test_every_round_and_every_seed_asks_other_questions() -> None:
    def asked(seed: int, step: int) -> list[int]:
        stage = ppo_stage(make_pruner(), cast(Any, Puzzle()), TrainConfig(ppo=SETTINGS, seed=seed))
        stage.update(step)
        questions: list[int] = stage.batch["samples"].tolist()
        return questions

    assert asked(0, 0) == asked(0, 0)
    assert asked(0, 1) != asked(0, 0) != asked(1, 0)


def test_a_subset_that_came_up_twice_is_scored_once() -> None:
    scored = []

    class Watched(Puzzle):
        def score(self, indices: Any, tokens: Any, keep_mask: torch.Tensor, *given: Any, **named: Any) -> Any:
            scored.extend((index, tuple(mask)) for index, mask in zip(indices, keep_mask.tolist(), strict=True))
            return super().score(indices, tokens, keep_mask, *given, **named)

    settings = replace(SETTINGS, rollouts=30)
    rolled = roll_out(make_pruner(), cast(Any, Watched()), INDICES, settings, torch.Generator().manual_seed(0))
    masks = rolled.trajectory.states[:, 1:]
    shown = {(int(row), tuple(mask)) for row, steps in zip(rolled.rows, masks.tolist(), strict=True) for mask in steps}
    assert len(scored) == len(set(scored)) == len(shown) < masks[..., 0].numel()


def test_the_critic_is_asked_and_its_advantages_are_those_of_gae() -> None:
    settings = replace(SETTINGS, baseline="critic", gamma=0.9, gae_lambda=0.3)
    (pruner, rolled), visual = rollouts(settings), Puzzle().visual(INDICES)
    for t in range(settings.horizon):
        look = pruner.look(pruner.encode(visual), visual, rolled.trajectory.states[:, t], rolled.rows)
        torch.testing.assert_close(rolled.values[:, t], look.state_value)
    raw = generalised_advantages(rolled.trajectory.rewards, rolled.values, 0.9, 0.3)
    advantage, target = advantages(rolled, settings)
    torch.testing.assert_close(target, raw + rolled.values)
    torch.testing.assert_close(advantage, (raw - raw.mean()) / (raw.std() + 1e-6))


def test_divergence_and_sample_size_by_their_formulas() -> None:
    (pruner, rolled), everyone = rollouts(), torch.arange(24)
    held = rolled.trajectory.states[:, :-1]
    change = 0.1 * held * torch.rand(held.shape, generator=torch.Generator().manual_seed(0))
    moved, weight = replace(rolled, log_probs=rolled.log_probs - change), change.sum((1, 2)).exp()
    _, said = ppo_loss(pruner, moved, everyone, *advantages(rolled, SETTINGS), SETTINGS)
    assert said["approx_kl"] == pytest.approx(float((change.exp() - 1 - change)[held].mean()), rel=1e-3)
    effective = float(weight.sum() ** 2 / (24 * weight.square().sum()))
    assert said["effective_sample_size"] == pytest.approx(effective, rel=1e-4)


def test_rates_rise_and_fall_each_by_its_own() -> None:
    """They reach their height in five rounds and end at a tenth of it."""
    settings = PpoStage(epochs=20, actor_learning_rate=1e-3, critic_learning_rate=3e-3)
    stage = ppo_stage(make_pruner(), cast(Any, Puzzle()), TrainConfig(ppo=settings))
    for step, share in ((0, 0.2), (4, 0.82), (19, 0.145)):
        stage.update(step)
        assert [group["lr"] for group in stage.optimizer.param_groups] == pytest.approx([1e-3 * share, 3e-3 * share])


@pytest.mark.parametrize("kind", ["log_likelihood", "correct"])
def test_rewards_begin_at_each_questions_own_unpruned_score(kind: Literal["log_likelihood", "correct"]) -> None:
    puzzle, settings = Puzzle(), replace(SETTINGS, score=kind, alpha=3.0, beta=0.2)
    unpruned = AnswerScores(-torch.arange(40.0) / 40, torch.arange(40) % 3 == 0)
    puzzle.unpruned = unpruned
    generator = torch.Generator().manual_seed(0)
    trajectory = roll_out(make_pruner(), cast(Any, puzzle), INDICES, settings, generator).trajectory
    whole, lost = (unpruned.correct.float(), 0.0) if kind == "correct" else (unpruned.log_prob, -2.0)
    for episode, (states, rewards) in enumerate(zip(trajectory.states, trajectory.rewards.tolist(), strict=True)):
        index = INDICES[episode % len(INDICES)]
        place = int(puzzle.place([index]))
        score, count = float(whole[index]), COUNT
        for state, reward in zip(states[1:], rewards, strict=True):
            left, after = int(state.sum()), float(kind == "correct") if state[place] else lost
            assert reward == pytest.approx(3 * (after - score) + 0.2 * (1 - left / count), abs=1e-5)
            score, count = after, left


def test_every_round_and_every_seed_draws_other_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def watched(*given: Any) -> Rollouts:
        drawn.append(given[-1].initial_seed())
        return roll_out(*given)

    monkeypatch.setattr(ppo, "roll_out", watched)
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        ppo_stage(make_pruner(), cast(Any, Puzzle()), TrainConfig(ppo=SETTINGS, seed=seed)).update(step)
    assert len(set(drawn)) == 3
    assert drawn[0] == drawn[-1]


def test_a_pass_shows_every_episode_once_with_its_own_advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, minibatch=8, update_epochs=2, max_kl=1e9, baseline="critic")
    pruner, rolled = rollouts(settings)
    advantage, target = advantages(rolled, settings)
    seen: list[list[int]] = []

    def watched(pruner: Any, rollouts: Any, chosen: torch.Tensor, *given: Any) -> Any:
        assert torch.equal(given[0], advantage[chosen])
        assert torch.equal(given[1], target[chosen])
        seen.append(chosen.tolist())
        return ppo_loss(pruner, rollouts, chosen, *given)

    monkeypatch.setattr(ppo, "ppo_loss", watched)
    optimizer = torch.optim.SGD(pruner.policy.parameters(), lr=1e-9)
    said = improve(pruner, optimizer, rolled, settings, torch.Generator().manual_seed(0))
    assert [len(chosen) for chosen in seen] == [8] * 6
    assert sorted(chain(*seen[:3])) == sorted(chain(*seen[3:])) == list(range(24))
    assert {frozenset(chosen) for chosen in seen[:3]} != {frozenset(chosen) for chosen in seen[3:]}
    assert said["explained_variance"] == pytest.approx(float(1 - (target - rolled.values).var() / target.var()))


def test_gradients_are_limited_and_those_of_one_update_alone() -> None:
    """The policy stands still, so that all passes have one gradient, which is longer than 1."""
    settings, norms = replace(SETTINGS, baseline="critic", value_coeff=100.0), []
    for passes in (1, 3):
        pruner, rolled = rollouts(replace(settings, update_epochs=passes))
        optimizer = torch.optim.SGD(pruner.policy.parameters(), lr=0.0)
        said = improve(pruner, optimizer, rolled, replace(settings, update_epochs=passes), torch.Generator())
        assert said["updates"] == passes
        norms.append(said["grad_norm"])
        left = [weight.grad.square().sum() for weight in pruner.policy.parameters() if weight.grad is not None]
        assert torch.stack(left).sum().sqrt() == pytest.approx(1, abs=1e-4)
    assert norms[0] > 2
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
