"""The documentation says what is true of the code where a program can tell: quoted messages, and named tests."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_ascend.model_loader.netloader.config import NetLoaderConfig

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ROOT / "docs/source"
MODULES = [
    ROOT / "vllm_ascend/__init__.py",
    ROOT / "vllm_ascend/versions.py",
    *sorted((ROOT / "vllm_ascend/model_loader/netloader").rglob("*.py")),
]
TESTS = [path for folder in ("tests", "csrc") for path in sorted((ROOT / folder).rglob("test_*.py"))]

PLACEHOLDER = re.compile(r"<[^<>]*>|\.\.\.")
JOINT = re.compile(r"[:;] |, and |(?= \(here )|(?= under TLS)|(?<=may) |(?<=imported) |(?<=\)) (?=or )")
"""Where one text of the program follows another in a message."""
VALUE = re.compile(r"%[-\d.]*[sdrf]")


def constant_parts(node: ast.AST) -> Iterator[str]:
    """What is always the same in a text of a program: in one literal, or between the values of an f-string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from VALUE.split(node.value)
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from constant_parts(value)


def texts_in(program: str) -> list[str]:
    """The constant parts of all texts in a program."""
    return [part for node in ast.walk(ast.parse(program)) for part in constant_parts(node)]


def logged_in(program: str) -> Iterator[tuple[str, ...]]:
    """The constant parts of each text with values in the way of loggers, whoever hands it to one."""
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and VALUE.search(node.value):
            parts = tuple(constant_parts(node))
            if " " in "".join(parts).strip():
                yield parts


PROGRAM = "\n".join(text for path in MODULES for text in texts_in(path.read_text()))
ERRORS = {"ReloadRefused", "TimeoutError"}
"""Names of exceptions, as tracebacks show them before the message."""


def cells(page: str, column: int) -> list[str]:
    """One column of all tables of a page, without their heads."""
    rows = [line.strip("| \n") for line in page.splitlines() if line.startswith("|")]
    found = [row.split(" | ")[column].strip() for row in rows if len(row.split(" | ")) > abs(column)]
    return [cell for cell in found if not cell.startswith("---")]


def quoted(text: str) -> list[str]:
    """What stands between backticks, blocks of code excepted."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


def unknown_parts(message: str, program: str) -> list[str]:
    """The constant parts of a quoted `message` that no text of the program has; in any order."""
    parts = [part.strip(" :;,().") for whole in PLACEHOLDER.split(message) for part in JOINT.split(whole)]
    return [part for part in parts if part and part not in ERRORS and part not in program]


MESSAGES = (PAGES / "messages.md").read_text()
QUOTED_MESSAGES = sorted({message for cell in cells(MESSAGES, 0) for message in quoted(cell) if " " in message})


@pytest.mark.parametrize("message", QUOTED_MESSAGES)
def test_a_quoted_message_is_in_the_code(message: str) -> None:
    assert unknown_parts(message, PROGRAM) == []


@pytest.mark.parametrize(
    "parts",
    sorted({parts for path in MODULES for parts in logged_in(path.read_text())}),
    ids="...".join,
)
def test_a_logged_message_is_explained(parts: tuple[str, ...]) -> None:
    """The page may end a message early, but not within its first forty letters."""
    beginning = "\0".join(parts).strip("\0 :;,().")[:40]
    assert re.search(".*".join(map(re.escape, beginning.split("\0"))), MESSAGES)


@functools.cache
def functions_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def named_tests(page: str) -> Iterator[tuple[str, list[str], str]]:
    """Each test in a table of `page` whose last column is called Test, with the files that its section names."""
    for section in page.split("\n## "):
        files = [name for name in quoted(section) if name.endswith(".py") or name.startswith("tests/")]
        for table in section.split("\n\n"):
            if re.match(r"\|.*\| Test \|\n", table):
                for cell in cells(table, -1)[1:]:
                    yield from ((section.partition("\n")[0], files, name) for name in quoted(cell) if name not in files)


def matching(name: str) -> list[Path]:
    """The files of tests at the path or in the folder `name`, which may leave out where it begins."""
    return [path for path in TESTS if f"/{name}/" in f"{path.as_posix()}/"]


FAULTS = (PAGES / "faults.md").read_text()


@pytest.mark.parametrize(
    ("files", "name"),
    [pytest.param(files, name, id=f"{section}: {name}") for section, files, name in named_tests(FAULTS)],
)
def test_a_test_that_the_page_of_faults_names_is_in_the_files_of_its_section(files: list[str], name: str) -> None:
    function, _, parameter = name.removesuffix("]").partition("[")
    homes = [path for file in files for path in matching(file) if f"test_{function}" in functions_in(path)]
    assert homes
    assert any(parameter in path.read_text().replace("_", " ") for path in homes)


@pytest.mark.parametrize("page", [*sorted(PAGES.glob("*.md")), ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_a_file_or_folder_of_tests_that_a_page_names_exists(page: Path) -> None:
    named = [
        name
        for name in quoted(page.read_text())
        if re.fullmatch(r"(?:tests|csrc|support|tools|benchmarks)/[\w/.-]+|([\w/]+/)?test_\w+\.py", name)
    ]
    assert [name for name in named if not matching(name.rstrip("/")) and not (ROOT / name).exists()] == []


def test_every_key_of_the_configuration_has_its_section() -> None:
    keys = {field.name.upper() for field in dataclasses.fields(NetLoaderConfig)} | {"CONFIG_FILE"}
    sections = re.findall(r"^### (.+)$", (PAGES / "configuration.md").read_text(), re.MULTILINE)
    assert {key for section in sections for key in re.split(r", | and ", section)} == keys


def test_every_room_is_in_the_table_of_rooms() -> None:
    page = (PAGES / "how_it_works.md").read_text()
    rooms = {
        path.parent.name for path in MODULES if path.name == "__init__.py" and path.parent.parent.name == "netloader"
    }
    named = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\) \|", page, re.MULTILINE)
    assert {room for room, anchor in named if room == anchor and f"\n## {room.capitalize()}\n" in page} == rooms


OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")]
"""Pages that the build of the documentation does not check."""


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_within_the_repository_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if not path.startswith("https:"):
            linked = page.parent / path if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors_in(linked), target


def anchors_in(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
