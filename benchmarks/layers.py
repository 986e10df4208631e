"""Speed and memory of the study of hidden layers against the usual way, in one run.

    python -m benchmarks.layers                     (about fifteen minutes on 2 cores)
    python -m benchmarks.layers --corpus FOLDER     (texts to stream; else the built-in page again and again)
    python -m benchmarks.layers --only measures stream large

Results are equal first (asserted), and only then compared for time. Times depend on the machine and on what else it
does: read the ratios.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import dimscope
from benchmarks.measure import PEAK, in_child, timed
from dimscope.activations.collection import collect, empty_collection
from dimscope.activations.sites import find_sites
from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.checkpoints.model import load_model, place
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.geometry import half_samples
from dimscope.geometry.dimension import linear_dimensions
from dimscope.geometry.spectrum import spectrum_of
from dimscope.studies.layers import tables
from dimscope.studies.layers.tables import rank_tolerance
from dimscope.texts.texts import Text, open_text
from dimscope.texts.windows import stream_windows

LAYERS, TOKENS, WIDTH = 49, 1024, 1600  # GPT2-XL
STREAMED, LENGTH, BATCH = 1_000_000, 512, 4
THRESHOLDS = (0.8, 0.9, 0.95, 0.99)
LARGE = {
    "gpt2-xl": "GPT2Config(n_embd=1600, n_layer=48, n_head=25)",
    "pythia-2.8b": "GPTNeoXConfig(vocab_size=50304, hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, "
    "intermediate_size=10240, max_position_embeddings=2048)",
}
MAKE = """
import sys, torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig
torch.manual_seed(0)
AutoModelForCausalLM.from_config(eval(sys.argv[2]), dtype=torch.bfloat16).save_pretrained(sys.argv[1])
facts = {}
"""
STUDY = """
import sys
from dimscope.cli.app import main
assert main(["layers", sys.argv[1], "--text", sys.argv[2], "--preset", "notebook", "--length", "1024",
             "--dtype", "bfloat16", "--out", sys.argv[3]]) == 0
facts = {}
"""


STREAM = """
import sys
from itertools import islice
from pathlib import Path
import dimscope
from dimscope.texts.windows import stream_windows

def resident(windows):
    status = Path("/proc/self/status").read_text()
    memory.append(int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1e6)

