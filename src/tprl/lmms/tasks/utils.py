"""What lmms-eval does with a question of a JSONL file, see ``tprl.data.jsonl``: as ``tprl evaluate`` does."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from tprl.data.jsonl import parse_record, read_image
from tprl.data.sample import Sample
from tprl.scoring import score

FOLDER = Path("tprl-questions")
"""Where the task's pictures and questions lie, from the folder in which lmms-eval is started."""


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [read_image(FOLDER / _sample(doc).image_id)]


def doc_to_target(doc: dict[str, Any]) -> str:
    return _sample(doc).answers[0]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"accuracy": score(_sample(doc), results[0])}


def _sample(doc: dict[str, Any]) -> Sample:
    """The question as ``tprl`` reads it; the columns that other lines have are None in this one.

    An id that is not given would be the number of the line, which lmms-eval does not tell, and no score depends on it.
    """
    record = {name: value for name, value in doc.items() if value is not None}
    return parse_record(json.dumps(record), default_id="")
