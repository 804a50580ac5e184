"""Plots of results: horizontal bars for the medians, and a dot for each round.

The background is transparent and all colours are of medium lightness, so that a plot is legible on light and on dark
pages. Text stays text in the SVG. The same figures give the same file, byte for byte.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE: Final = "reference"
"""The series of what others are compared with. It is grey."""
INK: Final = "#7a7a7a"
"""Of text and lines; it has the same contrast, 4.3 to 1, with white and with the page of a dark theme."""
COLOURS: Final = ("#3d85c6", "#d9822b", "#2a9d8f")
DOT: Final[dict[str, Any]] = {
    "marker": "o",
    "markersize": 3.5,
    "color": "#202020",
    "markeredgecolor": "#e0e0e0",
    "markeredgewidth": 0.6,
    "linestyle": "none",
}
"""Dark with a light edge, to be seen on bars and on pages alike."""
WIDTH: Final = 7.4
ROW_HEIGHT: Final = 0.27
PANEL_HEIGHT: Final = 1.15
"""Inches."""


@dataclass(frozen=True)
class Bar:
    """The values of all rounds, of which the bar shows the median; `note` stands at its end."""

    values: Sequence[float]
    note: str = ""
    series: str = ""


@dataclass(frozen=True)
class Panel:
    """One diagram: bars by row, with what the axis shows and in which unit.

    With a `reference`, a line at that value is labelled so. `logarithmic` is for values of different orders of
    magnitude; there are points in place of bars then, because a bar would have to begin at zero.
    """

    title: str
    axis: str
    rows: Mapping[str, Sequence[Bar]]
    reference: tuple[float, str] | None = None
    logarithmic: bool = False

    @property
    def series(self) -> list[str]:
        """The names of all series, in their order."""
        return list(dict.fromkeys(bar.series for bars in self.rows.values() for bar in bars if bar.series))

    @property
    def height(self) -> float:
        """In inches."""
        return PANEL_HEIGHT + ROW_HEIGHT * sum(map(len, self.rows.values()))


def draw(panels: Sequence[Panel], file: Path) -> None:
    """Writes the panels, one below the other, as an SVG file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "netloader",
        "font.family": "sans-serif",
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }
    with mpl.rc_context(style):
        heights = [panel.height for panel in panels]
        figure = Figure(figsize=(WIDTH, sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.1))
        all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for panel, axes in zip(panels, all_axes, strict=True):
            _draw_panel(panel, axes)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})


def _draw_panel(panel: Panel, axes: Axes) -> None:
    colours = _colours(panel.series)
    ticks, position = [], 0.0
    for bars in panel.rows.values():
        ticks.append(position + (len(bars) - 1) / 2)
        for bar in bars:
            _draw_bar(bar, position, colours.get(bar.series, COLOURS[0]), axes, panel.logarithmic)
            position += 1
        position += 0.5

    axes.set_yticks(ticks, list(panel.rows))
    axes.set_ylim(position - 0.8, -0.7)  # the first row is at the top
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=INK, alpha=0.2, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(panel.axis)
    _make_room_for_notes(panel, axes)
    if panel.reference is not None:
        value, label = panel.reference
        axes.axvline(value, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
    handles = _legend(colours, axes)
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=24 if handles else 6)
    if handles:
        axes.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(handles),
            frameon=False,
            labelcolor=INK,
            fontsize=9,
            borderaxespad=0.2,
        )


def _draw_bar(bar: Bar, position: float, colour: str, axes: Axes, logarithmic: bool) -> None:
    if logarithmic:
        axes.plot([statistics.median(bar.values)], [position], marker="o", markersize=9, color=colour)
    else:
        axes.barh(position, statistics.median(bar.values), height=0.8, color=colour)
    if len(bar.values) > 1:
        axes.plot(bar.values, [position] * len(bar.values), **DOT)
    axes.annotate(
        bar.note, (max(bar.values), position), xytext=(8, 0), textcoords="offset points", va="center", color=INK
    )


def _make_room_for_notes(panel: Panel, axes: Axes) -> None:
    values = [value for bars in panel.rows.values() for bar in bars for value in bar.values]
    if panel.logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 3, max(values) * 30)
    else:
        axes.set_xlim(0, 1.4 * max(values))


def _legend(colours: Mapping[str, str], axes: Axes) -> list[Any]:
    """A patch for each series, where there are several, and the line of the reference, if there is one."""
    from matplotlib.patches import Patch

    series = [Patch(color=colour, label=name) for name, colour in colours.items()] if len(colours) > 1 else []
    return [*series, *(line for line in axes.lines if not str(line.get_label()).startswith("_"))]


def _colours(series: Sequence[str]) -> dict[str, str]:
    others = iter(COLOURS)
    return {name: INK if name == REFERENCE else next(others) for name in series}
