"""The page: sections, figures and data into one self-contained HTML text."""

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dimscope.page import theme
from dimscope.page.payload import figure_spec, zipped_json
from dimscope.page.section import Facts, Plot, Section
from dimscope.page.wording import magnitude
from dimscope.storage import write_whole
from dimscope.units import readable_bytes

EMBED_LIMIT = 1_000_000
"""Tables up to this many bytes travel inside the page; larger ones are linked where they lie."""


@dataclass(frozen=True, slots=True)
class Page:
    """What the page shows: the model, numbers for its head, sections, and data for its scripts beside the figures."""

    facts: Facts
    highlights: tuple[tuple[str, str, str], ...]
    sections: tuple[Section, ...]
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Download:
    """A table to download: its name, its human-readable size, and a data: URI or a relative link."""

    name: str
    size: str
    href: str
    embedded: bool


def render_page(page: Page, downloads: Iterable[Download] = ()) -> str:
    """Return the page as HTML text."""
    facts = page.facts
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            facts=facts,
            row=facts.row,
            highlights=[*model_highlights(facts), *page.highlights],
            sections=page.sections,
            downloads=list(downloads),
            components=page.data.get("components", []),
            payload=zipped_json(_payload(page)),
            provenance=provenance(facts),
            css={name: theme.css_variables(name) for name in theme.SURFACES},
            style=_asset("style.css"),
            script=_asset("page.js"),
            plotly=Markup(get_plotlyjs()),
        )
    )


def write_page(page: Page, out: Path) -> Path:
    """Write OUT/index.html with the tables in OUT/tables that belong to it, whole or not at all; return its path."""
    names = sorted({name for study in page.facts.studies.values() for name in study.tables})
    files = [path for name in names if (path := out / "tables" / f"{name}.parquet").exists()]
    path = out / "index.html"
    write_whole(path, render_page(page, [table_download(file) for file in files]).encode())
    return path


def model_highlights(facts: Facts) -> list[tuple[str, str, str]]:
    """Return what the head of the page says about the model or the vectors, as (name, value, note)."""
    if facts.n_parameters is None:
        return [("vectors", f"{facts.n_rows:,} × {facts.dim:,}", f"rows × dimensions, stored as {facts.dtype}")]
    shared = "one table reads and predicts" if facts.tied else "two separate tables"
    shared = "there is no output table" if facts.tied is None else shared
    return [
        ("parameters", magnitude(facts.n_parameters), f"{facts.n_parameters:,} stored as {facts.dtype}"),
        ("embedding table", f"{facts.n_rows:,} × {facts.dim:,}", "tokens × dimensions"),
        ("tied", "yes" if facts.tied else "no", shared),
    ]


def provenance(facts: Facts) -> list[tuple[str, str]]:
    """Return report.json as rows of (name, value), nested keys joined by a dot."""
    return list(_flattened(facts.raw))


def _flattened(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flattened(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _payload(page: Page) -> dict[str, Any]:
    plots = [block for section in page.sections for block in section.blocks if isinstance(block, Plot)]
    return {
        "templates": {name: theme.template(name).to_plotly_json() for name in theme.SURFACES},
        "marks": {"highlight": theme.HIGHLIGHT.colour},
        "figures": {plot.anchor: figure_spec(plot.figure) for plot in plots},
        **page.data,
    }


def table_download(path: Path) -> Download:
    """Return the download of a Parquet file."""
    size = path.stat().st_size
    if size > EMBED_LIMIT:
        return Download(path.stem, readable_bytes(size), f"tables/{path.name}", embedded=False)
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Download(
        path.stem, readable_bytes(size), f"data:application/vnd.apache.parquet;base64,{data}", embedded=True
    )


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("dimscope.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> Markup:
    return Markup(resources.files("dimscope.page").joinpath("templates", name).read_text(encoding="utf-8"))
