"""A contact sheet: what a source looks like, at a glance."""

from collections import Counter, deque
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from tprl.data.sample import Sample, Source

WIDTH = 280
"""Side of a picture's square on the sheet in pixels."""

_COLUMNS, _GAP, _MARGIN, _PAD, _HEADER, _LINE = 4, 24, 40, 14, 72, 23
_PAPER, _CARD, _WELL, _INK, _QUIET, _EDGE = "#f3f1ec", "#ffffff", "#ebe8e1", "#23272e", "#8b8f98", "#dedad1"
_ACCENT, _TARGET = "#0b7a6f", "#e6007e"
_MOST_LINES = 4

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(source: Source, count: int) -> Image.Image:
    """``count`` samples of ``source`` as RGB cards: the picture, its target box if it has one, question and answer.

    Families take turns, and a picture comes again only when there is no other.

    Raises:
        ValueError: ``count`` is below 1.
        DataError: a picture cannot be read.
    """
    if count < 1:
        raise ValueError(f"a contact sheet shows at least 1 sample, got {count}")
    samples = _choose(source.samples, count)
    texts = [_wrap(sample.question, ImageFont.load_default(17), WIDTH) for sample in samples]
    columns = min(_COLUMNS, len(samples))
    rows = [range(start, min(start + columns, len(samples))) for start in range(0, len(samples), columns)]
    heights = [2 * _PAD + WIDTH + 56 + _LINE * max(len(texts[i]) for i in row) for row in rows]
    step = WIDTH + 2 * _PAD + _GAP
    sheet = Image.new(
        "RGB",
        (2 * _MARGIN + columns * step - _GAP, _HEADER + _MARGIN + sum(heights) + _GAP * (len(rows) - 1) + _MARGIN),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN + 22), f"{source.name} / {source.split}", _INK, ImageFont.load_default(28), anchor="ls")
    note = f"{len(samples)} of {len(source.samples)} samples"
    draw.text((_MARGIN, _MARGIN + 48), note, _QUIET, ImageFont.load_default(16), anchor="ls")
    top = _HEADER + _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = _MARGIN + column * step
            card = (left, top, left + WIDTH + 2 * _PAD, top + height)
            draw.rounded_rectangle(card, radius=12, fill=_CARD, outline=_EDGE)
            sheet.paste(_picture(source, samples[i]), (left + _PAD, top + _PAD))
            _caption(draw, left + _PAD, top + _PAD + WIDTH + 24, samples[i], texts[i])
        top += height + _GAP
    return sheet


def _choose(samples: Iterable[Sample], count: int) -> list[Sample]:
    queues: dict[str, deque[Sample]] = {}
    for sample in samples:
        queues.setdefault(sample.family, deque()).append(sample)
    shown: Counter[str] = Counter()
    chosen: list[Sample] = []
    while queues and len(chosen) < count:
        for family in list(queues)[: count - len(chosen)]:
            sample = min(queues[family], key=lambda sample: shown[sample.image_id])
            queues[family].remove(sample)
            shown[sample.image_id] += 1
            chosen.append(sample)
            if not queues[family]:
                del queues[family]
    return chosen


def _picture(source: Source, sample: Sample) -> Image.Image:
    """The sample's picture within a square, with the target box drawn on it."""
    picture = source.image(sample.image_id)
    scale = WIDTH / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)
    if sample.box:
        left, top, right, bottom = (round(edge * side) for edge, side in zip(sample.box, size * 2, strict=True))
        draw = ImageDraw.Draw(picture)
        for grow, colour in ((2, "white"), (1, _TARGET), (0, _TARGET), (-1, "white")):
            draw.rectangle((left - grow, top - grow, right - 1 + grow, bottom - 1 + grow), outline=colour)
    square = Image.new("RGB", (WIDTH, WIDTH), _WELL)
    square.paste(picture, ((WIDTH - size[0]) // 2, (WIDTH - size[1]) // 2))
    return square


def _caption(draw: ImageDraw.ImageDraw, left: int, baseline: int, sample: Sample, question: list[str]) -> None:
    draw.text((left, baseline), sample.family, _QUIET, ImageFont.load_default(14), anchor="ls")
    for line in question:
        baseline += _LINE
        draw.text((left, baseline), line, _INK, ImageFont.load_default(17), anchor="ls")
    font = ImageFont.load_default(19)
    answer = " / ".join(dict.fromkeys(sample.answers))
    draw.text((left, baseline + 29), _wrap(answer, font, WIDTH, 1)[0], _ACCENT, font, anchor="ls")


def _wrap(text: str, font: Font, width: int, most: int = _MOST_LINES) -> list[str]:
    """The text in at most ``most`` lines of ``width`` pixels; what does not fit gives way to an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: Font, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    words = line.removesuffix(" ...")
    while words and font.getlength(words + " ...") > width:
        words = words[:-1]
    return words + " ..."
