"""The face of the package, from ``import tprl`` to a pruned answer."""

import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import tprl
from lvlm.processors import processor_of
from lvlm.tiny import Tiny, make
from tprl.config import PrunerConfig
from tprl.lvlm.handle import HANDLE
from tprl.lvlm.model import Lvlm
from tprl.lvlm.prune_inside import prune_inside
from tprl.selectors import IN_MODEL, SELECTORS
from tprl.selectors.grid import UniformGrid
from tprl.selectors.in_model import FastV


@pytest.fixture
def tiny() -> Tiny:
    return make("llava")


def pruner_for(tiny: Tiny, seed: int = 0) -> tprl.TokenPruner:
    lvlm = Lvlm(tiny.model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pruner = tprl.TokenPruner(PrunerConfig(width=lvlm.width, fingerprint=lvlm.fingerprint))
        for parameter in pruner.parameters():
            torch.nn.init.normal_(parameter)
    return pruner.eval()


def kept(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **options: Any) -> list[list[int]]:
    with tprl.prune(model, *args, **options) as pruning, torch.no_grad():
        model.generate(**inputs, max_new_tokens=2)
    assert HANDLE not in model.__dict__
    return [picture.indices.tolist() for row in pruning.kept for picture in row]


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert tprl.__version__ == project["version"]
    with pytest.raises(AttributeError, match="'tprl' has no attribute 'prunes'"):
        _ = tprl.prunes  # type: ignore[attr-defined]


def test_importing_the_package_alone_imports_no_transformers() -> None:
    code = "import sys, tprl; print(tprl.__version__, 'transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True)
    assert ran.stdout.decode().split() == [tprl.__version__, "False"]


def test_a_token_pruner_prunes_the_model_that_it_was_trained_for(tiny: Tiny, tmp_path: Path) -> None:
    pruner = pruner_for(tiny)
    pruner.save_pretrained(tmp_path)
    loaded = tprl.TokenPruner.from_pretrained(tmp_path)
    inputs = tiny.batch([2, "I", 4], [1, "I", 5])
    indices = kept(tiny.model, inputs, loaded, budget=4, template_ids=frozenset())
    assert [len(picture) for picture in indices] == [4, 4]
    assert kept(tiny.model, inputs, pruner, budget=4, template_ids=frozenset()) == indices
    assert kept(tiny.model, inputs, pruner_for(tiny, 1), budget=4, template_ids=frozenset()) != indices
    probs: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patched:
        above = pruner.select_above
        patched.setattr(
            pruner, "select_above", lambda visual, t: probs.append(pruner.keep_probs(visual)) or above(visual, t)
        )
        indices = kept(tiny.model, inputs, pruner, threshold=0.3, template_ids=frozenset())
    assert indices == [(row > 0.3).nonzero()[:, 0].tolist() or [int(row.argmax())] for row in probs[0]]
    assert 0 < len(indices[0]) < 16
    pruner.config = replace(pruner.config, threshold=0.3)
    assert kept(tiny.model, inputs, pruner, template_ids=frozenset()) == indices
    with tprl.prune(tiny.model, pruner, template_ids=frozenset()) as pruning:
        assert pruning.threshold == 0.3
    with pytest.raises(ValueError, match="exactly one of budget, keep_ratio and threshold; got none"):
        tprl.prune(tiny.model, "divprune")

    other = make("paligemma").model
    with pytest.raises(ValueError, match=r"trained for another model \(width 16, fingerprint [0-9a-f]{16}\)"):
        tprl.prune(other, pruner, budget=4, template_ids=frozenset())
    for reader in (pruner, "cdpruner"):
        with pytest.raises(ValueError, match=r"give the model's own as processor=, or .* template_ids="):
            tprl.prune(tiny.model, reader, budget=4)
    wrong = pruner_for(tiny).bfloat16()
    with pytest.raises(
        ValueError, match=r"on cpu in torch.bfloat16, the model on cpu; .* pruner.float\(\).to\('cpu'\)"
    ):
        tprl.prune(tiny.model, wrong, budget=4, template_ids=frozenset())
    with pytest.raises(ValueError, match="the pruner is on meta, without its weights; load it again"):
        tprl.prune(tiny.model, wrong.float().to("meta"), budget=4, template_ids=frozenset())
    with pytest.raises(ValueError, match="processor Tokenizer is not allowed; the whole one, of AutoProcessor"):
        tprl.prune(tiny.model, pruner, budget=4, processor=type("Tokenizer", (), {})())
    assert HANDLE not in other.__dict__
    assert HANDLE not in tiny.model.__dict__


def test_proportional_attention_is_that_of_sdpa_or_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make("llava", torch.float32)
    pruner, inputs = pruner_for(tiny), tiny.batch([2, "I", 4])
    alone = replace(pruner.config, proportional=False)
    with tprl.prune(tiny.model, pruner, budget=4, template_ids=frozenset()), torch.no_grad():
        logits = tiny.model(**inputs).logits
    monkeypatch.setattr(pruner, "config", alone)
    with tprl.prune(tiny.model, pruner, budget=4, template_ids=frozenset()), torch.no_grad():
        assert (tiny.model(**inputs).logits - logits).abs().max() > 1e-3
    monkeypatch.setattr(tiny.model.config.get_text_config(), "_attn_implementation", "flash_attention_2")
    tprl.prune(tiny.model, pruner, budget=4, template_ids=frozenset())
    tprl.unprune(tiny.model)
    pruner.config = replace(alone, proportional=True)
    with pytest.raises(
        ValueError, match=r"'flash_attention_2' cannot give; .*replace\(pruner.config, proportional=False"
    ):
        tprl.prune(tiny.model, pruner, budget=4, template_ids=frozenset())


def test_beside_an_offloaded_model_a_pruner_is_where_that_computes() -> None:
    tiny = make("llava", torch.float32)
    pruner, inputs = pruner_for(tiny), tiny.batch([2, "I", 4])
    indices = kept(tiny.model, inputs, pruner, budget=4, template_ids=frozenset())
    cpu_offload(tiny.model, execution_device="cpu")
    assert tiny.model.device.type == "meta"
    assert kept(tiny.model, inputs, pruner, budget=4, template_ids=frozenset()) == indices
    with pytest.raises(ValueError, match=r"the model on cpu; .* pruner.float\(\).to\('cpu'\)"):
        tprl.prune(tiny.model, pruner.bfloat16(), budget=4, template_ids=frozenset())
    with pytest.raises(ValueError, match="the pruner is on meta, without its weights; load it again"):
        tprl.prune(tiny.model, pruner.float().to(tiny.model.device), budget=4, template_ids=frozenset())


def test_the_processor_tells_the_question_from_the_template(tiny: Tiny) -> None:
    """The template's words change nothing for the pruner, a question's words do."""
    pruner, processor = pruner_for(tiny), processor_of("llava")
    user, assistant, end, start, word = 4, 5, 6, 1, 12
    inputs = tiny.batch([6, "I", 6])
    places = (inputs["input_ids"][0] != 60).nonzero()[:, 0]

    def seen(ids: list[int]) -> Any:
        shown = inputs["input_ids"].clone()
        shown[0, places] = torch.tensor(ids * 2)
        logits: list[torch.Tensor] = []
        original = pruner.select

        def select(visual: Any, budget: Any) -> Any:
            logits.append(pruner.look(pruner.encode(visual), visual, visual.mask).logits)
            return original(visual, budget)

        pruner.select = select  # type: ignore[method-assign]
        with tprl.prune(tiny.model, pruner, budget=4, processor=processor), torch.no_grad():
            tiny.model(**{**inputs, "input_ids": shown})
        del pruner.select
        return logits[0]

    one = seen([word, user, user, user, user, user])
    assert torch.equal(seen([word, assistant, end, start, end, assistant]), one)
    assert not torch.equal(seen([word, word, end, start, end, assistant]), one)
    with tprl.prune(tiny.model, pruner, budget=4, processor=processor, template_ids=frozenset({word})) as pruning:
        assert pruning.template_ids == {word}


def test_a_picture_without_a_question_is_pruned(tiny: Tiny) -> None:
    inputs = tiny.batch(["I"])
    assert [
        len(picture) for picture in kept(tiny.model, inputs, pruner_for(tiny), budget=4, template_ids=frozenset())
    ] == [4]


@pytest.mark.parametrize("method", ["cdpruner", FastV(1)])
def test_an_answer_with_labels_decides_nothing(tiny: Tiny, method: Any) -> None:
    """Kept is what is kept for the prompt alone; labels of the whole prompt tell no answer from it."""
    inputs = tiny.batch([2, "I", 6], [1, "I", 7])
    prompt = {name: part if name == "pixel_values" else part[:, :-2] for name, part in inputs.items()}
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = 0

    def called(**inputs: torch.Tensor) -> list[list[int]]:
        with tprl.prune(tiny.model, method, budget=4, template_ids=frozenset()) as pruning, torch.no_grad():
            tiny.model(**inputs)
        return [picture.indices.tolist() for row in pruning.kept for picture in row]

    alone, unlike = called(**prompt), 0
    for answer in range(5, 35):
        inputs["input_ids"][:, -2:] = answer
        assert called(**inputs, labels=labels) == alone
        whole = called(**inputs)
        assert called(**inputs, labels=inputs["input_ids"]) == whole
        unlike += whole != alone
    assert unlike


def test_a_model_in_training_stays_in_training(tiny: Tiny) -> None:
    tiny.model.train()
    with tprl.prune(tiny.model, pruner_for(tiny), budget=4, processor=processor_of("llava")):
        assert tiny.model.training
    assert tiny.model.training


@pytest.mark.parametrize("name", ["uniform", "fastervlm", "divprune"])
def test_a_peer_by_name_or_as_an_object(tiny: Tiny, name: str) -> None:
    inputs = tiny.batch([2, "I", 4])
    indices = kept(tiny.model, inputs, name, keep_ratio=0.25)
    assert len(indices[0]) == 4
    assert kept(tiny.model, inputs, SELECTORS[name](), budget=4) == indices


def test_a_peer_keeps_all_of_a_picture_with_fewer_tokens_than_the_budget(tiny: Tiny) -> None:
    assert kept(tiny.model, tiny.batch([2, "I", 4]), "divprune", budget=99) == [[*range(16)]]


def test_a_selector_of_ones_own_is_told_the_question_if_it_says_that_it_reads_it(tiny: Tiny) -> None:
    class Asking(UniformGrid):
        name, reads_question = "asking", True

    with pytest.raises(ValueError, match="asking reads the question's own tokens: give the model's own as processor="):
        tprl.prune(tiny.model, Asking(), budget=4)
    inputs = tiny.batch([2, "I", 4])
    assert kept(tiny.model, inputs, Asking(), budget=4, processor=processor_of("llava")) == kept(
        tiny.model, inputs, "uniform", budget=4
    )


def test_a_method_inside_the_language_model(tiny: Tiny) -> None:
    inputs = tiny.batch([2, "I", 4])
    with prune_inside(tiny.model, FastV(1), budget=4) as pruning, torch.no_grad():
        tiny.model(**inputs)
    expected = [pruning.kept[0][0].indices.tolist()]
    assert kept(tiny.model, inputs, FastV(1), budget=4) == expected
    with pytest.raises(ValueError, match="positions 'compact' is not allowed with fastv; 'original'"):
        tprl.prune(tiny.model, FastV(1), budget=4, positions="compact")
    with pytest.raises(ValueError, match=r"threshold 0\.5 is not allowed with fastv; give budget or keep_ratio"):
        tprl.prune(tiny.model, FastV(1), threshold=0.5)
    assert kept(tiny.model, inputs, "fastv", budget=4) == expected
    with pytest.raises(ValueError, match="layer 2 is not allowed in a decoder of 2 layers"):
        tprl.prune(tiny.model, FastV(2), budget=4)
    with pytest.raises(ValueError, match=r"give an object, FastV\(\), not the class itself"):
        tprl.prune(tiny.model, FastV, budget=4)
    assert "fastv" in IN_MODEL
    mean = kept(tiny.model, inputs, "fastv-mean", budget=12)  # 16 in the first layer of two, 8 in the second
    assert mean == kept(tiny.model, inputs, "fastv", budget=8)
    assert len(mean[0]) == 8


def test_unprune_and_unknown_names(tiny: Tiny) -> None:
    tprl.prune(tiny.model, "random", budget=3)
    tprl.unprune(tiny.model)
    assert HANDLE not in tiny.model.__dict__
    with pytest.raises(ValueError, match=r"unknown selector 'fastW'; known: random, .*, fastv, "):
        tprl.prune(tiny.model, "fastW", budget=3)
    with pytest.raises(ValueError, match="pruner None is not allowed; a TokenPruner, a selector or the name of one"):
        tprl.prune(tiny.model, None, budget=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["prumerge+", "visionzip", "divprune", "cdpruner"])
def test_a_peer_under_autocast(name: str) -> None:
    tiny = make("llava", torch.float32)
    with tprl.prune(tiny.model, name, budget=7, template_ids=frozenset()) as pruned, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            tiny.model(**tiny.batch([2, "I", 4]))
        assert pruned.kept[0][0].count == 7


def test_a_model_that_was_compiled_before_is_pruned_inside() -> None:
    tiny = make("llava", torch.float32)
    inputs = tiny.batch([2, "I", 4])
    with torch.no_grad():
        with tprl.prune(tiny.model, FastV(1), budget=4):
            wanted = tiny.model(**inputs).logits
        compiled = torch.compile(tiny.model, backend="eager")
        compiled(**inputs)
        with tprl.prune(tiny.model, FastV(1), budget=4):
            torch.testing.assert_close(compiled(**inputs).logits, wanted)


def test_the_documented_lines_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LLaVA's on a tiny model; Qwen's, whose processor needs torchvision, are the same but for names and amount."""
    tiny = make("llava", torch.float32)
    tiny.model.save_pretrained(tmp_path)
    processor_of("llava").save_pretrained(tmp_path)
    document = (Path(__file__).parents[1] / "docs" / "your-model.md").read_text()
    llava, qwen, trained = (block.partition("```")[0] for block in document.split("```python\n")[1:])
    assert len(llava.splitlines()) == len(qwen.splitlines()) == 5
    hub = {"llava-hf/llava-1.5-7b-hf": str(tmp_path), "Qwen/Qwen2.5-VL-7B-Instruct": str(tmp_path)}
    picture = Image.new("RGB", (24, 24), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it ?"}]
    names: dict[str, Any] = {
        "tprl": tprl, "AutoModelForImageTextToText": AutoModelForImageTextToText, "AutoProcessor": AutoProcessor,
        "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    for block, kept_tokens in ((llava, 8), (qwen, 5)):
        for name, path in hub.items():
            block = block.replace(name, path)
        exec(block.replace("budget=192", "budget=8"), names)
        assert [kept.count for kept in names["pruned"].kept[0]] == [kept_tokens]
        assert capsys.readouterr().out
    pruner_for(tiny).save_pretrained(tmp_path / "pruner")
    exec(trained.replace("runs/mine", str(tmp_path)).replace("budget=64", "budget=4"), names)
    names["model"](**names["inputs"])
    assert names["model"].__dict__[HANDLE].kept[0][0].count == 4
