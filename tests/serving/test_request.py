"""The processor alone: placeholders, cache keys, what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("vllm")

from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.plugins import load_general_plugins

from serving import worlds
from tprl.serving.request import KEY, QUERY, RATIO, Served, checked_ratio, keep_count


@pytest.fixture(scope="module", params=list(worlds.CONFIGS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def processor(world: worlds.World) -> Any:
    load_general_plugins()
    config = ModelConfig(model=str(world.folder), dtype="float32", hf_overrides=world.overrides(0.5))
    return MULTIMODAL_REGISTRY.create_processor(config)


def run(processor: Any, prompt: str, pictures: Any = 0, **kwargs: Any) -> Any:
    """``pictures`` as vLLM takes them, or the number of one."""
    given = worlds.picture(pictures) if isinstance(pictures, int) else pictures
    return processor(prompt, processor.info.parse_mm_data({"image": given}), hf_processor_mm_kwargs=kwargs)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("ratio", [None, 1.0, 0.25, 0.001])
def test_a_picture_gets_as_many_placeholders_as_are_kept(
    world: worlds.World, processor: Any, number: int, ratio: float | None
) -> None:
    prompt = world.lvlm.prompts.text("w1 w2")
    total = world.visual_tokens(worlds.picture(number))
    expected = keep_count(total, 0.5 if ratio is None else ratio)
    output = run(processor, prompt, number, **({} if ratio is None else {"keep_ratio": ratio}))
    (place,) = output["mm_placeholders"]["image"]
    assert place.length == expected
    assert output["prompt_token_ids"].count(worlds.IMAGE) == expected
    whole = world.lvlm.processor(text=[prompt], images=[[worlds.picture(number)]])["input_ids"][0]
    assert len(output["prompt_token_ids"]) == len(whole) - total + expected


def test_the_key_tells_pictures_questions_and_ratios_apart(world: worlds.World, processor: Any) -> None:
    def key(question: str, number: int = 0, ratio: float = 0.5) -> str:
        output = run(processor, world.lvlm.prompts.text(question), number, keep_ratio=ratio)
        return output["mm_hashes"]["image"][0]

    keys = [key("w1 w2"), key("w2 w1"), key("w1"), key("w1 w2", 1), key("w1 w2", 0, 0.25)]
    assert len(set(keys)) == len(keys)
    assert key("w1 w2") == keys[0]


def test_the_question_is_what_tprl_prune_takes_for_it(world: worlds.World, processor: Any) -> None:
    (item,) = run(processor, world.lvlm.prompts.text("w3 w1 w4"), keep_ratio=0.3)["mm_kwargs"]["image"]
    assert item[QUERY].data.tolist() == [worlds.WORDS.index(word) for word in ("w3", "w1", "w4")]
    assert item[RATIO].data.item() == 0.3


def test_the_tower_key_is_the_pictures_alone(world: worlds.World, processor: Any) -> None:
    def key(question: str, number: int) -> list[int]:
        output = run(processor, world.lvlm.prompts.text(question), number)
        return output["mm_kwargs"]["image"][0][KEY].data.tolist()

    assert key("w1", 0) == key("w2 w5", 0)
    assert key("w1", 0) != key("w1", 1)
    both = world.lvlm.prompts.text(f"w1 {world.lvlm.prompts.placeholder}")
    items = run(processor, both, [worlds.picture(0), worlds.picture(1)])["mm_kwargs"]["image"]
    assert [item[KEY].data.tolist() for item in items] == [key("w1", 0), key("w1", 1)]


def test_the_tower_key_tells_shapes_apart(world: worlds.World, processor: Any) -> None:
    outputs = [
        run(processor, world.lvlm.prompts.text("w1"), Image.new("RGB", size, "red")) for size in ((48, 24), (24, 48))
    ]
    high, wide = (output["mm_kwargs"]["image"][0][KEY].data.tolist() for output in outputs)
    assert (high != wide) == (world.name == "qwen2_5_vl"), "a LLaVA sees both as the same square"


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), "half", True, None, [0.5]])
def test_ratios_that_are_not_allowed(world: worlds.World, processor: Any, ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"keep_ratio .* is not allowed; a number more than 0 and at most 1"):
        run(processor, world.lvlm.prompts.text("w1"), keep_ratio=ratio)


def test_a_ratio_is_a_float() -> None:
    assert checked_ratio(1) == 1.0


@pytest.mark.parametrize(
    ("total", "ratio", "count"), [(576, 64 / 576, 64), (576, 1.0, 576), (9, 0.01, 1), (10, 0.25, 2), (10, 0.37, 4)]
)
def test_keep_count(total: int, ratio: float, count: int) -> None:
    assert keep_count(total, ratio) == count


def test_what_the_server_was_not_told(world: worlds.World) -> None:
    config = world.lvlm.model.config
    with pytest.raises(ValueError, match=r"\['keep_ratio', 'pruner'\] missing"):
        Served.of(config)
    told: Any = SimpleNamespace(pruner="p", keep_ratio=1)
    assert Served.of(told) == Served("p", 1.0)
    told.keep_ratio = 1.5
    with pytest.raises(ValueError, match=r"keep_ratio 1\.5 is not allowed"):
        Served.of(told)


def test_embeddings_of_pictures_are_refused(
    world: worlds.World, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor.info.ctx.model_config.multimodal_config, "enable_mm_embeds", True)
    with pytest.raises(ValueError, match="takes pictures, not embeddings"):
        run(processor, world.lvlm.prompts.text("w1"), torch.zeros(1, 36, 64))


def test_no_videos_and_room_for_whole_pictures(world: worlds.World, processor: Any) -> None:
    assert processor.info.get_supported_mm_limits() == {"image": None}
    assert processor.info.get_mm_max_tokens_per_item(256, {"image": 1}) == {
        "image": 36 if world.name == "llava" else 64
    }
