"""What cells of a pruner are told apart by, and where results come from."""

import shutil
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from disk import synced_in
from tprl.config import PrunerConfig
from tprl.evaluate.provenance import commit, machine, pruner_digest, write_json
from tprl.pruner import TokenPruner


@torch.no_grad()
def test_a_pruner_is_told_by_all_but_its_threshold() -> None:
    config = PrunerConfig(4, 8, 8, 1, 2, width=8, fingerprint="f")
    pruner = TokenPruner(config)
    known = pruner_digest(pruner)
    assert len(known) == 16
    pruner.config = replace(config, threshold=0.01)
    assert pruner_digest(pruner) == known
    told = {known}
    for other in ({"novelty": 0.0}, {"policy_heads": 1}, {"use_question": False}, {"fingerprint": "g"}):
        pruner.config = replace(config, **other)
        told.add(pruner_digest(pruner))
    assert len(told) == 1 + 4
    pruner.config = config
    weights = list(pruner.state_dict().values())
    for weight in weights:
        weight.view(-1)[-1] += 1
        told.add(pruner_digest(pruner))
    assert len(told) == 1 + 4 + len(weights)


def test_the_machine_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lvlm: Any = SimpleNamespace(device=torch.device("cpu"), model=SimpleNamespace(dtype=torch.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: True)
        patch.setattr(Path, "read_text", lambda path: "processor\t: 0\nmodel name\t: Chip 9: fast\nmodel name\t: B\n")
        patch.setattr(torch, "get_num_threads", lambda: 77)
        told = machine(lvlm)
    assert (told["cpu"], told["threads"], told["device"], told["dtype"]) == ("Chip 9: fast", 77, "cpu", "bfloat16")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_tree_which_tracks_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*command: str) -> str:
        settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *settings, *command], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    package = tmp_path / "package" / "__init__.py"
    package.parent.mkdir()
    package.touch()
    monkeypatch.setattr("tprl.__file__", str(package))
    assert commit() == version("tprl")
    git("init")
    git("commit", "--allow-empty", "-m", "before")
    assert commit() == version("tprl"), "a tree that does not track the package says nothing of it"
    git("add", ".")
    git("commit", "-m", "with the package")
    assert commit() == git("rev-parse", "HEAD").strip()


def test_results_reach_the_disk_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = synced_in(tmp_path, monkeypatch)
    write_json(tmp_path / "results.json", {"n": 3})
    assert synced == ["results.json.partial"]
    assert (tmp_path / "results.json").read_text() == '{\n "n": 3\n}\n'
