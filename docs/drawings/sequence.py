"""Draws who says what to whom, downwards in time.

storage, server, client        the lanes, from left to right
server: what it does           a box in one lane
client -> server: what it says
server => client: bytes        a double line, for many bytes
storage --> client: what       a dashed line, for what happens in some cases only
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from drawings.svg import LINE, Canvas, width_of, wrap

WIDTH = 420
_MESSAGE = re.compile(r"(?P<sender>\w+) (?P<arrow>-->|->|=>) (?P<receiver>\w+): (?P<text>.+)")
_ACTION = re.compile(r"(?P<lane>\w+): (?P<text>.+)")
_KINDS = {"->": "line", "=>": "double", "-->": "dashed"}


def draw(lines: Sequence[str]) -> str:
    """The SVG of a sequence in the notation above. Raises ValueError for a line that is not in it."""
    first, *steps = [line.strip() for line in lines if line.strip()]
    names = [name.strip() for name in first.split(",")]
    distance = WIDTH / len(names)
    lanes = {name: distance * (position + 0.5) for position, name in enumerate(names)}
    canvas = Canvas(WIDTH)
    above = Canvas(WIDTH)

    y = 40.0
    for step in steps:
        y = _draw_step(above, lanes, min(distance - 12, 190), step, y)

    for name, x in lanes.items():
        canvas.line((x, 30), (x, y), kind="life")
        canvas.box(x - 45, 2, 90, 28, "named")
        canvas.text(x, 7, [name], kind="strong")
    return canvas.over(above).render(y + 4)


def _draw_step(canvas: Canvas, lanes: dict[str, float], width: float, step: str, y: float) -> float:
    """Draws one step below `y` and returns where the next one begins."""
    message, action = _MESSAGE.fullmatch(step), _ACTION.fullmatch(step)
    try:
        if message:
            sender, receiver = lanes[message["sender"]], lanes[message["receiver"]]
            kind = _KINDS[message["arrow"]]
            return _draw_message(canvas, (sender, receiver), kind, message["text"], y)
        if action:
            return _draw_action(canvas, lanes[action["lane"]], width, action["text"], y)
    except KeyError as error:
        raise ValueError(f"there is no lane {error} for {step!r}") from error
    raise ValueError(f"neither a message nor an action: {step!r}")


def _draw_message(canvas: Canvas, lanes: tuple[float, float], kind: str, text: str, y: float) -> float:
    sender, receiver = lanes
    lines = wrap(text, abs(receiver - sender) - 10)
    canvas.label((sender + receiver) / 2, y, lines)
    y += LINE * len(lines) + 5
    direction = 1 if receiver > sender else -1
    canvas.line((sender + 2 * direction, y), (receiver - 6 * direction, y), kind=kind)
    canvas.head(receiver - direction, y, direction, 0)
    return y + 9


def _draw_action(canvas: Canvas, x: float, width: float, text: str, y: float) -> float:
    lines = wrap(text, width - 12)
    width = max(map(width_of, lines)) + 12
    height = LINE * len(lines) + 8
    canvas.box(x - width / 2, y + 2, width, height)
    canvas.text(x, y + 6, lines)
    return y + height + 10
