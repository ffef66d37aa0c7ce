"""pocket-llava with its shipped policy: a hundred questions, served and by Hugging Face."""

import pytest

pytest.importorskip("vllm")

from serving import worlds
from tprl.data import load_source
from tprl.pocket.assemble import SHIPPED_PRUNER, open_lvlm, pocket_llava
from tprl.pruner import TokenPruner


def test_a_hundred_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "NEW_TOKENS", 6)
    folder = pocket_llava()
    world = worlds.World(
        "llava", open_lvlm(str(folder), "float32"), TokenPruner.from_pretrained(SHIPPED_PRUNER), folder, SHIPPED_PRUNER
    )
    world.lvlm.model.generation_config.eos_token_id = None
    source = load_source("scenes", "test", 100)
    requests: list[worlds.Request] = [
        (world.lvlm.prompts.text(sample.question), source.image(sample.image_id), 64 / 576) for sample in source.samples
    ]
    expected = [world.answer(*asked) for asked in requests]
    with worlds.serving(world, max_model_len=1024, max_num_batched_tokens=512) as engine:
        answers = worlds.ask(engine, requests)
    assert answers == expected
