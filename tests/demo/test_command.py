"""``tprl demo`` where it cannot start, and which pruner it takes; the page itself is tested in ``test_page``."""

import socket
import sys

import pytest

from evaluate.world import tiny_lvlm
from tprl.cli import main
from tprl.commands.demo import _check_address, _policy
from tprl.pocket.assemble import SHIPPED_PRUNER


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "tprl.demo.page", raising=False)
    assert main(["demo"]) == 2
    assert (
        "needs gradio, in an environment of its own: see docs/demo.md, or pip install '.[demo]'"
        in capsys.readouterr().err
    )


def test_ports_that_are_not_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--port", "65536"]) == 2
    assert "65536" in capsys.readouterr().err


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--host 127\.0\.0\.1 --port {port} cannot be listened at: Address al"):
            _check_address("127.0.0.1", port)
    _check_address("127.0.0.1", port)


def test_the_shipped_pruner_is_left_out_where_it_does_not_fit_and_a_named_one_refused() -> None:
    lvlm = tiny_lvlm()
    assert _policy(None, lvlm) is None
    with pytest.raises(ValueError, match="another model"):
        _policy(SHIPPED_PRUNER, lvlm)
