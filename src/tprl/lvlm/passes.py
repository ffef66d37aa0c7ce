"""Which rows go through a model together: rows of like length, so that little of a pass is padding."""

from collections.abc import Sequence

PADDING = 0.1
"""Share of a pass that padding stays below."""


class Passes:
    """Groups rows by length, and counts the padding that is left.

    Args:
        tokens: bound on tokens, padding included, in one pass; bounds memory.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._shown = self._slots = 0

    def group(self, lengths: Sequence[int]) -> list[list[int]]:
        """The numbers of the rows of every pass: less than ``PADDING`` of it is padding, and a row longer than a pass
        gets one by itself."""
        passes: list[list[int]] = []
        held = longest = 0
        for i in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            size = (len(passes[-1]) + 1) * longest if passes else self.tokens + 1
            if size <= self.tokens and held + lengths[i] > (1 - PADDING) * size:
                passes[-1].append(i)
                held += lengths[i]
            else:
                passes.append([i])
                held = longest = lengths[i]
            self._shown += lengths[i]
        self._slots += sum(len(chosen) * lengths[chosen[0]] for chosen in passes)
        return passes

    def padding_share(self) -> float:
        """Share of padding in all that was grouped since this was asked last, in [0, 1]."""
        share = 1 - self._shown / max(1, self._slots)
        self._shown = self._slots = 0
        return share
