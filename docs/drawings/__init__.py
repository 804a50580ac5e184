"""Figures that the documentation draws from text while it is built: a Sphinx extension.

Each directive puts an SVG into the page itself, so that it takes the colours of the page, light or dark. Whoever reads
the sources without building them sees the text of the directive. All figures are narrow and their text is large, so
that they can be read on a phone.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from drawings import house, memory, plots, sequence


def figure(svg: str, caption: str, kind: str = "drawing") -> list[nodes.Node]:
    """The nodes that show `svg` above its `caption`, which is also its description for those who cannot see it."""
    labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(caption)}" ', 1)
    text = f'<figure class="{kind}"><div>{labelled}</div><figcaption>{html.escape(caption)}</figcaption></figure>'
    return [nodes.raw("", text, format="html")]


class Sequence(SphinxDirective):
    """Messages over time; `sequence` has the notation of its content."""

    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"caption": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        try:
            return figure(sequence.draw(list(self.content)), self.options["caption"])
        except ValueError as error:
            raise self.error(str(error)) from error


class Memory(SphinxDirective):
    """One file of weights and those who map it. The content is the caption."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        return figure(memory.draw(), " ".join(self.content))


class House(SphinxDirective):
    """The rooms of Netloader and who imports whom, drawn from the test that holds them. The content is the caption."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(house.TABLE))
        return figure(house.draw(), " ".join(self.content))


class Plot(SphinxDirective):
    """What a benchmark measured, from `figures/NAME.json` beside the page. The content is the caption.

    Without such a file there is nothing to show.
    """

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        figures = Path(self.env.srcdir) / "figures" / f"{name}.json"
        self.env.note_dependency(str(figures))
        if not figures.exists():
            return []
        try:
            return figure(plots.draw(name, figures), " ".join(self.content), kind="plot")
        except ValueError as error:
            raise self.error(str(error)) from error


def setup(app: Sphinx) -> dict[str, bool]:
    """Makes the directives known to Sphinx."""
    app.add_directive("sequence", Sequence)
    app.add_directive("memory", Memory)
    app.add_directive("house", House)
    app.add_directive("plot", Plot)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
