"""Where the time goes: parts of the package name themselves, and count only while somebody measures."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Seconds = dict[str, float]
_measured: list[Seconds] = []
_open: list[str] = []


@contextmanager
def measured() -> Iterator[Seconds]:
    """Gives the seconds of every ``phase`` that runs meanwhile, each without the phases inside it, and under "other"
    those outside of all phases."""
    seconds: Seconds = {}
    _measured.append(seconds)
    try:
        with phase("other"):
            yield seconds
    finally:
        _measured.pop()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A named part of the work, as a context or as a decorator."""
    enter(name)
    try:
        yield
    finally:
        leave()


def enter(name: str) -> None:
    """Begin a phase, where no context will do: a hook of a module."""
    if _measured:
        _charge()
        _open.append(name)


def leave() -> None:
    """End the phase begun last."""
    if _measured:
        _charge()
        _open.pop()


_since = 0.0


def _charge() -> None:
    """Put the time since the last change of phase on the phase that is open."""
    global _since
    if torch.cuda.is_available():  # what was asked of a GPU belongs to the phase that asked
        torch.cuda.synchronize()
    now = time.perf_counter()
    if _open:
        seconds = _measured[-1]
        seconds[_open[-1]] = seconds.get(_open[-1], 0.0) + now - _since
    _since = now
