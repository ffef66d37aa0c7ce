"""Prefills take turns, and the first one of each method only warms up."""

from typing import Any

import pytest
import torch

from evaluate.world import World, tiny_lvlm
from tprl.evaluate import latency
from tprl.evaluate.latency import measure_prefills, prompt_inputs
from tprl.evaluate.methods import Method, make_methods
from tprl.lvlm.model import Lvlm


def test_methods_take_turns_pruned_and_the_first_prompt_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is faked: what the last layer sees, and 1000 more for the first prompt."""
    lvlm, world = tiny_lvlm(), World()
    inputs = [prompt_inputs(lvlm, world, world.samples[index]) for index in (0, 4)]
    seen: list[int] = []

    def prefill_ms(model: Lvlm, prompt: Any) -> float:
        layer = model.model.get_decoder().layers[-1]
        lengths: list[int] = []
        hook = layer.register_forward_hook(lambda module, given, output: lengths.append(output.shape[1]))
        with torch.no_grad():
            model.model(**prompt)
        hook.remove()
        seen.append(lengths[0])
        return lengths[0] + (1000 if prompt is inputs[0] else 0)

    monkeypatch.setattr(latency, "prefill_ms", prefill_ms)
    methods: dict[str, Method | None] = {"unpruned": None}
    methods |= {method.label: method for method in make_methods(["uniform", "fastv"], [3], None, None, False, 0)}
    taken = measure_prefills(lvlm, methods, inputs, "prefills")
    length = inputs[0]["input_ids"].shape[1]
    assert seen == [length, length - 13, length - 13] * 2
    assert taken == {"unpruned": length, "uniform-3": length - 13, "fastv-3": length - 13}


def test_a_method_takes_the_median_of_its_prefills(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm, world = tiny_lvlm(), World()
    inputs = [prompt_inputs(lvlm, world, world.samples[index]) for index in (0, 4, 8, 12)]
    taken = iter([1000.0, 9.0, 2.0, 4.0])
    monkeypatch.setattr(latency, "prefill_ms", lambda lvlm, prompt: next(taken))
    assert measure_prefills(lvlm, {"unpruned": None}, inputs, "prefills") == {"unpruned": 4.0}
