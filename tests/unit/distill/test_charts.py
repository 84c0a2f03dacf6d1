"""Charts: axes hold their data, and lines are where they should be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jobs.charts import MARGINS_PX, PALETTE, PANEL_PX, Axis, Line, Panel, draw_panels


@given(st.lists(st.floats(-1e6, 1e6).map(lambda v: round(v, 4)), min_size=1, max_size=5))
def test_an_axis_holds_its_values_between_a_few_round_ticks(values: list[float]) -> None:
    axis = Axis.around("x", values)
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in values)
    assert 2 <= len(axis.ticks) <= 8
    assert (axis.ticks[0], axis.ticks[-1]) == (axis.low, axis.high)


def test_points_are_drawn_where_their_axes_say() -> None:
    """Of a line from corner to corner, each end's marker is at its corner of the axes, in the line's colour."""
    line = Line("a", ((0, 0), (10, 100)))
    pixels = np.asarray(draw_panels([Panel("", (line, Line("b", ((5, 0),))))], "x", "y").convert("RGB")).astype(int)
    left, top, right, bottom = (
        MARGINS_PX[0],
        MARGINS_PX[1],
        PANEL_PX[0] - MARGINS_PX[2],
        PANEL_PX[1] - MARGINS_PX[3],
    )
    for x, y, colour in [(left, bottom, 0), (right, top, 0), ((left + right) // 2, bottom, 1)]:
        wanted = [int(PALETTE[colour][i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(pixels[y, x] - wanted).max() < 24
    assert pixels[top + 10, left + 10].min() > 200  # nothing in the other corner


def test_a_label_keeps_its_colour_in_all_panels_and_has_one_place_in_the_legend() -> None:
    first = Panel("1", (Line("a", ((0, 0),)), Line("b", ((1, 1),))))
    alone, twice = draw_panels([first], "x", "y"), draw_panels([first, Panel("2", first.lines[1:])], "x", "y")
    assert (twice.width, twice.height) == (2 * alone.width, alone.height)
    assert draw_panels([first] * 3, "x", "y").height == PANEL_PX[1] + alone.height


def test_a_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        draw_panels([Panel("", (Line("a", ()),))], "x", "y")
