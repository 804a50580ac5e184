"""A canvas of boxes, lines and wrapped text that is written out as an SVG.

Text is measured with the widths of a wide sans-serif type face, so that it stays in its box in narrower ones.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

LINE = 17
"""Height of a line of text, in the units of the canvas."""
SIZE = 13.5
"""Size of the type; pages.css has the same."""
_NARROW, _WIDE = frozenset("fijlrtI.,:;|!'()[] "), frozenset("mwMWGOQ@%=>")


def width_of(text: str) -> float:
    """At least the width of `text` in a sans-serif type face."""
    return sum(0.36 if letter in _NARROW else 0.92 if letter in _WIDE else 0.62 for letter in text) * SIZE


def wrap(text: str, width: float) -> list[str]:
    """`text` in lines that are at most as wide as `width`, unless a single word is wider."""
    lines: list[str] = []
    for word in text.split():
        if lines and width_of(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


class Canvas:
    """Collects the elements of a drawing that is `width` units wide; y grows downwards."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._elements: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box") -> None:
        """A rectangle with its left upper corner at (`x`, `y`); `kind` is its class in pages.css."""
        self._elements.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>'
        )

    def text(self, x: float, y: float, lines: Sequence[str], anchor: str = "middle", kind: str = "") -> None:
        """Lines of text below `y`, of which `x` is the middle, the `start` or the `end`."""
        for number, line in enumerate(lines):
            self._elements.append(
                f'<text class="{kind}" x="{x:g}" y="{y + LINE * (number + 1) - 4.5:g}" text-anchor="{anchor}">'
                f"{html.escape(line)}</text>"
            )

    def label(self, x: float, y: float, lines: Sequence[str]) -> None:
        """Lines of text around `x` below `y`, on a ground that hides what lies behind them."""
        width = max(map(width_of, lines), default=0) + 6
        self.box(x - width / 2, y, width, LINE * len(lines), "ground")
        self.text(x, y, lines)

    def line(self, *points: tuple[float, float], kind: str = "line") -> None:
        """Straight lines from point to point."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._elements.append(f'<polyline class="{kind}" points="{path}"/>')

    def head(self, x: float, y: float, dx: float, dy: float) -> None:
        """The head of an arrow that ends at (`x`, `y`) in the direction (`dx`, `dy`), along one of the axes."""
        back = (x - 9 * dx, y - 9 * dy)
        points = ((x, y), (back[0] + 4.5 * dy, back[1] + 4.5 * dx), (back[0] - 4.5 * dy, back[1] - 4.5 * dx))
        path = " ".join(f"{a:g},{b:g}" for a, b in points)
        self._elements.append(f'<polygon class="head" points="{path}"/>')

    def over(self, above: Canvas) -> Canvas:
        """This canvas with the elements of another one on top of its own."""
        both = Canvas(self.width)
        both._elements = self._elements + above._elements
        return both

    def render(self, height: float) -> str:
        """The SVG, `height` units high."""
        return f'<svg viewBox="0 0 {self.width} {height:g}">{"".join(self._elements)}</svg>'
