"""Progress of long work: a bar on a terminal, now and then a line in a log."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
SECONDS_A_LINE = 60.0


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """Yield ``items``, telling on standard error how many are done and how long the others will take."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _told(items, label)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=len(items) < 2, transient=True) as bar:
        yield from bar.track(items, description=label)


def _told(items: Sequence[T], label: str) -> Iterator[T]:
    start = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - told >= SECONDS_A_LINE:
            minutes = (now - start) / done * (len(items) - done) / 60
            print(f"{label}: {done} of {len(items)}, {minutes:.0f} min left", file=sys.stderr, flush=True)
            told = now
        yield item
