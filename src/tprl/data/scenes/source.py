"""The source of questions about scenes."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from tprl.data.sample import Sample
from tprl.data.scenes.drawing import render
from tprl.data.scenes.questions import BOX_SCALE, FAMILIES, ask, parse_box
from tprl.data.scenes.scene import SPLIT_SEEDS, STANDARD, SceneSettings, make_scene


class Scenes:
    """The ``scenes`` source: up to one question of every family about each picture, in a fixed order.

    Args:
        split: "train", "val" or "test".
        n: number of samples.
        settings: what the pictures look like.
        name: of the source.
    """

    def __init__(self, split: str, n: int, settings: SceneSettings = STANDARD, name: str = "scenes") -> None:
        self.name = name
        if split not in SPLIT_SEEDS:
            raise ValueError(f"split {split!r} is not one of {sorted(SPLIT_SEEDS)}")
        self.split = split
        self.settings = settings
        samples: list[Sample] = []
        index = 0
        while len(samples) < n:
            samples += self._samples(index)
            index += 1
        self.samples: Sequence[Sample] = samples[:n]

    def _samples(self, index: int) -> list[Sample]:
        scene = make_scene(self.split, index, self.settings)
        rng = np.random.default_rng((SPLIT_SEEDS[self.split], index, 1))
        samples = []
        for family in FAMILIES:
            asked = ask(scene, family, rng)
            if asked is None:
                continue
            question, answer = asked
            box = parse_box(answer) if family == "grounding" else None
            samples.append(
                Sample(f"{index}/{family}", str(index), question, (answer,), family, box, BOX_SCALE if box else 1.0)
            )
        return samples

    def image(self, image_id: str) -> Image.Image:
        return render(make_scene(self.split, int(image_id), self.settings))

    def version(self, image_id: str) -> str:
        """The background where it is not the usual one: no question tells of it."""
        return "" if self.settings.background == STANDARD.background else f" on {self.settings.background}"
