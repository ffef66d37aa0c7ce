"""Language-guided pruning of visual tokens for vision-language models (TPRL, arXiv 2603.13394)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tprl.api import TokenPruner, prune, unprune

__version__ = "0.1.0"
__all__ = ["TokenPruner", "__version__", "prune", "unprune"]


def __getattr__(name: str) -> Any:
    """The names of ``tprl.api``, imported when they are first used, as that takes seconds."""
    if name in __all__:
        from tprl import api

        return getattr(api, name)
    raise AttributeError(f"module 'tprl' has no attribute {name!r}")
