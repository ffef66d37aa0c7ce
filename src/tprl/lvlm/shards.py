"""Pictures as a frozen LVLM's language model is shown them, in files that are read slice by slice, never whole, so
memory does not grow with the number of pictures."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tprl.checkpoint import make_once, save_tensors
from tprl.data.sample import Source
from tprl.lvlm.model import Lvlm
from tprl.lvlm.pictures import EncodedPicture
from tprl.progress import track

SHARD_BYTES = 256 * 2**20
"""A shard is closed once it holds so much; building one takes as much memory, and a batch of pictures."""
ENCODE_BATCH = 16


@dataclass(frozen=True)
class Place:
    """Where a picture's rows stand, and its ``text`` and ``runs`` as in ``EncodedPicture``."""

    shard: int
    first: int
    last: int
    text: str
    runs: tuple[int, ...]


class Shards:
    """The encoded pictures of a source in one folder; those that no shard holds are encoded first.

    Args:
        lvlm: encodes them.
        source: where the pictures come from.
        image_ids: of the pictures.
        folder: of the shards.
        signals: what is kept of a picture besides its tokens.

    Attributes:
        places: where each picture stands.
        stored: names of what the shards hold of every picture.
    """

    def __init__(
        self, lvlm: Lvlm, source: Source, image_ids: Sequence[str], folder: Path, signals: frozenset[str]
    ) -> None:
        self.lvlm, self.source, self.image_ids, self.folder, self.signals = lvlm, source, image_ids, folder, signals
        self.stored: frozenset[str] = frozenset()
        ids = track(image_ids, f"encoding {source.name}/{source.split}")
        self.places = dict(zip(ids, self._walk(), strict=True))

    def picture(self, image_id: str) -> EncodedPicture:
        """One picture, read from its shard."""
        place = self.places[image_id]
        with safe_open(self._shard(place.shard), "pt") as file:
            parts = {name: file.get_slice(name)[place.first : place.last] for name in file.keys()}  # noqa: SIM118
        named = {name: parts.pop(name) for name in ("tokens", "coords", "places", "deep") if name in parts}
        return EncodedPicture(signals=parts, text=place.text, runs=place.runs, **named)

    def _shard(self, number: int) -> Path:
        return self.folder / f"tokens-{number:05d}.safetensors"

    def _walk(self) -> Iterator[Place]:
        """The places of all pictures, shard by shard; an interrupted build goes on where it stopped."""
        number = found = 0
        while found < len(self.image_ids):
            make_once(self._shard(number), partial(self._write, number, self.image_ids[found:]))
            with safe_open(self._shard(number), "pt") as file:
                self.stored = frozenset(file.keys())
                pictures = json.loads(file.metadata()["pictures"])
            first = 0
            for text, runs in pictures:
                yield Place(number, first, first + sum(runs), text, tuple(runs))
                first += sum(runs)
            number, found = number + 1, found + len(pictures)

    def _write(self, number: int, image_ids: Sequence[str]) -> None:
        """Fill a shard with the first of some pictures."""
        pictures: list[EncodedPicture] = []
        parts: dict[str, list[Tensor]] = {}
        size = 0
        for start in range(0, len(image_ids), ENCODE_BATCH):
            images = [self.source.image(image_id) for image_id in image_ids[start : start + ENCODE_BATCH]]
            for picture in self.lvlm.encode_images(images, self.signals):
                pictures.append(picture)
                for name, values in _tensors(picture).items():
                    parts.setdefault(name, []).append(values)
                    size += values.nbytes
            if size >= SHARD_BYTES:
                break
        shown = json.dumps([(picture.text, picture.runs) for picture in pictures])
        save_tensors(self._shard(number), {name: torch.cat(part) for name, part in parts.items()}, {"pictures": shown})


def _tensors(picture: EncodedPicture) -> dict[str, Tensor]:
    """What a shard holds of a picture."""
    named = {"tokens": picture.tokens, "coords": picture.coords, "places": picture.places, "deep": picture.deep}
    return {name: values.cpu() for name, values in (named | picture.signals).items() if values is not None}
