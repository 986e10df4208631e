"""How often noise makes the page tell a finding about damage or narrowing: a part of benchmarks/reliability.py."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from tqdm import trange

from benchmarks.measure import random_model
from dimscope.api import as_checkpoint, perturbation
from dimscope.checkpoints.model import load_model, place
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.evaluation.evaluate import SUMS, Evaluation, baseline, evaluate, evaluation_of
from dimscope.evaluation.throughput import ROUNDS, Throughput, speed_ratio, throughput
from dimscope.evaluation.yardstick import TOLERANCE
from dimscope.interventions.insertion import perturbed
from dimscope.studies.damage.claims import HOLDS, PARTLY, claims_frame
from dimscope.studies.damage.losses import Losses, losses_on
from dimscope.studies.damage.perturbation_error_sections import _equal_error
from dimscope.studies.damage.plan import Point
from dimscope.studies.damage.sections import _title, fewest_dimensions
from dimscope.studies.damage.tables import (
    RELATIVE,
    Measurement,
    damage_frame,
    evaluation_numbers,
    point_columns,
    windows_frame,
)
from dimscope.studies.narrowing.advice import (
    DENSE,
    NARROW,
    SCHEMA,
    SPEEDS,
    TextRead,
    advice,
    with_equal_size,
)
from dimscope.studies.narrowing.plan_rows import _halves
from dimscope.studies.reading import named_texts
from dimscope.texts.windows import Window, stream_windows

N_WINDOWS, LENGTH, VOCABULARY, WIDTH = 8, 64, 200, 32
TEXT = "text"
JUST_ABOVE = 1.02 * TOLERANCE.kl  # nats; the KL of a change on all windows
KEPT = {24: 0.5, 16: 1.0}  # dimensions under whose name a table gets noise of so many standard deviations
KINDS = ("truncate", "project", "project-rescaled")
DISTURBED = ("noise", "shift")
COMPARED = (0, 1, 3)  # the beliefs that compare two kinds of change, by their place in the table of beliefs
N_CANDIDATES = 11  # that a plan of a model of many layers times


# ---- one random change under several names ---------------------------------------------------------------------------


def frames(points: Mapping[Point, Evaluation], errors: Mapping[Point, float]) -> dict[str, pl.DataFrame]:
    """Return the tables `damage` and `windows` as the study writes them."""
    damage, windows = [], []
    for point, evaluation in points.items():
        columns = point_columns("toy", point, WIDTH)
        table = {"input": [Measurement(RELATIVE, errors[point], VOCABULARY)]} if point in errors else {}
        damage.append(damage_frame(columns, table, {TEXT: evaluation_numbers(evaluation)}))
        windows.append(windows_frame(columns, {TEXT: evaluation}))
    return {"damage": pl.concat(damage), "windows": pl.concat(windows)}


def same_change(family: str, seed: int) -> dict[str, pl.DataFrame]:
    """Return the tables of noise under the names of five kinds of change, on random tokens; each kind has seeds of its own."""
    model, rng = random_model(family, seed), np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, VOCABULARY, size=(N_WINDOWS, LENGTH)))
    ones = torch.ones(LENGTH, dtype=torch.int64)
    base = baseline(model, [Window(i, row, ones.cumsum(0), ones, 0) for i, row in enumerate(ids)], batch=N_WINDOWS)
    strengths = dict.fromkeys(KINDS, KEPT) | {kind: {0.5: 0.5, 1.0: 1.0} for kind in DISTURBED}
    points, errors = {Point(): evaluate(model, base, changed=False)}, {}
    for kind, sizes in strengths.items():
        for strength, size in sizes.items():
            for draw in range(3):
                point = Point(((kind, float(strength)),), "input", draw)
                with perturbed(model, perturbation("noise", model, size, seed=int(rng.integers(2**31)))):
                    points[point], errors[point] = evaluate(model, base), size
    return frames(points, errors)


def told_of_same_change(tables: Mapping[str, pl.DataFrame]) -> dict[str, bool]:
    """Return which findings about different kinds of change are told."""
    beliefs = claims_frame(tables["damage"], tables["windows"])["verdict"].to_list()
    losses = _losses(tables)
    return {
        "a kind of change does the least damage": "does the least damage" in _title(losses),
        "a belief that compares kinds holds, or holds in part": any(beliefs[i] in (HOLDS, PARTLY) for i in COMPARED),
        "equal error is not equal damage": _equal_error(losses).startswith("Equal error is not"),
    }


# ---- changes just above the tolerance --------------------------------------------------------------------------------


class Pool:
    """The sums of every window of a text of the built-in model, after changes whose KL on the whole text is just above."""

    def __init__(self, n_seeds: int = 8) -> None:
        checkpoint = as_checkpoint("builtin")
        model = load_model(checkpoint, place(checkpoint))
        text = named_texts(["builtin:prose"])["builtin prose"]
        windows = list(stream_windows(text, require_tokenizer(checkpoint.source), length=LENGTH))[:128]
        bases = [baseline(model, part, batch=16) for part in (windows[:64], windows[64:])]
        self.n_windows = len(windows)
        self.undamaged = torch.cat([evaluate(model, base, changed=False).sums for base in bases])

        def sums(kind: str, kept: int, seed: int) -> Tensor:
            with perturbed(model, perturbation(kind, checkpoint, kept, seed=seed)):
                return torch.cat([evaluate(model, base).sums for base in bases])

        self.truncations = [just_above(sums("truncate", kept, 0)[None])[0] for kept in (224, 192, 160)]
        projections = {kind: [sums(kind, 224, seed) for seed in range(n_seeds)] for kind in KINDS[1:]}
        self.projections = {kind: just_above(torch.stack(of_seeds)) for kind, of_seeds in projections.items()}

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return some of the windows, in the order of the text."""
        return np.sort(rng.permutation(self.n_windows)[:n])


