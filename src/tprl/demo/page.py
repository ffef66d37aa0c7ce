"""The page itself: gradio's components, and what happens when one is touched."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import tprl
from tprl.data import load_source
from tprl.demo.render import render
from tprl.demo.visit import MAX_BYTES, MAX_QUESTION, STEPS, Amount, Visit, read_upload
from tprl.lvlm.model import Lvlm
from tprl.pruner import TokenPruner
from tprl.selectors import IN_MODEL, SELECTORS

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

STYLE = Path(tprl.__file__).parent / "assets" / "demo.css"
FONTS = ("Inter", "Helvetica Neue", "Segoe UI", "Liberation Sans", "Arial", "sans-serif")
"""Those of them that the visitor has; none is loaded."""
PICTURES = 8
FORGOTTEN = 3600
"""Seconds after which uploads go from the disk."""
VISITS = 100
"""Visitors whose pictures are held at once."""
BUDGET = 64
PEER = "divprune"
MODES = ["budget", "threshold", "steps"]
LOG_ODDS = -40, 5
"""Where the slider of the threshold ends; probabilities of use lie too near 0 for a slider."""
SUGGESTIONS = 6
"""Questions offered about a picture."""


def build(lvlm: Lvlm, pruner: TokenPruner | None, title: str) -> gr.Blocks:
    """The page for a model.

    Args:
        lvlm: answers; one question at a time, whoever asks.
        pruner: the policy; without one only peers are compared.
        title: name of the model.
    """
    samples = load_source("scenes", "test", 10 * PICTURES)
    questions: dict[str, list[str]] = {}
    for sample in samples.samples:
        questions.setdefault(sample.image_id, []).append(sample.question)
    scenes = [(samples.image(image_id), questions[image_id]) for image_id in list(questions)[:PICTURES]]

    def begin(image: Any, held: int) -> tuple[Visit, Any]:
        visit = Visit(lvlm, pruner, image)
        return visit, gr.Slider(maximum=visit.total, value=min(held, visit.total))

    def pick(index: int, held: int) -> tuple[Any, ...]:
        image, asked = scenes[index]
        offered = gr.Dataset(samples=[[question] for question in asked[:SUGGESTIONS]], visible=True)
        return *begin(image, held), asked[0], offered

    def pick_selected(held: int, event: gr.SelectData) -> tuple[Any, ...]:
        return pick(int(event.index), held)

    def take(path: str, held: int) -> tuple[Any, ...]:
        return *begin(read_upload(Path(path)), held), gr.Dataset(visible=False)

    def show(visit: Visit | None, question: str, mode: Any, budget: int, log_odds: float, step: int, peer: str) -> str:
        if visit is None:
            raise ValueError("There is no picture yet; pick or upload one.")
        threshold = torch.tensor(log_odds).sigmoid().item()
        return render(visit, visit.compare(question, Amount(mode, int(budget), threshold, int(step)), peer))

    def sliders(mode: str) -> tuple[Any, ...]:
        shown = (mode != "threshold", mode == "threshold", mode == "steps")
        return tuple(gr.Slider(visible=visible) for visible in shown)

    with gr.Blocks(title="TPRL", analytics_enabled=False, delete_cache=(FORGOTTEN, FORGOTTEN)) as page:
        visit = gr.State()
        gr.HTML(f"<h1>What does the answer need to see?</h1><p>{escape(title)}, pruned by what is asked.</p>")
        gallery = gr.Gallery(
            [image for image, _ in scenes], show_label=False, container=False, columns=PICTURES, height="auto",
            allow_preview=False, buttons=[], interactive=False, elem_id="gallery",
        )  # fmt: skip
        with gr.Row(equal_height=True):
            question = gr.Textbox(
                show_label=False, container=False, placeholder="Ask about the picture", max_length=MAX_QUESTION,
                scale=8, elem_id="question",
            )  # fmt: skip
            ask = gr.Button("Ask", variant="primary", scale=1, min_width=90, elem_id="ask")
            upload = gr.UploadButton(
                "Upload a picture", file_types=["image"], size="md", scale=2, min_width=150, elem_id="upload"
            )
        suggestions = gr.Dataset(components=[question], samples=[[""]], show_label=False, visible=False)
        with gr.Row(elem_id="controls"):
            mode = gr.Radio(MODES, value="budget", label="Keep by", visible=pruner is not None, elem_id="mode")
            budget = gr.Slider(1, BUDGET, BUDGET, step=1, label="Tokens kept", buttons=[], elem_id="budget")
            threshold = gr.Slider(
                *LOG_ODDS, _log_odds(pruner.config.threshold) if pruner else 0, step=0.1, label="Keep log-odds above",
                visible=False, buttons=[], elem_id="threshold",
            )  # fmt: skip
            step = gr.Slider(0, STEPS, STEPS, step=1, label="Step", visible=False, buttons=[], elem_id="step")
            peer = gr.Dropdown([*SELECTORS, *IN_MODEL], value=PEER, label="Compare with", elem_id="peer")
        result = gr.HTML(elem_id="result")

        alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        quiet: dict[str, Any] = {"show_progress": "hidden", **alone}
        answer: dict[str, Any] = {
            "fn": _telling(show), "inputs": [visit, question, mode, budget, threshold, step, peer],
            "outputs": result, "trigger_mode": "always_last", "show_progress": "minimal", **alone,
        }  # fmt: skip
        scene = [visit, budget, question, suggestions]
        page.load(partial(pick, 0), budget, scene, **quiet).then(**answer)
        gallery.select(pick_selected, budget, scene, **quiet).then(**answer)
        upload.upload(_telling(take), [upload, budget], [visit, budget, suggestions], **quiet).success(**answer)
        suggestions.click(lambda chosen: chosen[0], suggestions, question, api_visibility="private").then(**answer)
        mode.input(sliders, mode, [budget, threshold, step], api_visibility="private").then(**answer)
        gr.on([ask.click, question.submit, budget.input, threshold.input, step.input, peer.input], **answer)
    return page


@contextmanager
def own_files() -> Iterator[None]:
    """While it is open, pages that are built keep what is uploaded in a folder of their own. It goes at the end, also
    where the process is told to end."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with TemporaryDirectory(prefix="tprl-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def serve(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until the process is interrupted.

    Raises:
        OSError: the port is taken.
    """
    theme = gr.themes.Base(
        primary_hue="orange", neutral_hue="stone", font=FONTS, font_mono=("Liberation Mono", "monospace")
    )
    _, address, _ = page.launch(
        share=False, server_name=host, server_port=port, max_file_size=MAX_BYTES, theme=theme, css_paths=STYLE,
        state_session_capacity=VISITS, footer_links=[], run_history=False, ssr_mode=False, quiet=True,
        prevent_thread_lock=True,
    )  # fmt: skip
    print(f"the demo is at {address} until Ctrl-C", flush=True)
    page.block_thread()


def _telling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and what is wrong with a visitor's input is a sentence on the page."""

    @wraps(function)
    def told(*args: Any) -> Any:
        try:
            return function(*args)
        except ValueError as error:
            raise gr.Error(escape(str(error)), title="This does not work", print_exception=False) from error

    return told


def _log_odds(probability: float) -> float:
    """Its place on the slider."""
    return round(torch.tensor(probability).logit().clamp(*LOG_ODDS).item(), 1)
