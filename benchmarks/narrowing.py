"""Narrowing: which directions are best to keep, against other ways to a smaller model, and how fast and lean it is.

    python -m benchmarks.narrowing --model builtin --model FOLDER     (an hour and a half on 2 cores)
    python -m benchmarks.narrowing --quick                            (seconds: does it run? nothing is written)
    python -m benchmarks.narrowing --only speed memory

Quality is KL on text that each model generates itself, with separate windows to calibrate and train, to choose the best state
of a training, and to evaluate; every seed has its own text, random subspace and order. Ratios are of one run.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.measure import VOCAB_SIZE, in_child
from benchmarks.slicegpt import n_parameters, sliced
from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.checkpoints.model import Placement, load_model
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.checkpoints.writer import PlannedTensor, write_safetensors
from dimscope.evaluation.evaluate import baseline
from dimscope.evaluation.generated_text import sample_windows
from dimscope.evaluation.throughput import throughput
from dimscope.narrowing.calibration import calibrate
from dimscope.narrowing.target import resolve_target
from dimscope.narrowing.training import mean_kl
from dimscope.studies.narrowing.advice import between
from dimscope.studies.narrowing.candidates import heal_candidate, initial_candidate, make_candidate, shallower_model
from dimscope.studies.narrowing.plan import default_widths
from dimscope.studies.narrowing.session import NarrowingSession, table_summary
from dimscope.studies.narrowing.settings import NarrowSettings
from dimscope.studies.narrowing.windows import SplitWindows
from dimscope.studies.study import SILENT

CPU = Placement("float32", "cpu")
BASES = ("random", "raw", "normalised", "learned")
RESULTS = Path(__file__).parent / "results" / "narrowing.json"


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done."""

    seeds: tuple[int, ...] = (0, 1, 2)
    length: int = 160
    training: int = 768  # windows
    others: int = 48  # windows to choose on, and to evaluate on
    batch: int = 16
    learn: int = 80  # steps
    heal: int = 16  # steps
    layers: int = 24  # of the model that is timed
    big_layers: int = 16  # of the checkpoint whose narrowing is watched
    big_width: int = 4096


QUICK = Size(
    seeds=(0,), length=24, training=32, others=4, batch=4, learn=2, heal=2, layers=1, big_layers=2, big_width=256
)


# ---- quality --------------------------------------------------------------------------------------------------------


def open_generated(name: str, seed: int, size: Size) -> NarrowingSession:
    """Open a session on text that the model generates: windows to evaluate, to choose and to train on."""
    checkpoint = open_checkpoint(name)
    target, dense = resolve_target(checkpoint), load_model(checkpoint, CPU)
    count = size.training + 2 * size.others
    tokenizer = require_tokenizer(checkpoint.source)
    windows = sample_windows(dense, tokenizer, count=count, length=size.length, seed=seed)
    training = windows[2 * size.others :]
    split = SplitWindows(
        calibration=training[: size.others],
        evaluation=windows[: size.others],
        held_out=windows[size.others : 2 * size.others],
        training=training,
    )
    return NarrowingSession(
        target=target,
        settings=NarrowSettings(learn_steps=size.learn, heal_steps=size.heal, seed=seed),
        monitor=SILENT,
        placement=CPU,
        trains=True,
        texts={},
        windows=split,
        dense=lambda: dense,
        calibration=cache(lambda: calibrate(dense, target.layout, split.calibration, size.batch)),
        table=cache(lambda: table_summary(checkpoint)),
        baseline=cache(lambda: baseline(dense, split.evaluation, size.batch)),
    )


def kl(session: NarrowingSession, model: PreTrainedModel) -> float:
    """KL to the dense model on the windows that nothing was fitted to, in nats."""
    return mean_kl(model, session.dense(), session.windows.evaluation, session.batch)


def bench_quality(name: str, size: Size) -> dict[str, Any]:
    """KL by basis and width, untrained and after healing of equal steps, over seeds; the curve of each learned basis."""
    rows, curves = [], []
    for seed in size.seeds:
        session = open_generated(name, seed, size)
        for width in default_widths(session.target):
            for basis in BASES:
                began = time.monotonic()
                candidate = make_candidate(session, basis, width)
                points, plain = candidate.points, kl(session, candidate.model)
                healed = kl(session, heal_candidate(session, candidate.narrowing).model)
                row = {
                    "model": session.target.checkpoint.title,
                    "seed": seed,
                    "width": width,
                    "basis": basis,
                    "kl": plain,
                    "healed": healed,
                }
                rows.append(row | {"seconds": time.monotonic() - began})
                print(json.dumps(rows[-1]), flush=True)
                if points:
                    curves.append({"seed": seed, "width": width, "points": [(p.step, p.held_out) for p in points]})
    return {"rows": rows, "curves": curves}


