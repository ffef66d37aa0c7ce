"""Questions as lmms-eval hands them to the task; needs no lmms-eval."""

from pathlib import Path

import pytest
from PIL import Image

from tprl.lmms.tasks import utils

DOC = {"image": "a.png", "question": "How many?", "answer": "two", "box": None}


@pytest.mark.parametrize("given", [{}, {"id": None}, {"id": "q7"}])
def test_an_id_may_be_left_out(given: dict[str, str | None]) -> None:
    assert utils.doc_to_target(DOC | given) == "two"
    assert utils.process_results(DOC | given, ["2"]) == {"accuracy": 1.0}
    assert utils.process_results(DOC | given, ["22"]) == {"accuracy": 0.0}


def test_its_picture_is_the_one_that_tprl_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "FOLDER", tmp_path)
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    for name in ("a.png", " a.png ", "no/../a.png"):
        (picture,) = utils.doc_to_visual(DOC | {"image": name})
        assert picture.size == (6, 4)
