"""Progress as a log shows it; the bar on a terminal is rich's."""

import pytest

from tprl import progress
from tprl.progress import track


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    given = []
    for item in track("abcdefgh", "cells"):
        given.append(item)
        now[0] += 25
    assert given == list("abcdefgh")
    assert capsys.readouterr().err.splitlines() == ["cells: 3 of 8, 2 min left", "cells: 6 of 8, 1 min left"]


def test_short_work_leaves_a_log_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(5), "cells")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""
