"""What is refused before any work is done."""

from collections.abc import Collection, Iterable
from pathlib import Path

from tprl import processes
from tprl.data.sample import Source
from tprl.evaluate.methods import Method
from tprl.lvlm.in_model import check_first_cut
from tprl.lvlm.model import Lvlm
from tprl.lvlm.signals import tower_signals

CELLS = "cells"
"""The folder of what was measured, in that of the results."""
LOOKED_AT = 8
"""Pictures whose visual tokens tell which budgets are allowed."""


def check_out(out: Path, resume: bool, overwrite: bool, results: str = CELLS) -> None:
    """Raise ValueError unless a run may write into ``out``, and over what is there if ``results`` (a pattern of names)
    are; the first process looks, before any of them writes."""
    if processes.is_first():
        if resume and overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file, not a folder")
        if out.exists() and not (resume or overwrite):
            raise ValueError(f"{out} exists; --resume goes on with it, --overwrite throws its results away")
        if overwrite and out.exists() and any(out.iterdir()) and not any(out.glob(results)):
            raise ValueError(f"{out} holds no results, so --overwrite leaves it alone; give another folder")
    processes.meet()


def check_budgets(lvlm: Lvlm, source: Source, budgets: Iterable[int]) -> int:
    """The most visual tokens that one of the first pictures of ``source`` has.

    Raises:
        ValueError: a budget is more than that.
    """
    first = list(dict.fromkeys(sample.image_id for sample in source.samples))[:LOOKED_AT]
    total = max(len(picture.tokens) for picture in lvlm.encode_images([source.image(name) for name in first]))
    for budget in budgets:
        if not 1 <= budget <= total:
            raise ValueError(
                f"budget {budget} is not allowed; 1 to {total}, the most visual tokens that one of the first "
                f"{len(first)} pictures has"
            )
    return total


def check_reach(lvlm: Lvlm, methods: Iterable[Method], visual_tokens: Collection[int]) -> None:
    """Raise ValueError unless the methods can prune this model, and keep to their budgets with pictures of so many
    ``visual_tokens``."""
    layers = lvlm.model.config.get_text_config().num_hidden_layers
    for method in methods:
        if missing := method.needs - tower_signals(lvlm.model):
            names = ", ".join(sorted(missing))
            raise ValueError(f"{method.name} needs {names}, which the tower of this {lvlm.family.name} does not give")
        if method.in_model is not None:
            check_first_cut(lvlm.model, method.in_model)
        for count in visual_tokens:
            method.layer_counts(layers, count)
