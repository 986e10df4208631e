"""The page: reads a finished run folder and writes one self-contained index.html beside its tables."""

import base64
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dimscope.checkpoints.budget import embedding_share
from dimscope.report import theme
from dimscope.report.payload import figure_spec, neighbour_lists, token_columns, zipped_json
from dimscope.report.section import Facts, Plot, Section, Tables, dimension, explained_variance
from dimscope.report.sections import STUDIES
from dimscope.report.sections.layers import layers_strip
from dimscope.report.wording import against, magnitude, number, share
from dimscope.results import write_whole

EMBED_LIMIT = 1_000_000
"""Tables up to this many bytes travel inside the page; larger ones are linked where they lie."""


@dataclass(frozen=True, slots=True)
class Download:
    """A table to download: its name, its size as people read it, and a data: URI or a relative link."""

    name: str
    size: str
    href: str
    embedded: bool


def write_page(directory: Path) -> Path:
    """Write DIR/index.html from DIR/report.json and the tables in DIR/tables that it names, whole or not at all.

    Where it names none, all are taken. Raises FileNotFoundError without a report.json. Sections whose tables are missing
    are left out.
    """
    directory = Path(directory)
    facts = Facts.from_json(json.loads((directory / "report.json").read_text(encoding="utf-8")))
    named = {name for names in facts.raw.get("tables", {}).values() for name in names}
    files = [p for p in sorted((directory / "tables").glob("*.parquet")) if not named or p.stem in named]
    tables = {path.stem: pl.read_parquet(path) for path in files}
    html = render(tables, facts, [_download(path) for path in files])
    page = directory / "index.html"
    write_whole(page, html.encode())
    return page


def render(tables: Tables, facts: Facts, downloads: Iterable[Download] = ()) -> str:
    """Return the page as HTML text: every study of the run in the order of the registry, then the provenance."""
    sections = [section for name, tell in STUDIES.items() if name in facts.study for section in tell(tables, facts)]
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            facts=facts,
            strip=facts_strip(tables, facts),
            sections=sections,
            downloads=list(downloads),
            components=_components(tables),
            payload=zipped_json(_payload(tables, facts, sections)),
            provenance=provenance(facts),
            css={name: theme.css_variables(name) for name in theme.SURFACES},
            style=_asset("style.css"),
            script=_asset("page.js"),
            plotly=Markup(get_plotlyjs()),
        )
    )


def facts_strip(tables: Tables, facts: Facts) -> list[tuple[str, str, str]]:
    """Return the head of the page as (name, value, note): the model in six numbers at most."""
    strip = [
        ("parameters", magnitude(facts.n_parameters), f"{facts.n_parameters:,} stored as {facts.dtype}"),
        ("embedding table", f"{facts.vocab_size:,} × {facts.hidden_size:,}", "tokens × dimensions"),
        (
            "tied",
            "yes" if facts.tied else "no",
            "one table reads and predicts" if facts.tied else "two separate tables",
        ),
    ]
    if "budget" in tables:
        strip.append(("embedding share", share(embedding_share(tables["budget"])), "of all parameters"))
    row = dimension(tables, "participation ratio")
    if row:
        strip.append(("effective dimension", number(row["value"]), against(row["value"], row["null_gaussian"])))
    return strip + layers_strip(tables, facts)


def provenance(facts: Facts) -> list[tuple[str, str]]:
    """Return report.json as rows of (name, value), nested keys joined by a dot."""
    return list(_flattened(facts.raw))


def _flattened(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flattened(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _components(tables: Tables) -> list[str]:
    return [name for name in tables["tokens"].columns if name.startswith("pc")] if "tokens" in tables else []


def _payload(tables: Tables, facts: Facts, sections: list[Section]) -> dict[str, Any]:
    plots = [block for section in sections for block in section.blocks if isinstance(block, Plot)]
    knn = tables.get("knn")
    return {
        "templates": {name: theme.template(name).to_plotly_json() for name in theme.SURFACES},
        "marks": {"highlight": theme.HIGHLIGHT.colour},
        "tokens": token_columns(tables["tokens"]) if "tokens" in tables else None,
        "knn": neighbour_lists(knn) if knn is not None and not knn.is_empty() else None,
        "knnFull": bool(facts.knn.get("full")),
        "explained": explained_variance(tables)[:10],
        "command": f"dimscope neighbors {shlex.quote(facts.model)}",
        "figures": {plot.anchor: figure_spec(plot.figure) for plot in plots},
    }


def _download(path: Path) -> Download:
    size = path.stat().st_size
    readable = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3))} kB"
    if size > EMBED_LIMIT:
        return Download(path.stem, readable, f"tables/{path.name}", embedded=False)
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Download(path.stem, readable, f"data:application/vnd.apache.parquet;base64,{data}", embedded=True)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("dimscope.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> Markup:
    return Markup(resources.files("dimscope.report").joinpath("templates", name).read_text(encoding="utf-8"))
