"""Stage 2: learning from demonstrations (TPRL, arXiv 2603.13394).

Deviation from the paper. There the policy imitates each step's action. Inference is one-shot, however, and ranks the
tokens of the *first* state, which by the first step alone would tell 64 tokens from 512 and nothing more. So the
target of a token in state t is the share of the steps from t on that it survives, and its binary cross-entropy makes
the keep probability just that: one look ranks tokens by how long they would be kept.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import tprl
from tprl import processes
from tprl.checkpoint import DamagedCheckpoint, load_checkpoint, make_once, save_checkpoint
from tprl.config import ImitateStage, TrainConfig
from tprl.demonstrations import SEARCH, MemoScore, Search, Worth, demonstrate, make_teacher
from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.recorded import Recorded
from tprl.lvlm.text_attention import text_attention
from tprl.progress import track
from tprl.pruner import TokenPruner
from tprl.run import RunFolder, Stage
from tprl.selectors import InModel, Selector
from tprl.selectors.grid import Random
from tprl.types import VisualTokens

NAME = "imitate"
LOG = "demonstrations"
SHARD = 64


@dataclass(frozen=True)
class DemonstrationSet:
    """Demonstrations that the reward likes: bool ``states (M, T + 1, N)`` of samples ``indices (M,)``."""

    indices: Tensor
    states: Tensor


def collect_demonstrations(run: RunFolder, train: EncodedSamples, config: TrainConfig) -> DemonstrationSet:
    """The best demonstration of each of the first samples of ``train``.

    They are kept beside the encoded pictures, for all trainings whose demonstrations would be the same. One whose
    return is not above 0 would teach to lose the answer, and is left out. The metrics tell how often each teacher was
    the best of those that stay.
    """
    names = [*heuristics(config.imitate), SEARCH]
    teachers = [make_teacher(name, config.seed) for name in names[:-1]]
    count = min(config.imitate.demonstrations, len(train))
    folder = train.folder / f"demonstrations-{_key(train, count, config)}"
    folder.mkdir(exist_ok=True)
    paths = {first: folder / f"{first:07d}.safetensors" for first in range(0, count, SHARD)}
    for first in track(list(paths)[processes.mine()], "demonstrations"):
        indices = list(range(first, min(first + SHARD, count)))
        make_once(paths[first], partial(_demonstrate, paths[first], teachers, train, indices, config), _is_whole)
    processes.meet()
    shards = [load_checkpoint(path)[0] for path in paths.values()]
    width = max(shard["states"].shape[-1] for shard in shards)
    states = torch.cat([nn.functional.pad(shard["states"], (0, width - shard["states"].shape[-1])) for shard in shards])
    returns = torch.cat([shard["returns"] for shard in shards])
    winner = torch.cat([shard["teacher"] for shard in shards])
    liked = returns > 0
    wins = Counter(names[int(i)] for i in winner[liked])
    if not run.logged(LOG):
        run.log(
            LOG, 0, {"liked": float(liked.sum())} | {f"won_by_{name}": wins[name] for name in config.imitate.teachers}
        )
    return DemonstrationSet(liked.nonzero()[:, 0], states[liked].bool())


def _key(train: EncodedSamples, count: int, config: TrainConfig) -> str:
    """A digest of all that demonstrations depend on besides the model and the pictures: teachers may change from
    release to release, and those that draw depend on the seed."""
    settings, ppo = config.imitate, config.ppo
    drawn = {SEARCH, Random.name} & set(settings.teachers)
    parts = [
        [tprl.__version__, train.lvlm.prompts.template],
        [(sample.image_id, sample.question, sample.answers) for sample in train.samples[:count]],
        [settings.teachers, settings.margin, settings.budgets, settings.search_rounds, settings.search_children],
        [ppo.score, ppo.alpha, settings.beta, ppo.gamma],
        config.seed if drawn else None,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def heuristics(settings: ImitateStage) -> tuple[str, ...]:
    """The teachers that are selectors.

    Raises:
        ValueError: there are none, and nothing to search from.
    """
    names = tuple(name for name in settings.teachers if name != SEARCH)
    if not names:
        raise ValueError(f"teachers {settings.teachers} are not allowed; {SEARCH!r} starts from what others keep")
    return names


def imitate_stage(
    pruner: TokenPruner, train: EncodedSamples, demonstrations: DemonstrationSet, config: TrainConfig
) -> Stage:
    """The stage: passes over the demonstrations in an order of the seed's."""
    settings = config.imitate
    if not len(demonstrations.indices):
        raise ValueError(
            "no demonstration has a positive return, so there is none to imitate; a larger imitate.beta or larger "
            "imitate.budgets let teachers lose more"
        )
    processes.check_shares(min(settings.batch, len(demonstrations.indices)), "the batch of")
    steps = settings.epochs * max(1, len(demonstrations.indices) // settings.batch)
    optimizer = torch.optim.AdamW(pruner.policy.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    batch: dict[str, Tensor] = {}
    update = _update(pruner, optimizer, train, demonstrations, config, steps, batch)
    return Stage(NAME, steps, pruner, optimizer, update, batch)


def survival_targets(states: Tensor) -> Tensor:
    """For states ``(B, T + 1, N)`` the share of the later states that hold each token, float ``(B, T, N)``."""
    horizon = states.shape[1] - 1
    later = states[:, 1:].float().flip(1).cumsum(1).flip(1)
    return later / torch.arange(horizon, 0, -1)[None, :, None]


def imitation_loss(logits: Tensor, target: Tensor, state: Tensor) -> Tensor:
    """Binary cross-entropy over the tokens that a state holds, in nats a token."""
    loss = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * state).sum() / state.sum()


def _update(
    pruner: TokenPruner,
    optimizer: torch.optim.Optimizer,
    train: EncodedSamples,
    demonstrations: DemonstrationSet,
    config: TrainConfig,
    steps: int,
    batch: dict[str, Tensor],
) -> Callable[[int], dict[str, float]]:
    settings = config.imitate
    per_epoch = steps // settings.epochs

    def update(step: int) -> dict[str, float]:
        order = np.random.default_rng((config.seed, 2, step // per_epoch)).permutation(len(demonstrations.indices))
        chosen = torch.from_numpy(order[step % per_epoch * settings.batch :][: settings.batch])
        held = demonstrations.states[chosen].sum((0, 2))
        chosen = chosen[processes.mine()]
        visual = train.visual(demonstrations.indices[chosen].tolist())
        states = demonstrations.states[chosen][..., : visual.mask.shape[1]]
        batch.update(samples=demonstrations.indices[chosen], tokens=visual.tokens, states=states)
        targets, states = survival_targets(states).to(visual.mask.device), states.to(visual.mask.device)
        with torch.no_grad():
            latents = pruner.encode(visual)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (step + 1) / 20) * (1 - 0.95 * step / steps)
        losses = []
        for t in range(targets.shape[1]):
            logits = pruner.look(latents, visual, states[:, t]).logits
            share = states[:, t].sum() / held[t]
            losses.append(share * imitation_loss(logits, targets[:, t], states[:, t]))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        processes.sum_gradients(pruner.policy.parameters())
        norm = nn.utils.clip_grad_norm_(pruner.policy.parameters(), 1.0)
        optimizer.step()
        told = processes.total(torch.stack([loss, losses[0]])).tolist()
        return {"loss": told[0], "first_step_loss": told[1], "grad_norm": norm.item()}

    return update


def worth_function(
    data: EncodedSamples, indices: Sequence[int], tokens: Tensor, kind: str, pictures: Tensor | None = None
) -> Worth:
    """How good the answers to samples ``indices`` are, whose visual tokens are ``tokens (B, N, D)``.

    Args:
        kind: see ``PpoStage.score``. A log-likelihood is the mean over the answer's tokens, in nats.
        pictures: int64 ``(B,)``, for each sample the first row with the same picture; None where all differ.
    """

    def worth(rows: Tensor, masks: Tensor) -> Tensor:
        looked_at = rows if pictures is None else pictures[rows.cpu()]
        scores = data.score([indices[row] for row in rows.tolist()], tokens, masks, pictures=looked_at)
        return scores.correct.float() if kind == "correct" else scores.log_prob

    return worth


def unpruned_scores(data: EncodedSamples, indices: Sequence[int], kind: str) -> Tensor:
    """The same score of the whole input, ``(B,)``."""
    return (data.unpruned.correct.float() if kind == "correct" else data.unpruned.log_prob)[list(indices)]


def _demonstrate(
    path: Path, teachers: Sequence[Selector | InModel], train: EncodedSamples, indices: list[int], config: TrainConfig
) -> None:
    """Write the shard of samples ``indices``."""
    visual = train.visual(indices)
    selectors = [Recorded(each, train, indices) if isinstance(each, InModel) else each for each in teachers]
    if any("text_attention" in selector.needs for selector in selectors):
        visual.signals["text_attention"] = _text_attention(train, indices, visual)
    kind, settings = config.ppo.score, config.imitate
    names = [train.samples[index].image_id for index in indices]
    pictures = torch.tensor([names.index(name) for name in names])
    search = None
    if SEARCH in settings.teachers:
        search = Search(settings.search_rounds, settings.search_children, config.seed)
    best = demonstrate(
        selectors,
        visual,
        settings.budgets,
        unpruned_scores(train, indices, kind),
        MemoScore(worth_function(train, indices, visual.tokens, kind, pictures)),
        config.ppo.alpha,
        settings.beta,
        config.ppo.gamma,
        settings.margin,
        search,
    )
    shard = {"states": best.states.to(torch.uint8), "teacher": best.teacher, "returns": best.returns}
    save_checkpoint(path, shard, {})


def _text_attention(train: EncodedSamples, indices: list[int], visual: VisualTokens) -> Tensor:
    """The signal of a batch, questions on one picture together: ``(B, N)``."""
    signal = torch.zeros(visual.mask.shape, device=visual.mask.device)
    rows: dict[str, list[int]] = {}
    for row, index in enumerate(indices):
        rows.setdefault(train.samples[index].image_id, []).append(row)
    for chosen in rows.values():
        real = visual.mask[chosen[0]]
        blocks = [train.block(indices[row]) for row in chosen]
        prefix = train.prefix([indices[chosen[0]]])
        seen = text_attention(train.scorer.reader, prefix, visual.tokens[chosen[0]][real], blocks)
        for row, attention in zip(chosen, seen, strict=True):
            signal[row, real] = attention
    return signal


def _is_whole(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except (FileNotFoundError, DamagedCheckpoint):
        return False
    return True
