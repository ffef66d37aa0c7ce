"""The model ``tprl`` of lmms-eval: a model of Hugging Face that answers from the visual tokens a method keeps."""

from typing import Any, NoReturn

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

import tprl
from tprl.evaluate.answers import greedy_answer
from tprl.evaluate.latency import question_inputs
from tprl.lvlm.cache import ANSWER_LIMIT
from tprl.pocket.assemble import SHIPPED_PRUNER, open_lvlm
from tprl.progress import track
from tprl.pruner import TokenPruner


class Tprl(lmms):
    """Greedy answers about one picture each.

    Args:
        model: "pocket-llava", or a folder or Hub id of a model.
        method: "tprl", or a peer's name, see ``tprl.selectors``; "tprl" unless given.
        pruner: folder or Hub id of the pruner that "tprl" stands for; the shipped one unless given.
        budget: visual tokens to keep.
        keep_ratio: share of the visual tokens to keep.
        threshold: keep probability above which a token stays; that of the pruner where there is one and no amount is
            given. Where there is none of these five, nothing is pruned.
        dtype: of the model: "auto", "float32", "bfloat16" or "float16".
        device: as torch names it.
        batch_size: 1, since questions are answered one by one.
        max_batch_size: as ``batch_size``.

    Raises:
        ValueError: an argument is not allowed, or the pruner was trained for another model.
    """

    def __init__(
        self,
        model: str = "pocket-llava",
        method: str | None = None,
        pruner: str | None = None,
        budget: int | None = None,
        keep_ratio: float | None = None,
        threshold: float | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if pruner is not None and method not in (None, TokenPruner.name):
            raise ValueError(f"a pruner goes with the method {TokenPruner.name}, not with {method}")
        if str(batch_size) != "1" or max_batch_size not in (None, 1):
            raise ValueError(f"questions are answered one by one: --batch_size 1, got {batch_size}")
        self.lvlm = open_lvlm(model, dtype, device)
        amounts: dict[str, Any] = {"budget": budget, "keep_ratio": keep_ratio, "threshold": threshold}
        if any(given is not None for given in (method, pruner, *amounts.values())):
            chosen: TokenPruner | str = method or TokenPruner.name
            if chosen == TokenPruner.name:
                chosen = TokenPruner.from_pretrained(pruner or SHIPPED_PRUNER, self.lvlm.fingerprint).to(device)
            tprl.prune(self.lvlm.model, chosen, processor=self.lvlm.processor, **amounts)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self._answer(*request.args) for request in track(requests, "answering")]

    def _answer(
        self, context: str, settings: dict[str, Any], doc_to_visual: Any, doc_id: int, task: str, split: str
    ) -> str:
        pictures = doc_to_visual(self.task_dict[task][split][doc_id])
        shown = len(pictures or ())
        if shown != 1 or not isinstance(pictures[0], Image.Image):
            what = f"{shown} pictures" if shown != 1 else f"a {type(pictures[0]).__name__}, no picture,"
            raise ValueError(f"{task} shows {what} with question {doc_id}; the model tprl takes 1 picture")
        if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
            raise ValueError(f"the model tprl answers greedily, {task} asks for {settings}")
        inputs = question_inputs(self.lvlm, pictures[0].convert("RGB"), context)
        text = greedy_answer(self.lvlm, inputs, settings.get("max_new_tokens", ANSWER_LIMIT))
        until = settings.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            text = text.split(end)[0] if end else text
        return text.strip()

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        raise ValueError("the model tprl generates answers; choose a task of the type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        raise ValueError("the model tprl answers one question; choose a task of the type generate_until")
