"""Sections about rows: the token map, neighbours, correlation, duplicates, under-trained tokens and hubs."""

import statistics

import polars as pl

from dimscope.geometry.metrics import HUBNESS, SEED_ROWS, UNTRAINED_THRESHOLD
from dimscope.page.section import Facts, Grid, Plot, Section, Tables, Token
from dimscope.page.wording import count, listed, number, sentence, share
from dimscope.studies.embedding import token_figures
from dimscope.studies.embedding.context import explained_variance, measure
from dimscope.studies.embedding.facts import embedding_facts

ALL_DIMENSIONS, FIRST_COMPONENTS = "all d dimensions", "first 10 components"


def map_section(tables: Tables, facts: Facts) -> Section | None:
    """Show every token on two components, with search, colours and precomputed neighbours."""
    if "tokens" not in tables or "pc2" not in tables["tokens"].columns:
        return None
    tokens, explained = tables["tokens"], explained_variance(tables)
    row, kinds = facts.row, _kinds(tokens) if facts.is_model else ""
    return Section(
        anchor="map",
        name=f"{sentence(row)} map",
        title=_map_finding(tokens, explained),
        blocks=(
            Plot(
                "token-map", token_figures.token_map(tokens, explained=explained), f"map of all {row}s", explorer=True
            ),
        ),
        how_to_read=(
            f"Every point is one {row}; near points have similar rows, as far as two components can show. {kinds}"
            "Search for a text, for a range of ids such as #0:100, or for an id such as #177, "
            f"choose other components, colour by category or by norm, and click a {row} for its nearest neighbours. "
            f"{_knn_note(facts)}"
        ),
        caveat=(
            f"This is a shadow on two of {facts.dim:,} dimensions: the exact leading components of all rows "
            "(PCA, the mean removed). Far apart here means far apart in the table, but close here "
            "does not mean close there. The neighbours in the list use all dimensions."
        ),
        tables=("tokens", "knn"),
    )


def _kinds(tokens: pl.DataFrame) -> str:
    odd = tokens.filter(pl.col("category") != "ordinary").height
    n = f": {odd:,} {'is' if odd == 1 else 'are'} not ordinary text" if odd else ""
    return f"Colours and shapes mark the kind of token{n}. "


def _map_finding(tokens: pl.DataFrame, explained: list[float]) -> str:
    who = f"All {tokens.height:,} rows on two components"
    return f"{who}, which hold {share(sum(explained[:2]))} of their variance" if explained else who


def _knn_note(facts: Facts) -> str:
    n = embedding_facts(facts).n_queries
    if not n:
        return "No neighbours were computed for this page."
    if n >= facts.n_rows:
        return f"The neighbours of all {n:,} {facts.row}s were computed."
    return f"Neighbours were computed for a random sample of {count(n, facts.row)} among all {facts.row}s."


def id_range_section(tables: Tables, facts: Facts) -> Section | None:
    """Show the first hundred ids on components 1 and 3."""
    if not facts.is_model or "tokens" not in tables or "pc3" not in tables["tokens"].columns:
        return None
    tokens = tables["tokens"]
    stop = min(100, tokens.height)
    fig = token_figures.id_scatter(tokens, 0, stop, "pc1", "pc3", explained=explained_variance(tables))
    return Section(
        anchor="first-ids",
        name="First ids",
        title=_id_range_finding(tokens, stop),
        blocks=(Plot("id-scatter", fig, f"ids 0 to {stop - 1} on components 1 and 3"),),
        how_to_read=(
            "The same cloud as in the map, from another side and only for the first ids. In most tokenizers these are "
            "special tokens, punctuation, digits and letters. Labels that found no room appear when you point at the "
            "dot."
        ),
        caveat=(
            f"{sentence(count(stop, 'token'))} of {facts.n_rows:,} and 2 of {facts.dim:,} dimensions: "
            "groups seen here are worth a question, not an answer."
        ),
        tables=("tokens",),
    )


def _id_range_finding(tokens: pl.DataFrame, stop: int) -> str:
    distance = (pl.col("pc1") ** 2 + pl.col("pc3") ** 2).sqrt()
    everyone = tokens.select(distance.median()).item()
    first = tokens.filter(pl.col("id") < stop).select(distance.median()).item()
    subject = f"Ids 0 to {stop - 1} lie"
    if not everyone or first is None:
        return f"Ids 0 to {stop - 1} on components 1 and 3"
    ratio = first / everyone
    if 0.9 <= ratio <= 1.1:
        return f"{subject} about as far from the centre as the median row on components 1 and 3"
    return f"{subject} {number(round(ratio, 1))} times as far from the centre as the median row on components 1 and 3"


