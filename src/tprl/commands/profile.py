"""``tprl profile``: where the time of a training and of an inference goes."""

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tprl.clock import Seconds
from tprl.config import TrainConfig
from tprl.data import load_source
from tprl.evaluate.provenance import machine, write_json
from tprl.pocket.assemble import SHIPPED_PRUNER, open_lvlm
from tprl.profiling import profile_inference, profile_training
from tprl.pruner import TokenPruner


def profile(
    *,
    model: str = "pocket-llava",
    data: str = "scenes",
    images: Path | None = None,
    pruner: Path | None = None,
    samples: int = 64,
    questions: int = 32,
    rollouts: int = 8,
    budget: int = 64,
    dtype: str = "auto",
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Measure one warm update of every stage of training, and an answer with and without pruning.

    Args:
        model: "pocket-llava", or a folder or Hub id of a model.
        data: "scenes", "scenes-crowded", "scenes-tiles", "easy-vqa", or a .jsonl file; its split "train" is used.
        images: picture folder of a .jsonl file; the file's own unless given.
        pruner: folder of the pruner; the shipped one unless given.
        samples: that are encoded and demonstrated.
        questions: in a round of PPO.
        rollouts: of every question.
        budget: visual tokens that the pruned answer keeps.
        dtype: of the model: "auto", "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        out: JSON file to write the seconds to.
    """
    if budget < 1:
        raise ValueError(f"--budget must be at least 1, got {budget}")
    defaults = TrainConfig(samples=samples)
    imitate, ppo = defaults.imitate, replace(defaults.ppo, questions=questions, rollouts=rollouts)
    settings = replace(defaults, imitate=replace(imitate, demonstrations=samples), ppo=ppo)
    source = load_source(data, "train", samples, images=images)
    lvlm = open_lvlm(model, dtype, device)
    policy = TokenPruner.from_pretrained(pruner or SHIPPED_PRUNER, lvlm.fingerprint).to(lvlm.device)
    parts = profile_training(lvlm, source, policy, settings) | profile_inference(lvlm, source, policy, budget)
    Console().print(seconds_table(parts, f"{model}, {samples} samples, {questions} x {rollouts} rollouts"))
    print(f"{lvlm.model.dtype} on {device}, {torch.get_num_threads()} thread(s)")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {"model": model, "data": data, "machine": machine(lvlm), "seconds": parts})
        print(f"wrote {out}")


def seconds_table(parts: dict[str, Seconds], title: str) -> Table:
    """A row for every phase of every part, the longest first, each with its share of the part."""
    table = Table("part", "phase", "ms", "share", title=title)
    for part, seconds in parts.items():
        whole = sum(seconds.values())
        table.add_row(part, "", f"{1000 * whole:.4g}", "", style="bold")
        for name, spent in sorted(seconds.items(), key=lambda entry: -entry[1]):
            table.add_row("", name, f"{1000 * spent:.4g}", f"{spent / whole:.0%}")
    return table
