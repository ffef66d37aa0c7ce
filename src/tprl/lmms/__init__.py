"""TPRL in lmms-eval: any model that ``tprl.prune`` knows as the model ``tprl``, and scenes as a task."""

from typing import Any


def manifest() -> Any:
    """What lmms-eval is told of the model; it finds this by the package's entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("tprl", simple_class_path="tprl.lmms.model.Tprl")