checkpoint, memory = dimscope.open("builtin"), []
model, tokenizer = dimscope.load_model(checkpoint), dimscope.require_tokenizer(checkpoint.source)
windows = islice(stream_windows(dimscope.open_text(sys.argv[1]), tokenizer, length=int(sys.argv[2])), int(sys.argv[3]))
dimscope.run_pass(model, dimscope.find_sites(model), windows, dimscope.PassSettings(batch=4), progress=resident)
later = memory[len(memory) // 10:]
facts = {"resident_gb_at_10%": later[0], "resident_gb_least_and_most_since": [min(later), max(later)]}
"""


def power_law_states(seed: int) -> Tensor:
    """TOKENS x WIDTH float32 rows whose spectrum falls as a power of its rank, turned at random, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(TOKENS, WIDTH, generator=generator) * torch.arange(1, WIDTH + 1) ** -0.7
    return rows @ torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 + torch.randn(WIDTH, generator=generator)


def notebook_measures(rows: Tensor) -> tuple[Tensor, int, dict[float, int]]:
    """Rank by matrix_rank, then a full svd, cumulated."""
    rows = rows - rows.mean(dim=0)
    rank = int(torch.linalg.matrix_rank(rows))
    _, s, _ = torch.linalg.svd(rows)
    cumulative = (s**2).cumsum(0) / (s**2).sum()
    return s, rank, {t: int((cumulative < t).sum()) + 1 for t in THRESHOLDS}


def bench_measures() -> dict[str, Any]:
    """49 layers x real and shuffled: matrix_rank and svd of each, against every spectral measure from one Gram matrix."""
    ours = theirs = error = theirs_error = shift = 0.0
    for number in range(2 * LAYERS):
        rows = power_law_states(number)
        tolerance = rank_tolerance(TOKENS, WIDTH, one_window=True)
        seconds, (spectrum, family) = timed(lambda r=rows, t=tolerance: _family(r, t))
        ours += seconds
        seconds, (s, rank, counts) = timed(lambda r=rows: notebook_measures(r))
        theirs += seconds
        found = {d.metric: d.value for d in family}
        assert found["numerical rank"] == rank
        assert all(abs(found[f"variance count {100 * t:g}%"] - k) <= 1 for t, k in counts.items())
        shift = max(shift, float((spectrum - s[: len(spectrum)]).abs().max() / spectrum[0]))
        if number % 14 == 0:  # float32 svd loses the small end, so the judge of it is float64
            exact = torch.linalg.svdvals(rows.double() - rows.double().mean(dim=0))[: len(spectrum)]
            error = max(error, float(((spectrum - exact) / exact).abs().max()))
            theirs_error = max(theirs_error, float(((s[: len(exact)] - exact) / exact).abs().max()))
    assert max(error, shift) < 1e-5, (error, shift)
    return {
        "ours_seconds": ours, "notebook_seconds": theirs, "ratio": theirs / ours, "largest_relative_error": error,
        "largest_relative_error_of_float32_svd": theirs_error, "largest_difference_as_a_share_of_the_largest": shift,
    }  # fmt: skip


def _family(rows: Tensor, tolerance: float) -> tuple[Tensor, list]:
    spectrum = spectrum_of(rows)
    return spectrum.singular_values, linear_dimensions(spectrum, THRESHOLDS, tolerance=tolerance)


def bench_stream(text: Text) -> dict[str, Any]:
    """The built-in model over a million tokens: bare forward passes and collecting ones, batch by batch in turns."""
    checkpoint = open_checkpoint("builtin")
    model, tokenizer = load_model(checkpoint, place(checkpoint)), require_tokenizer(checkpoint.source)
    sites = find_sites(model)
    with_logits, without = (empty_collection(model, sites, 2048, 0) for _ in range(2))
    windows = islice(stream_windows(text, tokenizer, length=LENGTH), STREAMED // LENGTH)
    bare = full = states_only = 0.0
    while batch := list(islice(windows, BATCH)):
        with torch.inference_mode():
            bare += timed(lambda b=batch: model(input_ids=torch.stack([w.ids for w in b]), use_cache=False).logits)[0]
        full += timed(lambda b=batch: collect(model, b, sites, with_logits))[0]
        states_only += timed(lambda b=batch: collect(model, b, sites, without, logits=False))[0]
    return {
        "tokens": with_logits.n_tokens, "bare_seconds": bare, "collecting_seconds": full, "ratio": full / bare,
        "ratio_without_logits": states_only / bare,
    }  # fmt: skip


def bench_errors(work: Path, tokenizer: Path | None) -> dict[str, Any]:
    """What the errors from half-samples of windows add to a study of 8 windows of 512 tokens, real, shuffled and untrained.

    The model is GPT2-small with random weights, or the built-in one where there is no tokenizer for it.
    """
    model = "builtin"
    if tokenizer is not None:
        model = str(work / "gpt2")
        in_child(MAKE + PEAK, model, "GPT2Config()")
        for file in tokenizer.iterdir():
            shutil.copy(file, model)

    def study() -> object:
        return dimscope.layers(model, texts=["builtin:prose"], windows=8, length=512, shuffles=2)

    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(2):
        seconds["with"].append(timed(study)[0])
        with mock.patch.object(half_samples, "FEWEST_ROWS", 1 << 30), mock.patch.object(tables, "FEWEST_ROWS", 1 << 30):
            seconds["without"].append(timed(study)[0])
    best = {name: min(of_both) for name, of_both in seconds.items()}
    return {"model": Path(model).name, **best, "ratio": best["with"] / best["without"]}


def bench_large(work: Path, tokenizer: Path | None, text: Path, name: str) -> dict[str, Any]:
    """A random-weight model in bfloat16 on one window of 1,024 tokens, real and shuffled, through the command line."""
    folder = work / name
    in_child(MAKE + PEAK, str(folder), LARGE[name])
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            shutil.copy(file, folder)
    began = time.perf_counter()
    result = in_child(STUDY + PEAK, str(folder), str(text), str(work / f"{name}-out"))
    result["seconds"] = time.perf_counter() - began
    result["weights_gb"] = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e9
    shutil.rmtree(folder)
    return result


def repeated_page(folder: Path) -> Path:
    """The built-in page, often enough for the tokens to stream."""
    page = files("dimscope.builtin").joinpath("texts", "page.html").read_text(encoding="utf-8")
    path = folder / "page.txt"
    with path.open("w", encoding="utf-8") as f:
        for part in _often(page, 6 * STREAMED):
            f.write(part)
    return path


def _often(text: str, characters: int) -> Iterator[str]:
    return (text for _ in range(characters // len(text) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="file or folder of texts to stream")
    parser.add_argument("--tokenizers", type=Path, help="folder with gpt2/ and gpt_neox/ for the large models")
    parser.add_argument("--only", nargs="+", default=["measures", "stream", "errors", "large"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layers.json"))
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        text = args.corpus or str(repeated_page(work))
        results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
        results["threads"] = torch.get_num_threads()
        if "measures" in args.only:
            results["measures"] = bench_measures()
        if "stream" in args.only:
            results["stream"] = bench_stream(open_text(text))
            results["stream_memory"] = in_child(STREAM + PEAK, text, str(LENGTH), str(STREAMED // LENGTH))
        if "errors" in args.only:
            results["errors"] = bench_errors(work, args.tokenizers / "gpt2" if args.tokenizers else None)
        for name, folder in (("gpt2-xl", "gpt2"), ("pythia-2.8b", "gpt_neox")):
            if "large" in args.only and args.tokenizers:
                results[name] = bench_large(work, args.tokenizers / folder, repeated_page(work), name)
        print(json.dumps(results, indent=1))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
