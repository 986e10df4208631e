"""Speed of the damage study at the shape of Qwen2.5-0.5B against the usual way, in one run.

    python -m benchmarks.damage                     (about fifteen minutes on 2 cores)
    python -m benchmarks.damage --quick             (small shapes, in seconds: does it run? nothing is written)
    python -m benchmarks.damage --only errors judged

Results are equal first (asserted), and only then compared for time. Times depend on the machine and on what else it
does: read the ratios.
"""

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.measure import HIDDEN_SIZE, VOCAB_SIZE, qwen_sized_table, timed
from dimscope.evaluation import evaluate as evaluation
from dimscope.interventions.insertion import perturbed
from dimscope.interventions.maps import LinearMap, exact_error
from dimscope.interventions.perturbations import make_map
from dimscope.interventions.table_summary import TableSummary
from dimscope.texts.windows import Window
from dimscope.vectors.moments import Moments, moments

KINDS, DIMENSIONS = ("truncate", "project", "project-rescaled"), range(100, 801, 100)
SEED, BLOCK = 0, 8192
REPEATS = 3  # of a setting, both ways in turns; the shortest counts
WINDOWS, BATCH, KEPT, ROUNDS = 8, 4, 600, 3


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how long it takes; the width is always that of Qwen2.5-0.5B."""

    vocab_size: int = VOCAB_SIZE
    layers: int = 24
    length: int = 512  # of a window


QUICK = Shape(vocab_size=4096, layers=2, length=64)


def decomposed(of: Moments) -> TableSummary:
    """A table whose directions are there already: it finds them once, when they are first asked for."""
    table = TableSummary(of)
    assert table.directions.vectors.shape == of.gram.shape
    return table


def linear_map(kind: str, k: int, table: TableSummary) -> LinearMap:
    change = make_map(kind, table, k, SEED)
    assert isinstance(change, LinearMap)
    return change


def gaussian(k: int) -> Tensor:
    """The random directions that dimscope draws before it makes them orthonormal."""
    return torch.randn(HIDDEN_SIZE, k, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))


Factors = tuple[Tensor, ...]


def notebook_factors(kind: str, k: int, svd: tuple[Tensor, Tensor, Tensor]) -> Factors:
    """What the notebook makes once for a setting, in float32: cut factors of W, or a random matrix and its pseudo-inverse."""
    if kind == "truncate":
        u, s, vh = svd
        return u[:, :k] * s[:k], vh[:k]
    projection = gaussian(k).float()
    return projection, projection.pinverse()


def notebook_error(kind: str, k: int, rows: Tensor, factors: Factors) -> tuple[float, Tensor]:
    """||W - W'||_F by a changed table in float32, and that table."""
    left, right = factors
    changed = left @ right if kind == "truncate" else rows @ left @ right
    changed = changed / (k / HIDDEN_SIZE) if kind == "project-rescaled" else changed
    return float(torch.dist(rows, changed)), changed


def exact_matrix(kind: str, k: int, table: TableSummary) -> Tensor:
    """M in float64: a projector as A A^+, which is not how dimscope makes it; a truncation has only one."""
    if kind == "truncate":
        return linear_map(kind, k, table).matrix
    projection = gaussian(k)
    projector = projection @ projection.pinverse()
    return projector if kind == "project" else projector / (k / HIDDEN_SIZE)


def norm(blocks: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(block.double().square().sum()) for block in blocks))


