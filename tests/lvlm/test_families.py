"""Where visual tokens stand: a patch of a picture is changed, and the token that notices must be there."""

import pytest
import torch
from transformers import LlamaConfig

from lvlm.tiny import IMAGE, NAMES, PAD, Tiny, make
from tprl.lvlm.families import FAMILIES, TOWERS, family_of, grid_coords, image_runs, square_coords
from tprl.lvlm.pictures import encode

MIXING = ("out_proj.", "attn.proj.", "attention.o_proj.", "projection_layer.")
"""Ends of a tower's attention, by which patches learn of each other."""


def still(name: str) -> Tiny:
    """A model whose patches do not attend to each other."""
    tiny = make(name)
    with torch.no_grad():
        for path, parameter in tiny.model.base_model.named_parameters():
            if ("vision" in path or "visual" in path) and any(end in path for end in MIXING):
                parameter.zero_()
    return tiny


def cells(rows: int, columns: int, size: int, top: int = 0, left: int = 0) -> list[tuple[int, int]]:
    return [(top + row * size, left + column * size) for row in range(rows) for column in range(columns)]


Change = tuple[tuple[int | slice, ...], float, float, int, int]
"""Where the pixels are, the centre of their patch in the picture, and the rows and columns of its tokens."""


def tile(place: tuple[int, ...], side: int, patch: int, tokens: int) -> list[Change]:
    """All patches of a square tile that has coordinates of its own."""
    return [
        (
            (*place, slice(None), slice(y, y + patch), slice(x, x + patch)),
            (y + patch / 2) / side,
            (x + patch / 2) / side,
            tokens,
            tokens,
        )
        for y, x in cells(side // patch, side // patch, patch)
    ]


def mosaic(place: tuple[int, ...], row: int, column: int, rows: int, columns: int, tokens: int) -> list[Change]:
    """All patches of a tile of 24 pixels at ``(row, column)`` of a picture of ``rows`` times ``columns`` tiles."""
    return [
        (where, (row + y) / rows, (column + x) / columns, tokens * rows, tokens * columns)
        for where, y, x, _, _ in tile(place, 24, 4, tokens)
    ]


def changes(name: str, number: int) -> list[Change]:
    """Every patch of picture ``number`` of ``tiny.batch(["I", 2], ["I", 1, "I", 2])``."""
    if name in ("llava", "paligemma"):
        return tile((number,), 24, 6, 4)
    if name == "gemma3":
        return tile((number,), 24, 4, 3)
    if name == "internvl":
        tiles = {0: [0], 1: [1, 2], 2: [3]}[number]
        return [change for index in tiles for change in tile((index,), 24, 4, 3)]
    if name in ("idefics3", "smolvlm"):
        sample, first = [(0, 0), (1, 0), (1, 1)][number]
        rows, columns = [(1, 2), (0, 0), (2, 1)][number]
        found = []
        for row, column in cells(rows, columns, 1):
            found += mosaic((sample, first + row * columns + column), row, column, rows, columns, 3)
        return found + tile((sample, first + rows * columns), 24, 4, 3)
    if name in ("mistral3", "pixtral"):
        merge = 2 if name == "mistral3" else 1
        rows, columns = [(2, 3), (3, 2), (2, 2)][number]
        height, width = rows * 4 * merge, columns * 4 * merge
        return [
            ((number, slice(None), slice(y, y + 4), slice(x, x + 4)), (y + 2) / height, (x + 2) / width, rows, columns)
            for y, x in cells(rows * merge, columns * merge, 4)
        ]
    if name.startswith("qwen"):
        grids = [(4, 6), (6, 4), (4, 4)]
        first, (rows, columns) = sum(h * w for h, w in grids[:number]), grids[number]
        order = [  # the processor groups the patches of a token
            (2 * block_row + row, 2 * block_column + column)
            for block_row in range(rows // 2)
            for block_column in range(columns // 2)
            for row in range(2)
            for column in range(2)
        ]
        return [
            ((first + index,), (y + 0.5) / rows, (x + 0.5) / columns, rows // 2, columns // 2)
            for index, (y, x) in enumerate(order)
        ]
    # LLaVA-NeXT and LLaVA-OneVision: pictures of 24 x 20, 14 x 24 and 10 x 24 pixels, scaled to 24, 24 and 12 pixels
    # of height at 24 of width at most, so nothing, one row of patches above and below, and nothing is padding.
    crop_rows, padded = [(2, 0), (2, 1), (1, 0)][number]
    rows, columns = 3 * crop_rows - 2 * padded, 6
    tokens = [(6, 6), (4, 6), (3, 6)][number]
    if name == "llava_onevision":
        tokens = [(4, 4), (3, 5), (3, 6)][number]
    found = tile((number, 0), 12, 4, 3)
    for row in range(padded, padded + rows):
        for column in range(columns):
            where = (number, 1 + row // 3 * 2 + column // 3)
            y, x = row % 3 * 4, column % 3 * 4
            place = (*where, slice(None), slice(y, y + 4), slice(x, x + 4))
            found.append((place, (row - padded + 0.5) / rows, (column + 0.5) / columns, *tokens))
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_coordinates_are_where_the_picture_is(name: str) -> None:
    tiny = still(name)
    inputs = tiny.batch(["I", 2], ["I", 1, "I", 2])
    before, _ = encode(tiny.model, inputs)
    for number in range(3):
        for where, y, x, rows, columns in changes(name, number):
            pixels = inputs["pixel_values"].clone()
            pixels[where] += torch.randn(pixels[where].shape, generator=torch.Generator().manual_seed(0))
            after, _ = encode(tiny.model, {**inputs, "pixel_values": pixels})
            moved = [(new.tokens - old.tokens).norm(dim=-1) for new, old in zip(after, before, strict=True)]
            assert [bool(change.any()) for change in moved] == [index == number for index in range(3)]
            row, column = after[number].coords[moved[number].argmax()].tolist()
            if name == "llava_onevision" and (rows, columns) in ((4, 4), (3, 5)):  # blended from their neighbours
                assert abs(row - y) < 1 / rows
                assert abs(column - x) < 1 / columns
                continue
            assert (moved[number] > 0).sum() == 1
            assert row == pytest.approx((int(y * rows) + 0.5) / rows)
            assert column == pytest.approx((int(x * columns) + 0.5) / columns)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_was_cut_short_is_told_from_its_pictures(name: str) -> None:
    tiny = make(name)
    inputs = tiny.batch(["I", 2])
    placeholders = (inputs["input_ids"] == IMAGE).nonzero()
    inputs["input_ids"][tuple(placeholders[-1])] = 7
    count = len(placeholders)
    with pytest.raises(ValueError, match=f"the pictures have {count} visual tokens, the prompts hold {count - 1}"):
        encode(tiny.model, inputs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_newlines_close_the_rows(name: str) -> None:
    tiny = make(name)
    inputs = tiny.batch(["I", 2], ["I", 1, "I", 2])
    pictures, _ = encode(tiny.model, inputs)
    for picture, rows in zip(pictures, [6, 4, 3] if name == "llava_next" else [4, 3, 3], strict=True):
        newline = (picture.tokens == tiny.model.model.image_newline).all(1)
        assert newline.sum() == rows
        assert torch.equal(newline, picture.coords[:, 1] == 1)
        assert torch.allclose(picture.coords[newline, 0], (torch.arange(rows) + 0.5) / rows)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if name in FAMILIES and FAMILIES[name].pack])
def test_patches_are_packed_as_the_features_are(name: str) -> None:
    """What patches say of their own place arrives at the token that stands there."""
    tiny = make(name)
    inputs = tiny.batch(["I", 2], ["I", 1, "I", 2])
    pictures, output = encode(tiny.model, inputs)
    side = {"llava": 4, "paligemma": 4, "llava_next": 3, "llava_onevision": 3}.get(name, 6)
    entries = [len(entry) for entry in output.pooler_output]
    own = square_coords(side * side)
    coords = torch.cat([picture.coords for picture in pictures])
    if name not in ("llava_next", "llava_onevision"):
        tiles = sum(entries) // (16 if side == 4 else 9)
        packed = FAMILIES[name].pack(tiny.model, own.expand(tiles, -1, -1), inputs, entries)
        expected = square_coords(16 if side == 4 else 9).repeat(tiles, 1)
        assert torch.allclose(packed, expected)
        return
    crops = []
    for rows, padded in ((2, 0), (2, 1), (1, 0)):
        crops.append(own)
        height = 3 * rows - 2 * padded
        for row in range(rows):
            for column in range(2):
                place = own * 3 + torch.tensor([3 * row - padded, 3 * column])
                crops.append(place / torch.tensor([height, 6]))
    packed = FAMILIES[name].pack(tiny.model, torch.stack(crops), inputs, entries)
    newline = coords[:, 1] == 1
    assert not packed[newline].any()
    if name == "llava_next":
        assert torch.allclose(packed[~newline], coords[~newline])
    else:
        assert (packed[~newline] - coords[~newline]).abs().max() < 0.1


def test_single_crop_pictures_of_onevision_end_in_one_newline() -> None:
    config = make("llava_onevision").model.config
    inputs = {"image_sizes": torch.tensor([[24, 20]])}
    (coords,) = FAMILIES["llava_onevision"].coords(config, inputs, [10], torch.tensor([[IMAGE] * 10]))
    assert torch.equal(coords, torch.cat([square_coords(9), torch.ones(1, 2)]))


def test_grids_by_hand() -> None:
    assert grid_coords(2, 4).tolist() == [
        [0.25, 0.125], [0.25, 0.375], [0.25, 0.625], [0.25, 0.875],
        [0.75, 0.125], [0.75, 0.375], [0.75, 0.625], [0.75, 0.875],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="12 visual tokens do not make a square grid"):
        square_coords(12)


def test_runs_by_hand() -> None:
    ids = torch.tensor([[IMAGE, IMAGE, 5, IMAGE], [PAD, 5, 6, 7], [5, IMAGE, IMAGE, IMAGE]])
    config = make("llava").model.config
    assert image_runs(config, ids) == [[(0, 2), (3, 4)], [], [(1, 4)]]


def test_the_table_names_every_family() -> None:
    for name in NAMES:
        model = make(name).model
        assert family_of(model) is family_of(model.config) is FAMILIES[model.config.model_type]
    assert {name if name != "pixtral" else "llava" for name in NAMES} == set(FAMILIES)
    with pytest.raises(ValueError, match="unknown model family 'llama'") as error:
        family_of(LlamaConfig())
    for name in FAMILIES:
        assert name in str(error.value)
    assert "'llama'" in str(error.value)


@pytest.mark.parametrize("name", [name for name in NAMES if name in FAMILIES and FAMILIES[name].pack])
def test_towers_keep_their_attention_where_the_table_says(name: str) -> None:
    tiny = make(name)
    tower = tiny.model.get_submodule(FAMILIES[name].tower)
    facts = TOWERS[tower.config.model_type]
    for layer in tower.get_submodule(facts.layers):
        assert isinstance(layer.get_submodule(facts.attention).get_submodule("k_proj"), torch.nn.Linear)
