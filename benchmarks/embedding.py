"""Speed and memory of the embedding study on a 151,936 x 896 bfloat16 table, against the usual way, in one run.

    make bench                                             (about five minutes on 2 cores)
    python -m benchmarks.embedding --tokenizer FOLDER      (a real tokenizer for the report)

Results are equal first (asserted), and only then compared for time. Times depend on the machine and on what else it
does: read the ratios.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import KDTree

from benchmarks.measure import (
    HIDDEN_SIZE,
    PEAK,
    PLANTED,
    VOCAB_SIZE,
    in_child,
    matmul_peak,
    qwen_sized_checkpoint,
    timed,
)
from dimscope.api import as_source
from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.geometry.neighbors import build_index
from dimscope.geometry.pairs import LEADING, pairs_within
from dimscope.geometry.spectrum import moments_of, principal_components, spectrum
from dimscope.studies.embedding.measures import measures_frame
from dimscope.studies.embedding.populations import influence_frame, row_sets
from dimscope.studies.embedding.run import units_of
from dimscope.studies.embedding.settings import EmbeddingSettings
from dimscope.studies.embedding.source import open_source
from dimscope.studies.embedding.spectrum_tables import dimensions_frame, spectrum_frame
from dimscope.vectors.embedding import open_table
from dimscope.vectors.moments import Moments

SPECTRUM = """
import sys, time, dimscope
start = time.perf_counter()
table = dimscope.open_table(dimscope.open(sys.argv[1]))
values = dimscope.spectrum(dimscope.moments_of(table), centred=False).singular_values
facts = {"seconds": time.perf_counter() - start}
"""
REPORT = """
import sys
from dimscope.cli.app import main
assert main(["report", sys.argv[1], "--out", sys.argv[2]]) == 0
facts = {}
"""


def bench_spectrum(folder: Path) -> dict[str, float]:
    """All 896 singular values from the file, against torch.linalg.svd of the loaded float32 table."""
    table = open_table(open_checkpoint(folder))
    peak = matmul_peak()
    ours, values = timed(lambda: spectrum(moments_of(table), centred=False).singular_values, repeats=3)
    rows = table.load()[1]
    notebook, (_, svd, _) = timed(lambda: torch.linalg.svd(rows, full_matrices=False))
    exact = torch.linalg.svdvals(rows.double())
    error = float(((values - exact) / exact).abs().max())
    assert error < 1e-5, error
    gflop = 2 * VOCAB_SIZE * HIDDEN_SIZE**2 / 1e9
    child = in_child(SPECTRUM + PEAK, str(folder))
    return {
        "ours_seconds": ours,
        "torch_svd_seconds": notebook,
        "ratio": notebook / ours,
        "largest_relative_error": error,
        "largest_relative_error_of_float32_svd": float(((svd - exact) / exact).abs().max()),
        "matmul_peak_gflops": peak,
        "share_of_peak": gflop / ours / peak,
        "peak_memory_gb": child["peak_gb"],
    }


def bench_pairs(rows: torch.Tensor, of: Moments) -> dict[str, float]:
    """All pairs within 0.001: exact in 896 dimensions, against a KD-tree on 10 components, which is not."""
    components = principal_components(of, LEADING)
    ours, pairs = timed(lambda: pairs_within(rows, components, 0.001), repeats=2)
    projected = (rows @ components[:, :10].float()).numpy()
    kdtree, found = timed(lambda: KDTree(projected).query_pairs(0.001, output_type="ndarray"))
    assert len(pairs) >= PLANTED * (PLANTED - 1) // 2
    measured = np.linalg.norm(
        rows[pairs.first[::1000]].double().numpy() - rows[pairs.second[::1000]].double().numpy(), axis=1
    )
    assert np.allclose(measured, pairs.distance[::1000], rtol=1e-6, atol=1e-12)
    mine = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    missed = mine - {(min(a, b), max(a, b)) for a, b in found.tolist()}
    # Float32 projections may lengthen a distance by a rounding error; nothing else may be missed.
    assert len(missed) < 1e-3 * len(mine), len(missed)
    return {
        "ours_seconds": ours,
        "kdtree_seconds": kdtree,
        "ratio": kdtree / ours,
        "pairs": len(pairs),
        "kdtree_pairs": len(found),
    }


def bench_neighbors(ids: torch.Tensor, rows: torch.Tensor) -> dict[str, float]:
    """1,000 exact queries, k = 20, against faiss.knn where it is installed; then one query alone."""
    index = build_index(ids, rows)
    chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))[:1000]
    ours, (found, scores) = timed(lambda: index.search(rows[chosen], 20), repeats=2)
    single, _ = timed(lambda: index.search(rows[chosen[:1]], 20), repeats=5)
    result = {"ours_seconds": ours, "single_query_ms": single * 1000}
    try:
        import faiss
    except ImportError:
        return result
    queries, base = index.keys[chosen].numpy(), index.keys.numpy()
    seconds, (cosines, _) = timed(lambda: faiss.knn(queries, base, 20, metric=faiss.METRIC_INNER_PRODUCT), repeats=2)
    assert np.allclose(cosines, scores.numpy(), atol=1e-5)
    return result | {"faiss_seconds": seconds, "ratio": seconds / ours, "found": found.numel()}


def bench_populations(folder: Path) -> dict[str, float]:
    """What all rows and one row per group of copies, beside the trained rows, add to the embedding study."""
    source, settings, done = open_source(as_source(folder), "input", both=True), EmbeddingSettings(), {}
    whole = 0.0
    for unit in units_of(source, settings, done):
        seconds, done[unit.name] = timed(unit.compute)
        whole += seconds

    def others() -> None:
        influence_frame(source, done["duplicates"])
        for rows in row_sets(source, done["duplicates"])[1:]:
            dimensions_frame(rows, spectrum_frame(rows, 0, settings.seed))
            measures_frame(rows)

    added, _ = timed(others, repeats=2)
    return {"study_seconds": whole, "added_seconds": added, "added_share": added / (whole - added)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer files to put beside the table")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/embedding.json"))
    parser.add_argument("--keep", type=Path, help="keep the checkpoint and the report in this folder")
    args = parser.parse_args()
    work = args.keep or Path(tempfile.mkdtemp())
    folder = qwen_sized_checkpoint(work / "model")
    if args.tokenizer:
        shutil.copytree(args.tokenizer, folder, dirs_exist_ok=True)
    results = {"threads": torch.get_num_threads(), "spectrum": bench_spectrum(folder)}
    print(json.dumps(results, indent=1))
    table = open_table(open_checkpoint(folder))
    ids, rows = table.load()
    results["pairs"] = bench_pairs(rows, moments_of(table))
    print(json.dumps(results["pairs"], indent=1))
    results["neighbors"] = bench_neighbors(ids, rows)
    print(json.dumps(results["neighbors"], indent=1))
    del rows
    results["populations"] = bench_populations(folder)
    print(json.dumps(results["populations"], indent=1))
    results["report"] = in_child(REPORT + PEAK, str(folder), str(work / "report"))
    results["report"]["page_mb"] = (work / "report/index.html").stat().st_size / 1e6
    print(json.dumps(results["report"], indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    if not args.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
