"""``tprl demo``: ask about pictures on a local web page, and see which patches the answers needed."""

import socket
from pathlib import Path

from tprl.lvlm.model import Lvlm
from tprl.pocket.assemble import SHIPPED_PRUNER, open_lvlm
from tprl.pruner import TokenPruner


def demo(
    *,
    model: str = "pocket-llava",
    pruner: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    dtype: str = "auto",
    device: str = "cpu",
) -> None:
    """Serve a page where anyone who can reach it asks about pictures; without a network nothing is missing.

    Args:
        model: "pocket-llava", or a folder or Hub id of a model.
        pruner: folder of the pruner; the shipped one where it fits the model, else peers alone, unless given.
        host: address to listen at; "0.0.0.0" lets other machines in.
        port: from 1 to 65535.
        dtype: of the model: "auto", "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must lie between 1 and 65535, got {port}")
    try:
        from tprl.demo.page import build, own_files, serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the demo needs {error.name}, in an environment of its own: see docs/demo.md, or pip install '.[demo]'"
        ) from error
    _check_address(host, port)
    lvlm = open_lvlm(model, dtype, device)
    policy = _policy(pruner, lvlm)
    if policy is None:
        print(f"no pruner for {model}: peers only; `tprl train --model {model}` makes one")
    with own_files():
        serve(build(lvlm, policy, model), host, port)


def _check_address(host: str, port: int) -> None:
    """Raise ValueError unless one can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ValueError(f"--host {host} --port {port} cannot be listened at: {error.strerror}") from error


def _policy(pruner: Path | None, lvlm: Lvlm) -> TokenPruner | None:
    if pruner is not None:
        return TokenPruner.from_pretrained(pruner, lvlm.fingerprint).to(lvlm.device)
    shipped = TokenPruner.from_pretrained(SHIPPED_PRUNER)
    return shipped.to(lvlm.device) if shipped.config.fingerprint == lvlm.fingerprint else None
