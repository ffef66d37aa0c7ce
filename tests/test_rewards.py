"""Rewards, returns and group advantages against sums worked out by hand and loops."""

import pytest
import torch

from tprl.rewards import discounted_returns, generalised_advantages, leave_one_out, step_rewards


def test_an_episode_by_hand() -> None:
    scores = torch.tensor([[0.8, 0.9, 0.6, 0.6]])
    counts = torch.tensor([[100, 50, 20, 20]])
    # 2 * (0.9 - 0.8) + 0.5 * (1 - 50 / 100), 2 * (0.6 - 0.9) + 0.5 * (1 - 20 / 50), nothing happened
    expected = torch.tensor([[0.2 + 0.25, -0.6 + 0.3, 0.0]])
    torch.testing.assert_close(step_rewards(scores, counts, alpha=2.0, beta=0.5), expected)


def test_the_first_difference_is_measured_against_the_unpruned_score() -> None:
    """Pruning that keeps the score earns nothing but efficiency, however high the score is."""
    counts = torch.tensor([[16, 8], [16, 8]])
    scores = torch.tensor([[0.9, 0.9], [-3.0, -3.0]])
    torch.testing.assert_close(step_rewards(scores, counts, 1.0, 0.1), torch.full((2, 1), 0.05))
    against_zero = torch.cat([torch.zeros(2, 1), scores[:, 1:]], 1)
    assert (step_rewards(against_zero, counts, 1.0, 0.1) - 0.05).abs().min() > 0.8


def test_gains_add_up_to_the_whole_change() -> None:
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(5, 4, generator=random)
    counts = torch.randint(1, 9, (5, 4), generator=random)
    torch.testing.assert_close(step_rewards(scores, counts, 1.0, 0.0).sum(1), scores[:, -1] - scores[:, 0])
    kept = 1 - step_rewards(scores, counts, 0.0, 1.0)
    torch.testing.assert_close(kept.prod(1), counts[:, -1] / counts[:, 0])


def test_rewards_refuse() -> None:
    with pytest.raises(ValueError, match=r"scores \(2, 3\) and counts \(2, 2\) differ"):
        step_rewards(torch.zeros(2, 3), torch.ones(2, 2), 1, 1)
    with pytest.raises(ValueError, match="at least 1, the smallest is 0"):
        step_rewards(torch.zeros(1, 2), torch.tensor([[4, 0]]), 1, 1)


@pytest.mark.parametrize("shape", [(2, 3), (5, 1), (4, 3, 2)])
def test_leave_one_out_is_the_mean_of_the_others(shape: tuple[int, ...]) -> None:
    returns = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = leave_one_out(returns)
    for g in range(len(returns)):
        others = [returns[k] for k in range(len(returns)) if k != g]
        torch.testing.assert_close(advantages[g], returns[g] - sum(others) / len(others))
    torch.testing.assert_close(advantages.sum(0), torch.zeros(shape[1:], dtype=torch.float64))
    assert not torch.allclose(advantages, returns - returns.mean(0))  # the mean that includes the rollout itself


def test_questions_of_a_group_do_not_mix() -> None:
    returns = torch.tensor([[1.0, 100], [3, 100]])
    assert leave_one_out(returns).tolist() == [[-2, 0], [2, 0]]


def test_one_rollout_is_no_group() -> None:
    with pytest.raises(ValueError, match="at least 2 rollouts a question, got 1"):
        leave_one_out(torch.zeros(1, 4))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_returns(gamma: float) -> None:
    rewards = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    returns = discounted_returns(rewards, gamma)
    for t in range(5):
        expected = sum(gamma ** (k - t) * rewards[..., k] for k in range(t, 5))
        torch.testing.assert_close(returns[..., t], expected)


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_generalised_advantages(gamma: float, lam: float) -> None:
    """The sum of the paper's eq. 16, one step at a time."""
    random = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 4, generator=random, dtype=torch.float64)
    advantages = generalised_advantages(rewards, values, gamma, lam)
    for row in range(3):
        later = [*values[row, 1:].tolist(), 0.0]
        delta = [float(rewards[row, t] + gamma * later[t] - values[row, t]) for t in range(4)]
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, 4)) for t in range(4)]
        assert advantages[row].tolist() == pytest.approx(expected)


def test_the_ends_of_generalised_advantages() -> None:
    """With lambda 1 they are returns less values, and a critic that is right leaves none."""
    random = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 4, generator=random, dtype=torch.float64)
    returns = discounted_returns(rewards, 0.9)
    torch.testing.assert_close(generalised_advantages(rewards, values, 0.9, 1.0), returns - values)
    torch.testing.assert_close(generalised_advantages(rewards, returns, 0.9, 0.95), torch.zeros_like(rewards))
    assert generalised_advantages(rewards, values, 0.9, 0.95).abs().min() > 1e-3
