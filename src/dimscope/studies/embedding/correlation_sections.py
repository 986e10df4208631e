"""The section about correlated rows: a range of ids as a picture, and the blocks of the whole table."""

import polars as pl

from dimscope.page.section import Facts, Grid, Plot, Section, Tables
from dimscope.page.wording import count
from dimscope.studies.embedding import token_figures
from dimscope.studies.embedding.token_sections import group_grid


def correlation_section(tables: Tables, facts: Facts) -> Section | None:
    """Show the correlation of an id range and the blocks of near-perfectly correlated tokens of the whole table."""
    if "correlation" not in tables or tables["correlation"].is_empty():
        return None
    matrix = tables["correlation"]
    first, last = matrix["id"].min(), matrix["id"].max()
    row, ids = facts.row, "ids" if facts.is_model else "rows"
    figure = token_figures.correlation(matrix, "token id" if facts.is_model else "row number")
    blocks: list[Plot | Grid] = [
        Plot("correlation-map", figure, f"correlation of {ids} {first} to {last}", square=True)
    ]
    groups = tables.get("correlation_blocks")
    if groups is not None and not groups.is_empty():
        blocks.append(group_grid(groups, "block", "min_r", f"Blocks among all {row}s", "lowest r inside", row))
    return Section(
        anchor="correlation",
        name="Correlation",
        title=_correlation_finding(groups, row),
        findings=()
        if groups is None or groups.is_empty()
        else (_in_picture(groups, matrix["id"].to_list(), row, ids),),
        blocks=tuple(blocks),
        how_to_read=(
            f"Each cell compares two of the {ids} {first} to {last}: red pairs rise and fall together over the "
            "dimensions, blue ones against each other, and the colour of the page means no relation. The diagonal is "
            f"each {row} with itself. A solid red square means {row}s that can hardly be told apart."
        ),
        caveat=(
            f"The picture shows {count(matrix.height, row)} of {facts.n_rows:,}; the blocks are searched in "
            "the whole table. Correlation is not a distance: rows of very different length can correlate perfectly. "
            f"Unrelated random rows scatter around 0 by about ±{1 / max(facts.dim - 1, 1) ** 0.5:.2f}."
        ),
        tables=("correlation", "correlation_blocks"),
    )


def _correlation_finding(groups: pl.DataFrame | None, row: str) -> str:
    if groups is None:
        return f"How {row}s correlate"
    if groups.is_empty():
        return f"No two {row}s of the table are near-perfectly correlated"
    n, largest = groups["block"].n_unique(), groups["size"].to_numpy().max()
    lowest = groups["min_r"].min()
    if n == 1:
        return f"One block of {largest:,} {row}s is almost perfectly correlated (lowest r {lowest:.3f})"
    bound = f"(lowest r {lowest:.3f})"
    return f"{n:,} blocks of {row}s are almost perfectly correlated, the largest of {largest:,} {bound}"


def _in_picture(groups: pl.DataFrame, shown: list[int], row: str, ids: str) -> str:
    """Say how much of the largest block is in the picture, which shows part of the table."""
    largest = groups.filter(pl.col("size") == pl.col("size").max())
    largest = largest.filter(pl.col("block") == largest["block"][0])
    inside = largest.filter(pl.col("id").is_in(shown)).height
    which = "largest block" if groups["block"].n_unique() > 1 else "block"
    where = f"the {ids} {shown[0]} to {shown[-1]} of the picture"
    return f"Of the {count(largest.height, row)} of the {which}, {inside:,} are among {where}."