def just_above(sums: Tensor, kl: float = JUST_ABOVE) -> Tensor:
    """Return sums by seed and window with a mean KL of `kl`."""
    scaled = sums.clone()
    of_kl, positions = (SUMS.index(name) for name in ("kl", "n_positions"))
    scaled[..., of_kl] *= kl / (sums[..., of_kl].sum() / sums[..., positions].sum())
    return scaled


def is_harmless(pool: Pool, rng: np.random.Generator) -> bool:
    """Whether a removal of dimensions is told to be harmless on eight windows; random changes have three of the seeds."""
    chosen = pool.sample(rng, N_WINDOWS)
    points = {Point(): evaluation_of(pool.undamaged[chosen])}
    points[Point((("truncate", 24.0),), "input")] = evaluation_of(pool.truncations[0][chosen])
    for kind, sums in pool.projections.items():
        for draw, seed in enumerate(rng.permutation(len(sums))[:3]):
            points[Point(((kind, 24.0),), "input", draw)] = evaluation_of(sums[seed][chosen])
    return "is harmless" in fewest_dimensions(_losses(frames(points, {})))


def _losses(tables: Mapping[str, pl.DataFrame]) -> Losses:
    return losses_on(tables["damage"], tables["windows"], TEXT, "input")


def plan_of(*rows: Mapping[str, Any]) -> pl.DataFrame:
    """Return the table `plan` of a dense model and some candidates."""
    common = dict.fromkeys(SCHEMA) | {"loss": 3.0, "loss_high": 3.1, "tied": False}
    dense = common | {"method": DENSE, "parameters": 1000, "bytes": 2000, "kl": 0.0}
    return with_equal_size(pl.DataFrame([dense, *(common | row for row in rows)], schema=SCHEMA))


