"""The peers: other methods that choose visual tokens, behind one face, as baselines and as demonstrators."""

from tprl.selectors.attention import FasterVLM, PruMergePlus, VisionZip, VisPruner
from tprl.selectors.base import Selector
from tprl.selectors.grid import Random, UniformGrid
from tprl.selectors.in_model import Dart, FastV, PyramidDrop, SparseVLM
from tprl.selectors.similarity import CDPruner, DivPrune
from tprl.selectors.stages import InModel, OnAverage

__all__ = ["IN_MODEL", "ON_AVERAGE", "SELECTORS", "InModel", "Selector", "make_selector"]

SELECTORS: dict[str, type[Selector]] = {
    selector.name: selector
    for selector in (Random, UniformGrid, FasterVLM, VisionZip, VisPruner, PruMergePlus, DivPrune, CDPruner)
}
"""Selectors that act between projector and language model, by name."""


IN_MODEL: dict[str, type[InModel]] = {method.name: method for method in (FastV, SparseVLM, PyramidDrop, Dart)}
"""Methods that act inside the language model, by name; their budget is what its last layers see."""


ON_AVERAGE: dict[str, OnAverage] = {method.name: method for method in (OnAverage(make()) for make in IN_MODEL.values())}
"""The same methods, "fastv-mean" and so on; their budget is what its layers see on average."""


def make_selector(name: str, seed: int = 0) -> Selector | InModel:
    """A selector or a method that acts inside the language model, by its name.

    Args:
        name: a key of ``SELECTORS``, ``IN_MODEL`` or ``ON_AVERAGE``.
        seed: of those that draw at random.

    Raises:
        ValueError: nothing has that name.
    """
    makers: dict[str, type[Selector] | type[InModel]] = {**SELECTORS, **IN_MODEL}
    if name in ON_AVERAGE:
        return ON_AVERAGE[name]
    if name not in makers:
        raise ValueError(f"unknown selector {name!r}; known: {', '.join((*makers, *ON_AVERAGE))}")
    return Random(seed) if name == Random.name else makers[name]()
