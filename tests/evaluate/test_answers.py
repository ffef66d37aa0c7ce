"""What an answer took, against the counts that belong to each part of it."""

from statistics import fmean

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evaluate.world import LAYERS, QUESTIONS, World, tiny_lvlm
from tprl.config import PrunerConfig
from tprl.evaluate import answers
from tprl.evaluate.answers import Answered, answered
from tprl.evaluate.flops import kv_cache_mib, lvlm_flops
from tprl.evaluate.latency import question_inputs
from tprl.evaluate.methods import Method, make_methods
from tprl.lvlm.model import Lvlm
from tprl.pruner import TokenPruner

QUESTION = QUESTIONS[0]
IMAGE = World().image("0")


@pytest.fixture(scope="module")
def lvlm() -> Lvlm:
    return tiny_lvlm()


def words(lvlm: Lvlm) -> int:
    return int((question_inputs(lvlm, IMAGE, QUESTION)["input_ids"] != lvlm.model.config.image_token_id).sum())


def rest(lvlm: Lvlm, answer: Answered, visual_tokens: int, layer_counts: list[int] | None = None) -> int:
    """FLOPs beyond those of the model itself."""
    model = lvlm_flops(lvlm.model.config, visual_tokens, words(lvlm), layer_counts, encoded_tokens=16)
    return answer.flops - model.total


def test_the_whole_model_chooses_nothing(lvlm: Lvlm) -> None:
    answer = answered(lvlm, IMAGE, QUESTION)
    assert answer.kept.tolist() == list(range(16))
    assert answer.visual_tokens == 16
    assert rest(lvlm, answer, 16) == 0
    assert answer.kv_cache_mib == kv_cache_mib(lvlm.model.config, 16 + words(lvlm), 4)
    assert answer.prefill_ms > 0


def test_a_policy_costs_its_own_products(lvlm: Lvlm) -> None:
    pruner = TokenPruner(PrunerConfig(8, 8, 16, 1, 2, width=lvlm.width, fingerprint=lvlm.fingerprint)).eval()
    answer = answered(lvlm, IMAGE, QUESTION, Method(pruner.name, pruner, 5))
    visual = lvlm.visual_tokens(lvlm.encode_images([IMAGE]), [QUESTION])
    assert answer.kept.tolist() == pruner.select(visual, torch.tensor([5])).keep_mask[0].nonzero()[:, 0].tolist()
    compared = 2 * 16 * 5 * lvlm.width  # every token with each of those that are kept
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as looking:
        pruner.keep_probs(visual)
    assert rest(lvlm, answer, 5) == looking.get_total_flops() + compared > compared
    assert answer.kv_cache_mib == kv_cache_mib(lvlm.model.config, 5 + words(lvlm), 4)


def test_a_method_inside_is_charged_layer_by_layer(lvlm: Lvlm) -> None:
    [method] = make_methods(("fastv",), (5,), None, None, False, 0)
    answer = answered(lvlm, IMAGE, QUESTION, method)
    counts = [16, *[5] * (LAYERS - 1)]
    assert len(answer.kept) == 5
    assert answer.visual_tokens == fmean(counts)
    assert 0 < rest(lvlm, answer, 16, counts) < rest(lvlm, answer, 5)
    assert answer.kv_cache_mib == pytest.approx(kv_cache_mib(lvlm.model.config, fmean(counts) + words(lvlm), 4))


def test_what_is_kept_is_what_reaches_the_last_layer(lvlm: Lvlm) -> None:
    [method] = make_methods(("pyramiddrop",), (5,), None, None, False, 0)
    answer = answered(lvlm, IMAGE, QUESTION, method)
    assert len(answer.kept) == 5
    assert answer.visual_tokens == fmean(method.layer_counts(LAYERS, 16) or [])


def test_the_first_prefill_only_warms_up(lvlm: Lvlm, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([1000.0, 9.0, 2.0, 4.0])
    monkeypatch.setattr(answers, "prefill_ms", lambda lvlm, prompt: next(taken))
    assert answered(lvlm, IMAGE, QUESTION).prefill_ms == 4.0
