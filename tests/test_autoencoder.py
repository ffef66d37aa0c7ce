"""The autoencoder: its layers written out, its loss one token at a time, and that it learns what can be learnt."""

import pytest
import torch

from tprl.autoencoder import TokenAutoencoder, reconstruction_loss

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_layers_written_out() -> None:
    """``D -> hidden -> latent``, LayerNorm and GELU between."""
    model, tokens = TokenAutoencoder(width=10, hidden=7, latent=3), noise(2, 4, 10)
    first, norm, _, second = model.encoder
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    hidden = tokens @ first.weight.T + first.bias
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    hidden = hidden * norm.weight + norm.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    latents = model.encode(tokens)
    assert latents.shape == (2, 4, 3)
    torch.testing.assert_close(latents, hidden @ second.weight.T + second.bias, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(tokens), model.decoder(latents))
    assert model(tokens).shape == tokens.shape


def test_every_token_by_itself() -> None:
    model, tokens = TokenAutoencoder(10, 7, 3), noise(2, 4, 10)
    changed = tokens.clone()
    changed[0, 2] += 1
    same = torch.ones(2, 4, dtype=torch.bool)
    same[0, 2] = False
    torch.testing.assert_close(model.encode(changed)[same], model.encode(tokens)[same])
    assert (model.encode(changed)[~same] - model.encode(tokens)[~same]).abs().max() > 1e-3


def test_loss_one_token_at_a_time() -> None:
    tokens, guess = noise(2, 4, 5), noise(2, 4, 5, seed=1)
    real = [(row, token) for row in range(2) for token in range(4) if MASK[row, token]]
    mean = sum(tokens[place] for place in real) / len(real)
    error = sum(((guess[place] - tokens[place]) ** 2).sum() for place in real)
    spread = sum(((tokens[place] - mean) ** 2).sum() for place in real)
    torch.testing.assert_close(reconstruction_loss(guess, tokens, MASK), error / spread)


def test_scale_of_the_loss() -> None:
    tokens = noise(2, 4, 5)
    mean = tokens[MASK].mean(0).expand_as(tokens)
    torch.testing.assert_close(reconstruction_loss(mean, tokens, MASK), torch.ones(()))
    assert reconstruction_loss(tokens, tokens, MASK) == 0
    scaled = reconstruction_loss(mean * 100 + 7, tokens * 100 + 7, MASK)
    torch.testing.assert_close(scaled, torch.ones(()))


@pytest.mark.parametrize("filling", [1e4, torch.nan])
def test_padding_changes_nothing(filling: float) -> None:
    tokens, guess = noise(2, 4, 5), noise(2, 4, 5, seed=1)
    expected = reconstruction_loss(guess, tokens, MASK)
    tokens[~MASK], guess[~MASK] = filling, -filling
    assert torch.equal(reconstruction_loss(guess, tokens, MASK), expected)
    tokens[0, 0] += 1
    assert not torch.equal(reconstruction_loss(guess, tokens, MASK), expected)


def test_it_learns_what_fits_into_the_latents_and_not_more() -> None:
    """Tokens on a plane go through three latents; tokens of full rank do not."""
    losses = {}
    for name, tokens in {"plane": noise(1, 256, 2) @ noise(2, 12, seed=1), "full": noise(1, 256, 12)}.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = TokenAutoencoder(12, 32, 3)
        optimizer, mask = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.ones(1, 256, dtype=torch.bool)
        for _ in range(150):
            loss = reconstruction_loss(model(tokens), tokens, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["plane"] < 0.05
    assert losses["full"] > 0.3
