"""What a result was made from and where, and how results are written."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tprl
from tprl.checkpoint import save_text
from tprl.lvlm.model import Lvlm
from tprl.pruner import TokenPruner


def pruner_digest(pruner: TokenPruner) -> str:
    """A digest that changes with any weight or setting of a pruner but its threshold, which budgets do not ask for."""
    settings = {name: value for name, value in asdict(pruner.config).items() if name != "threshold"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(pruner.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def machine(lvlm: Lvlm) -> dict[str, Any]:
    """Where and how it was measured."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "cpu": names[0].partition(": ")[2] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(lvlm.device) if lvlm.device.type == "cuda" else str(lvlm.device),
        "torch": torch.__version__,
        "dtype": str(lvlm.model.dtype).removeprefix("torch."),
    }


def commit() -> str:
    """The git commit of the source tree, or the package's version where it does not lie in one."""
    folder = Path(tprl.__file__).parent
    git = shutil.which("git")
    if git is not None:
        tracked = subprocess.run(
            [git, "ls-files", "__init__.py"], cwd=folder, capture_output=True, text=True, check=False
        )
        if tracked.stdout.strip():
            return subprocess.run(
                [git, "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
            ).stdout.strip()
    return version("tprl")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    save_text(path, json.dumps(content, indent=1) + "\n")
