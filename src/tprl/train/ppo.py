"""Stage 3: PPO on task accuracy and efficiency together (TPRL, arXiv 2603.13394; PPO, arXiv 1707.06347).

Deviations from the paper. Options of ``PpoStage``: an episode has one step, since inference looks once; the baseline is
the mean of the question's other rollouts ("group", arXiv 2402.14740) instead of the critic; the discount
``lambda_disc`` is nearer to 1, since 0.5 drops half of all tokens in the second step whatever the policy thinks of
them. Always: ratios are clipped token by token, since the product over hundreds of tokens explodes (the joint one is
watched as ``effective_sample_size``).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tprl import processes
from tprl.clock import phase
from tprl.config import PpoStage, TrainConfig
from tprl.demonstrations import MemoScore
from tprl.env import PruningEnv, Trajectory
from tprl.lvlm.cache import EncodedSamples
from tprl.policy import KeepDistribution
from tprl.pruner import TokenPruner
from tprl.rewards import discounted_returns, generalised_advantages, leave_one_out
from tprl.run import Stage
from tprl.train.imitate import unpruned_scores, worth_function
from tprl.types import VisualTokens

NAME = "ppo"


@dataclass(frozen=True)
class Rollouts:
    """``G`` episodes of each of ``Q`` questions; row ``g * Q + q`` of the trajectory is the ``g``-th of question ``q``.

    Attributes:
        visual: the questions, ``Q`` rows.
        latents: ``(Q, N, L + MATCHES)``, see ``TokenPruner.encode``.
        rows: int64 ``(G * Q,)``, the question of each episode.
        trajectory: of ``G * Q`` episodes.
        log_probs: ``(G * Q, T, N)`` of every token's draw when it was made.
        values: ``(G * Q, T)`` the critic's.
    """

    visual: VisualTokens
    latents: Tensor
    rows: Tensor
    trajectory: Trajectory
    log_probs: Tensor
    values: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the question's words, by name."""
        trajectory = vars(self.trajectory)
        return trajectory | {"latents": self.latents, "log_probs": self.log_probs, "values": self.values}


def ppo_stage(
    pruner: TokenPruner,
    train: EncodedSamples,
    config: TrainConfig,
    watch: Callable[[int], dict[str, float]] = lambda step: {},
) -> Stage:
    """The stage: one update is a round of rollouts and the passes over them.

    Args:
        watch: metrics besides those of the rollouts, asked for after every update with its number.
    """
    settings = config.ppo
    questions = min(settings.questions, len(train))
    episodes = questions * settings.rollouts
    smallest = episodes // math.ceil(episodes / settings.minibatch)
    processes.check_shares(smallest, f"minibatches of {settings.minibatch} of {episodes} episodes, the smallest of")
    processes.check_shares(questions, "subsets to be scored in a round, if those of a question are all the same,")
    critic = list(pruner.policy.critic.parameters())
    actor = [p for name, p in pruner.policy.named_parameters() if not name.startswith("critic.")]
    optimizer = torch.optim.AdamW(
        [
            {"params": actor, "rate": settings.actor_learning_rate},
            {"params": critic, "rate": settings.critic_learning_rate},
        ],
        lr=0.0,
        weight_decay=0.0,
    )
    batch: dict[str, Tensor] = {}

    def update(step: int) -> dict[str, float]:
        rng = np.random.default_rng((config.seed, 3, step))
        generator = torch.Generator(pruner.token_mean.device).manual_seed(int(rng.integers(2**62)))
        chosen = rng.choice(len(train), questions, replace=False).tolist()
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / 5) * (1 - 0.9 * step / settings.epochs)
        start = time.perf_counter()
        rollouts = roll_out(pruner, train, chosen, settings, generator)
        speed = {"rollouts_per_second": len(rollouts.rows) / (time.perf_counter() - start)}
        batch.update(rollouts.tensors(), samples=torch.tensor(chosen))
        return describe(rollouts) | speed | improve(pruner, optimizer, rollouts, settings, generator) | watch(step)

    return Stage(NAME, settings.epochs, pruner, optimizer, update, batch)


