"""What the digest of samples says of them."""

from dataclasses import replace

from tprl.data import load_source
from tprl.data.sample import Sample, samples_digest
from tprl.data.scenes.questions import BOX_SCALE

BOXED = Sample("0", "0", "Where?", ("0 0 12 12",), "where", (0.0, 0.0, 0.5, 0.5), 24)


class Source:
    """Samples without pictures."""

    name, split = "some", "test"

    def __init__(self, *samples: Sample) -> None:
        self.samples = samples

    def version(self, image_id: str) -> str:
        return ""


def digest(sample: Sample) -> str:
    return samples_digest(Source(sample, BOXED))  # type: ignore[arg-type]


def test_what_scores_depend_on_is_in_it() -> None:
    scales = [replace(BOXED, box_scale=scale) for scale in (BOX_SCALE, 1.0, 1000.0)]
    others = [
        replace(BOXED, image_id="1"),
        replace(BOXED, question="Where is it?"),
        replace(BOXED, answers=("0 0 12 13",)),
        replace(BOXED, box=(0.0, 0.0, 0.5, 0.6)),
        replace(BOXED, box=None),
    ]
    assert len({digest(sample) for sample in [*scales, *others]}) == len(scales) + len(others)


def test_how_a_scale_is_written_is_not() -> None:
    assert digest(replace(BOXED, box_scale=1000)) == digest(replace(BOXED, box_scale=1000.0))
    assert digest(replace(BOXED, box=None)) == digest(replace(BOXED, box=None, box_scale=1.0))


def test_results_that_are_kept_are_found_by_it() -> None:
    """The digests of before the box scale was part of them, but that of scenes-tiles, which differs from scenes by its
    pictures alone."""
    names = ("scenes", "scenes-crowded", "scenes-tiles", "easy-vqa")
    assert [samples_digest(load_source(name, "test", 50)) for name in names] == [
        "5546b52a8b00ed78", "f4e7a5f0ddc0685d", "b166b5eac8c22b5e", "cd003b6a2f5ed75b",
    ]  # fmt: skip
