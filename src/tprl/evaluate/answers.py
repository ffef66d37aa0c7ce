"""One question about one picture, answered by the model itself as a method prunes it, and what that took."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from tprl.evaluate.flops import encoded_tokens, kv_cache_mib, lvlm_flops
from tprl.evaluate.latency import prefill_ms, pruned_model, question_inputs
from tprl.evaluate.methods import Method, count_choice
from tprl.lvlm.cache import ANSWER_LIMIT
from tprl.lvlm.in_model import Dropping
from tprl.lvlm.model import Lvlm
from tprl.lvlm.prune import Pruning

TIMED_PREFILLS = 3


@dataclass(frozen=True)
class Answered:
    """An answer and what it took, the pruner inside.

    Attributes:
        text: what the model says, by greedy decoding.
        kept: int64 ``(k,)`` on the CPU, ascending: the picture's visual tokens that reach the last layer.
        visual_tokens: that a decoder layer sees on average.
        flops: of the prefill: tower, projector, choice of the tokens and language model.
        prefill_ms: median milliseconds of ``TIMED_PREFILLS`` prefills after one that warms up.
        kv_cache_mib: MiB of the prompt's keys and values.
    """

    text: str
    kept: Tensor
    visual_tokens: float
    flops: int
    prefill_ms: float
    kv_cache_mib: float


def answered(lvlm: Lvlm, image: Image.Image, question: str, method: Method | None = None) -> Answered:
    """Ask a model, pruned by ``method`` or whole.

    Args:
        image: RGB.
        method: its budget is at most the picture's number of visual tokens.

    Raises:
        ValueError: the method cannot prune this model.
    """
    config = lvlm.model.config
    inputs = question_inputs(lvlm, image, question)
    visual = inputs["input_ids"] == config.image_token_id
    total, words = int(visual.sum()), int((~visual).sum())
    pruned: AbstractContextManager[object] = pruned_model(lvlm, method, inputs) if method else nullcontext()
    with pruned as handle:
        milliseconds = median([prefill_ms(lvlm, inputs) for _ in range(1 + TIMED_PREFILLS)][1:])
        text = greedy_answer(lvlm, inputs)
        kept = kept_tokens(handle, total).cpu()
    counts = method.layer_counts(config.get_text_config().num_hidden_layers, total) if method else None
    flops = lvlm_flops(config, len(kept), words, counts, encoded_tokens=encoded_tokens(config, inputs)).total
    seen = len(kept) if counts is None else fmean(counts)
    cache = kv_cache_mib(config, seen + words, lvlm.model.dtype.itemsize)
    if method:
        flops += _choice_flops(lvlm, image, question, method, inputs)
    return Answered(text, kept, seen, flops, milliseconds, cache)


@torch.no_grad()
def greedy_answer(lvlm: Lvlm, inputs: BatchFeature, limit: int = ANSWER_LIMIT) -> str:
    """The model's answer to a prompt of batch 1 by its own ``generate``, pruned or not, of at most ``limit`` tokens."""
    model = cast(Any, lvlm.model)
    ids = model.generate(**inputs, max_new_tokens=limit, do_sample=False, eos_token_id=lvlm.prompts.end_id)
    tokenizer = cast(Any, lvlm.processor).tokenizer
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def kept_tokens(handle: object, total: int) -> Tensor:
    """Indices of the visual tokens of the one picture that were kept, or that reached the last layer.

    Args:
        handle: what ``pruned_model`` gave, after a call; None of a whole model.
        total: how many visual tokens the picture has.
    """
    if isinstance(handle, Pruning):
        return handle.kept[0][0].indices
    if isinstance(handle, Dropping) and handle.kept:
        return handle.kept[-1][0, handle.visual[0]].nonzero()[:, 0]
    return torch.arange(total)


@torch.no_grad()
def _choice_flops(lvlm: Lvlm, image: Image.Image, question: str, method: Method, inputs: BatchFeature) -> int:
    visual = lvlm.visual_tokens(lvlm.encode_images([image], method.needs), [question])

    def prefill(counted: Method) -> None:
        with pruned_model(lvlm, counted, inputs):
            lvlm.model(**inputs, logits_to_keep=1)

    return count_choice(method, visual, lambda within: prefill(replace(method, in_model=within.method)))