@torch.no_grad()
def roll_out(
    pruner: TokenPruner, train: EncodedSamples, indices: list[int], settings: PpoStage, generator: torch.Generator
) -> Rollouts:
    """Sample episodes and score all their steps in one call, a subset that came up twice once."""
    visual = train.visual(indices)
    latents = pruner.encode(visual)
    rows = torch.arange(len(indices), device=visual.mask.device).repeat(settings.rollouts)
    env = PruningEnv(visual.mask[rows], settings.horizon, settings.alpha, settings.beta)
    log_probs, values = [], []
    for t in range(settings.horizon):
        distribution, value = look(pruner, latents, visual, env.state, rows, t, settings)
        action = distribution.sample(generator)
        log_probs.append(distribution.token_log_prob(action))
        values.append(value)
        env.step(action)
    worth = worth_function(train, indices, visual.tokens, settings.score)

    def shared(questions: Tensor, masks: Tensor) -> Tensor:
        own = processes.mine()
        return processes.gathered(worth(questions[own], masks[own]), len(questions))

    def score(masks: Tensor) -> Tensor:
        by_question = masks.unflatten(1, (settings.rollouts, -1)).flatten(0, 1)
        return MemoScore(shared)(by_question).reshape(masks.shape[:2])

    trajectory = env.finish(unpruned_scores(train, indices, settings.score).repeat(settings.rollouts), score)
    return Rollouts(visual, latents, rows, trajectory, torch.stack(log_probs, 1), torch.stack(values, 1))


def look(
    pruner: TokenPruner,
    latents: Tensor,
    visual: VisualTokens,
    state: Tensor,
    rows: Tensor,
    t: int,
    settings: PpoStage,
) -> tuple[KeepDistribution, Tensor]:
    """The distribution of step ``t`` and the critic's value, the same in the rollout and in the update.

    All episodes of a question begin in one state, which is looked at once.
    """
    if t == 0:
        questions, back = rows.unique(return_inverse=True)
        output = pruner.look(latents, visual, visual.mask[questions], questions)
        logits, value = output.logits[back], output.state_value[back]
    else:
        logits, value = pruner.look(latents, visual, state, rows)
    return KeepDistribution(logits, state, settings.discount**t), value


def advantages(rollouts: Rollouts, settings: PpoStage) -> tuple[Tensor, Tensor]:
    """Normalised advantages and the critic's targets, ``(G * Q, T)`` each."""
    rewards = rollouts.trajectory.rewards
    returns = discounted_returns(rewards, settings.gamma)
    if settings.baseline == "group":
        grouped = returns.unflatten(0, (settings.rollouts, -1))
        advantage, target = leave_one_out(grouped).flatten(0, 1), returns
    else:
        advantage = generalised_advantages(rewards, rollouts.values, settings.gamma, settings.gae_lambda)
        target = advantage + rollouts.values
    return (advantage - advantage.mean()) / (advantage.std() + 1e-6), target


@phase("update")
def improve(
    pruner: TokenPruner,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    settings: PpoStage,
    generator: torch.Generator,
) -> dict[str, float]:
    """The clipped updates on one round of rollouts; metrics are means over all of them."""
    advantage, target = advantages(rollouts, settings)
    episodes = len(rollouts.rows)
    seen: list[dict[str, float]] = []
    for _ in range(settings.update_epochs):
        kl = []
        order = torch.randperm(episodes, generator=generator, device=generator.device)
        for drawn in order.tensor_split(math.ceil(episodes / settings.minibatch)):
            chosen = by_question(drawn, rollouts.rows)
            loss, metrics = ppo_loss(pruner, rollouts, chosen, advantage[chosen], target[chosen], settings)
            optimizer.zero_grad()
            loss.backward()
            processes.sum_gradients(pruner.policy.parameters())
            norm = nn.utils.clip_grad_norm_(pruner.policy.parameters(), 1.0)
            optimizer.step()
            seen.append(metrics | {"grad_norm": norm.item()})
            kl.append(metrics["approx_kl"])
        if np.mean(kl) > settings.max_kl:
            break
    means = {name: float(np.mean([metrics[name] for metrics in seen])) for name in seen[0]}
    means["updates"] = float(len(seen))
    if settings.baseline == "critic":
        means["explained_variance"] = (1 - (target - rollouts.values).var() / target.var().clamp(min=1e-12)).item()
    return means


