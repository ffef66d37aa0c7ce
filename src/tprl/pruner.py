"""TokenPruner: the trained encoder and policy behind one face, saved as safetensors and JSON."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tprl.autoencoder import TokenAutoencoder
from tprl.checkpoint import DamagedCheckpoint, save_tensors, save_text
from tprl.clock import phase
from tprl.config import PrunerConfig
from tprl.match import MATCHES, question_match
from tprl.novelty import novelty
from tprl.policy import Policy, PolicyOutput
from tprl.selectors.base import check, top
from tprl.sizes import sizes
from tprl.types import Selection, VisualTokens

WEIGHTS, CONFIG = "pruner.safetensors", "pruner.json"


class TokenPruner(nn.Module):
    """Says which visual tokens the question needs. One look, no generation.

    Example:
        >>> pruner = TokenPruner.from_pretrained("runs/mine/pruner")
        >>> keep_mask = pruner.select(visual, torch.tensor([64])).keep_mask
    """

    name = "tprl"
    needs: frozenset[str] = frozenset()
    reads_question = True
    token_mean: Tensor
    token_scale: Tensor

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = TokenAutoencoder(config.width, config.autoencoder_hidden, config.latent)
        latent = config.latent if config.use_autoencoder else config.width
        self.policy = Policy(
            latent + MATCHES, config.width, config.policy_hidden, config.policy_layers, config.policy_heads
        )
        self.register_buffer("token_mean", torch.zeros(config.width))
        self.register_buffer("token_scale", torch.ones(()))

    def normalise(self, tokens: Tensor) -> Tensor:
        """Visual tokens as the autoencoder reads them: float32, centred, unit variance over the training pictures."""
        return (tokens.float() - self.token_mean) * self.token_scale

    @phase("policy: latents")
    def encode(self, visual: VisualTokens) -> Tensor:
        """What the policy sees of every visual token, ``(B, N, L + MATCHES)``: its latents (the token itself without
        the autoencoder) and how it matches the question."""
        tokens = self.normalise(visual.tokens)
        latents = self.autoencoder.encode(tokens) if self.config.use_autoencoder else tokens
        match = question_match(visual) if self.config.use_question else latents.new_zeros(*latents.shape[:2], MATCHES)
        return torch.cat([latents, match], 2)

    @phase("policy: look")
    def look(self, latents: Tensor, visual: VisualTokens, state: Tensor, rows: Tensor | None = None) -> PolicyOutput:
        """The policy's output for states. Tokens that a state does not hold cost nothing; their logits are 0.

        Args:
            latents: ``(B, N, L + MATCHES)`` from ``encode``.
            visual: ``B`` pictures and their questions.
            state: bool ``(R, N)``, the tokens still held.
            rows: int64 ``(R,)``, which picture each state belongs to; None where there is one state a picture.
        """
        rows = torch.arange(len(state), device=state.device) if rows is None else rows
        order = state.int().argsort(dim=1, descending=True, stable=True)[:, : int(state.sum(1).max())]
        held = state.gather(1, order)
        output: PolicyOutput = self.policy(
            latents[rows[:, None], order],
            visual.coords[rows[:, None], order],
            held,
            visual.query[rows].float(),
            visual.query_mask[rows] & self.config.use_question,
        )
        logits = output.logits.new_zeros(state.shape).scatter(1, order, output.logits * held)
        return PolicyOutput(logits, output.state_value)

    def chosen_by(self, latents: Tensor, visual: VisualTokens, state: Tensor) -> Tensor:
        """What tokens of a state are chosen by, ``(B, N)``: the policy's logits, lowered for what a likelier token
        shows already, see ``tprl.novelty``; minus infinity where the state holds none.

        Args:
            latents: ``(B, N, L + MATCHES)`` from ``encode``.
            visual: ``B`` pictures and their questions.
            state: bool ``(B, N)``, the tokens still held.
        """
        logits = self.look(latents, visual, state).logits
        if self.config.novelty:
            logits = logits + self.config.novelty * novelty(logits, latents[..., :-MATCHES], state)
        return logits.masked_fill(~state, -torch.inf)

    def keep_probs(self, visual: VisualTokens) -> Tensor:
        """Probability of keeping each token in one look, float32 ``(B, N)``, 0 at padding: of ``chosen_by``."""
        return self._logits(visual).sigmoid()

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        """The ``budget`` most probable tokens of every row.

        Args:
            budget: int64 ``(B,)``, from 1 to the row's number of real tokens.

        Raises:
            ValueError: a budget is out of range, or the tokens have another width.
        """
        self._check(visual)
        check(self, visual, budget)
        return self._chosen(visual, top(self._logits(visual), visual.mask, budget))

    def select_above(self, visual: VisualTokens, threshold: float | None = None) -> Selection:
        """Every token whose keep probability exceeds ``threshold`` (the calibrated one unless given), and at least
        the most probable one.

        Raises:
            ValueError: the threshold is outside [0, 1], or the tokens have another width.
        """
        self._check(visual)
        threshold = self.config.threshold if threshold is None else threshold
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
        logits = self._logits(visual)
        best = torch.zeros_like(visual.mask).scatter(1, logits.argmax(1, keepdim=True), True)
        return self._chosen(visual, ((logits.sigmoid() > threshold) | best) & visual.mask)

    @torch.no_grad()
    def _logits(self, visual: VisualTokens) -> Tensor:
        """``chosen_by`` in one look. Tokens are ranked by these, since probabilities round to 1."""
        return self.chosen_by(self.encode(visual), visual, visual.mask)

    @torch.no_grad()
    def _chosen(self, visual: VisualTokens, keep_mask: Tensor) -> Selection:
        if not self.config.proportional:
            return Selection(keep_mask)
        return Selection(keep_mask, sizes=sizes(self.normalise(visual.tokens), keep_mask, visual.mask))

    def _check(self, visual: VisualTokens) -> None:
        if visual.tokens.shape[-1] != self.config.width:
            raise ValueError(
                f"this pruner was trained for a language model of width {self.config.width}, got tokens of width "
                f"{visual.tokens.shape[-1]}"
            )

    def check_fits(self, fingerprint: str) -> None:
        """Raise ValueError unless the pruner was trained for a model of this ``Lvlm.fingerprint``."""
        if fingerprint != self.config.fingerprint:
            raise ValueError(
                f"the pruner was trained for another model (width {self.config.width}, fingerprint "
                f"{self.config.fingerprint}) than this one ({fingerprint}); train one with `tprl train --model ...`"
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``pruner.safetensors`` and ``pruner.json`` into ``folder``; either file appears whole or not at all.

        Raises:
            OSError: the disk is full or the folder is not writable.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / WEIGHTS, self.state_dict(), {"format": "pt"})
        save_text(folder / CONFIG, json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, fingerprint: str | None = None) -> "TokenPruner":
        """Load a pruner from a folder or from the Hub.

        Args:
            name_or_path: a folder, or a Hub repository where there is no such folder.
            fingerprint: of the model that it is to prune; a pruner of another model is refused.

        Raises:
            FileNotFoundError: there is no such folder and no such repository, or it lacks one of the two files.
            ValueError: unknown or missing settings or weights, or another model's fingerprint.
            DamagedCheckpoint: a file is truncated.
        """
        folder = Path(name_or_path)
        if not folder.is_dir():
            if folder.is_absolute() or str(name_or_path).count("/") != 1:
                raise FileNotFoundError(f"there is no folder {folder}")
            try:
                folder = Path(snapshot_download(str(name_or_path), allow_patterns=[WEIGHTS, CONFIG]))
            except (OSError, HFValidationError) as error:
                message = f"there is no folder {folder}, and the Hub did not give a repository of that name: {error}"
                raise FileNotFoundError(message) from error
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no pruner: {name} is missing")
        try:
            settings = json.loads((folder / CONFIG).read_bytes())
        except ValueError as error:
            raise DamagedCheckpoint(f"{folder / CONFIG} is not JSON: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{folder / CONFIG} has to hold a JSON object of settings, got {settings!r:.80}")
        known = {field.name for field in fields(PrunerConfig)}
        if settings.keys() != known:
            raise ValueError(
                f"{folder / CONFIG}: unknown settings {sorted(settings.keys() - known)}, "
                f"missing settings {sorted(known - settings.keys())}"
            )
        try:
            pruner = cls(PrunerConfig(**settings))
        except TypeError as error:
            raise ValueError(f"{folder / CONFIG} holds a setting of another type: {error}") from error
        if fingerprint is not None:
            pruner.check_fits(fingerprint)
        try:
            weights = load_file(folder / WEIGHTS)
        except SafetensorError as error:
            raise DamagedCheckpoint(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from error
        expected = pruner.state_dict()
        wrong = {
            name
            for name in weights.keys() | expected.keys()
            if name not in weights or name not in expected or weights[name].shape != expected[name].shape
        }
        if wrong:
            raise ValueError(f"{folder / WEIGHTS} does not fit its settings: {sorted(wrong)}")
        pruner.load_state_dict(weights)
        return pruner.eval()

    def push_to_hub(self, repository: str, private: bool = False) -> str:
        """Upload the pruner to a Hub repository (made where it does not exist); returns its address."""
        from tempfile import TemporaryDirectory

        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repository, folder_path=folder))
