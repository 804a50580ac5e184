"""Draws one file of weights, page by page, and the processes that map it."""

from __future__ import annotations

from drawings.svg import LINE, Canvas, wrap

WIDTH = 420
LEFT, PAGE, PAGES = 176, 30, 8
ROW = 62
WRITTEN_BY_ENGINE, WRITTEN_BY_CLIENT = {2, 5}, {6}


def draw() -> str:
    """The SVG."""
    canvas = Canvas(WIDTH)
    rows = {"file": 6.0, "engine": 6.0 + ROW, "client": 6.0 + 2 * ROW, "elsewhere": 6.0 + 3 * ROW + 40}
    for page in range(PAGES):
        x = LEFT + PAGE * (page + 0.5) - 1
        canvas.line((x, rows["file"] + 30), (x, rows["client"] + 10), kind="thin")

    _draw_row(canvas, rows["file"], "The server's file: a sealed memfd", "page", set())
    _draw_row(canvas, rows["engine"], "The server's engine: a private map", "mapped", WRITTEN_BY_ENGINE)
    _draw_row(canvas, rows["client"], "A client on this host: a private map", "mapped", WRITTEN_BY_CLIENT)
    _draw_row(canvas, rows["elsewhere"], "A client elsewhere: a file of its own", "page", set())
    _draw_network(canvas, rows["elsewhere"] - 34)
    return canvas.render(_draw_legend(canvas, rows["elsewhere"] + 56))


def _draw_row(canvas: Canvas, y: float, name: str, kind: str, written: set[int]) -> None:
    canvas.text(2, y, wrap(name, LEFT - 14), anchor="start")
    for page in range(PAGES):
        canvas.box(LEFT + PAGE * page, y + 4, PAGE - 2, 28, "copied" if page in written else kind)


def _draw_network(canvas: Canvas, y: float) -> None:
    x = LEFT + PAGE * PAGES / 2 - 1
    canvas.line((2, y - 14), (WIDTH - 2, y - 14), kind="dashed")
    canvas.line((x, y - 6), (x, y + 24), kind="double")
    canvas.head(x, y + 36, 0, 1)
    canvas.text(2, y - 8, ["network: the bytes", "travel, and are checked"], anchor="start", kind="soft")


def _draw_legend(canvas: Canvas, y: float) -> float:
    entries = (
        ("page", "a page that holds bytes"),
        ("mapped", "the same page, seen through a map; it costs nothing"),
        ("copied", "a private copy: post-processing wrote to this page"),
    )
    for kind, text in entries:
        canvas.box(4, y + 2, 18, 14, kind)
        lines = wrap(text, WIDTH - 40)
        canvas.text(32, y, lines, anchor="start")
        y += LINE * len(lines) + 5
    return y
