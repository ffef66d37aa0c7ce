"""The README says what the results say."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_table_is_that_of_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "scripts" / "readme_table.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text()
    assert module.with_table(readme, ROOT / "results" / "scenes") == readme
    altered = readme.replace("| tprl |", "| tprl+ |", 1)
    assert altered != readme
    assert module.with_table(altered, ROOT / "results" / "scenes") == readme


@pytest.mark.parametrize("command", ["make quickstart", "make test"])
def test_the_two_commands_exist(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()
    assert f"\n{command.split()[1]}: setup\n" in (ROOT / "Makefile").read_text()