def neighbours_section(tables: Tables, facts: Facts) -> Section | None:
    """Show probe queries with their neighbours in all dimensions and in the first ten components."""
    if "probes" not in tables or tables["probes"].is_empty():
        return None
    probes = tables["probes"]
    queries = probes["query"].unique(maintain_order=True).to_list()
    shared = [_shared(probes, query) for query in queries]
    grids = tuple(_probe_grid(probes, query, ids, facts) for query, ids in zip(queries, shared, strict=True))
    return Section(
        anchor="neighbours",
        name="Neighbours",
        title=_neighbours_finding(probes, shared, facts),
        blocks=grids,
        how_to_read=(
            f"Each table lists the nearest tokens by cosine, on the left in all {facts.dim:,} dimensions, "
            "on the right when only the first 10 components are kept. Tokens found by both are bold. Cosines on the "
            "right are usually higher: fewer dimensions leave less room to differ. Click a token to see it on the map."
        ),
        caveat=(
            f"{sentence(count(len(queries), 'query', 'queries'))} chosen beforehand, not a sample: they illustrate and "
            "prove nothing about the rest. The search itself is exact over all tokens."
        ),
        tables=("probes", "knn"),
    )


def _shared(probes: pl.DataFrame, query: str) -> set[int]:
    rows = probes.filter(pl.col("query") == query)
    full, few = (set(rows.filter(pl.col("space") == space)["id"]) for space in (ALL_DIMENSIONS, FIRST_COMPONENTS))
    return full & few


def _neighbours_finding(probes: pl.DataFrame, shared: list[set[int]], facts: Facts) -> str:
    k, kept = probes["rank"].to_numpy().max(), statistics.mean(len(ids) for ids in shared)
    over = f"on average over {count(len(shared), 'query', 'queries')}" if len(shared) > 1 else "for one query"
    if facts.dim <= 10:
        return f"Nearest neighbours of {count(len(shared), 'query', 'queries')}"
    kept_names = f"{number(kept)} of {k} nearest neighbours"
    return f"Keeping 10 of {facts.dim:,} dimensions keeps {kept_names}, {over}"


def _probe_grid(probes: pl.DataFrame, query: str, shared: set[int], facts: Facts) -> Grid:
    sides = [
        probes.filter((pl.col("query") == query) & (pl.col("space") == space)).sort("rank")
        for space in (ALL_DIMENSIONS, FIRST_COMPONENTS)
    ]
    rows = []
    for rank in range(max(side.height for side in sides)):
        cells: list[Token | str] = [str(rank + 1)]
        for side in sides:
            if rank < side.height:
                row = side.row(rank, named=True)
                cells += [Token(row["id"], row["label"], row["id"] in shared), f"{row['cosine']:.3f}"]
            else:
                cells += ["", ""]
        rows.append(tuple(cells))
    header = ("", f"all {facts.dim:,} dimensions", "cosine", "first 10 components", "cosine")
    return Grid(query, header, tuple(rows), frozenset({0, 2, 4}))


GROUPS_SHOWN = 10


def group_grid(groups: pl.DataFrame, key: str, spread: str, caption: str, spread_name: str, row: str) -> Grid:
    """List the largest groups with their first rows."""
    largest = groups.sort("size", key, descending=[True, False])[key].unique(maintain_order=True).to_list()
    rows = []
    for group in largest[:GROUPS_SHOWN]:
        members = groups.filter(pl.col(key) == group).sort("id")
        names = [f"{label} #{i}" for label, i in members.select("label", "id").head(6).iter_rows()]
        more = f", … {members.height - 6:,} more" if members.height > 6 else ""
        kinds = ", ".join(members["category"].unique().sort())
        rows.append((f"{members.height:,}", kinds, ", ".join(names) + more, f"{members[spread][0]:.3g}"))
    note = f"{caption}: the {GROUPS_SHOWN} largest of {len(largest):,}" if len(largest) > GROUPS_SHOWN else caption
    return Grid(note, (f"{row}s", "category", "which", spread_name), tuple(rows), frozenset({0, 3}))