def merged(before: dict[str, Any], found: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Results by model with those of other seeds that were there already, and what all of them say."""
    told = dict(before)
    for model, new in found.items():
        old = before.get(model, {"rows": [], "curves": []})
        both = {part: [r for r in old[part] if r["seed"] not in seeds] + new[part] for part in ("rows", "curves")}
        told[model] = both | {"order": _order(both["rows"])}
    return told


def _order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds, and whether every seed has the bases in the expected order."""
    told = []
    for width in sorted({r["width"] for r in rows}, reverse=True):
        for stage in ("kl", "healed"):
            by = {b: [r[stage] for r in rows if r["width"] == width and r["basis"] == b] for b in BASES}
            best_first = [by[b] for b in reversed(BASES)]
            holds = sum(all(a <= b for a, b in pairwise(s)) for s in zip(*best_first, strict=True))
            spread = {b: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else math.nan) for b, v in by.items()}
            told.append(
                {"width": width, "stage": stage, "spread": spread, "seeds_in_order": holds, "seeds": len(by["raw"])}
            )
    return told


# ---- at equal size --------------------------------------------------------------------------------------------------


def bench_size(name: str, size: Size) -> dict[str, Any]:
    """KL of ways that change size differently, read off each one's curve at the parameters of our narrow models.

    Learned bases of the first seed are those of `bench_quality`, on the same windows, where that has been run.
    """
    session = open_generated(name, 0, size)
    target, whole, count = session.target, session.dense(), n_parameters
    widths = default_widths(target)
    known = _known(session.target.checkpoint.title, "learned") if size.layers > 1 else {}
    curves: dict[str, list[tuple[int, float]]] = {"layers left out": [(count(whole), 0.0)]}

    def add(way: str, model: PreTrainedModel) -> None:
        curves.setdefault(way, []).append((count(model), kl(session, model)))
        print(json.dumps([way, *curves[way][-1]]), flush=True)

    for width in widths:
        add("narrow, normalised", initial_candidate(session, "normalised", width).model)
        if width in known:
            curves.setdefault("narrow, learned", []).append((curves["narrow, normalised"][-1][0], known[width]))
        else:
            add("narrow, learned", make_candidate(session, "learned", width).model)
        if target.tied:
            two = initial_candidate(session, "normalised", width, tied=False).model
            add("narrow, normalised, two tables", two)
    dim, calibration = target.dim, session.windows.calibration
    exact = kl(session, sliced(whole, calibration, dim))
    assert exact < 1e-6, f"SliceGPT at full width is not the dense model: KL {exact}"
    for width in sorted({*widths, *(round(dim * share) for share in (0.95, 0.8, 0.7, 0.4, 0.3))}, reverse=True):
        add("SliceGPT", sliced(whole, calibration, width))
    for n in range(1, whole.config.num_hidden_layers // 2 + 1):
        add("layers left out", shallower_model(session, n))
    dense = count(whole)
    places = [n for n, _ in curves["narrow, normalised"]]
    equal = [
        {"parameters": n, "share": n / dense, **{way: between(sorted(curve), n) for way, curve in curves.items()}}
        for n in places
    ]
    return {"model": session.target.checkpoint.title, "dense": dense, "curves": curves, "equal": equal}


def _known(model: str, basis: str) -> dict[int, float]:
    """KL by width of the first seed, as measured before."""
    found = json.loads(RESULTS.read_text()).get("quality", {}).get(model, {}) if RESULTS.exists() else {}
    return {r["width"]: r["kl"] for r in found.get("rows", ()) if r["seed"] == 0 and r["basis"] == basis}


# ---- speed and memory -----------------------------------------------------------------------------------------------


def bench_speed(size: Size) -> dict[str, Any]:
    """Prefill and decoding of the shape of Qwen2.5-0.5B at three quarters of its width against the whole, in turns."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE if size.layers > 1 else 4096, "intermediate_size": 4864, "num_hidden_layers": size.layers,
        "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    models = {
        name: Qwen2ForCausalLM(Qwen2Config(hidden_size=width, **shape)).eval()
        for name, width in (("dense", 896), ("narrow", 672))
    }
    found = []
    for _ in range(3):
        speed = throughput(models)
        found.append(
            {
                "prefill": speed["narrow"].prefill.median / speed["dense"].prefill.median,
                "decode": speed["narrow"].decode.median / speed["dense"].decode.median,
                "tokens_per_second": {name: (s.prefill.median, s.decode.median) for name, s in speed.items()},
            }
        )  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
    return {key: statistics.median(f[key] for f in found) for key in ("prefill", "decode")} | {"rounds": found}


WATCHED = """
import json, sys, threading, time
from pathlib import Path
from dimscope.cli.app import main

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1e6

peak, done = 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.02)

