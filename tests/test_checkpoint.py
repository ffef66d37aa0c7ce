"""Checkpoints come back bit for bit or not at all, and a save that fails leaves what stood there."""

import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from disk import synced_in
from tprl.checkpoint import (
    DamagedCheckpoint,
    load_checkpoint,
    load_optimizer,
    make_once,
    optimizer_tensors,
    prefixed,
    save_checkpoint,
    save_tensors,
    save_text,
    with_prefix,
)

META = {"step": 7, "name": "é"}


def tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(5, 3, generator=random),
        "half": torch.randn(4, generator=random).bfloat16(),
        "flags": torch.tensor([True, False]),
        "step": torch.tensor(3.0),
        "counts": torch.arange(6).view(2, 3).T,  # not contiguous
        "empty": torch.zeros(0, 2),
    }


def assert_same(found: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """What was found is ``tensors()`` and ``META``."""
    loaded, meta = found
    assert meta == META
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", tensors(), META)
    assert_same(load_checkpoint(tmp_path / "a.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_gradients_and_modules_can_be_saved(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    save_checkpoint(tmp_path / "a.safetensors", {"weight": weight}, {})
    assert torch.equal(load_checkpoint(tmp_path / "a.safetensors")[0]["weight"], weight.data)


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, tensors(), META)
    whole = path.read_bytes()
    for length in [0, 1, 8, 9, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors"):
            load_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors"):
        load_checkpoint(path)
    path.write_bytes(whole)
    assert load_checkpoint(path)[1] == META


def test_a_bit_that_flips_among_the_values_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, tensors(), META)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - start > 100
    for place in range(start, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DamagedCheckpoint, match="checksum"):
            load_checkpoint(path)


def test_a_bit_that_flips_in_the_header_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, tensors(), META)
    whole = path.read_bytes()
    noticed = 0
    for place in range(8 + int.from_bytes(whole[:8], "little")):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 3]) + whole[place + 1 :])
        try:
            assert_same(load_checkpoint(path))
        except DamagedCheckpoint:
            noticed += 1
    assert noticed > 500


def test_checkpoints_without_a_checksum_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, tensors(), META)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    del metadata["header"]
    save_tensors(path, load_checkpoint(path)[0], metadata)
    assert_same(load_checkpoint(path))


def test_a_file_of_someone_else(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(DamagedCheckpoint, match="does not match its checksum"):
        load_checkpoint(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.safetensors")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"weight": torch.ones(4)}, {"step": 1})
    with full_disk(4096), pytest.raises(OSError, match=r"could not save .*a\.safetensors"):
        save_checkpoint(path, {"weight": torch.zeros(100_000)}, {"step": 2})
    loaded, meta = load_checkpoint(path)
    assert meta == {"step": 1}
    assert torch.equal(loaded["weight"], torch.ones(4))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_text_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_text(path, "old\n")
    with full_disk(4096), pytest.raises(OSError, match=r"could not save .*a\.json"):
        save_text(path, "new" * 10_000)
    assert path.read_text() == "old\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    save_text(path, "new é\n")
    assert path.read_text() == "new é\n"


def test_a_save_that_is_cut_short_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after half of the bytes were written: the name still holds the old ones, and the next save succeeds."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"weight": torch.ones(4)}, {"step": 1})

    def killed(given: Any, target: Path, **_: Any) -> None:
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("tprl.checkpoint.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"weight": torch.zeros(4)}, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(path)[1] == {"step": 1}
    save_checkpoint(path, {"weight": torch.zeros(4)}, {"step": 2})
    assert load_checkpoint(path)[1] == {"step": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not save"):
        save_tensors(tmp_path / "none" / "a.safetensors", {"weight": torch.ones(1)}, {})


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 1))
    return module, torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)


def advance(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        given = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(given).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_the_next_step_after_a_round_trip_is_the_same(tmp_path: Path, with_optimizer: bool) -> None:
    straight, optimizer = training()
    advance(straight, optimizer, range(3))
    saved = prefixed(straight.state_dict(), "module.") | optimizer_tensors(optimizer)
    save_checkpoint(tmp_path / "a.safetensors", saved, {"step": 3})
    advance(straight, optimizer, range(3, 6))

    resumed, fresh = training()
    loaded, _ = load_checkpoint(tmp_path / "a.safetensors")
    resumed.load_state_dict(with_prefix(loaded, "module."))
    if with_optimizer:
        load_optimizer(fresh, loaded)
    advance(resumed, fresh, range(3, 6))
    same = [torch.equal(*pair) for pair in zip(straight.parameters(), resumed.parameters(), strict=True)]
    assert all(same) == with_optimizer  # and without the optimizer's state it would not be the same


def test_learning_rates_are_those_of_the_new_optimizer() -> None:
    module, old = training()
    advance(module, old, range(2))
    new = torch.optim.AdamW(module.parameters(), lr=0.5)
    load_optimizer(new, optimizer_tensors(old))
    assert new.param_groups[0]["lr"] == 0.5
    assert new.state_dict()["state"][0]["step"] == 2


def test_of_two_runs_that_want_a_file_one_makes_it_and_the_other_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, made = tmp_path / "shard", []
    begun, finish = threading.Event(), threading.Event()

    def make() -> None:
        made.append(path)
        begun.set()
        assert finish.wait(60)
        path.write_text("whole")

    first, second = (threading.Thread(target=make_once, args=(path, make)) for _ in range(2))
    first.start()
    assert begun.wait(60)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    finish.set()
    for thread in (first, second):
        thread.join(60)
        assert not thread.is_alive()
    assert made == [path]
    assert f"waiting for {path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_whose_maker_failed_or_was_killed_is_made_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    with pytest.raises(ZeroDivisionError):
        make_once(path, lambda: print(1 / 0))
    code = "import sys, os, pathlib, tprl.checkpoint as c; p = pathlib.Path(sys.argv[1])"
    code += "; c.make_once(p, lambda: (p.write_text('half'), os.kill(os.getpid(), 9)), lambda p: False)"
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=120).returncode == -9
    assert path.read_text() == "half"
    make_once(path, lambda: save_text(path, "whole"), lambda path: path.read_text() == "whole")
    assert path.read_text() == "whole"


def test_bytes_reach_the_disk_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = synced_in(tmp_path, monkeypatch)
    save_text(tmp_path / "a.json", "text")
    save_tensors(tmp_path / "a.safetensors", {"weight": torch.ones(1)}, {})
    assert synced == ["a.json.partial", "a.safetensors.partial"]


def test_a_maker_that_failed_holds_the_lock_no_longer(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    with pytest.raises(ZeroDivisionError) as failed:  # whose traceback keeps what the maker had at hand
        make_once(path, lambda: print(1 / 0))
    with FileLock(path.with_name("shard.lock"), timeout=0):
        assert failed.tb