def duplicates_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell which rows lie within a small radius of each other in all dimensions."""
    if "duplicates" not in tables:
        return None
    groups, grid = tables["duplicates"], None
    if groups.height:
        grid = group_grid(groups, "group", "diameter", "Groups of copies", "largest distance", facts.row)
    return Section(
        anchor="duplicates",
        name="Duplicates",
        title=_duplicates_finding(groups, embedding_facts(facts).radius, facts.row),
        blocks=(grid,) if grid else (),
        how_to_read=(
            "Two rows are joined when their distance, measured in all dimensions, is at most the radius; a group is "
            "everything that can be reached over such steps."
            f"{' Copies usually are rows that training never touched.' if facts.is_model else ''}"
        ),
        caveat=(
            "The search is exact and covers all pairs, but the radius is a choice: a larger one finds more. Inside a "
            "group the ends can lie farther apart than the radius; the largest distance says how far."
        ),
        tables=("duplicates",),
    )


def _duplicates_finding(groups: pl.DataFrame, radius: float | None, row: str) -> str:
    within = f" (radius {number(radius)})" if radius is not None else ""
    if groups.is_empty():
        return f"No two rows of the table are copies of each other{within}"
    n, members = groups["group"].n_unique(), groups.height
    if n == 1:
        return f"{members:,} {row}s are practically one vector{within}"
    return f"{members:,} {row}s share only {n:,} practically different vectors{within}"


def untrained_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell which tokens look as if training never reached them."""
    if "tokens" not in tables:
        return None
    tokens = tables["tokens"]
    if tokens["untrained_score"].is_null().all():
        return None
    row = measure(tables, UNTRAINED_THRESHOLD)
    threshold = row["value"] if row else None
    flagged = tokens.filter(pl.col("untrained"))
    grid = _untrained_grid(flagged)
    plot = Plot(
        "untrained-scores", token_figures.untrained_scores(tokens, threshold), "scores by category", log_toggle=True
    )
    return Section(
        anchor="untrained",
        name="Under-trained tokens",
        title=_untrained_finding(flagged, threshold),
        findings=_untrained_signs(tables, flagged),
        blocks=(plot, grid) if grid else (plot,),
        how_to_read=(
            "A row looks under-trained if its norm is zero or far below the median, if it is near a group of seed rows, or if "
            "it is nearly equal to two or more other rows. Seed rows cannot have been trained: ids beyond the tokenizer, "
            "bytes that no text contains, tokens that the tokenizer never produces. The score is the distance to the nearest of "
            "these groups, or to the origin: 0 looks untrained, 1 is the median of the ordinary tokens. "
            + (
                "There is no dashed line because no threshold could be set."
                if threshold is None
                else "The dashed line is the threshold."
            )
        ),
        caveat=_untrained_caveat(tables),
        tables=("tokens", "measures"),
    )


def _untrained_signs(tables: Tables, flagged: pl.DataFrame) -> tuple[str, ...]:
    """Return a sentence with the number of flagged rows by sign, the most frequent first, and what they are compared with."""
    if flagged.is_empty():
        return ()
    signs = flagged.group_by("untrained_sign").len().sort("len", "untrained_sign", descending=[True, False])
    parts = listed([f"{sign} ({n:,})" for sign, n in signs.iter_rows()])
    return (f"Reasons: {parts}, by comparison with the ordinary tokens and with {count(_n_seed(tables), 'seed row')}.",)


def _n_seed(tables: Tables) -> int:
    seeds = measure(tables, SEED_ROWS)
    return round(seeds["value"]) if seeds else 0


def _untrained_finding(flagged: pl.DataFrame, threshold: float | None) -> str:
    ordinary = flagged.filter(pl.col("category") == "ordinary").height
    if flagged.is_empty() and threshold is None:
        return "The seed rows do not stand apart from the rest, so no row is called under-trained"
    if flagged.is_empty():
        return "No row looks under-trained"
    who = count(flagged.height, "row")
    verb = "looks" if flagged.height == 1 else "look"
    if not ordinary and flagged.height == 1:
        return f"{who} {verb} under-trained, and it is not ordinary text"
    if not ordinary:
        return f"{who} {verb} under-trained, none of them ordinary text"
    if ordinary == flagged.height:
        return f"{who} {verb} under-trained, though ordinary text can produce {'it' if ordinary == 1 else 'them'}"
    return f"{who} {verb} under-trained, {ordinary:,} of them ordinary text"


