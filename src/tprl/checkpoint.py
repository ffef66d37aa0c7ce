"""Checkpoints: one safetensors file each, written whole or not at all, with a checksum that says if it is whole."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class DamagedCheckpoint(RuntimeError):
    """A checkpoint file that is truncated or altered."""


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``meta`` to ``path``: to a temporary name first, then renamed.

    Raises:
        OSError: the disk is full or the folder is not writable; what stood at ``path`` is left untouched.
    """
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    text = json.dumps(meta)
    save_tensors(path, tensors, {"meta": text, "sha256": _digest(tensors), "header": _header_digest(tensors, text)})


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a plain safetensors file whole or not at all.

    Raises:
        OSError: the disk is full or the folder is not writable; what stood at ``path`` is left untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        reach_disk(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"could not save {path}: {error}") from error


def save_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        OSError: the disk is full or the folder is not writable; what stood at ``path`` is left untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        reach_disk(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"could not save {path}: {error}") from error


def make_once(path: Path, make: Callable[[], None], is_whole: Callable[[Path], bool] = Path.exists) -> None:
    """Let ``make`` write ``path`` where it does not stand there whole; of several runs that want it one does, the
    others wait. The lock ends with the process that holds it, however that ends."""
    if is_whole(path):
        return
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for {path}, which another run makes", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        if not is_whole(path):
            make()
        Path(lock.lock_file).unlink(missing_ok=True)  # whoever waits for it finds ``path`` whole
    finally:
        lock.release()


def reach_disk(path: Path) -> None:
    """Wait until what was written to a file would survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the meta of a checkpoint.

    Raises:
        DamagedCheckpoint: the file is not readable as safetensors or its checksum does not match.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path} is not a whole safetensors file: {error}") from error
    text = metadata.get("meta", "")
    header = _header_digest(tensors, text)  # older checkpoints have none
    if not text or metadata.get("sha256") != _digest(tensors) or metadata.get("header", header) != header:
        raise DamagedCheckpoint(f"{path} does not match its checksum")
    return tensors, json.loads(text)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{index}.{key}": value for index, slots in state.items() for key, value in slots.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``; learning rates stay those of ``optimizer``."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in with_prefix(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with ``prefix`` put before every name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _header_digest(tensors: dict[str, Tensor], meta: str) -> str:
    shapes = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in sorted(tensors.items())]
    return hashlib.sha256(json.dumps([shapes, meta]).encode()).hexdigest()
