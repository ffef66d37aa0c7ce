"""Phases are charged for their own time only."""

from contextlib import suppress

import pytest

from tprl import clock
from tprl.clock import enter, leave, measured, phase


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test moves by hand."""
    time = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: time[0])
    return time


def test_every_second_belongs_to_the_innermost_phase(now: list[float]) -> None:
    @phase("score")
    def score() -> None:
        now[0] += 2
        enter("model")
        now[0] += 5
        leave()
        now[0] += 1

    score()  # nobody measures
    with measured() as seconds:
        now[0] += 10
        with phase("update"):
            now[0] += 20
            score()
        score()
        with suppress(ZeroDivisionError), phase("update"):
            now[0] += 7
            raise ZeroDivisionError
        now[0] += 100
    score()
    assert seconds == {"other": 110, "update": 27, "score": 6, "model": 10}
    assert sum(seconds.values()) == 153


def test_what_was_measured_before_stays(now: list[float]) -> None:
    with measured() as first:
        now[0] += 1
    with measured() as second:
        now[0] += 2
    assert (first, second) == ({"other": 1}, {"other": 2})
