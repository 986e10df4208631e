"""How often noise makes the page tell a finding, and how often its 95% intervals hold; writes docs/reliability-of-numbers.md.

python -m benchmarks.reliability [--repetitions 100]: about fifteen minutes on two cores.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import trange

from benchmarks import reliability_damage
from benchmarks.measure import random_model
from dimscope.activations.collection import Collection, collect, empty_collection
from dimscope.activations.sites import find_sites
from dimscope.api import as_checkpoint, perturbation
from dimscope.checkpoints.model import load_model, place
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.evaluation.evaluate import baseline, evaluate
from dimscope.evaluation.replicates import replicates
from dimscope.geometry.grouped import participation_ratio_across, variance_counts
from dimscope.geometry.half_samples import Replicated, groups_of
from dimscope.geometry.intrinsic import gaussian_dimension, intrinsic_dimensions
from dimscope.geometry.metrics import TWO_NN
from dimscope.geometry.representation_similarity import leading_subspace, subspace_overlap
from dimscope.geometry.spectrum import decompose
from dimscope.geometry.token_types import one_of_each, variance_between_types
from dimscope.geometry.untrained import untrained_scores
from dimscope.interventions.insertion import perturbed
from dimscope.interventions.maps import RowMap
from dimscope.page.section import Facts, StudyFacts
from dimscope.studies.embedding.correlation_sections import correlation_section
from dimscope.studies.embedding.measures import measures_frame
from dimscope.studies.embedding.populations import row_sets
from dimscope.studies.embedding.row_tables import duplicates_table, tokens_table
from dimscope.studies.embedding.run import blocks_table, dimensions_table, first_correlations
from dimscope.studies.embedding.source import open_source
from dimscope.studies.embedding.spectrum_sections import dimension_section, isotropy_section, spectrum_section
from dimscope.studies.embedding.spectrum_tables import spectra_frame
from dimscope.studies.embedding.token_sections import duplicates_section
from dimscope.studies.layers.comparisons import above_chance, beyond, clearly_below, extremes, intervals_apart
from dimscope.studies.layers.tables import layer_spectra
from dimscope.studies.reading import named_texts
from dimscope.texts.window_sums import Interval, interval
from dimscope.texts.windows import Window, shuffle_within, stream_windows
from dimscope.vectors.table import table_from_tensor

PAGE = Path(__file__).parent.parent / "docs/reliability-of-numbers.md"
N_WINDOWS, LENGTH = 8, 64  # of a sample; the text has about 20 times as many windows
LAYERS = (1, 3, 6)
N_SEEDS, OF_SAMPLE = 40, 5  # of a random change: in all, and of a sample


# ---- tables and states without structure ----------------------------------------------------------------------------


def white(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Return white noise."""
    return rng.normal(size=(n, d))


