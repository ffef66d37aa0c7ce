"""Stage 1: the autoencoder learns to reconstruct visual tokens (TPRL, arXiv 2603.13394), without any label."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tprl import processes
from tprl.autoencoder import reconstruction_loss
from tprl.config import AutoencoderStage
from tprl.lvlm.cache import EncodedSamples
from tprl.pruner import TokenPruner
from tprl.run import Stage

NAME = "autoencoder"
STATISTICS_PICTURES = 64


def autoencoder_stage(pruner: TokenPruner, train: EncodedSamples, config: AutoencoderStage, seed: int) -> Stage:
    """The stage; sets the pruner's centre and scale of tokens first."""
    processes.check_shares(min(config.pictures, len(train.image_ids)), "the batch of")
    first = torch.cat([train.features(name).tokens.float() for name in train.image_ids[:STATISTICS_PICTURES]])
    pruner.token_mean.copy_(first.mean(0))
    pruner.token_scale.copy_(first.var(0, correction=0).mean().rsqrt())
    optimizer = torch.optim.AdamW(
        pruner.autoencoder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    batch: dict[str, Tensor] = {}
    return Stage(NAME, config.steps, pruner, optimizer, _update(pruner, optimizer, train, config, seed, batch), batch)


def _update(
    pruner: TokenPruner,
    optimizer: torch.optim.Optimizer,
    train: EncodedSamples,
    config: AutoencoderStage,
    seed: int,
    batch: dict[str, Tensor],
) -> Callable[[int], dict[str, float]]:
    def update(step: int) -> dict[str, float]:
        rng = np.random.default_rng((seed, 1, step))
        chosen = rng.choice(len(train.image_ids), min(config.pictures, len(train.image_ids)), replace=False)
        rows = [train.features(train.image_ids[int(i)]).tokens for i in chosen[processes.mine()]]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], True)
        batch["tokens"] = pad_sequence(rows, True)
        tokens = pruner.normalise(batch["tokens"].to(pruner.token_mean.device))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - 0.95 * step / config.steps)
        loss = _part(reconstruction_loss(pruner.autoencoder(tokens), tokens, mask), tokens[mask])
        optimizer.zero_grad()
        loss.backward()
        processes.sum_gradients(pruner.autoencoder.parameters())
        norm = torch.nn.utils.clip_grad_norm_(pruner.autoencoder.parameters(), 1.0)
        optimizer.step()
        return {"unexplained_variance": processes.total(loss).item(), "grad_norm": norm.item()}

    return update


def _part(loss: Tensor, real: Tensor) -> Tensor:
    """A process's part of the loss of all pictures: its loss is relative to the variance of its own tokens."""
    count, sums, squares = len(real), real.sum(0), real.square().sum()
    own = squares - sums.square().sum() / count
    whole = processes.total(torch.cat([sums, torch.stack([squares, squares.new_tensor(count)])]))
    return loss * own / (whole[-2] - whole[:-2].square().sum() / whole[-1])
