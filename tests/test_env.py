"""The decision process: what follows what, what it refuses, and when it asks for scores."""

import pytest
import torch
from torch import Tensor

from tprl.env import PruningEnv, Trajectory

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
FIRST = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
SECOND = torch.tensor([[0, 0, 0, 1, 0], [1, 0, 1, 0, 0]]).bool()


def played() -> PruningEnv:
    env = PruningEnv(MASK, 2, alpha=1.0, beta=0.1)
    env.step(FIRST)
    env.step(SECOND)
    return env


class Judge:
    """Scores a mask by the sum of its columns' numbers, so that no two masks are confused."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []

    def __call__(self, masks: Tensor) -> Tensor:
        self.asked.append(masks)
        return (masks * torch.tensor([1.0, 2, 4, 8, 16])).sum(-1)


def test_what_is_kept_is_the_next_state() -> None:
    env = PruningEnv(MASK, 2, 1.0, 0.1)
    assert torch.equal(env.state, MASK)
    assert not env.done
    assert torch.equal(env.step(FIRST), FIRST)
    assert torch.equal(env.state, FIRST)
    assert not env.done
    env.step(SECOND)
    assert torch.equal(env.state, SECOND)
    assert env.done


def test_all_steps_are_scored_in_one_call() -> None:
    judge = Judge()
    trajectory = played().finish(torch.tensor([20.0, 5]), judge)
    assert len(judge.asked) == 1
    assert torch.equal(judge.asked[0], torch.stack([FIRST, SECOND]))
    assert trajectory.scores.tolist() == [[20, 13, 8], [5, 7, 5]]


def test_what_happened_is_what_is_handed_out() -> None:
    trajectory = played().finish(torch.tensor([20.0, 5]), Judge())
    assert torch.equal(trajectory.states, torch.stack([MASK, FIRST, SECOND], 1))
    assert torch.equal(trajectory.actions, torch.stack([FIRST, SECOND], 1))
    assert trajectory.counts.tolist() == [[5, 3, 1], [3, 3, 2]]
    expected = torch.tensor([[13 - 20 + 0.1 * 2 / 5, 8 - 13 + 0.1 * 2 / 3], [7 - 5, 5 - 7 + 0.1 / 3]])
    torch.testing.assert_close(trajectory.rewards, expected)
    assert isinstance(trajectory, Trajectory)


def test_padding_is_no_token() -> None:
    """Padding neither counts as removed nor can be kept."""
    wide = torch.nn.functional.pad(MASK, (0, 4))
    env = PruningEnv(wide, 2, 1.0, 0.1)
    for action in (FIRST, SECOND):
        env.step(torch.nn.functional.pad(action, (0, 4)))

    def judge(masks: Tensor) -> Tensor:
        return Judge()(masks[..., :5])

    given = torch.tensor([20.0, 5])
    torch.testing.assert_close(env.finish(given, judge).rewards, played().finish(given, Judge()).rewards)


def test_a_dropped_token_does_not_come_back() -> None:
    env = PruningEnv(MASK, 3, 1.0, 0.1)
    env.step(FIRST)
    with pytest.raises(ValueError, match="keeps a token that the state does not hold"):
        env.step(MASK)
    assert torch.equal(env.state, FIRST)
    with pytest.raises(ValueError, match="keeps a token that the state does not hold"):
        PruningEnv(MASK, 1, 1.0, 0.1).step(torch.ones_like(MASK))


def test_something_is_always_kept() -> None:
    nothing = FIRST.clone()
    nothing[1] = False
    with pytest.raises(ValueError, match="drops every token of a row"):
        PruningEnv(MASK, 1, 1.0, 0.1).step(nothing)
    with pytest.raises(ValueError, match="at least one real token"):
        PruningEnv(nothing, 1, 1.0, 0.1)


def test_the_horizon_is_kept() -> None:
    with pytest.raises(RuntimeError, match="ended after 2 steps"):
        played().step(SECOND)
    env = PruningEnv(MASK, 2, 1.0, 0.1)
    env.step(FIRST)
    with pytest.raises(RuntimeError, match="taken 1 of 2 steps"):
        env.finish(torch.zeros(2), Judge())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PruningEnv(MASK, 0, 1.0, 0.1)


def test_a_score_that_fails_stops_the_run() -> None:
    def broken(masks: Tensor) -> Tensor:
        raise ZeroDivisionError("no answer")

    with pytest.raises(ZeroDivisionError, match="no answer"):
        played().finish(torch.zeros(2), broken)