def by_question(episodes: Tensor, rows: Tensor) -> Tensor:
    """``episodes (M,)`` in the order in which the shares of processes, see ``processes.mine``, hold whole questions, so
    that no two processes look at the same first state (but for one at the border of two shares).

    Args:
        rows: int64, the question of each episode.
    """
    shared = torch.empty_like(episodes)
    sorted_episodes = episodes[rows[episodes].argsort(stable=True)]
    for rank, share in enumerate(sorted_episodes.tensor_split(processes.count())):
        shared[rank :: processes.count()] = share
    return shared


def ppo_loss(
    pruner: TokenPruner, rollouts: Rollouts, chosen: Tensor, advantage: Tensor, target: Tensor, settings: PpoStage
) -> tuple[Tensor, dict[str, float]]:
    """This process's part of ``-L_clip + value_coeff L_value - entropy_coeff H`` of some episodes, and the metrics of
    all of them.

    Args:
        chosen: int64 ``(M,)`` of the episodes.
        advantage: ``(M, T)``.
        target: ``(M, T)`` of the critic.
    """
    count, own = rollouts.trajectory.states[chosen, :-1].sum(), processes.mine()
    episodes, part = chosen[own], len(chosen[own]) / len(chosen)
    states, actions = rollouts.trajectory.states[episodes], rollouts.trajectory.actions[episodes]
    actor, value_loss, entropy, kl, clipped, log_weight = [], [], [], [], [], []
    for t in range(settings.horizon):
        state = states[:, t]
        rows = rollouts.rows[episodes]
        distribution, value = look(pruner, rollouts.latents, rollouts.visual, state, rows, t, settings)
        log_ratio = distribution.token_log_prob(actions[:, t]) - rollouts.log_probs[episodes, t]
        ratio = log_ratio.exp()
        gain = advantage[own, t, None]
        limited = ratio.clamp(1 - settings.clip_epsilon, 1 + settings.clip_epsilon)
        actor.append((torch.minimum(ratio * gain, limited * gain) * state).sum())
        if settings.baseline == "critic":
            value_loss.append(nn.functional.mse_loss(value, target[own, t]))
        entropy.append(distribution.entropy().mean())
        with torch.no_grad():
            kl.append(((ratio - 1 - log_ratio) * state).sum())
            clipped.append(((ratio - 1).abs() > settings.clip_epsilon)[state].float().sum())
            log_weight.append(log_ratio.sum(1))
    actor_loss = -torch.stack(actor).sum() / count
    mean_entropy = part * torch.stack(entropy).mean()
    loss = actor_loss - settings.entropy_coeff * mean_entropy
    metrics = {
        "actor_loss": actor_loss,
        "entropy": mean_entropy,
        "approx_kl": torch.stack(kl).sum() / count,
        "clip_fraction": torch.stack(clipped).sum() / count,
    }
    if value_loss:
        metrics["value_loss"] = part * torch.stack(value_loss).mean()
        loss = loss + settings.value_coeff * metrics["value_loss"]
    sums = processes.total(torch.stack(list(metrics.values()))).tolist()
    weight = processes.gathered(torch.stack(log_weight).sum(0), len(chosen)).softmax(0)
    effective = {"effective_sample_size": (1 / weight.pow(2).sum() / len(weight)).item()}
    return loss, dict(zip(metrics, sums, strict=True)) | effective


def describe(rollouts: Rollouts) -> dict[str, float]:
    """What happened in a round: rewards and their parts, and the tokens kept after every step."""
    trajectory = rollouts.trajectory
    counts = trajectory.counts.float()
    removed = (1 - counts[:, 1:] / counts[:, :-1]).sum(1).mean()
    return {
        "reward": trajectory.rewards.sum(1).mean().item(),
        "score": trajectory.scores[:, -1].mean().item(),
        "score_lost": (trajectory.scores[:, 0] - trajectory.scores[:, -1]).mean().item(),
        "removed": removed.item(),
    } | {f"kept_{t}": counts[:, t].mean().item() for t in range(1, counts.shape[1])}
