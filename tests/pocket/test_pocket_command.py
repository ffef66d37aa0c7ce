"""A stage goes on as it began, or not at all."""

from pathlib import Path

import pytest

from tprl.commands import pocket


def test_a_stage_goes_on_with_what_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, int]] = []
    monkeypatch.setattr(pocket, "_training", lambda name, run, seed, delta: begun.append((name, seed)) or iter([]))
    pocket.train(tmp_path, stages="tower", seed=1)
    pocket.train(tmp_path, stages="tower,language", seed=1)
    pocket.train(tmp_path, stages="joint", shipped=True)
    assert begun == [("tower", 1), ("tower", 1), ("language", 1), ("joint", 0)]
    with pytest.raises(ValueError, match=r"the stage tower in .* began with .*'seed': 1.* go on with .*'seed': 2"):
        pocket.train(tmp_path, stages="tower", seed=2)
    with pytest.raises(ValueError, match=r"'shipped': True.* go on with .*'shipped': False"):
        pocket.train(tmp_path, stages="joint")
    with pytest.raises(ValueError, match=r"unknown stages roof; known: tower"):
        pocket.train(tmp_path, stages="roof")
    assert len(begun) == 4
