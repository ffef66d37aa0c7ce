"""How fast the rollout engine is against the plain loop, how its cost grows, and how much memory it takes.

The plain loop is a re-statement of what is usually written first: one episode at a time, and at every step the picture
is processed and encoded anew, the policy looks at a batch of one, and the answer is generated token by token. The
engine plays a whole round at once; the loop plays the first episodes of that round with the same random numbers, and
the script stops if their rewards differ in float32. All is measured in one process, so what else the machine does meets
both.

    python benchmarks/rollout_speed.py --out runs/rollout_speed.json
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tprl.config import PpoStage
from tprl.data import load_source
from tprl.data.sample import Source
from tprl.evaluate.latency import question_inputs
from tprl.evaluate.provenance import commit, machine, write_json
from tprl.lvlm.cache import ANSWER_LIMIT, EncodedSamples
from tprl.lvlm.model import Lvlm
from tprl.lvlm.packing import make_prefix
from tprl.lvlm.prune import prune
from tprl.lvlm.score import AnswerScores, Within
from tprl.pocket.assemble import SHIPPED_PRUNER, cache_folder, open_lvlm
from tprl.pruner import TokenPruner
from tprl.train.ppo import Rollouts, roll_out
from tprl.types import Selection, VisualTokens

SIDES = (12, 16, 24, 32)
BATCHES = (1, 4, 16, 64)
Row = dict[str, Any]


class Dice:
    """Draws one action of one episode from a policy, with given random numbers; stands where a selector does."""

    needs: frozenset[str] = frozenset()

    def __init__(self, pruner: TokenPruner) -> None:
        self.pruner = pruner

    def throw(self, state: Tensor, uniform: Tensor, discount: float) -> None:
        """Set the state ``(1, N)`` to act in, the random numbers ``(N,)`` and the factor of the probabilities."""
        self.state, self.uniform, self.discount = state, uniform, discount

    def select_above(self, visual: VisualTokens, threshold: float) -> Selection:
        logits = self.pruner.look(self.pruner.encode(visual), visual, self.state).logits[0]
        keep = (self.uniform < self.discount * logits.sigmoid()) & self.state[0]
        if not keep.any():
            keep[logits.masked_fill(~self.state[0], -torch.inf).argmax()] = True
        self.state = keep[None]
        return Selection(self.state)


@torch.no_grad()
def play_alone(
    lvlm: Lvlm, pruner: TokenPruner, data: EncodedSamples, index: int, noise: Tensor, settings: PpoStage, cached: bool
) -> list[float]:
    """The rewards of one episode about sample ``index``, played by the plain loop.

    Args:
        noise: random numbers ``(T, N)``.
        cached: generate with a KV cache.
    """
    sample, dice = data.samples[index], Dice(pruner)
    image, block = data.source.image(sample.image_id), data.block(index)
    reference = block.ids[block.answer_start :]

    def ask() -> float:
        inputs = question_inputs(lvlm, image, sample.question)
        options: dict[str, Any] = {"max_new_tokens": ANSWER_LIMIT, "do_sample": False, "use_cache": cached}
        ids = cast(Any, lvlm.model).generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        return float(ids.tolist() == reference)

    before, state, rewards = ask(), torch.ones(1, noise.shape[1], dtype=torch.bool), []
    for t in range(settings.horizon):
        held = int(state.sum())
        dice.throw(state, noise[t], settings.discount**t)
        with prune(lvlm.model, cast(Any, dice), budget=None, threshold=0.5, template_ids=lvlm.prompts.template_ids):
            after = ask()
        state = dice.state
        rewards.append(settings.alpha * (after - before) + settings.beta * (1 - int(state.sum()) / held))
        before = after
    return rewards


class Resized:
    """Stands where ``EncodedSamples`` stands: the same questions about pictures of ``side * side`` tokens."""

    def __init__(self, data: EncodedSamples, side: int) -> None:
        self.data, self.side = data, side
        self.unpruned = data.unpruned
        self.before, _ = data.lvlm.prompts.ids(data.samples[0].question)
        self.image_id = int(data.lvlm.model.config.image_token_id)

    def visual(self, indices: Sequence[int]) -> VisualTokens:
        whole, side = self.data.visual(indices), self.side
        old = int(whole.tokens.shape[1] ** 0.5)
        grid = whole.tokens.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
        tokens = nn.functional.interpolate(grid, (side, side), mode="bilinear").flatten(2).mT.to(whole.tokens)
        centres = (torch.arange(side) + 0.5) / side
        coords = torch.cartesian_prod(centres, centres).expand(len(indices), -1, -1)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        return VisualTokens(tokens, mask, coords, whole.query, whole.query_mask)

    def score(
        self,
        indices: Sequence[int],
        tokens: Tensor,
        keep_mask: Tensor,
        within: Within | None = None,
        pictures: Tensor | None = None,
    ) -> AnswerScores:
        count = len(indices)
        prefix = make_prefix([self.before] * count, self.image_id, [(self.side**2,)] * count)
        blocks = [[self.data.block(i)] for i in indices]
        return self.data.scorer.score(prefix, tokens, keep_mask, blocks, within, pictures)


def play(
    pruner: TokenPruner, data: EncodedSamples | Resized, questions: int, settings: PpoStage
) -> tuple[Rollouts, Row]:
    """A round of the engine, and what it took."""
    forget_peak()
    start = time.perf_counter()
    rollouts = roll_out(pruner, cast(EncodedSamples, data), list(range(questions)), settings, dealt())
    seconds = time.perf_counter() - start
    return rollouts, {
        "questions": questions,
        "rollouts": len(rollouts.rows),
        "kept_mean": rollouts.trajectory.counts[:, 1:].float().mean().item(),
        "ms_per_rollout": 1000 * seconds / len(rollouts.rows),
        "rollouts_per_second": len(rollouts.rows) / seconds,
        "peak_mib": peak_mib(),
    }


def dealt() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def forget_peak() -> None:
    """Let the kernel count this process's peak memory from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """Peak resident memory of the process since ``forget_peak``."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def against_the_loop(
    lvlm: Lvlm, pruner: TokenPruner, data: EncodedSamples, questions: int, episodes: int, settings: PpoStage
) -> list[Row]:
    """The engine, and the loop with and without a KV cache, and in which share of the loop's episodes both find the
    same rewards.

    Raises:
        RuntimeError: rewards differ in float32. In bfloat16 a batch rounds otherwise than a single picture, which may
            keep a token more or less.
    """
    play(pruner, data, 2, settings)
    rollouts, row = play(pruner, data, questions, settings)
    rows = [{"way": "engine", **row, "padding": data.scorer.passes.padding_share()}]
    count = rollouts.visual.mask.shape[1]
    generator = dealt()
    noise = torch.stack(
        [torch.rand(len(rollouts.rows), count, generator=generator) for _ in range(settings.horizon)], 1
    )
    for cached in (True, False):
        play_alone(lvlm, pruner, data, 0, noise[0], settings, cached)
        start = time.perf_counter()
        found = [
            play_alone(lvlm, pruner, data, int(rollouts.rows[e]), noise[e], settings, cached) for e in range(episodes)
        ]
        seconds = (time.perf_counter() - start) / episodes
        wanted = rollouts.trajectory.rewards[:episodes].cpu()
        same = torch.isclose(torch.tensor(found), wanted, atol=1e-5).all(1).float().mean().item()
        if same < 1 and lvlm.model.dtype == torch.float32:
            raise RuntimeError(f"rewards differ: {found} and {wanted.tolist()}")
        rows.append({
            "way": f"plain loop{'' if cached else ', no KV cache'}", "rollouts": episodes,
            "ms_per_rollout": 1000 * seconds, "rollouts_per_second": 1 / seconds,
            "engine_is_faster": seconds * row["rollouts_per_second"], "same_rewards": same,
        })  # fmt: skip
    return rows