def bench_errors(shape: Shape) -> dict[str, Any]:
    """||W - W'||_F of 24 linear settings from the Gram matrix, against 24 changed tables and torch.dist.

    A first ratio is of the errors alone, the maps being there; a second one counts what makes a map on both sides, a
    QR here and a pseudo-inverse there. What both ways have of W before the first setting counts in neither: Gram matrix and
    eigenvectors here (told, and counted in a third ratio), its SVD there (told only).
    """
    rows = qwen_sized_table(shape.vocab_size).float()
    gram, of = timed(lambda: moments(rows.split(BLOCK), dtype=torch.float64), repeats=REPEATS)
    eigen, table = timed(lambda: decomposed(of), repeats=REPEATS)
    svd_seconds, svd = timed(lambda: torch.linalg.svd(rows, full_matrices=False))
    seconds: dict[str, list[float]] = {name: [] for name in ("map", "error", "factors", "table")}
    error = table_error = dist_error = 0.0
    for kind in KINDS:
        for k in DIMENSIONS:
            tries: dict[str, list[float]] = {name: [] for name in seconds}
            for _ in range(REPEATS):
                spent, change = timed(lambda kind=kind, k=k: linear_map(kind, k, table))
                tries["map"].append(spent)
                spent, found = timed(lambda change=change: exact_error(change, of))
                tries["error"].append(spent)
                spent, factors = timed(lambda kind=kind, k=k: notebook_factors(kind, k, svd))
                tries["factors"].append(spent)
                spent, (dist, changed) = timed(lambda kind=kind, k=k, f=factors: notebook_error(kind, k, rows, f))
                tries["table"].append(spent)
            for name, times in tries.items():
                seconds[name].append(min(times))
            rest = torch.eye(HIDDEN_SIZE, dtype=torch.float64) - exact_matrix(kind, k, table)
            exact = norm(block.double() @ rest for block in rows.split(BLOCK))
            theirs = norm(a.double() - b for a, b in zip(rows.split(BLOCK), changed.split(BLOCK), strict=True))
            error = max(error, abs(found / exact - 1))
            table_error = max(table_error, abs(theirs / exact - 1))
            dist_error = max(dist_error, abs(dist / exact - 1))
    assert error < 1e-9, error
    assert table_error < 1e-4, table_error  # the same tables; how float32 adds up their distances is another matter
    total = {name: sum(times) for name, times in seconds.items()}
    ours, theirs = total["map"] + total["error"], total["factors"] + total["table"]
    return {
        "settings": len(KINDS) * len(DIMENSIONS), "seconds": total, "ratio": total["table"] / total["error"],
        "ratio_with_maps": theirs / ours, "gram_seconds": gram, "eigendecomposition_seconds": eigen,
        "ratio_with_maps_gram_and_eigendecomposition": theirs / (gram + eigen + ours),
        "uncounted_torch_svd_seconds": svd_seconds,
        "largest_relative_error": error, "largest_relative_error_of_float32_tables": table_error,
        "largest_relative_error_of_torch_dist": dist_error,
    }  # fmt: skip


def random_model(shape: Shape) -> PreTrainedModel:
    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=shape.vocab_size, hidden_size=HIDDEN_SIZE, intermediate_size=4864, num_hidden_layers=shape.layers,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).float().eval()


def random_windows(shape: Shape) -> list[Window]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(shape.vocab_size, (WINDOWS, shape.length), generator=generator)
    ends = torch.arange(1, shape.length + 1)  # a byte each
    return [Window(i, row, ends + i * shape.length, torch.ones_like(ends), 0) for i, row in enumerate(ids)]


@torch.inference_mode()
def all_logits(model: PreTrainedModel, window: Window) -> Tensor:
    return model(input_ids=window.ids[None], use_cache=False).logits[0]


@torch.inference_mode()
def naive_sums(logits: Tensor, log_p: Tensor, ids: Tensor) -> tuple[float, float]:
    """Loss and KL of a window, summed over its positions; the log-probabilities of the model as it was are given."""
    log_q = logits.log_softmax(dim=1)
    loss = nll_loss(log_q[:-1], ids[1:], reduction="sum")
    return float(loss), float(kl_div(log_q, log_p, log_target=True, reduction="sum"))


def naive_pass(
    model: PreTrainedModel, windows: list[Window], before: list[Tensor]
) -> tuple[float, float, float, float]:
    """Seconds of the bare forward pass with all logits, and of what follows from them; then mean loss and KL."""
    bare = after = loss = kl = 0.0
    for window, log_p in zip(windows, before, strict=True):
        seconds, logits = timed(lambda w=window: all_logits(model, w))
        bare += seconds
        seconds, sums = timed(lambda x=logits, p=log_p, w=window: naive_sums(x, p, w.ids))
        after += seconds
        loss, kl = loss + sums[0], kl + sums[1]
    n_positions = sum(len(w.ids) for w in windows)
    return bare, after, loss / (n_positions - len(windows)), kl / n_positions


