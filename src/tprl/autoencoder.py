"""The self-supervised autoencoder whose encoder turns visual tokens into the policy's compact state.

TPRL, arXiv 2603.13394, section on state representation: token-wise ``D -> hidden -> latent -> hidden -> D`` with
LayerNorm and GELU, trained to reconstruct visual tokens alone.
"""

from torch import Tensor, nn


class TokenAutoencoder(nn.Module):
    """Token-wise autoencoder.

    Args:
        width: D, the language model's width.
        hidden: units of the hidden layers.
        latent: L, width of the compact state.
    """

    def __init__(self, width: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder = _two_layers(width, hidden, latent)
        self.decoder = _two_layers(latent, hidden, width)

    def encode(self, tokens: Tensor) -> Tensor:
        """``(..., D)`` to latents ``(..., L)``."""
        latents: Tensor = self.encoder(tokens)
        return latents

    def forward(self, tokens: Tensor) -> Tensor:
        """The reconstruction ``(..., D)`` of ``tokens``."""
        reconstruction: Tensor = self.decoder(self.encoder(tokens))
        return reconstruction


def reconstruction_loss(reconstruction: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over real tokens, relative to their variance: 1 is what the mean token would score.

    Args:
        reconstruction: ``(B, N, D)``.
        tokens: ``(B, N, D)``.
        mask: bool ``(B, N)``.
    """
    real = tokens[mask]
    error = (reconstruction[mask] - real).pow(2).mean()
    return error / (real - real.mean(0)).pow(2).mean()


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs))
