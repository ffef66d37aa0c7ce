"""The joint reward of accuracy and efficiency, as pure functions of tensors (TPRL, arXiv 2603.13394)."""

import torch
from torch import Tensor


def step_rewards(scores: Tensor, counts: Tensor, alpha: float, beta: float) -> Tensor:
    """``r_t = alpha (Score(H_t) - Score(H_{t-1})) + beta (1 - K_t / K_{t-1})``.

    Args:
        scores: ``(B, T + 1)``, the answer's score before any pruning (``t = 0``) and after every step.
        counts: ``(B, T + 1)``, tokens kept before any pruning and after every step, all at least 1.
        alpha: weight of the task.
        beta: weight of efficiency.

    Returns:
        ``(B, T)`` rewards.

    Raises:
        ValueError: shapes differ or a count is below 1.
    """
    if scores.shape != counts.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and counts {tuple(counts.shape)} differ in shape")
    if bool((counts < 1).any()):
        raise ValueError(f"every count must be at least 1, the smallest is {counts.min().item()}")
    gain = scores[:, 1:] - scores[:, :-1]
    removed = 1 - counts[:, 1:].float() / counts[:, :-1].float()
    return alpha * gain + beta * removed


def leave_one_out(returns: Tensor) -> Tensor:
    """Advantages against the mean of the *other* rollouts of the same question (RLOO, arXiv 2402.14740, eq. 6).

    Args:
        returns: ``(G, Q, ...)``, ``G >= 2`` rollouts of ``Q`` questions.
    """
    group = len(returns)
    if group < 2:
        raise ValueError(f"a group needs at least 2 rollouts a question, got {group}")
    return (returns - returns.mean(0, keepdim=True)) * group / (group - 1)


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """``G_t = r_t + gamma G_{t+1}`` along the last dimension of ``(..., T)``."""
    total = torch.zeros_like(rewards[..., 0])
    returns = []
    for reward in rewards.unbind(-1)[::-1]:
        total = reward + gamma * total
        returns.append(total)
    return torch.stack(returns[::-1], -1)


def generalised_advantages(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16); the value behind the last step is 0.

    ``A_t = delta_t + gamma lambda A_{t+1}`` with ``delta_t = r_t + gamma V_{t+1} - V_t``.

    Args:
        rewards: ``(B, T)``.
        values: ``(B, T)``, of the states before each step.
    """
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    return discounted_returns(rewards + gamma * after - values, gamma * gae_lambda)
