"""Where the time of a training and of an inference goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch

from tprl.clock import Seconds, enter, leave, measured, phase
from tprl.config import TrainConfig
from tprl.data.sample import Source
from tprl.demonstrations import teacher_signals
from tprl.evaluate.latency import question_inputs
from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.model import Lvlm
from tprl.lvlm.prune import prune
from tprl.lvlm.signals import TOWER_SIGNALS
from tprl.pruner import TokenPruner
from tprl.run import RunFolder
from tprl.selectors import make_selector
from tprl.train.autoencoder import autoencoder_stage
from tprl.train.imitate import collect_demonstrations, heuristics, imitate_stage
from tprl.train.pipeline import without_blind_teachers
from tprl.train.ppo import ppo_stage

ANSWER_TOKENS = 16


def profile_training(lvlm: Lvlm, source: Source, pruner: TokenPruner, config: TrainConfig) -> dict[str, Seconds]:
    """Seconds of every part of a training and of each phase in it: the cache of the source's samples, the
    demonstrations, and one update of every stage once it is warm.

    Args:
        pruner: what the stages start from; left as it is.
    """
    pruner = deepcopy(pruner)
    config = without_blind_teachers(lvlm, config)
    needs = teacher_signals(heuristics(config.imitate)).values()
    parts: dict[str, Seconds] = {}
    with TemporaryDirectory() as place, _phases_of(lvlm):
        folder = Path(place)
        with measured() as parts["cache"]:
            data = EncodedSamples(lvlm, source, folder, frozenset[str]().union(*needs) & TOWER_SIGNALS)
            _ = data.unpruned
        with measured() as parts["demonstrations"]:
            demonstrations = collect_demonstrations(RunFolder(folder / "run", {}), data, config)
        for name, stage in (
            ("autoencoder update", autoencoder_stage(pruner, data, config.autoencoder, config.seed)),
            ("imitation update", imitate_stage(pruner, data, demonstrations, config)),
            ("PPO round", ppo_stage(pruner, data, config)),
        ):
            stage.update(0)
            with measured() as parts[name]:
                stage.update(1)
    return parts


@torch.no_grad()
def profile_inference(lvlm: Lvlm, source: Source, pruner: TokenPruner, budget: int) -> dict[str, Seconds]:
    """Seconds of answering the source's first question once it is warm, with every token and with ``budget`` of
    them."""
    sample = source.samples[0]
    ways: dict[str, tuple[Any, dict[str, float]]] = {
        "answer, every token": (make_selector("uniform"), {"keep_ratio": 1.0}),
        f"answer, {budget} tokens": (pruner, {"budget": budget}),
    }
    parts: dict[str, Seconds] = {}
    for name, (selector, amount) in ways.items():
        options: dict[str, Any] = {**amount, "template_ids": lvlm.prompts.template_ids}
        with _phases_of(lvlm), prune(lvlm.model, selector, **options):
            for _ in range(2):
                with measured() as parts[name]:
                    with phase("processor"):
                        inputs = question_inputs(lvlm, source.image(sample.image_id), sample.question)
                    cast(Any, lvlm.model).generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return parts


@contextmanager
def _phases_of(lvlm: Lvlm) -> Iterator[None]:
    """Makes phases of the vision tower with its projector, of the language model's passes over prompts, and of those
    over single tokens."""
    decoder: torch.nn.Module = cast(Any, lvlm.model).get_decoder()
    base = cast(Any, lvlm.model.base_model)
    base.get_image_features = phase("vision tower")(base.get_image_features)

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        shown = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        enter("language model" if cast(torch.Tensor, shown).shape[1] > 1 else "language model: decoding")

    hooks = [
        decoder.register_forward_pre_hook(begin, with_kwargs=True),
        decoder.register_forward_hook(lambda *_: leave()),
    ]
    try:
        yield
    finally:
        del base.get_image_features
        for hook in hooks:
            hook.remove()
