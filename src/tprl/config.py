"""Settings of a pruner and of its training: the command line, the saved JSON and the defaults are these classes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrunerConfig:
    """A pruner's shape. The defaults suit a language model of width 576; ``paper`` is the paper's size.

    Attributes:
        width: D, width of the language model it prunes for.
        fingerprint: of that model, see ``Lvlm.fingerprint``; another model is refused.
        latent: L, width of the autoencoder's latents.
        autoencoder_hidden: hidden units of the autoencoder.
        policy_hidden: width of the policy's trunk.
        policy_layers: transformer layers of the trunk.
        policy_heads: attention heads of the trunk.
        threshold: keep probability above which a token stays when neither budget nor threshold is given.
        use_question: False hides the question from the policy (an ablation).
    """

    width: int
    fingerprint: str
    latent: int = 64
    autoencoder_hidden: int = 128
    policy_hidden: int = 64
    policy_layers: int = 2
    policy_heads: int = 4
    threshold: float = 0.5
    use_question: bool = True

    @classmethod
    def paper(cls, width: int, fingerprint: str) -> "PrunerConfig":
        """The sizes of TPRL, arXiv 2603.13394."""
        return cls(width, fingerprint, latent=256, autoencoder_hidden=512, policy_hidden=256, policy_heads=8)
