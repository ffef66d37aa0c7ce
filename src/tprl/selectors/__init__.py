"""The peers: other methods that choose visual tokens, behind one face, as baselines and as demonstrators."""

from tprl.selectors.attention import FasterVLM, PruMergePlus, VisionZip, VisPruner
from tprl.selectors.base import Selector
from tprl.selectors.grid import Random, UniformGrid
from tprl.selectors.similarity import CDPruner, DivPrune

__all__ = ["SELECTORS", "Selector", "make_selector"]

SELECTORS: dict[str, type[Selector]] = {
    selector.name: selector
    for selector in (Random, UniformGrid, FasterVLM, VisionZip, VisPruner, PruMergePlus, DivPrune, CDPruner)
}
"""Selectors that act between projector and language model, by name."""


def make_selector(name: str, seed: int = 0) -> Selector:
    """A selector by its name.

    Args:
        name: a key of ``SELECTORS``.
        seed: of those that draw at random.

    Raises:
        ValueError: no selector has that name.
    """
    if name not in SELECTORS:
        raise ValueError(f"unknown selector {name!r}; known: {', '.join(SELECTORS)}")
    return Random(seed) if name == Random.name else SELECTORS[name]()
