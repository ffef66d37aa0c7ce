"""The page in a real browser: a person picks a picture, asks, moves sliders and sees the patches change.

Run by ``make test-demo``, which has gradio and Playwright; the browser is the machine's own Chromium.
"""

import base64
import io
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tprl.data import load_source

pytestmark = pytest.mark.demo

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip
PATIENCE = 240_000
"""Milliseconds until something that does not appear is given up, also on a busy machine."""
SIDE = 24
"""Patches along a side of a scene."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tprl.cli", "demo", "--port", str(port)]
    files = tmp_path_factory.mktemp("files")
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(files)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=offline)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line, server.communicate()[1]
    yield f"http://127.0.0.1:{port}/"
    assert len(list(files.glob("tprl-demo-*/**/*.webp"))) > 1
    server.terminate()
    assert "Traceback" not in server.communicate(timeout=60)[1]
    assert not [path for path in files.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Any]:
    """The opened page; at the end, nothing was asked of any other machine."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no Chromium is found: none of {', '.join(BROWSERS)} is on the path")
    asked: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=FLAGS)
        opened = chromium.new_page(viewport={"width": 1280, "height": 1000})
        opened.set_default_timeout(PATIENCE)
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(address)
        yield opened
        chromium.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


class Result:
    """What the page shows of one method: "whole", "tprl" or a peer."""

    def __init__(self, page: Any, method: str) -> None:
        self.article = page.locator(f"#result article[data-method={method}]")

    @property
    def answer(self) -> str:
        return str(self.article.locator(".answer").inner_text())

    @property
    def patches(self) -> np.ndarray:
        """Mean colours of the patches as drawn, ``(SIDE, SIDE, 3)``, without the edges that JPEG blurs."""
        uri = self.article.locator("img").get_attribute("src")
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))), np.float32)
        side = len(image) // SIDE
        return image.reshape(SIDE, side, SIDE, side, 3)[:, 5:-5, :, 5:-5].mean((1, 3))

    def wait_for(self, count: int | str) -> None:
        """Until it shows that many visual tokens."""
        self.article.locator(f"dd[data-count='{count}']").wait_for()


def kept(page: Any) -> np.ndarray:
    """Which patches the policy's picture shows as they are in the whole picture, bool ``(SIDE, SIDE)``."""
    return np.abs(Result(page, "tprl").patches - Result(page, "whole").patches).max(2) < 3


def test_a_person_asks_and_moves_the_slider(page: Any) -> None:
    tprl = Result(page, "tprl")
    tprl.wait_for(64)
    scenes = load_source("scenes", "test", 30)
    second = [sample for sample in scenes.samples if sample.image_id == "1"]

    page.locator("#gallery button.thumbnail-item").nth(1).click()
    page.wait_for_function(f"document.querySelector('#question textarea').value === {second[0].question!r}")
    page.locator("#result figcaption", has_text=second[0].question).wait_for()
    first_look = page.locator("#result figure img").first.get_attribute("src")

    attribute = next(sample for sample in second if sample.family == "attribute")
    page.locator("#question textarea").fill(attribute.question)
    page.locator("#ask").click()
    page.locator("#result figure:nth-child(2) figcaption", has_text=second[0].question).wait_for()
    looks = page.locator("#result figure img")
    assert looks.nth(0).get_attribute("src") != looks.nth(1).get_attribute("src") == first_look
    assert Result(page, "whole").answer == attribute.answers[0]
    at_64 = kept(page)
    assert 64 <= at_64.sum() < 80  # a white patch looks the same when it is faded

    page.locator("#budget input[type=range]").fill("16")
    tprl.wait_for(16)
    at_16 = kept(page)
    assert 16 <= at_16.sum() < 32
    assert not (at_16 & ~at_64).any()
    Result(page, "divprune").wait_for(16)


def test_threshold_and_steps(page: Any) -> None:
    tprl = Result(page, "tprl")
    page.get_by_label("threshold", exact=True).check()
    page.locator("#threshold input[type=range]").fill("-40")
    tprl.wait_for(576)
    assert kept(page).all()
    page.get_by_label("steps", exact=True).check()
    page.locator("#step input[type=range]").fill("2")
    tprl.wait_for(round(576 * (16 / 576) ** (2 / 3)))
    page.locator("#step input[type=range]").fill("0")
    tprl.wait_for(576)
    page.get_by_label("budget", exact=True).check()
    tprl.wait_for(16)


def test_another_selector(page: Any) -> None:
    page.locator("#peer input").click()
    page.get_by_role("option", name="fastervlm").click()
    Result(page, "fastervlm").wait_for(16)
    assert page.locator("#result article").count() == 3


def test_a_broken_upload_gives_a_sentence_and_a_good_one_an_answer(page: Any, tmp_path: Path) -> None:
    whole = Result(page, "whole")
    before = whole.patches
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    page.locator("input[type=file]").set_input_files(tmp_path / "broken.png")
    page.get_by_text("broken.png cannot be read as a picture; it has to be a whole JPEG, PNG or WebP.").wait_for()
    assert np.array_equal(whole.patches, before)

    page.locator("#question textarea").fill("Is there a dog in the picture?")
    Image.new("RGB", (300, 300), "teal").save(tmp_path / "teal.png")
    page.locator("input[type=file]").set_input_files(tmp_path / "teal.png")
    page.locator("#result figcaption", has_text="Is there a dog").wait_for()
    assert np.abs(whole.patches - (0, 128, 128)).max() < 4


def test_an_empty_question_gives_a_sentence(page: Any) -> None:
    page.locator("#question textarea").fill("  ")
    page.locator("#ask").click()
    page.get_by_text("The question is empty; ask something about the picture.").wait_for()
