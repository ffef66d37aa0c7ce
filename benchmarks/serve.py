"""Requests a second, time to the first token and KV blocks of a vLLM server, pruned against unpruned in one run.

One server on loopback answers both, since the keep ratio goes with the request; at ratio 1 the pruner does not run.
Every request has its own picture and question, so no cache helps. The two take turns at each concurrency.

    python benchmarks/serve.py          # in the environment of `make test-vllm`
"""

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import aiohttp
import tyro
from rich.console import Console
from rich.table import Table

from tprl.data import load_source
from tprl.pocket.assemble import SHIPPED_PRUNER, pocket_llava
from tprl.pocket.precision import fastest_dtype
from tprl.serving import ARCHITECTURES

HOST, PORT, NAME = "127.0.0.1", 8123, "pocket-llava"
ADDRESS = f"http://{HOST}:{PORT}"


@dataclass
class Measured:
    """One keep ratio at one concurrency, over all turns."""

    seconds: float = 0
    first_tokens: list[float] = field(default_factory=list)
    blocks: float = 0


def main(
    requests: int = 32,
    budget: int = 64,
    concurrency: tuple[int, ...] = (1, 4, 16),
    new_tokens: int = 6,
    turns: int = 2,
    dtype: str = "auto",
) -> None:
    """Measure.

    Args:
        requests: of each ratio at each concurrency in each turn.
        budget: visual tokens to keep, of 576.
        concurrency: how many requests are on their way at a time.
        new_tokens: tokens of an answer.
        turns: how often pruned and unpruned take turns.
        dtype: of the server; "auto" is bfloat16 where this machine multiplies it faster, else float32.
    """
    if dtype == "auto":
        dtype = str(fastest_dtype("cpu")).removeprefix("torch.")
    ratios = {"unpruned": 1.0, f"{budget} of 576": budget / 576}
    bodies = make_bodies(2 * len(concurrency) * turns * requests + 2, new_tokens)
    measured = {(name, at): Measured() for at in concurrency for name in ratios}
    with served(dtype):
        asyncio.run(run(bodies, ratios, concurrency, requests, turns, measured))
    table = Table(title=f"{NAME}, vLLM, {dtype}, {os.cpu_count()} cores, {turns} x {requests} requests a row")
    for name in ("concurrency", "visual tokens", "requests/s", "first token, ms", "KV blocks at most"):
        table.add_column(name, justify="right")
    for (name, at), one in measured.items():
        rate = turns * requests / one.seconds
        table.add_row(str(at), name, f"{rate:.2f}", f"{1000 * median(one.first_tokens):.0f}", f"{one.blocks:.0f}")
    Console().print(table)


@contextmanager
def served(dtype: str) -> Iterator[None]:
    """The server as docs/serving.md starts it, with ratios that requests may set."""
    overrides = {"architectures": [next(iter(ARCHITECTURES))], "pruner": str(SHIPPED_PRUNER), "keep_ratio": 1.0}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(pocket_llava()), "--host", HOST,
        "--port", str(PORT), "--served-model-name", NAME, "--dtype", dtype, "--max-model-len", "1024",
        "--block-size", "32", "--enforce-eager", "--trust-request-mm-kwargs", "--hf-overrides", json.dumps(overrides),
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
    log = Path(tempfile.mkdtemp()) / "vllm.log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            asyncio.run(wait(process, log))
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


async def wait(process: "subprocess.Popen[bytes]", log: Path) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                async with session.get(f"{ADDRESS}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")


def make_bodies(count: int, new_tokens: int) -> list[dict[str, Any]]:
    """Chat completions about ``count`` different pictures."""
    source = load_source("scenes", "test", 20 * count)
    first = {sample.image_id: sample for sample in reversed(source.samples)}
    if len(first) < count:
        raise ValueError(f"{count} pictures are needed, scenes gave {len(first)}")
    bodies = []
    for image_id, sample in list(first.items())[:count]:
        png = io.BytesIO()
        source.image(image_id).save(png, "PNG")
        address = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": sample.question}]
        messages = [{"role": "user", "content": content}]
        body = {"model": NAME, "messages": messages, "max_tokens": new_tokens, "temperature": 0, "stream": True}
        bodies.append({**body, "ignore_eos": True})
    return bodies


async def run(
    bodies: list[dict[str, Any]], ratios: dict[str, float], concurrency: tuple[int, ...], requests: int, turns: int,
    measured: dict[tuple[str, int], Measured],
) -> None:  # fmt: skip
    left = iter(bodies)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
        for ratio in ratios.values():
            await ask(session, next(left), ratio)
        for at in concurrency:
            for _ in range(turns):
                for name, ratio in ratios.items():
                    await measure(session, [next(left) for _ in range(requests)], ratio, at, measured[name, at])


async def measure(
    session: aiohttp.ClientSession, bodies: list[dict[str, Any]], ratio: float, at: int, into: Measured
) -> None:
    """Send all ``bodies``, at most ``at`` at a time."""
    free = asyncio.Semaphore(at)

    async def one(body: dict[str, Any]) -> None:
        async with free:
            into.first_tokens.append(await ask(session, body, ratio))

    start = perf_counter()
    watch = asyncio.create_task(watch_blocks(session, into))
    await asyncio.gather(*(one(body) for body in bodies))
    into.seconds += perf_counter() - start
    watch.cancel()


async def ask(session: aiohttp.ClientSession, body: dict[str, Any], ratio: float) -> float:
    """Seconds to the first token of an answer, which is read to its end."""
    start = perf_counter()
    first = None
    request = {**body, "mm_processor_kwargs": {"keep_ratio": ratio}}
    async with session.post(f"{ADDRESS}/v1/chat/completions", json=request) as answer:
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {await answer.text()}")
        async for line in answer.content:
            if first is None and b'"content":"' in line and b'"content":""' not in line:
                first = perf_counter() - start
    return perf_counter() - start if first is None else first


async def watch_blocks(session: aiohttp.ClientSession, into: Measured) -> None:
    """Note the most KV blocks in use, as the server's metrics tell them."""
    while True:
        async with session.get(f"{ADDRESS}/metrics") as answer:
            text = await answer.text()
        total = re.search(r'num_gpu_blocks="(\d+)"', text)
        usage = re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", text, re.MULTILINE)
        if total and usage:
            into.blocks = max(into.blocks, float(usage[1]) * int(total[1]))
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    tyro.cli(main)
