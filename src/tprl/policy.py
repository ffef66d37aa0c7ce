"""The language-guided policy: a shared attention trunk, an actor per token, a critic, and the action distribution.

TPRL, arXiv 2603.13394: actor and critic share a trunk over ``[latents ; projected query]``; the actor gives every
token a keep probability, the critic a value of the state from the mean over real tokens. Ours also sees where each
token lies in its picture.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class PolicyOutput(NamedTuple):
    """``logits (B, N)`` of keeping each token and ``state_value (B,)``."""

    logits: Tensor
    state_value: Tensor


class Policy(nn.Module):
    """Keep logits and a state value from latents, places and the question.

    Args:
        latent: L, width of what is seen of a token, its latents above all.
        width: D, width of the question's embeddings.
        hidden: width of the trunk.
        layers: transformer layers of the trunk.
        heads: attention heads of the trunk.
    """

    def __init__(self, latent: int, width: int, hidden: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token_in = nn.Linear(latent, hidden)
        self.query_in = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.place_in = nn.Linear(4 * _FREQUENCIES, hidden)
        self.kind = nn.Parameter(torch.zeros(2, hidden))
        self.trunk = nn.ModuleList(_Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.actor = _head(hidden)
        self.critic = _head(hidden)

    def forward(self, latents: Tensor, coords: Tensor, mask: Tensor, query: Tensor, query_mask: Tensor) -> PolicyOutput:
        """One look at a state.

        Args:
            latents: ``(B, N, L)``.
            coords: ``(B, N, 2)`` in [0, 1].
            mask: bool ``(B, N)``, True at the tokens that the state still holds. The others change nothing.
            query: ``(B, Q, D)`` embeddings of the question's own tokens.
            query_mask: bool ``(B, Q)``.
        """
        count = latents.shape[1]
        tokens = self.token_in(latents) + self.place_in(_waves(coords)) + self.kind[0]
        state = torch.cat([tokens, self.query_in(query) + self.kind[1]], 1)
        real = torch.cat([mask, query_mask], 1)[:, None, None]
        for block in self.trunk:
            state = block(state, real)
        tokens = self.norm(state[:, :count])
        held = mask.unsqueeze(-1)
        mean = (tokens * held).sum(1) / held.sum(1).clamp(min=1)
        return PolicyOutput(self.actor(tokens).squeeze(-1), self.critic(mean).squeeze(-1))


class _Block(nn.Module):
    """A pre-norm transformer layer without dropout, so that a rollout and its update see the same policy.

    PyTorch's own layer takes a path for masked attention that is slow on CPUs.
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention_in = nn.Linear(hidden, 3 * hidden)
        self.attention_out = nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)
        )

    def forward(self, state: Tensor, real: Tensor) -> Tensor:
        """``state (B, S, H)``; ``real`` bool ``(B, 1, 1, S)``, True where there is something to attend to."""
        parts = self.attention_in(self.attention_norm(state)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=real)
        state = state + self.attention_out(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = state + self.mlp(state)
        return mixed


class KeepDistribution:
    """Independent keep-or-drop draws, ``a_i ~ Bernoulli(discount * sigmoid(logit_i))``, over real tokens.

    Sampling and re-scoring both go through this object, so that the discount ``lambda_disc^t`` can never be in one
    and not in the other. At least one token is always kept: an all-drop draw keeps the most probable token, and
    that is the action that is stored and re-scored.

    Args:
        logits: ``(B, N)``.
        mask: bool ``(B, N)``, tokens that can be kept.
        discount: ``(B,)`` or a number in (0, 1], ``lambda_disc^t``.
    """

    def __init__(self, logits: Tensor, mask: Tensor, discount: Tensor | float) -> None:
        discount = torch.as_tensor(discount, dtype=logits.dtype, device=logits.device).expand(len(logits))[:, None]
        self.mask = mask
        self.log_keep = nn.functional.logsigmoid(logits) + discount.log()
        self.probs = self.log_keep.exp() * mask
        # log(1 - discount * sigmoid(x)), exact where sigmoid(x) rounds to 1
        self.log_drop = torch.logaddexp(
            -nn.functional.softplus(logits), torch.log1p(-discount) + nn.functional.logsigmoid(logits)
        )

    def sample(self, generator: torch.Generator) -> Tensor:
        """bool ``(B, N)``, at least one True a row."""
        uniform = torch.rand(self.probs.shape, generator=generator, device=self.probs.device)
        action = (uniform < self.probs) & self.mask
        best = self.log_keep.masked_fill(~self.mask, -torch.inf).argmax(1, keepdim=True)
        return action | (~action.any(1, keepdim=True) & torch.zeros_like(action).scatter(1, best, True))

    def token_log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of every token's draw, ``(B, N)``, 0 at padding."""
        return torch.where(self.mask, torch.where(action, self.log_keep, self.log_drop), 0.0)

    def entropy(self) -> Tensor:
        """Mean entropy a real token in nats, ``(B,)``."""
        entropy = -(self.log_keep.exp() * self.log_keep + self.log_drop.exp() * self.log_drop)
        return torch.where(self.mask, entropy, 0.0).sum(1) / self.mask.sum(1).clamp(min=1)


_FREQUENCIES = 6


def _waves(coords: Tensor) -> Tensor:
    """Sines and cosines of coordinates ``(..., 2)`` at octaves, ``(..., 4 * _FREQUENCIES)``."""
    octaves = torch.pi * 2.0 ** torch.arange(_FREQUENCIES, device=coords.device)
    angles = (coords.unsqueeze(-1) * octaves).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def _head(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1))
