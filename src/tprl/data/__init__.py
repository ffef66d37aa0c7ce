"""Samples and where they come from."""

from pathlib import Path

from tprl.data.easy_vqa import EasyVqa
from tprl.data.jsonl import Jsonl
from tprl.data.sample import Source
from tprl.data.scenes.scene import SceneSettings
from tprl.data.scenes.source import Scenes

SCENES = {
    "scenes": SceneSettings(),
    "scenes-crowded": SceneSettings(min_objects=10, max_objects=14),
    "scenes-tiles": SceneSettings(background="tiles"),
}
"""Scenes by name: as trained on, with more things in a picture than training ever shows, and on other backgrounds."""


def load_source(
    name: str, split: str, n: int | None = None, skip_bad: bool = False, images: Path | None = None
) -> Source:
    """The samples called ``name``.

    Args:
        name: of ``SCENES``, "easy-vqa", or the path of a JSONL file (see ``tprl.data.jsonl``).
        split: "train", "val" or "test".
        n: at most so many samples, at least 1; None for all. Scenes never end, so there it has to be given.
        skip_bad: of a JSONL file, leave out records that cannot be read.
        images: of a JSONL file, the picture folder; None is the folder of the file.

    Raises:
        ValueError: unknown name or split, an ``n`` below 1 or missing, or ``images`` or ``skip_bad`` without a JSONL
            file.
        DataError: a record of a JSONL file cannot be read.
    """
    if n is not None and n < 1:
        raise ValueError(f"the number of samples has to be at least 1, got {n}")
    if name.endswith(".jsonl"):
        return Jsonl(Path(name), split, n, images, skip_bad)
    if images is not None:
        raise ValueError(f"a picture folder ({images}) goes with a .jsonl file only, not with {name!r}")
    if skip_bad:
        raise ValueError(f"bad records are those of a .jsonl file; {name!r} has none to skip")
    if name == "easy-vqa":
        return EasyVqa(split, n)
    if name in SCENES:
        if n is None:
            raise ValueError("scenes never end: say how many samples are wanted")
        return Scenes(split, n, SCENES[name], name)
    raise ValueError(f"data {name!r} is not one of {', '.join(SCENES)}, easy-vqa or the path of a .jsonl file")


def load_training(
    data: str,
    val_data: str | None,
    samples: int,
    validation: int,
    skip_bad: bool = False,
    images: Path | None = None,
) -> tuple[Source, Source]:
    """What is trained on and what is held out.

    Args:
        data: as in ``load_source``.
        val_data: the same of what is held out. Two JSONL files are taken whole; of one, a tenth of the pictures is held
            out.
        samples: at most so many to train on.
        validation: at most so many held out.
        skip_bad: see ``load_source``; of both, as far as they are JSONL files.
        images: the same.

    Raises:
        ValueError: see ``load_source``; or a picture is trained on and held out.
        DataError: a record of a JSONL file cannot be read.
    """

    any_file = any(name.endswith(".jsonl") for name in (data, val_data or data))

    def part(name: str, split: str, n: int) -> Source:
        is_file = name.endswith(".jsonl")
        if any_file and not is_file:
            return load_source(name, split, n)
        return load_source(name, "test" if is_file and val_data else split, n, skip_bad, images)

    train, held_out = part(data, "train", samples), part(val_data or data, "val", validation)
    if isinstance(train, Jsonl) and isinstance(held_out, Jsonl) and (shared := train.files() & held_out.files()):
        raise ValueError(f"{val_data or data} holds out pictures that {data} trains on, such as {min(shared)}")
    return train, held_out


__all__ = ["SCENES", "load_source", "load_training"]
