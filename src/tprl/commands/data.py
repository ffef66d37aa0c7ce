"""``tprl data``: write a source's pictures and questions into a folder, or look at them on one sheet."""

import json
from pathlib import Path
from typing import Any

from tprl.data import load_source
from tprl.data.sheet import contact_sheet
from tprl.progress import track


def sheet(out: Path, *, data: str = "scenes", split: str = "train", n: int = 24, images: Path | None = None) -> None:
    """Draw pictures and their questions on one contact sheet.

    Args:
        out: the PNG file to write.
        data: "scenes", "scenes-crowded", "scenes-tiles", "easy-vqa", or a .jsonl file.
        split: "train", "val" or "test".
        n: number of pictures.
        images: picture folder of a .jsonl file; the file's own unless given.
    """
    contact_sheet(load_source(data, split, 20 * n, images=images), n).save(out)
    print(f"wrote {out}")


def make(out: Path, *, data: str = "scenes", split: str = "train", n: int = 1000, overwrite: bool = False) -> None:
    """Write pictures and a questions.jsonl, in the form that --data takes.

    Args:
        out: the folder to write.
        data: "scenes", "scenes-crowded", "scenes-tiles" or "easy-vqa".
        split: "train", "val" or "test".
        n: number of questions.
        overwrite: write into a folder that exists.
    """
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; --overwrite writes into it")
    source = load_source(data, split, n)
    out.mkdir(parents=True, exist_ok=True)
    names = {sample.image_id: f"{sample.image_id.replace('/', '-')}.png" for sample in source.samples}
    for image_id, name in track(list(names.items()), "drawing"):
        source.image(image_id).save(out / name)
    partial = out / "questions.jsonl.partial"
    with partial.open("w") as file:
        for sample in source.samples:
            record: dict[str, Any] = {
                "id": sample.sample_id,
                "image": names[sample.image_id],
                "question": sample.question,
            }
            if sample.box is None:
                record |= {"answer": sample.answers[0]} if len(sample.answers) == 1 else {"answers": sample.answers}
            else:
                box = [edge * sample.box_scale for edge in sample.box]
                record |= {"box": box, "box_scale": sample.box_scale, "answer": sample.answers[0]}
            file.write(json.dumps(record | {"family": sample.family}) + "\n")
    partial.replace(out / "questions.jsonl")
    print(f"wrote {len(names)} pictures and {len(source.samples)} questions into {out}")
