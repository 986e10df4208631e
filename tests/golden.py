"""Sections of a page as text, for one snapshot per study: what a reader sees, without the numbers inside figures."""

from __future__ import annotations

from collections.abc import Iterable

import plotly.graph_objects as go

from dimscope.page.section import Gallery, Grid, Plot, Section


def page_text(sections: Iterable[Section]) -> str:
    """Return titles, findings, explanations, grids, galleries, and of each figure its traces and axis titles.

    Use it with syrupy: `assert page_text(code.make_sections(tables, facts)) == snapshot`. `pytest --snapshot-update`
    writes the snapshot anew; read its diff.
    """
    return "\n\n".join(_section_text(section) for section in sections)


def _section_text(section: Section) -> str:
    lines = [f"# {section.name} ({section.anchor})", f"title: {section.title}"]
    lines += [f"finding: {finding}" for finding in section.findings]
    for block in section.blocks:
        if isinstance(block, Plot):
            lines += [f"figure {block.anchor}: {block.alt}", f"  caption: {block.caption}", *_figure_text(block.figure)]
        elif isinstance(block, Grid):
            lines += [f"grid: {block.caption}", "  " + " | ".join(block.header)]
            lines += ["  " + " | ".join(map(str, row)) for row in block.rows]
        elif isinstance(block, Gallery):
            lines += [f"gallery: {block.prompt}", *(f"  {answer.change}: {answer.text}" for answer in block.answers)]
    lines += [
        f"how to read: {section.how_to_read}",
        f"caveat: {section.caveat}",
        f"tables: {', '.join(section.tables)}",
    ]
    return "\n".join(lines)


def _figure_text(figure: go.Figure) -> list[str]:
    """Return the kind and name of each trace, and the title of each axis that has one."""
    traces = [f"  {trace.type}: {trace.name}" for trace in figure.data]
    layout = figure.to_plotly_json()["layout"]
    axes = {key: value.get("title", {}).get("text") for key, value in layout.items() if key[1:5] == "axis"}
    return traces + [f"  {key}: {title}" for key, title in sorted(axes.items()) if title]
