"""Values of tokens on a picture, against cells worked out by hand."""

from itertools import pairwise

import pytest
import torch
from PIL import Image

from tprl.draw import SIDE, draw_heat, draw_kept, headed, spread


def grid(rows: int, columns: int) -> torch.Tensor:
    return torch.cartesian_prod((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns)


def test_a_regular_grid_has_a_cell_for_every_token_in_any_order() -> None:
    values, order = torch.rand(24 * 17), torch.randperm(24 * 17)
    assert torch.equal(spread(grid(24, 17)[order], values[order]), values.view(24, 17))


def test_several_resolutions_leave_no_holes_and_tokens_at_one_place_show_the_greatest() -> None:
    fine = torch.rand(16)
    both = spread(torch.cat([grid(4, 4), grid(1, 1)]), torch.cat([fine, torch.tensor([7.0])]))
    assert both.shape == (5, 5)
    assert both[2, 2] == 7
    assert both.isfinite().all()
    assert [float(both[row, column]) for row, column in ((0, 0), (0, 4), (4, 4))] == fine[[0, 3, 15]].tolist()
    assert spread(torch.cat([grid(2, 2), grid(2, 2)]), torch.tensor([1.0, 0, 0, 0, 0, 0, 3, 2])).flatten().tolist() == [
        1, 0, 3, 2
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(96, 48), (48, 96)])
def test_kept_patches_stay_and_the_others_fade(size: tuple[int, int]) -> None:
    image, keep = Image.new("RGB", size, "black"), torch.tensor([False, True, False, False])
    drawn = draw_kept(image, grid(2, 2), keep)
    assert max(drawn.size) == SIDE
    width, height = drawn.size
    assert drawn.getpixel((width - 3, 3)) == (0, 0, 0)
    for corner in ((3, 3), (3, height - 3), (width - 3, height - 3)):
        assert min(drawn.getpixel(corner)) > 190
    captioned = draw_kept(image, grid(2, 2), keep, "one of four")
    assert captioned.crop((0, captioned.height - height, width, captioned.height)).tobytes() == drawn.tobytes()
    assert captioned.crop((0, 0, width, captioned.height - height)).convert("L").getextrema()[0] < 100


def test_a_text_over_a_picture_takes_the_lines_that_it_needs() -> None:
    picture = Image.new("RGB", (200, 10), "white")
    short, long = headed(picture, "two words"), headed(picture, "word " * 40)
    assert short.width == long.width == 200
    assert long.height > 3 * short.height
    assert long.crop((197, 0, 200, long.height)).convert("L").getextrema() == (255, 255)  # no line runs out of it
    ink = [long.crop((0, y, 200, y + 1)).convert("L").getextrema()[0] < 128 for y in range(long.height)]
    assert sum(now and not before for before, now in pairwise(ink)) > 3


def test_what_is_needed_glows() -> None:
    drawn = draw_heat(Image.new("RGB", (40, 40), "grey"), grid(2, 2), torch.tensor([0.0, 1.0, 0.0, 0.5])).convert("L")
    dark, bright, middle = (drawn.getpixel(corner) for corner in ((3, 3), (SIDE - 3, 3), (SIDE - 3, SIDE - 3)))
    assert dark < middle < bright
