"""``tprl demo`` where it cannot start, and which pruner it takes; the page itself is tested in ``test_page``."""

import sys

import pytest

from evaluate.world import tiny_lvlm
from tprl.cli import main
from tprl.commands.demo import _policy
from tprl.pocket.assemble import SHIPPED_PRUNER


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "tprl.demo.page", raising=False)
    assert main(["demo"]) == 2
    assert "needs gradio: pip install -e '.[demo]'" in capsys.readouterr().err


def test_ports_that_are_not_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--port", "65536"]) == 2
    assert "65536" in capsys.readouterr().err


def test_the_shipped_pruner_is_left_out_where_it_does_not_fit_and_a_named_one_refused() -> None:
    lvlm = tiny_lvlm()
    assert _policy(None, lvlm) is None
    with pytest.raises(ValueError, match="another model"):
        _policy(SHIPPED_PRUNER, lvlm)