watcher = threading.Thread(target=watch)
watcher.start()
began = time.monotonic()
code = main(["narrow", sys.argv[1], "--width", sys.argv[2], "--basis", sys.argv[3], "--no-evaluate", "-o", sys.argv[4], "--json"])
done = True
watcher.join()
print(json.dumps({"peak_anonymous_gb": peak, "seconds": time.monotonic() - began, "code": code}))
"""


def random_checkpoint(folder: Path, config: Any) -> tuple[int, int]:
    """A sharded bfloat16 checkpoint of a config with random weights, written tensor by tensor: its bytes and the largest tensor's."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    plan = [PlannedTensor(name, tuple(p.shape), torch.bfloat16) for name, p in model.named_parameters()]
    generator = torch.Generator().manual_seed(0)

    def rows(shape: tuple[int, ...]) -> Any:
        first, *rest = shape
        for start in range(0, first, 4096):
            yield 0.02 * torch.randn(min(4096, first - start), *rest, generator=generator)

    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    write_safetensors(folder, ((p, rows(p.shape)) for p in plan), plan)
    return sum(p.n_bytes for p in plan), max(p.n_bytes for p in plan)


def bench_memory(size: Size) -> list[dict[str, Any]]:
    """Cutting checkpoints without a calibration: seconds, and the peak of anonymous memory (mapped files are not counted)."""
    qwen = Qwen2Config(
        vocab_size=VOCAB_SIZE if size.layers > 1 else 4096, hidden_size=896, intermediate_size=4864,
        num_hidden_layers=size.layers, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    d = size.big_width
    llama = LlamaConfig(
        vocab_size=8000, hidden_size=d, intermediate_size=d * 43 // 16, num_hidden_layers=size.big_layers,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    rows = []
    jobs = (
        ("Qwen2.5-0.5B", qwen, 672, "embedding"),
        ("Qwen2.5-0.5B", qwen, 672, "random"),
        ("Llama", llama, d // 4, "random"),
    )
    for name, config, width, basis in jobs:
        with tempfile.TemporaryDirectory(prefix="dimscope-") as temporary:
            folder = Path(temporary)
            total, largest = random_checkpoint(folder / "dense", config)
            found = in_child(WATCHED, str(folder / "dense"), str(width), basis, str(folder / "narrow"))
            sizes = {"gb": total / 1e9, "largest_gb": largest / 1e9, "bound_gb": 1 + 3 * largest / 1e9}
            rows.append({"shape": name, "dim": config.hidden_size, "width": width, "basis": basis, **sizes, **found})
            print(json.dumps(rows[-1]), flush=True)
            assert found["code"] == 0
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="for quality and size: builtin, or the folder of a Llama")
    parser.add_argument("--only", nargs="+", choices=("quality", "size", "speed", "memory"))
    parser.add_argument("--seeds", nargs="+", type=int, help="of the quality; results of others are kept (0 1 2)")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    size = QUICK if given.quick else Size()
    size = replace(size, seeds=tuple(given.seeds)) if given.seeds else size
    models = given.model or ["builtin"]
    makers = {
        "quality": lambda: {open_checkpoint(m).title: bench_quality(m, size) for m in models},
        "size": lambda: {open_checkpoint(m).title: bench_size(m, size) for m in models},
        "speed": lambda: bench_speed(size),
        "memory": lambda: bench_memory(size),
    }
    for name in given.only or makers:
        found = makers[name]()
        if not given.quick:
            before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # another process may have written too
            before[name] = merged(before.get(name, {}), found, size.seeds) if name == "quality" else found
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(before, indent=1) + "\n")


if __name__ == "__main__":
    main()
