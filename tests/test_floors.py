"""The floors of the house: a module imports from its own floor and from lower ones, never from a higher one."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = {
    "checkpoint": 0, "clock": 0, "config": 0, "draw": 0, "processes": 0, "progress": 0, "types": 0,
    "autoencoder": 1, "match": 1, "novelty": 1, "policy": 1, "rewards": 1, "scoring": 1, "selectors": 1,
    "sizes": 1,
    "data": 2, "lvlm": 2,
    "demonstrations": 3, "env": 3, "pruner": 3, "run": 3,
    "api": 4, "evaluate": 4, "pocket": 4, "profiling": 4, "train": 4,
    "__main__": 5, "cli": 5, "commands": 5, "demo": 5, "lmms": 5, "serving": 5,
}  # fmt: skip
EXCEPTIONS = {("scoring", "tprl.data.sample")}
FACE = "api"
"""Where the names that the package itself offers come from."""


def source_files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    spec = importlib.util.find_spec("tprl")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    names = {path: ["tprl", *path.relative_to(root).with_suffix("").parts] for path in sorted(root.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in names.items()}


def imports(module: str, source: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, wherever in it and however."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tprl":
            yield node.lineno, f"tprl.{node.attr}"


def room(name: str) -> str | None:
    """The part of the package that a dotted name stands in; None outside of it, or for its version."""
    top, _, rest = name.partition(".")
    if top != "tprl" or rest in ("", "__version__"):
        return None
    first = rest.split(".")[0]
    return first if first in FLOORS else FACE


def leaks(module: str, source: str, is_package: bool = False) -> list[str]:
    """Imports of a module that its floor forbids."""
    own = module.split(".")[1]
    found = []
    for line, name in imports(module, source, is_package):
        other = room(name)
        allowed = any(own == who and f"{name}.".startswith(f"{what}.") for who, what in EXCEPTIONS)
        if other and FLOORS[other] > FLOORS[own] and not allowed:
            found.append(f"{module}:{line}: floor {FLOORS[own]} imports {name} of floor {FLOORS[other]}")
    return found


def test_every_module_has_a_floor() -> None:
    rooms = {name.split(".")[1] for name in source_files() if name != "tprl"}
    assert rooms <= FLOORS.keys()


def test_floors_do_not_leak() -> None:
    found = [
        leak
        for module, path in source_files().items()
        if module != "tprl"
        for leak in leaks(module, path.read_text(), path.name == "__init__.py")
    ]
    assert found == []


def test_only_some_rooms_know_transformers() -> None:
    """Everything up to floor 1, the environment and the run folder work without a model of transformers."""
    without = {name for name, floor in FLOORS.items() if floor < 2} | {"env", "run"}
    found = [
        f"{module}:{line}"
        for module, path in source_files().items()
        if module != "tprl" and module.split(".")[1] in without
        for line, name in imports(module, path.read_text())
        if name.split(".")[0] == "transformers"
    ]
    assert found == []


def test_rooms_do_not_import_one_another_in_a_circle() -> None:
    needs: dict[str, set[str]] = {name: set() for name in FLOORS}
    for module, path in source_files().items():
        if module != "tprl":
            own = module.split(".")[1]
            needs[own] |= {found for _, name in imports(module, path.read_text()) if (found := room(name))} - {own}
    needs["scoring"].discard("data")  # only the exception, which imports nothing
    while free := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in free}
    assert needs == {}


@pytest.mark.parametrize(
    ("module", "source", "is_package", "expected"),
    [
        ("tprl.policy", "from tprl.pruner import TokenPruner", False, "1 imports tprl.pruner.TokenPruner of floor 3"),
        ("tprl.policy", "from tprl import pruner", False, "1 imports tprl.pruner of floor 3"),
        ("tprl.policy", "import tprl.lvlm.model as model", False, "1 imports tprl.lvlm.model of floor 2"),
        ("tprl.policy", "import tprl\n\ndef f():\n    return tprl.prune", False, "1 imports tprl.prune of floor 4"),
        ("tprl.policy", "def f():\n    from tprl.train.ppo import x", False, "1 imports tprl.train.ppo.x of floor 4"),
        ("tprl.types", "from .policy import Policy", False, "0 imports tprl.policy.Policy of floor 1"),
        ("tprl.data.scenes", "from ..env import Score", False, "2 imports tprl.env.Score of floor 3"),
        ("tprl.data", "from ..env import Score", True, "2 imports tprl.env.Score of floor 3"),
        ("tprl.data", "from . import env", True, None),
        ("tprl.data.scenes", "from . import env", False, None),
        ("tprl.scoring", "from tprl.data.sample import Box", False, None),
        ("tprl.scoring", "from tprl.data.samples import Box", False, "1 imports tprl.data.samples.Box of floor 2"),
        ("tprl.scoring", "from tprl.data import load_source", False, "1 imports tprl.data.load_source of floor 2"),
        ("tprl.rewards", "from tprl.data.sample import Box", False, "1 imports tprl.data.sample.Box of floor 2"),
        ("tprl.pruner", "from tprl.policy import Policy\nimport torch", False, None),
        ("tprl.demonstrations", "from tprl.env import PruningEnv", False, None),
        ("tprl.evaluate.benchmark", "import tprl\nprint(tprl.__version__)", False, None),
        ("tprl.policy", "from tprl import __version__", False, None),
    ],
)
def test_made_up_imports(module: str, source: str, is_package: bool, expected: str | None) -> None:
    found = leaks(module, source, is_package)
    assert bool(found) == (expected is not None)
    if expected:
        assert found[0].endswith(f"floor {expected}")