def near_zero(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Return white noise of which 30% of the rows are nearly zero."""
    return rng.normal(size=(n, d)) * np.where(rng.random((n, 1)) < 0.3, 1e-3, 1.0)


def lognormal(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Return random directions with lognormal norms."""
    return rng.normal(size=(n, d)) * np.exp(rng.normal(size=(n, 1)))


def heavy(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Return rows of a t distribution with three degrees of freedom."""
    return rng.normal(size=(n, d)) / np.sqrt(rng.chisquare(3, size=(n, 1)) / 3)


TABLES = {"white noise": white, "30% of rows near zero": near_zero, "lognormal norms": lognormal, "rows of t3": heavy}


def table_findings(rows: np.ndarray) -> dict[str, bool]:
    """Return which findings the page tells about a table."""
    source = open_source(table_from_tensor(torch.from_numpy(rows).float()))
    populations = row_sets(source)
    spectra = spectra_frame(populations, 0, 0)
    tables = {
        "spectrum": spectra,
        "dimensions": dimensions_table(populations, spectra),
        "measures": pl.concat([measures_frame(population) for population in populations]),
        "correlation": first_correlations(source, 50),
        "correlation_blocks": blocks_table(source),
        "duplicates": duplicates_table(source),
        "tokens": tokens_table(source),
    }
    study = StudyFacts({"side": "vectors", "radius": source.near}, tuple(tables))
    facts = Facts("noise", *rows.shape, studies={"embedding": study})
    sections = (spectrum_section, dimension_section, isotropy_section, correlation_section, duplicates_section)
    titles = [section.title for make in sections if (section := make(tables, facts)) is not None]
    untrained = untrained_scores(source.table, torch.empty(0, dtype=torch.int64))
    return {
        "directions wider than chance": not titles[0].startswith("None"),
        "more or fewer dimensions than a random table": "about as many" not in titles[1],
        "rows share a direction": titles[2].startswith("Rows share"),
        "norms follow the row number": "do not follow" not in titles[2],
        "rows are almost perfectly correlated": not titles[3].startswith("No two"),
        "rows are copies of each other": not titles[4].startswith("No two"),
        "rows look untrained": untrained.threshold is not None
        and bool((np.asarray(untrained.scores) <= untrained.threshold).any()),
    }


TRUE = {("30% of rows near zero", name) for name in ("rows are copies of each other", "rows look untrained")}
"""What is no noise: rows that are nearly zero lie near each other, and look untrained."""


def profile_frame(numbers: list[Replicated], **columns: list[float]) -> pl.DataFrame:
    """Return a profile over layers as the page has it."""
    rows = {
        "layer": list(range(len(numbers))),
        "value": [n.value for n in numbers],
        "halves": [list(n.differences) for n in numbers],
    }
    return pl.DataFrame(rows | {"stderr": [n.interval().stderr for n in numbers]} | columns)


def text_findings(family: str, rng: np.random.Generator, seed: int) -> dict[str, bool]:
    """Return which findings a random model is told to show on texts of independent tokens, shuffled and beside another."""
    model = random_model(family, seed)
    real, another = (random_windows(rng) for _ in range(2))
    texts = (real, [shuffle_within(w, seed, 0) for w in real], another)
    collections = [collection(model, windows) for windows in texts]
    counts, shuffled, of_another = (
        profile_frame([raw.counts["variance count 95%"] for raw in layer_spectra(of, (0.95,)).values()])
        for of in collections
    )
    losses = [interval(of.predictions.by_window.stacked(), lambda s: s[..., 1] / s[..., 0]) for of in collections]
    return {
        "real text needs more or fewer components than shuffled text": any(beyond(counts, shuffled)),
        "a text needs more or fewer components than another": any(beyond(counts, of_another)),
        "shuffling changes the loss": intervals_apart(asdict(losses[0]), asdict(losses[1])),
    }


def random_windows(rng: np.random.Generator) -> list[Window]:
    """Return windows of independent tokens."""
    ids = torch.from_numpy(rng.zipf(1.5, size=(N_WINDOWS, LENGTH)) % 200)
    ends = torch.arange(1, LENGTH + 1)
    return [Window(i, w, LENGTH * i + ends, torch.ones(LENGTH, dtype=torch.int64), 0) for i, w in enumerate(ids)]


def collection(model: torch.nn.Module, windows: list[Window], reservoir: int = 2048) -> Collection:
    """Return what a model shows on windows."""
    sites = find_sites(model)
    into = empty_collection(model, sites, reservoir, 0)
    collect(model, windows, sites, into)
    into.reservoir.prune(whole=True)
    return into


def some_layers_are_higher(rng: np.random.Generator) -> bool:
    """Whether two layers are told to have different intrinsic dimensions where all have independent Gaussian states."""
    layers = [torch.from_numpy(white(rng, 400, 10)) for _ in range(5)]
    windows = groups_of(np.repeat(np.arange(8), 50))
    return extremes(profile_frame([two_nn(rows, windows) for rows in layers]).with_columns(site=pl.lit("")))[2]


def some_layers_use_more(rng: np.random.Generator) -> bool:
    """Whether two layers are told to use different numbers of dimensions where all have independent states of the same spectrum."""
    windows, counts = groups_of(np.repeat(np.arange(8), 50)), []
    for _ in range(5):
        rows = torch.from_numpy(white(rng, 400, 24) * np.linspace(3, 0.5, 24))
        of = decompose(rows)
        counts += variance_counts(rows, windows, of.axes, of.spectrum.singular_values.square(), (0.95,))
    return extremes(profile_frame(counts).with_columns(site=pl.lit("")))[2]


def spaces_overlap(rng: np.random.Generator) -> bool:
    """Whether the widest components of independent clouds are told to overlap."""
    clouds = [[torch.from_numpy(white(rng, 400, 64)) for _ in range(2)] for _ in range(5)]
    rows = [asdict(subspace_overlap(*(leading_subspace(cloud, 16) for cloud in pair))) for pair in clouds]
    names = {"null": "overlap_null", "null_sd": "overlap_null_sd"}
    return bool(above_chance(pl.DataFrame(rows).rename(names).with_row_index("layer")))


def some_layer_is_curved(rng: np.random.Generator) -> bool:
    """Whether states are told not to fill the space that they span where they are Gaussian."""
    layers = [torch.from_numpy(white(rng, 400, 24) * np.linspace(3, 0.1, 24) ** (i / 2)) for i in range(5)]
    windows = groups_of(np.repeat(np.arange(8), 50))
    gaussian = [gaussian_dimension(rows, seed=i + 1)[TWO_NN, None] for i, rows in enumerate(layers)]
    return bool(clearly_below(profile_frame([two_nn(rows, windows) for rows in layers], gaussian=gaussian), "gaussian"))


def two_nn(rows: Tensor, groups: np.ndarray) -> Replicated:
    """Return TwoNN with its half-samples."""
    return next(e.replicated for e in intrinsic_dimensions(rows, groups=groups) if e.metric == TWO_NN)


def tokens_matter(rng: np.random.Generator) -> bool:
    """Whether the share of the variance between tokens is told to differ between layers where tokens have no meaning."""
    tokens, groups = rng.integers(0, 100, 400), groups_of(np.repeat(np.arange(8), 50))
    layers = [variance_between_types(torch.from_numpy(white(rng, 400, 16)), tokens, groups) for _ in range(5)]
    return extremes(profile_frame(layers).with_columns(site=pl.lit("")))[2]


def false_findings(n: int) -> Iterator[tuple[str, str, float]]:
    """Yield each finding, the inputs without structure, and the share of these on which it is told."""
    for name, draw in TABLES.items():
        rng = np.random.default_rng(1)
        told = [table_findings(draw(rng, 1500, 64)) for _ in trange(n, desc=name)]
        yield from shares(told, f"tables of 1,500 x 64: {name}", [finding for of, finding in TRUE if of == name])
    for family in ("Llama", "GPT-2"):
        rng = np.random.default_rng(2)
        told = [text_findings(family, rng, seed) for seed in trange(n, desc=family)]
        yield from shares(told, f"random {family}, independent tokens")
    yield from reliability_damage.false_findings(n)
    states = {
        "two layers use different numbers of dimensions": (some_layers_use_more, "five layers of Gaussian states"),
        "two layers have different intrinsic dimensions": (some_layers_are_higher, "five layers of white noise"),
        "states do not fill the space that they span": (some_layer_is_curved, "five layers of Gaussian states"),
        "vocabulary accounts for more at one layer than at another": (tokens_matter, "five layers, tokens at random"),
        "components of real states and of others overlap": (spaces_overlap, "five pairs of clouds of white noise"),
    }
    for finding, (test, inputs) in states.items():
        rng = np.random.default_rng(3)
        yield finding, inputs, float(np.mean([test(rng) for _ in trange(n, desc=finding)]))


def shares(told: list[dict[str, bool]], inputs: str, true: Sequence[str] = ()) -> Iterator[tuple[str, str, float]]:
    """Yield each finding with the share of inputs on which it was told; those that are true of the inputs are left out."""
    for finding in told[0]:
        if finding not in true:
            yield finding, inputs, float(np.mean([of_input[finding] for of_input in told]))


# ---- intervals ------------------------------------------------------------------------------------------------------


class Pool:
    """The windows of a text, and what the built-in model shows on each of them."""

    def __init__(self) -> None:
        checkpoint = as_checkpoint("builtin")
        model = load_model(checkpoint, place(checkpoint))
        text = named_texts(["builtin:prose"])["builtin prose"]
        self.windows = list(stream_windows(text, require_tokenizer(checkpoint.source), length=LENGTH))
        seen = [collection(model, [window]) for window in self.windows]
        self.sums = torch.stack([of.predictions.by_window.stacked()[0] for of in seen])
        samples = [of.reservoir.sample() for of in seen]
        self.tokens = [sample.tokens for sample in samples]
        self.states = {layer: [sample.layers[layer] for sample in samples] for layer in LAYERS}
        self._damage(model, checkpoint)

    def _damage(self, model: torch.nn.Module, checkpoint: object) -> None:
        """Sum KL and loss of every window, after a truncation, and after noise of several seeds."""
        bases = [baseline(model, [window]) for window in self.windows]

        def sums(of: RowMap) -> Tensor:
            with perturbed(model, of):
                evaluations = [evaluate(model, base) for base in bases]
            numbers = [(e.kl.value * e.n_positions, e.n_positions, e.loss_rise.value * e.n_predicted, e.n_predicted)
                       for e in evaluations]  # fmt: skip
            return torch.tensor(numbers, dtype=torch.float64)

        self.truncation = sums(perturbation("truncate", checkpoint, 64))
        self.noise = torch.stack(
            [sums(perturbation("noise", checkpoint, 0.5, seed=seed)) for seed in trange(N_SEEDS, desc="noise")]
        )

    def intervals(self, chosen: np.ndarray, seeds: np.ndarray) -> dict[str, Interval]:
        """Return every interval of the page that comes from some windows of one text, and some seeds of a random change."""
        sums, damage = self.sums[chosen], self.truncation[chosen]
        noise = replicates(seeds.tolist(), self.noise[seeds][:, chosen], lambda s: s[..., 0] / s[..., 1])
        found = {
            "loss": interval(sums, lambda s: s[..., 1] / s[..., 0]),
            "bits per byte": interval(sums, lambda s: s[..., 1] / s[..., 6] / math.log(2)),
            "entropy": interval(sums, lambda s: s[..., 3] / s[..., 2]),
            "probability of the first choice": interval(sums, lambda s: s[..., 5] / s[..., 4]),
            "KL of truncation to 64 of 256 dimensions": interval(damage, lambda s: s[..., 0] / s[..., 1]),
            "rise of the loss by it": interval(damage, lambda s: s[..., 2] / s[..., 3]),
            "KL of noise of 0.5 standard deviations, five seeds": noise.interval(),
        }
        tokens = np.concatenate([self.tokens[i] for i in chosen])
        windows = np.repeat(np.arange(len(chosen)), [len(self.tokens[i]) for i in chosen])
        groups = groups_of(windows)
        for layer in LAYERS:
            rows = torch.cat([self.states[layer][i] for i in chosen])
            found[f"participation ratio, across windows, block {layer}"] = participation_ratio_across(
                rows, groups
            ).interval()
            found[f"variance between token types, block {layer}"] = variance_between_types(
                rows, tokens, groups
            ).interval()
        return found

    def two_nn(self, chosen: np.ndarray, layer: int) -> Interval:
        """Return TwoNN of one state per token."""
        tokens = np.concatenate([self.tokens[i] for i in chosen])
        groups = groups_of(np.repeat(np.arange(len(chosen)), [len(self.tokens[i]) for i in chosen]))
        rows, one = torch.cat([self.states[layer][i] for i in chosen]), one_of_each(tokens)
        return two_nn(rows[torch.from_numpy(one)], groups[one]).interval()


def coverages(n: int) -> Iterator[tuple[str, float, str]]:
    """Yield each interval, the share of samples in which it holds, and what it is held against."""
    pool, rng = Pool(), np.random.default_rng(4)
    whole = pool.intervals(np.arange(len(pool.windows)), np.arange(N_SEEDS))
    names, covered = list(whole), []
    one_per_type: dict[int, list[Interval]] = {layer: [] for layer in LAYERS}
    for _ in trange(n, desc="samples of windows"):
        chosen = np.sort(rng.permutation(len(pool.windows))[:N_WINDOWS])
        own = pool.intervals(chosen, np.sort(rng.permutation(N_SEEDS)[:OF_SAMPLE]))
        covered.append([own[name].low <= whole[name].value <= own[name].high for name in names])
        for layer in LAYERS:
            one_per_type[layer].append(pool.two_nn(chosen, layer))
    for name, share in zip(names, np.mean(covered, axis=0), strict=True):
        seeds = f" and {N_SEEDS} seeds" if "seeds" in name else ""
        yield name, float(share), f"the value on all {len(pool.windows)} windows{seeds}"
    for layer, intervals in one_per_type.items():
        middle = np.mean([i.value for i in intervals])
        share = np.mean([i.low <= middle <= i.high for i in intervals])
        yield (
            f"TwoNN, one state per token, block {layer}",
            float(share),
            f"the mean over samples of {N_WINDOWS} windows",
        )


def page(n: int) -> str:
    """Return the page of documentation."""
    findings = [f"| {name} | {inputs} | {share:.0%} |" for name, inputs, share in false_findings(n)]
    intervals = [f"| {name} | {against} | {share:.0%} |" for name, share, against in coverages(n)]
    return "\n".join([
        "# How reliable the numbers are",
        "",
        "`python -m benchmarks.reliability` writes this page.",
        "",
        "## Findings on inputs without structure",
        "",
        f"Each finding of the page was tested on {n} inputs in which there is nothing to find.",
        "A finding should be told on at most 5% of them.",
        "",
        "| finding | inputs | told on |", "|---|---|---|", *findings,
        "",
        "## Intervals",
        "",
        f"The built-in model read {n} samples of {N_WINDOWS} windows of {LENGTH} tokens of its prose.",
        "The second column says what each 95% interval was held against; it should hold in 90% to 99% of the samples.",
        "TwoNN depends on the number of points, so its interval is for samples of one size.",
        "",
        "| interval | held against | holds in |", "|---|---|---|", *intervals,
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=100)
    PAGE.write_text(page(parser.parse_args().repetitions), encoding="utf-8")
