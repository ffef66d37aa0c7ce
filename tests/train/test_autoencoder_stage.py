"""The stage that trains the autoencoder: the scale it brings tokens to, and that it learns a model's tokens."""

from pathlib import Path

import pytest
import torch

from evaluate.world import World, tiny_lvlm
from tprl.autoencoder import reconstruction_loss
from tprl.config import AutoencoderStage, PrunerConfig
from tprl.lvlm.cache import EncodedSamples
from tprl.pruner import TokenPruner
from tprl.train.autoencoder import autoencoder_stage


def test_tokens_are_centred_and_scaled_and_then_explained(tmp_path: Path) -> None:
    lvlm = tiny_lvlm()
    data = EncodedSamples(lvlm, World(), tmp_path)
    torch.manual_seed(0)
    pruner = TokenPruner(PrunerConfig(8, 16, width=lvlm.width, fingerprint=lvlm.fingerprint))
    stage = autoencoder_stage(pruner, data, AutoencoderStage(steps=150, pictures=3, learning_rate=1e-2), seed=0)
    tokens = torch.cat([data.features(image_id).tokens for image_id in data.image_ids])
    seen = pruner.normalise(tokens)
    torch.testing.assert_close(seen.mean(0), torch.zeros(lvlm.width), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.square().mean(), torch.ones(()), atol=1e-4, rtol=0)
    assert (tokens.square().mean() - 1).abs() > 0.01  # they were not before
    torch.testing.assert_close(seen[0] - seen[1], (tokens[0] - tokens[1]) * pruner.token_scale)
    policy = {name: weight.clone() for name, weight in pruner.policy.named_parameters()}
    losses = [stage.update(step)["unexplained_variance"] for step in range(stage.steps)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(weight, policy[name]) for name, weight in pruner.policy.named_parameters())


def test_every_step_and_every_seed_sees_other_pictures(tmp_path: Path) -> None:
    lvlm = tiny_lvlm()
    data = EncodedSamples(lvlm, World(), tmp_path)

    def seen(seed: int, step: int) -> torch.Tensor:
        pruner = TokenPruner(PrunerConfig(8, 16, width=lvlm.width, fingerprint=lvlm.fingerprint))
        stage = autoencoder_stage(pruner, data, AutoencoderStage(pictures=3), seed)
        stage.update(step)
        return stage.batch["tokens"]

    assert torch.equal(seen(0, 0), seen(0, 0))
    assert not torch.equal(seen(0, 0), seen(0, 1))
    assert not torch.equal(seen(0, 0), seen(1, 0))


def test_an_update_explains_the_normalised_tokens_at_its_own_rate(tmp_path: Path) -> None:
    lvlm = tiny_lvlm()
    data = EncodedSamples(lvlm, World(), tmp_path)
    torch.manual_seed(0)
    pruner = TokenPruner(PrunerConfig(8, 16, width=lvlm.width, fingerprint=lvlm.fingerprint))
    settings = AutoencoderStage(steps=40, pictures=3, learning_rate=1e-9, weight_decay=0.3)
    stage = autoencoder_stage(pruner, data, settings, seed=0)
    first, again = stage.update(0), stage.update(0)
    tokens = pruner.normalise(stage.batch["tokens"])
    loss = reconstruction_loss(pruner.autoencoder(tokens), tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))
    assert first["unexplained_variance"] == pytest.approx(loss.item(), rel=1e-4)
    assert again["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)  # of one update alone
    for step, share in ((0, 1.0), (20, 0.525), (39, 1 - 0.95 * 39 / 40)):
        stage.update(step)
        assert stage.optimizer.param_groups[0]["lr"] == pytest.approx(1e-9 * share)
    assert stage.optimizer.param_groups[0]["weight_decay"] == 0.3