def _untrained_grid(flagged: pl.DataFrame, shown: int = 20) -> Grid | None:
    if flagged.is_empty():
        return None
    # Ordinary tokens come first: those are the surprise, the seed rows are expected.
    ranked = flagged.sort(pl.col("category") != "ordinary", "untrained_score", "id").head(shown)
    rows = tuple(
        (Token(row["id"], row["label"]), f"{row['id']:,}", row["category"], number(row["untrained_score"]),
         row["untrained_reason"] or "")
        for row in ranked.iter_rows(named=True)
    )  # fmt: skip
    more = f": {shown} of {flagged.height:,}, ordinary ones first" if flagged.height > shown else ""
    return Grid(f"Under-trained tokens{more}", ("token", "id", "category", "score", "reason"), rows, frozenset({1, 3}))


def _untrained_caveat(tables: Tables) -> str:
    n = _n_seed(tables)
    basis = f"There {'is' if n == 1 else 'are'} {count(n, 'seed row')}. "
    return (
        f"{basis}A low score says that a row resembles untrained rows, not that the model fails on it; prompts would "
        "have to show that. The fewer the seed rows, the fewer kinds of untrained rows they show."
    )


def hubness_section(tables: Tables, facts: Facts) -> Section | None:
    """Tell whether a few tokens are near neighbours of very many others."""
    if "hubs" not in tables or tables["hubs"].is_empty():
        return None
    hubs, row = tables["hubs"].sort("in_degree", descending=True), facts.row
    rows = tuple(
        (Token(i, label), f"{i:,}", f"{degree:,}")
        for i, label, degree in hubs.head(10).select("id", "label", "in_degree").iter_rows()
    )
    grid = Grid(
        "The ten largest hubs" if len(rows) == 10 else "Hubs", (row, "id", "in-degree"), rows, frozenset({1, 2})
    )
    return Section(
        anchor="hubness",
        name="Hubs",
        title=_hubness_finding(hubs, row),
        findings=_untrained_hubs(tables, hubs.head(len(rows))),
        blocks=(
            Plot("hub-degrees", token_figures.hubness(hubs, row), "in-degrees of the neighbour graph", log_toggle=True),
            grid,
        ),
        how_to_read=(
            f"Every {row} has a list of nearest neighbours; the in-degree counts the lists that a {row} is in. Grey is "
            f"what random lists would give. A long tail to the right means hubs: {row}s that are near to everything, "
            f"and that crowd the neighbour lists. Dots at 0 are {row}s that are in no list."
        ),
        caveat=_hubness_caveat(tables, facts, hubs),
        tables=("hubs", "knn"),
    )


def _untrained_hubs(tables: Tables, largest: pl.DataFrame) -> tuple[str, ...]:
    """Say how many of the largest hubs look under-trained."""
    flagged = tables["tokens"].filter("untrained")["id"] if "tokens" in tables else pl.Series(dtype=pl.Int64)
    n = largest.filter(pl.col("id").is_in(flagged.implode())).height
    verb = "looks" if n == 1 else "look"
    return (f"Of the {largest.height} largest hubs, {n} {verb} under-trained.",) if n else ()


def _hubness_finding(hubs: pl.DataFrame, row: str) -> str:
    top, mean = hubs["in_degree"][0], hubs["in_degree"].to_numpy().mean()
    absent = hubs.filter(pl.col("in_degree") == 0).height
    rest = f"{share(absent / hubs.height)} of {row}s are in no list" if absent else f"every {row} is in a list"
    average = number(round(float(mean), 1))
    return f"The largest hub is in the neighbour lists of {count(top, row)}, where {average} is the average; {rest}"


def _hubness_caveat(tables: Tables, facts: Facts, hubs: pl.DataFrame) -> str:
    skew = measure(tables, HUBNESS)
    null = (
        f"; that of Gaussian rows of the same shape is {number(skew['null'])}"
        if skew and skew["null"] is not None
        else ""
    )
    skewness = f" The skewness of the in-degrees is {number(skew['value'])}{null}." if skew else ""
    scope = (
        f"The graph has all {hubs.height:,} rows."
        if hubs.height >= facts.n_rows
        else f"The graph lives inside a random sample of {hubs.height:,} {facts.row}s: neighbours are sought within the "
        "sample, so these lists differ from those of the map."
    )
    return f"{scope}{skewness} High dimension alone makes some hubs: compare with the Gaussian rows, and look who the hubs are."
