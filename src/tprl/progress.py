"""Progress bars, on a terminal only, so that logs stay readable."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def track(items: Sequence[T], label: str) -> Iterator[T]:
    """Yield ``items`` under a bar with the time left, on standard error."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal or len(items) < 2, transient=True) as bar:
        yield from bar.track(items, description=label)
