"""Draws the rooms of Netloader and who imports whom, from the table that `tests/unit/test_package.py` enforces.

A room stands as high as those that import it allow. A line leads down to each room that it imports and that no other
line leads to already: whatever can be reached downwards may be imported. A line that passes a storey gets a narrow
place of its own in it, so that it crosses no box.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from statistics import mean
from typing import Any

from drawings.svg import LINE, Canvas, wrap

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE = ROOT / "tests/unit/test_package.py"
PACKAGE = ROOT / "vllm_ascend/model_loader/netloader"
ENTRY = "entry points"
WIDTH, GAP, BETWEEN, PASSAGE = 420, 12, 26, 8

Graph = dict[str, set[str]]


def draw() -> str:
    """The SVG. Rooms in which torch or vLLM may be imported are drawn in another colour."""
    below = _with_passages(_reduced(rooms()), _heights(rooms()))
    heavy = torch_rooms()
    boxes, lines = Canvas(WIDTH), Canvas(WIDTH)
    places: dict[str, tuple[float, float, float]] = {}  # of each room: its middle, top and bottom

    y = 4.0
    for storey in _storeys(below):
        passages = sum(_is_passage(room) for room in storey)
        free = WIDTH - 4 - GAP * (len(storey) - 1) - PASSAGE * passages
        width = free / (len(storey) - passages)
        texts = {room: wrap(purpose_of(room), width - 12) for room in storey if not _is_passage(room)}
        height = LINE * (1 + max(map(len, texts.values()))) + 12
        x = 2.0
        for room in storey:
            own_width = PASSAGE if _is_passage(room) else width
            places[room] = (x + own_width / 2, y, y + height)
            if room in texts:
                boxes.box(x, y, width, height, "heavy" if room in heavy else "box")
                boxes.text(x + width / 2, y + 4, [room], kind="strong")
                boxes.text(x + width / 2, y + 4 + LINE, texts[room])
            else:
                lines.line((places[room][0], y), (places[room][0], y + height))
            x += own_width + GAP
        y += height + BETWEEN

    for room in below:
        for position, other in enumerate(sorted(below[room], key=lambda name: places[name][0])):
            _draw_import(lines, places[room], places[other], (position + 1) / (len(below[room]) + 1) - 0.5, other)
    y = _draw_legend(boxes, y - BETWEEN + 10)
    return lines.over(boxes).render(y)


def rooms() -> Graph:
    """Which rooms each room may import, with the entry points above all of them."""
    table: Graph = constant("ROOMS")
    return {ENTRY: set(table), **table}


def torch_rooms() -> set[str]:
    """The rooms in which all modules may import torch or vLLM."""
    prefixes = (*constant("TORCH"), *constant("VLLM"))
    return {prefix.removesuffix(".") for prefix in prefixes if prefix.endswith(".")} | {ENTRY}


def purpose_of(room: str) -> str:
    """What a room is for: the beginning of its package's docstring."""
    if room == ENTRY:
        return f"what vLLM and the command line call: {', '.join(sorted(constant('ENTRY_POINTS') - {''}))}"
    if room == "shared words":
        return ", ".join(sorted(constant("SHARED_WORDS")))
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    return re.split(r"[:.,]", docstring, maxsplit=1)[0]


def constant(name: str) -> Any:
    """The value of a constant of the test. Raises ValueError where it has none of that `name`."""
    for node in ast.parse(TABLE.read_text()).body:
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(value)
    raise ValueError(f"{TABLE} has no constant {name}")


def _reduced(below: Graph) -> Graph:
    """`below` without the imports that lead to where another one leads as well."""

    def reached(room: str) -> set[str]:
        return below[room].union(*map(reached, below[room]))

    return {room: others - set().union(*map(reached, others)) for room, others in below.items()}


def _heights(below: Graph) -> dict[str, int]:
    """How many storeys lie above each room: as few as those that import it allow."""
    above = {room: {other for other in below if room in below[other]} for room in below}

    def height(room: str) -> int:
        return max((height(other) + 1 for other in above[room]), default=0)

    return {room: height(room) for room in below}


def _with_passages(below: Graph, heights: dict[str, int]) -> Graph:
    """`below` with a passage in every storey that an import leads through, so that all lead to the next storey."""
    result: Graph = {room: set() for room in below}
    for room, others in below.items():
        for other in others:
            last = room
            for storey in range(heights[room] + 1, heights[other]):
                passage = f"passage {storey} from {room} to {other}"
                result[last].add(passage)
                result[passage] = set()
                last = passage
            result[last].add(other)
    return result


def _is_passage(room: str) -> bool:
    return room.startswith("passage ")


def _storeys(below: Graph) -> list[list[str]]:
    """The rooms of each storey from left to right, each near the middle of those that import it."""
    heights = _heights(below)
    places: dict[str, float] = {}
    storeys = []
    for number in range(max(heights.values()) + 1):
        storey = [room for room in below if heights[room] == number]
        importers = {room: [places[other] for other in places if room in below[other]] for room in storey}
        storey.sort(key=lambda room: mean(importers[room]) if importers[room] else 0.5)
        places |= {room: (position + 0.5) / len(storey) for position, room in enumerate(storey)}
        storeys.append(storey)
    return storeys


def _draw_import(
    canvas: Canvas, upper: tuple[float, float, float], lower: tuple[float, float, float], share: float, name: str
) -> None:
    """A line from the bottom of one place to the top of the next; `share` keeps lines of one room apart."""
    start, end = (upper[0] + 40 * share, upper[2]), (lower[0] + 40 * share, lower[1])
    if _is_passage(name):
        end = (lower[0], lower[1])
    canvas.line(start, (start[0], start[1] + 5), (end[0], end[1] - 12), end)
    if not _is_passage(name):
        canvas.head(end[0], end[1] - 1, 0, 1)


def _draw_legend(canvas: Canvas, y: float) -> float:
    for kind, text in (("box", "imports neither torch nor vLLM"), ("heavy", "may import torch or vLLM")):
        canvas.box(4, y + 2, 18, 14, kind)
        canvas.text(32, y, [text], anchor="start")
        y += LINE + 5
    return y
