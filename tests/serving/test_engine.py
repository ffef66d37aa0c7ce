"""Greedy tokens of the served model against Hugging Face's, pruned by ``tprl.prune``, in float32."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

from serving import worlds
from tprl.serving import request

RATIOS = [1.0, 0.5, 0.2]
QUESTIONS = ["w1 w2 w3", "w9", "w5 w4 w5 w20 w21 w7"]


@pytest.fixture(scope="module", params=list(worlds.CONFIGS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def requests(world: worlds.World) -> list[worlds.Request]:
    """Three pictures, three questions and three ratios, so mixed that neighbours differ in all of them."""
    grid = [(number, question, ratio) for number in range(3) for question in QUESTIONS for ratio in RATIOS]
    return [
        (world.lvlm.prompts.text(question), worlds.picture(number), ratio)
        for number, question, ratio in (grid[10 * index % 27] for index in range(27))
    ]


@pytest.fixture(scope="module")
def expected(world: worlds.World, requests: list[worlds.Request]) -> list[list[int]]:
    return [world.answer(*asked) for asked in requests]


def test_the_question_changes_answers(world: worlds.World, expected: list[list[int]]) -> None:
    """Else the tests below would show nothing."""
    assert len({tuple(answer) for answer in expected}) > 20


@pytest.mark.parametrize("chunk", [16, 32])
def test_tokens_are_those_of_hugging_face(
    world: worlds.World, requests: list[worlds.Request], expected: list[list[int]], chunk: int
) -> None:
    """Prompts are read in chunks, so a picture's tokens in several steps; twice, the second time out of the caches."""
    with worlds.serving(world, max_num_batched_tokens=chunk) as engine:
        assert worlds.ask(engine, requests) == expected
        assert worlds.ask(engine, requests) == expected


def test_tokens_without_caches(world: worlds.World, requests: list[worlds.Request], expected: list[list[int]]) -> None:
    with worlds.serving(world, enable_prefix_caching=False, mm_processor_cache_gb=0) as engine:
        assert worlds.ask(engine, requests) == expected


def test_every_boundary_of_a_chunk(world: worlds.World) -> None:
    """Chunks of 16 tokens that end before, between and behind the marks around a picture."""
    asked = [
        (f"{' '.join(['w7'] * lead)} {world.lvlm.prompts.text('w3 w8')}", worlds.picture(1), 0.3)
        for lead in range(9, 16)
    ]
    with worlds.serving(world, max_num_batched_tokens=16, max_num_seqs=1) as engine:
        assert worlds.ask(engine, asked) == [world.answer(*one) for one in asked]


def test_a_key_without_the_question_gives_wrong_answers(
    world: worlds.World, requests: list[worlds.Request], expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The negative control: with the question left out of the cache key, one question's tokens serve another."""

    def without_question(self: Any, inputs: Any) -> Any:
        kwargs = {name: value for name, value in inputs.hf_processor_mm_kwargs.items() if name != request.QUERY}
        return super(request.PrunedProcessor, self)._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))

    monkeypatch.setattr(request.PrunedProcessor, "_get_mm_hashes", without_question, raising=False)
    with worlds.serving(world) as engine:
        assert worlds.ask(engine, requests) != expected


def test_the_tower_runs_once_a_picture(world: worlds.World) -> None:
    seen: list[int] = []
    prompts = [world.lvlm.prompts.text(f"w{number}") for number in range(6)]
    with worlds.serving(world, max_num_seqs=1) as engine:
        (model,) = engine.apply_model(lambda model: model)
        tower = getattr(model, worlds.TOWERS[world.name])
        tower.register_forward_hook(lambda module, inputs, output: seen.append(1))
        worlds.ask(engine, [(prompt, worlds.picture(0), 0.5) for prompt in prompts])
        assert len(seen) == 1
        worlds.ask(engine, [(prompts[0], worlds.picture(1), 0.5)])
        assert len(seen) == 2
        model._tower_cache.clear()
        worlds.ask(engine, [(prompts[0], worlds.picture(0), 0.25)])
        assert len(seen) == 3


def test_the_default_ratio_and_two_pictures(world: worlds.World) -> None:
    """A prompt that says no ratio gets the server's, and every picture of a prompt is pruned by the same question."""
    prompt = world.lvlm.prompts.text("w2 w6")
    both = prompt.replace("w2", f"w2 {world.lvlm.prompts.placeholder}", 1)
    pictures = [worlds.picture(1), worlds.picture(2)]
    with worlds.serving(world, hf_overrides=world.overrides(0.25)) as engine:
        answers = worlds.ask(engine, [(prompt, pictures[0], None), (both, pictures, None)])
    assert answers[0] == world.answer(prompt, pictures[0], 0.25)
    assert answers[1] == world.answer(both, pictures, 0.25)


def test_a_pruner_of_another_model_is_refused(world: worlds.World) -> None:
    settings = replace(world.pruner.config, fingerprint="0" * 16)
    folder = world.pruner_folder.with_name("other")
    type(world.pruner)(settings).save_pretrained(folder)
    with pytest.raises(ValueError, match="trained for another model"):  # noqa: SIM117
        with worlds.serving(world, hf_overrides={**world.overrides(0.5), "pruner": str(folder)}):
            pass