def show(title: str, rows: list[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title)
    for row in rows:
        values = [row.get(name, "") for name in names]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    Console(width=120).print(table)


def main(
    questions: int = 32,
    rollouts: int = 8,
    episodes: int = 8,
    sides: tuple[int, ...] = SIDES,
    batches: tuple[int, ...] = BATCHES,
    data: str = "scenes",
    dtype: str = "auto",
    out: Path | None = None,
) -> None:
    """Measure.

    Args:
        questions: of the engine's round.
        rollouts: of every question.
        episodes: that the plain loop plays, the first ones of the round.
        sides: grids of visual tokens whose cost is measured, side * side tokens each.
        batches: numbers of questions whose cost is measured.
        data: "scenes", "easy-vqa", or a .jsonl file.
        dtype: of the model that all is measured on: "auto", "float32" or "bfloat16". The loop and the engine are
            compared in float32 too.
        out: JSON file to write to.
    """
    lvlm = open_lvlm("pocket-llava", dtype)
    precise = lvlm if lvlm.model.dtype == torch.float32 else open_lvlm("pocket-llava", "float32")
    pruner = TokenPruner.from_pretrained(SHIPPED_PRUNER, lvlm.fingerprint)
    source: Source = load_source(data, "val", max(questions, *batches, 1))
    settings = PpoStage(questions=questions, rollouts=rollouts, horizon=3, score="correct")
    results: dict[str, list[Row]] = {}
    for measured in dict.fromkeys((precise, lvlm)):
        encoded = EncodedSamples(measured, source, cache_folder())
        title = f"engine and plain loop, {measured.model.dtype}".replace("torch.", "")
        results[title] = against_the_loop(measured, pruner, encoded, questions, episodes, settings)
    results["visual tokens"] = [
        {"visual_tokens": side**2, **play(pruner, Resized(encoded, side), questions, settings)[1]} for side in sides
    ]
    results["batch"] = [play(pruner, encoded, batch, replace(settings, questions=batch))[1] for batch in batches]
    for title, rows in results.items():
        show(title, rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"machine": machine(lvlm), "commit": commit(), "data": data, **results})
        print(f"wrote {out}")


if __name__ == "__main__":
    tyro.cli(main)
