"""The server as people start it, in a process of its own on loopback."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

pytest.importorskip("vllm")

from serving import worlds
from tprl.serving.request import keep_count

PATIENCE = 1200


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.make("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def server(world: worlds.World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(world.folder),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "256", "--block-size", "32", "--enforce-eager", "--trust-request-mm-kwargs",
        "--hf-overrides", json.dumps(world.overrides(0.25)),
    ]  # fmt: skip
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask the server to end; a signal that comes while it starts is lost to it."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def wait_for(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = monotonic() + PATIENCE
    while monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"the server ended: {log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            sleep(1)
    pytest.fail(f"the server did not start: {log.read_text()[-4000:]}")


def ask(server: str, **more: Any) -> tuple[int, Any]:
    """Status and body of a chat completion about a picture."""
    png = io.BytesIO()
    worlds.picture(0).save(png, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "w1 w2"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body | more).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_ratios_over_http(world: worlds.World, server: str) -> None:
    """The server's ratio, the request's, one that is not allowed, and the server still answers."""
    text = len(world.lvlm.processor.tokenizer(world.lvlm.prompts.text("w1 w2"), add_special_tokens=False)["input_ids"])
    for more, ratio in (({}, 0.25), ({"mm_processor_kwargs": {"keep_ratio": 0.5}}, 0.5)):
        status, body = ask(server, **more)
        assert status == 200
        assert body["usage"]["prompt_tokens"] == text - 1 + keep_count(36, ratio)
    status, body = ask(server, mm_processor_kwargs={"keep_ratio": 1.5})
    assert status == 400
    assert "keep_ratio 1.5 is not allowed" in json.dumps(body)
    assert ask(server)[0] == 200
