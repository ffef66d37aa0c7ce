"""FLOPs against hand-written formulas, published figures, and real forward passes of every family."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lvlm.tiny import NAMES, make
from ragged import visual_tokens
from tprl.commands.flops import flops
from tprl.commands.train import PAPER
from tprl.config import PrunerConfig, PrunerShape
from tprl.evaluate.flops import (
    encoded_by,
    encoded_tokens,
    kv_cache_mib,
    lvlm_flops,
    text_tokens_at,
)
from tprl.evaluate.methods import Method, count_choice
from tprl.evaluate.presets import PRESETS, load_config
from tprl.pruner import TokenPruner
from tprl.selectors.in_model import FastV
from tprl.types import Selection, VisualTokens


def llama(length: int, width: int, inner: int, layers: int, vocabulary: int) -> int:
    """Prefill of a Llama without grouped heads: four projections, scores and values, three matrices, one head."""
    projections = 4 * 2 * length * width * width
    attention = 2 * 2 * length * length * width
    mlp = 3 * 2 * length * width * inner
    return layers * (projections + attention + mlp) + 2 * width * vocabulary


def clip(patches: int, patch: int, width: int, inner: int, layers: int) -> int:
    length = patches + 1
    layer = 4 * 2 * length * width**2 + 4 * length**2 * width + 2 * 2 * length * width * inner
    return 2 * patches * 3 * patch**2 * width + layers * layer


@pytest.mark.parametrize(("name", "width", "inner", "layers"), [
    ("llava-1.5-7b", 4096, 11008, 32), ("llava-1.5-13b", 5120, 13824, 40),
])  # fmt: skip
def test_llava_is_the_formula(name: str, width: int, inner: int, layers: int) -> None:
    config = load_config(name)
    for visual in (576, 192, 0):
        flops = lvlm_flops(config, visual, 64)
        assert flops.vision == clip(576, 14, 1024, 4096, 24)
        assert flops.projector == 2 * 576 * (1024 * width + width * width)
        assert flops.language == llama(visual + 64, width, inner, layers, 32064)


def test_qwens_tower_is_the_formula() -> None:
    """1296 tokens of 2 x 2 patches, which attend in windows of 8 x 8 patches in 28 layers of 32."""
    patches, width = 4 * 1296, 1280
    linear = 32 * 2 * patches * (4 * width**2 + 3 * width * 3420)
    attention = 2 * 2 * patches * width * (4 * patches + 28 * 8**2)
    flops = lvlm_flops(load_config("qwen2.5-vl-7b"), 432, 64, encoded_tokens=1296)
    assert flops.vision == 2 * patches * 3 * 2 * 14**2 * width + linear + attention
    assert flops.projector == 2 * 1296 * ((4 * width) ** 2 + 4 * width * 3584)


def test_published_figures() -> None:
    llava, qwen = load_config("llava-1.5-7b"), load_config("qwen2.5-vl-7b")
    unpruned, pruned = lvlm_flops(llava, 576, 64), lvlm_flops(llava, 192, 64)
    assert unpruned.total == pytest.approx(8.910e12, rel=1e-3)
    assert pruned.total == pytest.approx(3.756e12, rel=1e-3)
    assert pruned.saved(unpruned) == pytest.approx(0.578, abs=1e-3)
    assert lvlm_flops(qwen, 1296, 64, encoded_tokens=1296).language == pytest.approx(18.49e12, rel=1e-3)
    assert lvlm_flops(qwen, 432, 64, encoded_tokens=1296).language == pytest.approx(6.57e12, rel=1e-3)


def test_text_length_at_which_the_papers_figure_holds() -> None:
    config = load_config("llava-1.5-7b")
    length = text_tokens_at(config, 192, 0.542)
    assert length == 110
    saved = [lvlm_flops(config, 192, text).saved(lvlm_flops(config, 576, text)) for text in (length, length + 1)]
    assert saved[0] >= 0.542 > saved[1]
    assert text_tokens_at(config, 192, saved[0]) == length
    two = text_tokens_at(config, 192, 0.7, encoded_tokens=1152)
    saved = [
        lvlm_flops(config, 192, text, None, 1, 1152).saved(lvlm_flops(config, 1152, text, None, 1, 1152))
        for text in (two, two + 1)
    ]
    assert saved[0] >= 0.7 > saved[1]
    with pytest.raises(ValueError, match=r"from 576 to 192 saves less than 90\.0%"):
        text_tokens_at(config, 192, 0.9)
    with pytest.raises(ValueError, match="between 0 and 1, got 0"):
        text_tokens_at(config, 192, 0)


def test_presets_are_the_models_that_they_name() -> None:
    """By parameters, in billions, as their makers state them."""
    from transformers import AutoModelForImageTextToText

    stated = {"llava-1.5-7b": 7.06, "llava-1.5-13b": 13.35, "qwen2.5-vl-3b": 3.75, "qwen2.5-vl-7b": 8.29}
    assert stated.keys() == PRESETS.keys()
    for name, billions in stated.items():
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(load_config(name))
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_as_it_runs(name: str) -> None:
    """A prompt with one picture on the CPU, with weights, then four tokens with a cache, and the tower alone."""
    tiny = make(name, torch.float32, "eager")
    model, config = tiny.model, tiny.model.config
    inputs = tiny.batch([3, "I", 4])
    if "pixtral" in config.vision_config.model_type:  # without the padding of a batch
        height, width = inputs["image_sizes"][0].tolist()
        inputs["pixel_values"] = inputs["pixel_values"][..., :height, :width]
    visual, length = tiny.counts[0], inputs["input_ids"].shape[1]
    encoded = 5 * 9 if "image_grid_pinpoints" in config.to_dict() else visual
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cache = model(**inputs, logits_to_keep=1, use_cache=True).past_key_values
    flops = lvlm_flops(config, visual, length - visual, encoded_tokens=encoded)
    assert flops.total == counter.get_total_flops()
    assert encoded_tokens(config, inputs) == encoded
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_mib(config, length, 4) == pytest.approx(stored / 2**20)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert lvlm_flops(config, visual, length - visual, None, 4, encoded).total == counter.get_total_flops()
    pictures = {key: value for key, value in inputs.items() if key.startswith(("pixel", "image"))}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.get_image_features(**pictures)
    assert flops.vision + flops.projector == counter.get_total_flops()
    ends = ("Projector", "Connector", "Transformer.merger", "PretrainedModel.merger", "VisionModel.merger")
    projector = [m for m in counter.get_flop_counts() if m.endswith(ends) or "deepstack_merger_list" in m]
    outermost = [m for m in projector if m.count(".") < 3]
    assert flops.projector == sum(sum(counter.get_flop_counts()[m].values()) for m in outermost) > 0


def test_tower_always_sees_all_and_attention_is_counted() -> None:
    config = load_config("llava-1.5-7b")
    few, many = lvlm_flops(config, 1, 64), lvlm_flops(config, 576, 64)
    assert (few.vision, few.projector) == (many.vision, many.projector)
    lengths = torch.tensor([100, 200, 300])
    costs = [lvlm_flops(config, int(length) - 1, 1).language for length in lengths]
    assert costs[2] - 2 * costs[1] + costs[0] == 32 * 2 * 2 * 4096 * 2 * 100**2  # the second difference of b * L**2


def test_pruning_inside_the_model() -> None:
    config = load_config("llava-1.5-7b")
    whole, half = lvlm_flops(config, 576, 64), lvlm_flops(config, 288, 64)
    assert lvlm_flops(config, 576, 64, [576] * 32) == whole
    mixed = lvlm_flops(config, 576, 64, [576] * 2 + [288] * 30)
    expected = half.language + (whole.language - half.language) * 2 / 32
    assert mixed.language == pytest.approx(expected, rel=1e-5)
    assert half.total < mixed.total < whole.total
    for counts in ([576] * 31, [576] * 31 + [-1]):
        with pytest.raises(ValueError, match="32 counts"):
            lvlm_flops(config, 576, 64, counts)


def test_bad_counts_and_configs(tmp_path: Path) -> None:
    llava, qwen = load_config("llava-1.5-7b"), load_config("qwen2.5-vl-3b")
    for counts in ((-1, 1), (1, 0), (1, 1, None, 0)):
        with pytest.raises(ValueError, match="need visual_tokens >= 0, text_tokens >= 1 and generated_tokens >= 1"):
            lvlm_flops(llava, *counts)
    with pytest.raises(ValueError, match="576 tokens of a picture"):
        lvlm_flops(llava, 1, 1, encoded_tokens=577)
    with pytest.raises(ValueError, match="encoded_tokens has to be at least 1, got 0"):
        lvlm_flops(llava, 1, 1, encoded_tokens=0)
    with pytest.raises(ValueError, match=r"Qwen2\.5-VL takes pictures of any size"):
        lvlm_flops(qwen, 1, 1)
    with pytest.raises(ValueError, match="unknown model family 'llama'"):
        lvlm_flops(llava.text_config, 1, 1)
    assert encoded_by(llava) == 576
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PRESETS["llava-1.5-7b"]))
    assert lvlm_flops(load_config(str(path)), 192, 64) == lvlm_flops(llava, 192, 64)
    odd = {**PRESETS["llava-1.5-7b"]["text_config"], "num_attention_heads": 33}
    for text in (
        "{",
        "[]",
        "{}",
        '{"model_type": "none"}',
        json.dumps({**PRESETS["llava-1.5-7b"], "text_config": odd}),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"is no config\.json"):
            load_config(str(path))


def test_two_pictures_cost_the_tower_twice() -> None:
    config = load_config("llava-1.5-7b")
    one, two = lvlm_flops(config, 64, 64), lvlm_flops(config, 64, 64, encoded_tokens=1152)
    assert (two.vision, two.projector, two.language) == (2 * one.vision, 2 * one.projector, one.language)


def test_cache_of_llava_7b() -> None:
    assert kv_cache_mib(load_config("llava-1.5-7b"), 640, 2) == 2 * 32 * 4096 * 640 * 2 / 2**20
    assert kv_cache_mib(load_config("qwen2.5-vl-7b"), 100, 2) == 2 * 28 * 4 * 128 * 100 * 2 / 2**20


class Attention(nn.Module):
    """Reads tokens by a transformer layer, as often as it is told."""

    name, needs = "attention", frozenset[str]()

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
        self.times = times

    def select(self, visual: VisualTokens, budget: torch.Tensor) -> Selection:
        states = visual.tokens
        for _ in range(self.times):
            states = self.layer(states, src_key_padding_mask=~visual.mask)
        return Selection(visual.mask)


def test_choosing_counts_attention_too() -> None:
    visual = visual_tokens([10], [1], 16)
    expected = 4 * 2 * 10 * 16**2 + 2 * 2 * 10**2 * 16 + 2 * 2 * 10 * 16 * 32
    for times in (1, 2):
        method = Method("attention", Attention(times), 5)
        assert count_choice(method, visual, lambda _: None) == times * expected


@pytest.mark.parametrize("shape", [PrunerShape(), PAPER.pruner], ids=["default", "paper"])
def test_the_pruner_costs_little_beside_llava_7b(shape: PrunerShape) -> None:
    """576 tokens of width 4096 and a question of 32 tokens: at most 0.3 % of the unpruned prefill."""
    config = PrunerConfig(**asdict(shape), width=4096, fingerprint="")
    visual = VisualTokens(
        torch.zeros(1, 576, 4096), torch.ones(1, 576).bool(), torch.zeros(1, 576, 2),
        torch.zeros(1, 32, 4096), torch.ones(1, 32).bool(),
    )  # fmt: skip
    pruner = TokenPruner(config).eval()
    cost = count_choice(Method(pruner.name, pruner, 192), visual, lambda _: None)
    encoder = 2 * 576 * config.autoencoder_hidden * (4096 + config.latent)
    assert encoder < cost < 0.003 * lvlm_flops(load_config("llava-1.5-7b"), 576, 64).total


def test_fastv_saves_less_than_pruning_before_the_model() -> None:
    config = load_config("llava-1.5-7b")
    counts = FastV().layer_counts(32, 576, 192)
    assert counts == [576, 576] + [192] * 30
    whole, before, inside = (
        lvlm_flops(config, 576, 64), lvlm_flops(config, 192, 64), lvlm_flops(config, 576, 64, counts)
    )  # fmt: skip
    saved = (whole.language - inside.language) / (whole.language - before.language)
    assert saved == pytest.approx(30 / 32, rel=1e-4)


def cells(text: str) -> dict[str, list[str]]:
    """The rows of a printed table by their first cell."""
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in text.splitlines() if "\u2502" in line]
    return {row[0]: row[1:] for row in rows}


def test_the_command_prints_the_published_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PRESETS["llava-1.5-7b"]))
    for config in ("llava-1.5-7b", str(path), str(tmp_path)):
        flops(config)
        printed = capsys.readouterr().out
        rows = cells(printed)
        assert list(rows) == ["576", "192", "128", "64"]
        for tokens, total, saved in (("576", 8.910, 0.0), ("192", 3.756, 57.8)):
            parts = [float(part) for part in rows[tokens][:4]]
            assert parts[3] == pytest.approx(total, rel=0.01)
            assert sum(parts[:3]) == pytest.approx(parts[3], abs=0.002)
            assert float(rows[tokens][4].removesuffix("%")) == pytest.approx(saved, abs=0.1)
        assert rows["192"][5] == f"{2 * 32 * 4096 * (192 + 64) * 2 / 2**20:.1f}"
        assert "with 110 text tokens" in " ".join(printed.split())


def test_the_command_for_pictures_of_any_size_and_its_errors(capsys: pytest.CaptureFixture[str]) -> None:
    flops("qwen2.5-vl-7b", "432", encoded_tokens=1296, generated_tokens=10, cache_bytes=4)
    rows = cells(capsys.readouterr().out)
    assert list(rows) == ["1296", "432"]
    steps = lvlm_flops(load_config("qwen2.5-vl-7b"), 432, 64, None, 10, 1296)
    assert float(rows["432"][3]) == pytest.approx(steps.total / 1e12, abs=1e-3)
    assert rows["432"][5] == f"{2 * 28 * 4 * 128 * (432 + 64 + 9) * 4 / 2**20:.1f}"
    with pytest.raises(ValueError, match="say how many encoded_tokens"):
        flops("qwen2.5-vl-7b")
    with pytest.raises(ValueError, match=r"budgets \[577\] are not allowed; 1 to the picture's 576"):
        flops("llava-1.5-7b", "577,3")
    with pytest.raises(ValueError, match="expected comma-separated names, got ''"):
        flops("llava-1.5-7b", "")
    with pytest.raises(ValueError, match="--cache-bytes 0 is not allowed; at least 1"):
        flops("llava-1.5-7b", cache_bytes=0)
