"""Processors loaded with and without the packages that they would like."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lvlm.processors import processor_of
from lvlm.tiny import make
from tprl.lvlm import processors
from tprl.lvlm.processors import load_processor, without_videos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen2.5-VL processor as it lies on the Hub."""
    processor = processor_of("qwen2_5_vl")
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(processor.chat_template)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2_5_VLProcessor"}))
    return tmp_path


def test_a_processor_of_videos_is_loaded_for_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: False)
    config = make("qwen2_5_vl").model.config
    loaded, made = load_processor(str(folder), config), processor_of("qwen2_5_vl")
    assert loaded.video_processor is None
    assert loaded.chat_template == made.chat_template
    asked: Any = {"text": ["<|image_pad|> a cat"], "images": [[Image.new("RGB", (40, 24))]], "return_tensors": "pt"}
    for name, value in made(**asked).items():
        assert torch.equal(loaded(**asked)[name], value)


def test_other_parts_are_still_checked() -> None:
    made = processor_of("qwen2_5_vl")
    with pytest.raises(TypeError, match="image_processor"):
        without_videos(type(made).__mro__[1])("images", made.tokenizer, None)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> None:
        raise ImportError("num2words is required")

    monkeypatch.setattr(processors.AutoTokenizer, "from_pretrained", missing)
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs a package that is missing: num2words"):
        load_processor(str(folder), make("qwen2_5_vl").model.config)
