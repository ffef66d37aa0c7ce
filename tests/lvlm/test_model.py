"""Pictures and questions as embeddings, with real processors where those work without torchvision."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tprl
from lvlm.processors import processor_of
from lvlm.tiny import Tiny, make
from tprl.lvlm.model import Lvlm, fingerprint
from tprl.lvlm.pictures import ImageFeatures
from tprl.selectors.grid import UniformGrid
from tprl.types import Selection, VisualTokens


def lvlm(name: str = "llava") -> tuple[Lvlm, Tiny]:
    tiny = make(name)
    return Lvlm(tiny.model, processor_of(name)), tiny


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Random pictures, by width and height."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


@pytest.mark.parametrize("name", ["llava", "llava_next", "gemma3", "paligemma", "idefics3"])
def test_pictures_become_the_models_own_features(name: str) -> None:
    model, tiny = lvlm(name)
    images = pictures((24, 24), (40, 20), (20, 40))
    features = model.encode_images(images)
    counts = {"llava": [16] * 3, "gemma3": [9] * 3, "paligemma": [16] * 3}.get(name)
    if counts is not None:
        assert [len(picture.tokens) for picture in features] == counts
    for picture, image in zip(features, images, strict=True):
        inputs = model.processor(text=[model.processor.image_token], images=[[image]], return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].double()
        vision = {key: inputs[key] for key in ("pixel_values", "image_sizes", "pixel_attention_mask") if key in inputs}
        alone = tiny.model.model.get_image_features(**vision, return_dict=True).pooler_output
        assert torch.allclose(picture.tokens, torch.cat(list(alone)))
        assert picture.coords.shape == (len(picture.tokens), 2)
        assert picture.coords.dtype == torch.float32
        assert picture.coords.min() > 0
        assert picture.coords.max() <= 1
        assert picture.signals == {}
    if name == "idefics3":  # a picture twice as wide as high: one row of two tiles, then the whole
        tiles, whole = features[1].coords[:18], features[1].coords[18:]
        assert len(whole) == 9
        assert sorted({round(column, 4) for column in tiles[:, 1].tolist()}) == [
            round((i + 0.5) / 6, 4) for i in range(6)
        ]
        assert sorted({round(row, 4) for row in tiles[:, 0].tolist()}) == [round((i + 0.5) / 3, 4) for i in range(3)]


def test_signals_are_those_of_the_tower() -> None:
    """Against the softmax and the key projection of the last layer, written out for one picture."""
    model, tiny = lvlm()
    images = pictures((24, 24), (24, 24))
    model.encode_images(images)
    hooks = [len(module._forward_hooks) for module in tiny.model.modules()]
    both = model.encode_images(images, frozenset({"cls_attention", "tower_keys"}))
    assert tiny.model.model.vision_tower.config._attn_implementation == "sdpa"
    assert [len(module._forward_hooks) for module in tiny.model.modules()] == hooks
    inputs = model.processor(text=["<image>"] * 2, images=[[image] for image in images], return_tensors="pt")
    tower = tiny.model.model.vision_tower
    layer = tower.encoder.layers[-1]
    with torch.no_grad():
        states = tower(inputs["pixel_values"].double(), output_hidden_states=True).hidden_states[-2]
        states = layer.layer_norm1(states)
        query, key = (
            part(states).unflatten(-1, (2, 8)).transpose(1, 2)
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1).mean(1)
    for number, picture in enumerate(both):
        assert torch.allclose(picture.signals["cls_attention"], weights[number, 0, 1:].float(), atol=1e-6)
        assert torch.allclose(picture.signals["tower_keys"], key.mean(1)[number, 1:].float(), atol=1e-5)
        assert picture.signals["cls_attention"].dtype == torch.float32
    (only,) = model.encode_images(images[:1], frozenset({"tower_keys"}))
    assert set(only.signals) == {"tower_keys"}
    with pytest.raises(ValueError, match=r"text_attention.*cls_attention"):
        model.encode_images(images, frozenset({"text_attention"}))
    with pytest.raises(ValueError, match="Qwen2-VL"):
        Lvlm(make("qwen2_vl").model, model.processor).encode_images(images, frozenset({"tower_keys"}))


def test_the_used_layer_is_the_one_of_the_features() -> None:
    """LLaVA's features may come from before the last layer; so do the signals."""
    keys = {}
    for layer in (-1, -2, 2, 1):
        model, tiny = lvlm()
        tiny.model.config.vision_feature_layer = layer
        (picture,) = model.encode_images(pictures((24, 24)), frozenset({"tower_keys"}))
        keys[layer] = picture.signals["tower_keys"]
    assert torch.equal(keys[-1], keys[2])
    assert torch.equal(keys[-2], keys[1])
    assert not torch.allclose(keys[-1], keys[-2])


def test_questions_become_the_embeddings_of_their_own_tokens() -> None:
    model, tiny = lvlm()
    query, mask = model.question_embeds(["what is it ?", "a cat"])
    table = tiny.model.get_input_embeddings().weight
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert torch.equal(query[0], table[[7, 8, 9, 10]])
    assert torch.equal(query[1], torch.cat([table[[11, 12]], torch.zeros(2, 16)]))


