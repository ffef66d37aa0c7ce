"""How long a prefill takes, pruned and not: vision tower, projector, pruner and language model with its KV cache."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, cast

import torch
from PIL import Image
from transformers import BatchFeature

from tprl.data.sample import Sample, Source
from tprl.evaluate.methods import Method
from tprl.lvlm.in_model import dropping
from tprl.lvlm.model import Lvlm
from tprl.lvlm.prune import Selects, prune
from tprl.progress import track


def prompt_inputs(lvlm: Lvlm, source: Source, sample: Sample) -> BatchFeature:
    """``question_inputs`` of a sample."""
    return question_inputs(lvlm, source.image(sample.image_id), sample.question)


def question_inputs(lvlm: Lvlm, image: Image.Image, question: str) -> BatchFeature:
    """What ``forward`` and ``generate`` take for a question about a picture, batch 1, by the model's own processor."""
    processor = cast(Any, lvlm.processor)
    text = lvlm.prompts.text(question)
    bos = processor.tokenizer.bos_token
    inputs = processor(
        text=[text],
        images=[[image]],
        add_special_tokens=bos is None or not text.startswith(bos),
        return_tensors="pt",
    )
    return cast(BatchFeature, inputs.to(lvlm.device, lvlm.model.dtype))


def pruned_model(lvlm: Lvlm, method: Method, inputs: BatchFeature) -> AbstractContextManager[object]:
    """A context in which the model itself prunes as ``method`` says, for a prompt of batch 1 and its answer."""
    ids = inputs["input_ids"]
    visual = ids == lvlm.model.config.image_token_id
    budget = None if method.budget is None else min(method.budget, int(visual.sum()))
    if method.within is None:
        return prune(
            lvlm.model,
            cast(Selects, method.selector),
            budget=budget,
            threshold=method.threshold,
            template_ids=lvlm.prompts.template_ids,
        )
    return dropping(
        cast(Any, lvlm.model).get_decoder(),
        method.within.method,
        visual=visual,
        last=torch.tensor([ids.shape[1] - 1], device=ids.device),
        budgets=torch.tensor([budget], device=ids.device),
    )


def measure_prefills(
    lvlm: Lvlm, methods: Mapping[str, Method | None], inputs: Sequence[BatchFeature], title: str
) -> dict[str, float]:
    """Median milliseconds of a prefill by each method, None being no pruning. The methods take turns on every input, so
    that all meet the same machine; the first input warms up and does not count.

    Args:
        inputs: of at least two samples.
        title: of the progress bar.
    """
    taken: dict[str, list[float]] = {label: [] for label in methods}
    for prompt in track(inputs, title):
        for label, method in methods.items():
            with pruned_model(lvlm, method, prompt) if method else nullcontext():
                taken[label].append(prefill_ms(lvlm, prompt))
    return {label: median(milliseconds[1:]) for label, milliseconds in taken.items()}


@torch.no_grad()
def prefill_ms(lvlm: Lvlm, inputs: BatchFeature) -> float:
    """Milliseconds of one prefill, pruned or not."""
    _wait(lvlm)
    start = time.perf_counter()
    lvlm.model(**inputs, use_cache=True, logits_to_keep=1)
    _wait(lvlm)
    return 1000 * (time.perf_counter() - start)


def _wait(lvlm: Lvlm) -> None:
    """Let a GPU finish what was asked of it."""
    if lvlm.device.type == "cuda":
        torch.cuda.synchronize(lvlm.device)