def candidate(width: int, halves: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return a row of a plan, with its KL on the windows of the choice and on those that judge it."""
    row = {"method": NARROW, "basis": "raw", "width": width, "parameters": 10 * width, "bytes": 20 * width, "kl": 0.01}
    return row | dict(halves) | more


def is_within(pool: Pool, rng: np.random.Generator) -> bool:
    """Whether the advice tells that a width is within the tolerance, where it was lucky on the windows of the choice."""
    chosen = pool.sample(rng, 2 * N_WINDOWS)
    rows = [
        candidate(80 - i, {**_halves(sums[chosen], [TEXT] * len(chosen)), "choice_kl_high": TOLERANCE.kl / 2})
        for i, sums in enumerate(pool.truncations)
    ]
    title = advice(plan_of(rows[int(rng.integers(len(rows)))]), TextRead([TEXT], len(chosen)))[0]
    return "width" in title and "not certain" not in title and "not confirmed" not in title


def is_within_on_two_texts(pool: Pool, rng: np.random.Generator) -> bool:
    """Whether the advice tells so where the width costs a tenth on another text: on both together it is within."""
    chosen = pool.sample(rng, 4 * N_WINDOWS)
    one, other = rng.permutation(chosen)[: 2 * N_WINDOWS], chosen[: 2 * N_WINDOWS]
    sums = torch.cat([pool.truncations[0][one], just_above(pool.truncations[0][None], 0.1 * JUST_ABOVE)[0][other]])
    halves = _halves(sums, ["one"] * len(one) + ["other"] * len(other)) | {"choice_kl_high": TOLERANCE.kl / 2}
    title = advice(plan_of(candidate(80, halves)), TextRead(["one", "other"], len(sums)))[0]
    return "width" in title and "not certain" not in title and "not confirmed" not in title


# ---- models that are equally fast ------------------------------------------------------------------------------------


def is_faster(pairs: Sequence[tuple[Throughput, Throughput]]) -> bool:
    """Whether the advice names a fastest candidate, of candidates that were each timed beside the dense model."""
    rows = []
    for i, (own, dense) in enumerate(pairs):
        ratio = speed_ratio(own, dense).prefill
        values = (None, None, ratio.median, None, ratio.low, None, ratio.high, None)
        harmless = {"choice_kl_high": 0.01, "judged_kl": 0.01, "judged_kl_low": 0.009, "judged_kl_high": 0.011}
        rows.append(candidate(80 - i, harmless, **dict(zip(SPEEDS, values, strict=True))))
    title = advice(plan_of(*rows), TextRead([TEXT], 16))[0]
    return "fastest: width" in title


def noisy_rounds(rng: np.random.Generator, n_rounds: int) -> Throughput:
    """Return speeds of equal models with lognormal noise of 5%."""
    return Throughput(*(tuple(rng.lognormal(sigma=0.05, size=n_rounds)) for _ in range(2)))


def noise_is_faster(rng: np.random.Generator) -> bool:
    """Whether one of eleven candidates is told to be faster that have the speed of the dense model."""
    return is_faster([(noisy_rounds(rng, ROUNDS), noisy_rounds(rng, ROUNDS)) for _ in range(N_CANDIDATES)])


def copy_is_faster(models: Sequence[Any]) -> bool:
    """Whether one of several copies of a model is told to be faster than another copy, as this machine times them."""
    dense, *copies = models
    both = [throughput({"dense": dense, "own": own}, read=32, written=1) for own in copies]
    return is_faster([(speeds["own"], speeds["dense"]) for speeds in both])


# ---- all of them -----------------------------------------------------------------------------------------------------


def false_findings(n: int) -> Iterator[tuple[str, str, float]]:
    """Yield each finding, the inputs without structure, and the share of these on which it is told."""
    torch.set_num_threads(1)
    for family in ("Llama", "GPT-2"):
        told = [told_of_same_change(same_change(family, seed)) for seed in trange(n, desc=f"{family}, same change")]
        for finding in told[0]:
            yield finding, f"random {family}, one kind of noise under five names", _share(t[finding] for t in told)
    pool = Pool()
    above = f"built-in model, KL of {JUST_ABOVE:.4f} on all windows"
    tests: dict[str, tuple[Callable[[Pool, np.random.Generator], bool], str]] = {
        "a removal of dimensions is harmless": (is_harmless, f"{above}, three kinds"),
        "a narrower width is within the tolerance": (is_within, f"{above}, chosen by luck"),
        "a narrower width is within on every text": (
            is_within_on_two_texts,
            f"{above} of one text, a tenth on another",
        ),
    }
    for finding, (test, inputs) in tests.items():
        rng = np.random.default_rng(5)
        yield finding, inputs, _share(test(pool, rng) for _ in trange(n, desc=finding))
    rng, models = np.random.default_rng(6), [random_model("Llama", 0) for _ in range(6)]
    yield (
        "a candidate is faster than the dense model",
        f"{N_CANDIDATES} speeds with noise of 5%",
        _share(noise_is_faster(rng) for _ in trange(n, desc="noise")),
    )
    yield (
        "a candidate is faster than the dense model",
        "five copies of a random Llama, timed",
        _share(copy_is_faster(models) for _ in trange(n, desc="copies")),
    )


def _share(told: Iterator[bool]) -> float:
    values = list(told)
    return sum(values) / len(values) if values else math.nan
