"""Watching what is brought to the disk."""

import os
from pathlib import Path

import pytest


def synced_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the names of the files in ``folder`` that are flushed to the disk from now on, in order."""
    names: list[str] = []

    def fsync(file: int) -> None:
        inode = os.fstat(file)
        names.extend(path.name for path in folder.rglob("*") if os.path.samestat(path.stat(), inode))

    monkeypatch.setattr("tprl.checkpoint.os.fsync", fsync)
    return names
