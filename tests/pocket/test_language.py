"""The curriculum of stage two: which phase a step belongs to."""

import pytest

from tprl.pocket.language import CURRICULUM, phase_of


@pytest.mark.parametrize(
    ("step", "number", "first"),
    [(0, 0, 0), (99, 0, 0), (100, 1, 100), (299, 1, 100), (300, 2, 300), (999, 2, 300), (5000, 2, 300)],
)
def test_a_step_belongs_to_one_phase_and_the_last_goes_on(step: int, number: int, first: int) -> None:
    assert phase_of(step) == (CURRICULUM[number], first)