def test_a_question_is_told_from_the_template_as_it_is_in_a_prompt() -> None:
    """The template says "a cat", so these words are nobody's question, here and where a prompt is pruned."""
    model, tiny = lvlm()
    model.processor.chat_template = "a cat " + model.processor.chat_template
    query, mask = model.question_embeds(["what is a cat ?", "a cat"])
    assert mask.tolist() == [[True] * 3, [False] * 3]
    assert torch.equal(query[0], tiny.model.get_input_embeddings().weight[[7, 8, 10]])
    seen: list[VisualTokens] = []

    class Watch(UniformGrid):
        def select(self, visual: VisualTokens, budget: torch.Tensor) -> Selection:
            seen.append(visual)
            return super().select(visual, budget)

    inputs = model.processor(
        text=[model.prompts.text("what is a cat ?")], images=[pictures((24, 24))], return_tensors="pt"
    )
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with tprl.prune(tiny.model, Watch(), budget=4, processor=model.processor), torch.no_grad():
        tiny.model(**inputs)
    assert torch.equal(seen[0].query[seen[0].query_mask], query[0, :3])


def test_a_model_that_is_shown_the_prompt_and_the_tokens_says_what_it_always_says() -> None:
    """``before``, visual tokens, ``after`` make the same sequence as the processor."""
    model, tiny = lvlm()
    image = pictures((24, 24))
    (features,) = model.encode_images(image)
    before, after = model.prompts.ids("what is it ?")
    table = tiny.model.get_input_embeddings()
    embeds = torch.cat([table(torch.tensor(before[:-1])), features.tokens, table(torch.tensor(after))])[None]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]}]
    text = model.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = model.processor(text=text, images=image, return_tensors="pt").to("cpu", torch.float64)
    with torch.no_grad():
        assert torch.allclose(tiny.model(inputs_embeds=embeds).logits, tiny.model(**inputs).logits)


def test_features_and_questions_are_collated() -> None:
    model, _ = lvlm()
    one, two = model.encode_images(pictures((24, 24), (24, 24)), frozenset({"cls_attention", "tower_keys"}))
    short = ImageFeatures(two.tokens[:5], two.coords[:5], {name: signal[:5] for name, signal in two.signals.items()})
    visual = model.visual_tokens([one, short], ["what", "is it"])
    assert visual.mask.sum(1).tolist() == [16, 5]
    assert torch.equal(visual.tokens[1, :5], two.tokens[:5])
    assert torch.equal(visual.coords[0], one.coords)
    assert not visual.tokens[1, 5:].any()
    assert not visual.signals["tower_keys"][1, 5:].any()
    assert torch.equal(visual.signals["cls_attention"][1, :5], two.signals["cls_attention"][:5])
    assert visual.query_mask.tolist() == [[True, False], [True, True]]


def test_a_saved_model_loads_with_its_processor(tmp_path: Path) -> None:
    model, tiny = lvlm()
    tiny.model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    loaded = Lvlm.from_pretrained(str(tmp_path), dtype=torch.float64)
    assert loaded.fingerprint == model.fingerprint
    assert loaded.prompts.ids("what is it ?", "a cat") == model.prompts.ids("what is it ?", "a cat")
    image = pictures((24, 24))
    assert torch.allclose(loaded.encode_images(image)[0].tokens, model.encode_images(image)[0].tokens)
    assert Lvlm.from_pretrained(str(tmp_path)).model.dtype == torch.float64
    assert Lvlm.from_pretrained(str(tmp_path), dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_model_of_another_family_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "kosmos-2"}')
    with pytest.raises(ValueError, match="unknown model family 'kosmos-2'; known: gemma3, idefics3, internvl, llava"):
        Lvlm.from_pretrained(str(tmp_path))


def test_fingerprints_follow_what_a_pruner_is_fitted_to() -> None:
    known = {name: Lvlm(make(name).model).fingerprint for name in ("llava", "pixtral", "qwen2_vl", "gemma3")}
    assert len(set(known.values())) == 4
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in known.values())
    assert Lvlm(make("llava", seed=1).model).fingerprint == known["llava"]
    for change in ({"vision_feature_layer": -2}, {"vision_feature_select_strategy": "full"}):
        model = make("llava").model
        for key, value in change.items():
            setattr(model.config, key, value)
        assert Lvlm(model).fingerprint != known["llava"]
    model = make("llava").model
    model.config.text_config.hidden_size = 32
    assert Lvlm(model).fingerprint != known["llava"]
    model = make("llava").model
    model.config.text_config.vocab_size += 1
    model.config.name_or_path = "elsewhere"
    assert Lvlm(model).fingerprint == known["llava"]


@pytest.mark.parametrize(
    "key",
    [
        *("depth", "embed_dim", "image_size", "patch_size", "num_hidden_layers", "spatial_merge_size", "scale_factor"),
        *("downsample_ratio", "mm_tokens_per_image", "image_grid_pinpoints"),
    ],
)
def test_every_size_of_the_layout_counts(key: str) -> None:
    one, other = (fingerprint({"model_type": "m", "vision_config": {key: size}}) for size in (2, 4))
    assert one != other


def test_width_and_a_missing_processor() -> None:
    model: Any = Lvlm(make("gemma3").model)
    assert model.width == 16
    for call in (lambda: model.encode_images([]), lambda: model.question_embeds([]), lambda: model.prompts.ids("")):
        with pytest.raises(ValueError, match="without a processor"):
            call()
