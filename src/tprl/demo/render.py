"""What the page shows of a visit, as HTML without scripts and with its pictures inside."""

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from tprl.demo.visit import Column, Visit
from tprl.draw import HEAT, draw_heat, draw_kept
from tprl.pruner import TokenPruner

LOOKS = 4
"""Questions whose keep probabilities are shown."""

_TEMPLATE = Environment(
    loader=PackageLoader("tprl", "assets"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
).get_template("demo.html.j2")


def render(visit: Visit, columns: Sequence[Column]) -> str:
    """The answers side by side, each with the patches that were kept, and where the policy looked for the latest
    questions.

    Args:
        columns: of ``Visit.compare``; the first is the whole model.
    """
    shown = []
    for column in columns:
        keep = torch.zeros(visit.total, dtype=torch.bool)
        if column.answered:
            keep[column.answered.kept] = True
        shown.append({**column.__dict__, "picture": _uri(draw_kept(visit.image, visit.coords, keep))})
    looks = [
        {"question": question, "picture": _uri(draw_heat(visit.image, visit.coords, visit.keep_probs(question)))}
        for question in (visit.questions[:LOOKS] if visit.pruner else ())
    ]
    ramp = Image.fromarray(matplotlib.colormaps[HEAT](np.linspace(0, 1, 128)[None], bytes=True)[..., :3])
    return _TEMPLATE.render(
        columns=shown, whole=columns[0].answered, own=TokenPruner.name, looks=looks, scale=_uri(ramp)
    )


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