def baseline(model: PreTrainedModel, windows: list[Window], *, kept: bool) -> evaluation.Baseline:
    """A baseline that keeps its log-probabilities, or computes them again, whatever memory is free."""
    with patch.object(evaluation, "CACHE_SHARE", 1.0 if kept else 0.0):
        base = evaluation.baseline(model, windows, BATCH)
    assert (base.cache is not None) == kept, "too little memory to keep the log-probabilities"
    return base


def difference(found: evaluation.Evaluation, loss: float, kl: float) -> float:
    """The larger of the relative differences of loss and KL."""
    return max(abs(found.loss.value / loss - 1), abs(found.kl.value / kl - 1))


def judged_error(model: PreTrainedModel, window: Window, change: LinearMap) -> float:
    """Of loss and KL of one window, against float64 on all logits of a model whose table was really changed."""
    base = baseline(model, [window], kept=True)
    log_p = all_logits(model, window).double().log_softmax(dim=1)
    with perturbed(model, change, "both"):
        found = evaluation.evaluate(model, base)
    with perturbed(model, change, "both", materialise=True):
        loss, kl = naive_sums(all_logits(model, window).double(), log_p, window.ids)
    n = len(window.ids)
    return difference(found, loss / (n - 1), kl / n)


def bench_judged(shape: Shape) -> dict[str, Any]:
    """One judged setting, against the forward pass that it needs and what is naively computed from all its logits.

    The damaged model is the same for all, hooks included. Ratios are of each round, and their median is told.
    """
    model, windows = random_model(shape), random_windows(shape)
    table = model.get_input_embeddings().weight.detach()
    change = linear_map("project", KEPT, TableSummary(moments(table.split(BLOCK))))
    error = judged_error(model, windows[0], change)
    assert error < 1e-4, error
    before = [all_logits(model, window).log_softmax(dim=1) for window in windows]
    keeping = baseline(model, windows, kept=True)
    again = replace(keeping, cache=None)
    rounds: list[tuple[float, ...]] = []
    with perturbed(model, change, "both"):
        for _ in range(ROUNDS):
            bare, after, loss, kl = naive_pass(model, windows, before)
            ours, found = timed(lambda: evaluation.evaluate(model, keeping))
            recomputed, same = timed(lambda: evaluation.evaluate(model, again))
            assert difference(found, same.loss.value, same.kl.value) < 1e-9, (found, same)
            assert difference(found, loss, kl) < 1e-4, (found, loss, kl)
            rounds.append((bare, bare + after, ours, recomputed))
    told = ("bare_seconds", "naive_seconds", "ours_seconds", "ours_recomputed_seconds")
    seconds = {name: median(values) for name, values in zip(told, zip(*rounds, strict=True), strict=True)}
    return seconds | {
        "ratio_to_naive": median(ours / naive for _, naive, ours, _ in rounds),
        "ratio_to_bare": median(ours / bare for bare, _, ours, _ in rounds),
        "recomputed_ratio_to_naive": median(recomputed / naive for _, naive, _, recomputed in rounds),
        "recomputed_ratio_to_bare": median(recomputed / bare for bare, _, _, recomputed in rounds),
        "ratio_to_naive_of_each_round": [ours / naive for _, naive, ours, _ in rounds],
        "tokens": sum(len(w.ids) for w in windows), "largest_relative_error": error,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["errors", "judged"], default=["errors", "judged"])
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs; nothing is written")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/damage.json"))
    args = parser.parse_args()
    shape = QUICK if args.quick else Shape()
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() and not args.quick else {}
    results["threads"] = torch.get_num_threads()
    for name, bench in (("errors", bench_errors), ("judged", bench_judged)):
        if name in args.only:
            results[name] = bench(shape)
            print(json.dumps(results[name], indent=1), flush=True)
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
