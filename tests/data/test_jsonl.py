"""JSONL files, good and bad."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tprl.data import load_source, load_training
from tprl.data.jsonl import Jsonl, parse_record, read_image
from tprl.data.sample import DataError, samples_digest
from tprl.data.splits import held_out
from tprl.scoring import parse_box, score

GOOD = {"image": "a.png", "question": "What?", "answer": "dog"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good pictures a.png and b.jpg, a truncated one of each kind, an empty one and one that is text."""
    noise = Image.effect_noise((64, 48), 80).convert("RGB")
    noise.save(tmp_path / "a.png")
    noise.save(tmp_path / "b.jpg")
    for name in ("a.png", "b.jpg"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    return tmp_path


def write(folder: Path, *records: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_reads_every_kind_of_record(folder: Path) -> None:
    box = {"image": "b.jpg", "question": "Where?", "box": [100, 200, 300, 400], "box_scale": 1000}
    named = {"image": "a.png", "question": " Who? ", "answers": ["Ann", "Ann", "Bob"], "family": "who", "id": "q7"}
    source = Jsonl(write(folder, GOOD, "", box, named), "test")
    assert [(s.sample_id, s.image_id, s.question, s.answers, s.family) for s in source.samples] == [
        ("1", "a.png", "What?", ("dog",), "all"),
        ("3", "b.jpg", "Where?", ("100 200 300 400",), "all"),
        ("q7", "a.png", "Who?", ("Ann", "Ann", "Bob"), "who"),
    ]
    assert source.samples[1].box == (0.1, 0.2, 0.3, 0.4)
    assert source.image("a.png").size == (64, 48)
    assert (source.name, source.split, source.skipped) == ("data.jsonl", "test", [])


@pytest.mark.parametrize(("box", "scale"), [([0.1, 0.2, 0.3, 0.4], 1), ([1e-05, 0, 0.5, 1], 1), ([3, 5, 24, 24.0], 24)])
def test_box_as_an_answer_is_the_box(folder: Path, box: list[float], scale: float) -> None:
    record = {"image": "a.png", "question": "Where?", "box": box, "box_scale": scale}
    (sample,) = Jsonl(write(folder, record), "test").samples
    assert parse_box(sample.answers[0], sample.box_scale) == pytest.approx(sample.box)
    written = parse_record(json.dumps(record | {"answer": "so"}), "1")
    assert (written.box, written.answers) == (sample.box, ("so",))
    assert score(sample, sample.answers[0]) == pytest.approx(1)


WITHOUT = {"image": "a.png", "question": "What?"}
BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ('{"image": ', "not JSON"),
    "a list": ([1], "JSON object"),
    "unknown field": ({**GOOD, "colour": "red"}, r"unknown fields \['colour'\]"),
    "no image": ({"question": "What?", "answer": "dog"}, "'image' is missing"),
    "no question": ({"image": "a.png", "answer": "dog"}, "'question' is missing"),
    "no answer": (WITHOUT, "one of 'answer', 'answers' and 'box'"),
    "two answers": ({**GOOD, "answers": ["dog"]}, "one of 'answer', 'answers' and 'box'"),
    "empty question": ({**GOOD, "question": " "}, "'question' has to be a text"),
    "empty answer": ({**GOOD, "answer": ""}, "'answer' has to be a text"),
    "a number as answer": ({**GOOD, "answer": 3}, "'answer' has to be a text"),
    "no answers": ({**WITHOUT, "answers": []}, "list of texts"),
    "an empty one of the answers": ({**WITHOUT, "answers": ["dog", ""]}, "list of texts"),
    "text as answers": ({**WITHOUT, "answers": "dog"}, "list of texts"),
    "number as family": ({**GOOD, "family": 1}, "'family' has to be a text"),
    "box in pixels": ({**WITHOUT, "box": [10, 10, 40, 40]}, "is not 0 <= left < right <= 1"),
    "inverted box": ({**WITHOUT, "box": [0.5, 0, 0.4, 1]}, "is not 0 <= left < right <= 1"),
    "flat box": ({**WITHOUT, "box": [0.5, 0.1, 0.6, 0.1]}, "is not 0 <= left < right <= 1"),
    "negative box": ({**WITHOUT, "box": [-0.1, 0, 0.4, 1]}, "is not 0 <= left < right <= 1"),
    "box of three": ({**WITHOUT, "box": [0, 0, 1]}, "four numbers"),
    "box of NaN": ('{"image": "a.png", "question": "?", "box": [0, 0, NaN, 1]}', "four numbers"),
    "box of truths": ({**WITHOUT, "box": [False, False, True, True]}, "four numbers"),
    "box scale 0": ({**WITHOUT, "box": [0, 0, 1, 1], "box_scale": 0}, "above 0, got 0"),
    "box of huge numbers": ({**WITHOUT, "box": [0, 0, 1, 10**400]}, "four numbers"),
    "huge box scale": ({**WITHOUT, "box": [0, 0, 1, 1], "box_scale": 10**400}, "has to be a number above 0"),
    "deep nesting": ("[" * 100_000, "nested too deeply"),
    "deep nesting in a field": ('{"image": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "half a character as question": ({**GOOD, "question": "What \ud83d?"}, r"'question' is no Unicode .*\\ud83d"),
    "half a character as answer": ({**GOOD, "answer": "\ud83d"}, "'answer' is no Unicode"),
    "half a character in answers": ({**WITHOUT, "answers": ["dog", "\udc36"]}, "'answers' is no Unicode"),
    "half a character as image": ({**GOOD, "image": "\ud83d.png"}, "'image' is no Unicode"),
    "half a character as id": ({**GOOD, "id": "\ud83d"}, "'id' is no Unicode"),
    "half a character as family": ({**GOOD, "family": "\ud83d"}, "'family' is no Unicode"),
    "box scale alone": ({**GOOD, "box_scale": 5}, "of no use without 'box'"),
    "id taken": ({**GOOD, "id": "1"}, "id '1' is taken by line 1"),
    "missing picture": ({**GOOD, "image": "no.png"}, "there is no picture .*no.png"),
    "long picture name": ({**GOOD, "image": "a" * 300 + ".png"}, "(no|look for) picture .*aaa"),
    "folder as picture": ({**GOOD, "image": "."}, "there is no picture"),
    "empty picture": ({**GOOD, "image": "empty.png"}, r"empty.png is empty \(zero bytes\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_record_stops_with_file_and_line(folder: Path, case: str) -> None:
    record, message = BAD[case]
    path = write(folder, GOOD, record, GOOD)
    with pytest.raises(DataError, match=f"data.jsonl:2: .*{message}"):
        Jsonl(path, "test")


@pytest.mark.parametrize("case", BAD)
def test_bad_record_is_counted_and_said(folder: Path, case: str) -> None:
    record, _ = BAD[case]
    path = write(folder, GOOD, record, GOOD)
    with pytest.warns(UserWarning, match="skipped 1 bad records: .*data.jsonl:2: "):
        source = Jsonl(path, "test", skip_bad=True)
    assert [sample.sample_id for sample in source.samples] == ["1", "3"]
    assert len(source.skipped) == 1
    assert "data.jsonl:2: " in source.skipped[0]


def test_bytes_that_are_no_text(folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(b'{"image": "a.png", "question": "\xff?", "answer": "b"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:1: not JSON"):
        Jsonl(path, "test")


def test_whole_characters_are_as_good_escaped_in_halves(folder: Path) -> None:
    record = '{"image": "a.png", "question": "\\ud83d\\udc36?", "answer": "dog"}'
    assert Jsonl(write(folder, record), "test").samples[0].question == "\N{DOG FACE}?"


@pytest.mark.parametrize("name", ["cut-a.png", "cut-b.jpg", "text.png"])
def test_broken_picture(folder: Path, name: str) -> None:
    """Named with its line when it is used; with ``skip_bad`` gone from the samples before."""
    path = write(folder, GOOD, {**GOOD, "image": name})
    with pytest.raises(DataError, match=f"data.jsonl:2: cannot read picture .*{name}"):
        Jsonl(path, "test").image(name)
    with pytest.warns(UserWarning, match="skipped 1"):
        source = Jsonl(path, "test", skip_bad=True)
    assert [sample.image_id for sample in source.samples] == ["a.png"]


def test_nothing_to_say_when_all_is_well(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Jsonl(write(folder, GOOD), "test", skip_bad=True).skipped == []


def test_pictures_in_another_folder_and_first_n(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("elsewhere"), GOOD, GOOD, {**GOOD, "image": "no.png"})
    assert len(load_source(str(path), "test", 2, images=folder).samples) == 2
    with pytest.raises(DataError, match="there is no picture"):
        load_source(str(path), "test", 2)
    with pytest.raises(ValueError, match=r"goes with a \.jsonl file only"):
        load_source("scenes", "test", 2, images=folder)
    with pytest.raises(ValueError, match=r"bad records are those of a \.jsonl file; 'scenes' has none to skip"):
        load_source("scenes", "test", 2, skip_bad=True)


def test_missing_files(folder: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        Jsonl(folder / "no.jsonl", "test")
    with pytest.raises(DataError, match="there is no picture folder"):
        Jsonl(write(folder, GOOD), "test", images=folder / "no")
    with pytest.raises(DataError, match="no sample for split 'test' among its 0"):
        Jsonl(write(folder), "test")
    with pytest.raises(ValueError, match="'dev' is not one of"):
        Jsonl(write(folder, GOOD), "dev")


def test_train_and_val_divide_the_pictures(folder: Path) -> None:
    records = []
    for number in range(30):
        Image.new("RGB", (4, 4)).save(folder / f"{number}.png")
        records += [{**GOOD, "image": f"{number}.png"}] * 2
    path = write(folder, *records)
    parts = {split: Jsonl(path, split).samples for split in ("train", "val", "test")}
    pictures = {split: {sample.image_id for sample in samples} for split, samples in parts.items()}
    assert (len(pictures["train"]), len(pictures["val"]), len(parts["val"])) == (27, 3, 6)
    assert not pictures["train"] & pictures["val"]
    assert len(parts["test"]) == 60
    for split, samples in parts.items():  # fewer of them are the first of them, so that no two sizes mix the splits
        assert Jsonl(path, split, 4).samples == samples[:4]
    reordered = write(folder, *records[::-1])
    assert {sample.image_id for sample in Jsonl(reordered, "val").samples} == pictures["val"]
    with pytest.raises(DataError, match="no sample for split 'train' among its 1"):
        Jsonl(write(folder, GOOD), "train")


def test_of_two_files_either_is_whole(folder: Path) -> None:
    """Of one, the pictures are divided; none may be on both sides."""
    for letter in "cdef":
        (folder / f"{letter}.png").write_bytes((folder / "a.png").read_bytes())
    own, other = folder / "own.jsonl", folder / "other.jsonl"
    own.write_text("".join(json.dumps(GOOD | {"image": f"{letter}.png"}) + "\n" for letter in "acd"))
    other.write_text("".join(json.dumps(GOOD | {"image": f"{letter}.png"}) + "\n" for letter in "ef"))
    parts = load_training(str(own), str(other), 9, 9)
    assert [[sample.image_id for sample in part.samples] for part in parts] == [
        ["a.png", "c.png", "d.png"], ["e.png", "f.png"],
    ]  # fmt: skip
    train, held_out = load_training(str(own), None, 9, 9)
    shown = [sample.image_id for sample in (*train.samples, *held_out.samples)]
    assert sorted(shown) == ["a.png", "c.png", "d.png"]
    assert len(held_out.samples) == 1
    assert [len(part.samples) for part in load_training(str(own), "scenes", 9, 4)] == [3, 4]
    for names, splits in (
        (("scenes", "scenes-crowded"), ["train", "val"]), (("scenes", None), ["train", "val"]),
        ((str(own), "scenes"), ["test", "val"]), (("scenes", str(own)), ["train", "test"]),
        ((str(own), None), ["train", "val"]),
    ):  # fmt: skip
        assert [part.split for part in load_training(*names, 2, 2)] == splits
    other.write_text(json.dumps(GOOD | {"image": "d.png"}))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    far = elsewhere / "other.jsonl"
    for name, own_name in (("d.png", other), ("../d.png", far), (str(folder / "d.png"), far)):
        own_name.write_text(json.dumps(GOOD | {"image": name}))
        with pytest.raises(ValueError, match=r"other.jsonl holds out pictures that .*own.jsonl trains on, .*d\.png"):
            load_training(str(own), str(own_name), 9, 9)
    (elsewhere / "d.png").write_bytes((folder / "a.png").read_bytes())
    far.write_text(json.dumps(GOOD | {"image": "d.png"}))
    assert len(load_training(str(own), str(far), 9, 9)[1].samples) == 1
    own.write_text("".join(json.dumps(GOOD | {"image": f"{at}/d.png"}) + "\n" for at in ("elsewhere", elsewhere)))
    with pytest.raises(ValueError, match=r"own.jsonl holds out pictures that .*own.jsonl trains on"):
        load_training(str(own), None, 9, 9)


def test_picture_folder_and_bad_records_are_those_of_the_file_alone(folder: Path) -> None:
    path = write(folder, GOOD, {"image": "a.png"})
    pictures = folder / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes((folder / "a.png").read_bytes())
    for names in ((str(path), "scenes"), ("scenes", str(path))):
        with pytest.warns(UserWarning, match="skipped 1 bad records"):
            parts = load_training(*names, 3, 3, skip_bad=True, images=pictures)
        assert sorted(len(part.samples) for part in parts) == [1, 3]
    with pytest.raises(ValueError, match=r"goes with a \.jsonl file only, not with 'scenes'"):
        load_training("scenes", None, 3, 3, images=pictures)


def test_a_picture_is_one_however_it_is_spelt(folder: Path) -> None:
    """By every spelling it is in the same split, and names that are plain already stay as they are."""
    (folder / "street").mkdir()
    plain = [f"street/{number} ..x.png" for number in range(20)]
    for name in plain:
        Image.new("RGB", (4, 4)).save(folder / name)
    records = [
        {**GOOD, "image": spelling}
        for name in plain
        for spelling in (name, f"./{name}", f"no/../{name}", f"street//{name[7:]}", f"street/./{name[7:]}")
    ]
    path = write(folder, *records)
    assert [sample.image_id for sample in Jsonl(path, "test").samples] == [name for name in plain for _ in range(5)]
    train, val = ({sample.image_id for sample in Jsonl(path, split).samples} for split in ("train", "val"))
    assert (len(train), len(val), train & val) == (18, 2, set())
    assert Jsonl(path, "test").image(plain[0]).size == (4, 4)
    assert parse_record(json.dumps({**GOOD, "image": "../a.png"}), "1").image_id == "../a.png"


def test_read_image_is_upright_rgb(folder: Path) -> None:
    picture = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.png", exif=exif)
    read = read_image(folder / "turned.png")
    assert (read.mode, read.size, read.getpixel((0, 0))) == ("RGB", (4, 8), (255, 0, 0))


def test_a_picture_that_changes_is_another_version(folder: Path) -> None:
    source = Jsonl(write(folder, GOOD), "test")
    before, version = samples_digest(source), source.version("a.png")
    Image.new("RGB", (7, 9)).save(folder / "a.png")
    assert source.version("a.png") != version
    assert samples_digest(source) != before
    os.utime(folder / "a.png", ns=(1, 1))  # as many bytes, at another time
    assert source.version("a.png").endswith(":1")


def test_pictures_of_16_bits_keep_their_greys(tmp_path: Path) -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "ramp.png"))[..., 0], np.arange(256).reshape(16, 16))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "depth.tiff")
    with pytest.raises(DataError, match=r"depth\.tiff: its pixels are numbers of 32 bits \(mode F\)"):
        read_image(tmp_path / "depth.tiff")


@pytest.mark.parametrize("block", [b"II*\0", b"nonsense"])
def test_a_damaged_exif_block_is_a_bad_picture(tmp_path: Path, block: bytes) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", exif=b"Exif\0\0" + block)
    with pytest.raises(DataError, match=r"cannot read picture .*a\.png"):
        read_image(tmp_path / "a.png")


def test_a_picture_of_a_kind_that_is_not_implemented_is_a_bad_picture(tmp_path: Path) -> None:
    header = [124, 0, 8, 8, 0, 0, 0, *[0] * 11, 32, 4, int.from_bytes(b"????", "little"), *[0] * 10]
    (tmp_path / "a.dds").write_bytes(b"DDS " + b"".join(number.to_bytes(4, "little") for number in header))
    with pytest.raises(DataError, match=r"cannot read picture .*a\.dds: .*nimplemented"):
        read_image(tmp_path / "a.dds")


def test_a_tenth_of_the_pictures_is_held_out_however_often_each_is_asked_about() -> None:
    names = [str(number) for number in range(30)]
    expected = held_out(names)
    assert len(expected) == 3
    for often in names:
        assert held_out([*names, *[often] * 100]) == expected


def test_as_old_but_of_another_size_is_another_version(folder: Path) -> None:
    source, versions = Jsonl(write(folder, GOOD), "test"), set()
    for size in (7, 70):
        Image.new("RGB", (size, size)).save(folder / "a.png")
        os.utime(folder / "a.png", ns=(1, 1))
        versions.add(source.version("a.png"))
    assert len(versions) == 2


def test_a_picture_too_large_to_be_safe_is_a_bad_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(DataError, match=r"cannot read picture .*a\.png: .*decompression bomb"):
        read_image(folder / "a.png")


def test_a_picture_is_told_by_the_first_line_that_names_it(folder: Path) -> None:
    bad = {**GOOD, "image": "cut-a.png"}
    with pytest.raises(DataError, match=r"data\.jsonl:2: cannot read"):
        Jsonl(write(folder, GOOD, bad, bad), "test").image("cut-a.png")
