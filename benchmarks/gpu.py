"""On a machine with CUDA: that the GPU gives the numbers of the CPU, and how long a study takes at the size of real models.

python -m benchmarks.gpu [--large]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

import dimscope
from dimscope.api import as_checkpoint

SMALL = {"windows": 8, "length": 128, "dtype": "float32"}
NUMBERS = ["value", "loss", "loss_rise", "kl", "top_1"]


def difference(left: pl.DataFrame, right: pl.DataFrame) -> tuple[float, str]:
    """Return the largest difference of the numbers of two tables, as a share of the larger of the number and 0.01, and of what."""
    assert left.height == right.height
    largest = (0.0, "")
    for name in [column for column in NUMBERS if column in left.columns]:
        gap = (left[name] - right[name]).abs() / pl.select(pl.max_horizontal(left[name].abs(), 0.01)).to_series()
        if gap.drop_nulls().len() and float(gap.max()) > largest[0]:
            row = left.row(int(gap.fill_null(0.0).arg_max() or 0), named=True)
            words = (
                str(row[key]) for key in ("metric", "preprocess", "layer", "condition") if row.get(key) is not None
            )
            largest = (float(gap.max()), f"{name}: {', '.join(words)}")
    return largest


def same_numbers() -> dict[str, tuple[float, str]]:
    """Run each study that runs a model on the CPU and on the GPU; return the largest difference of each table."""
    found = {}
    studies: dict[str, tuple[Any, dict[str, Any]]] = {
        "layers": (dimscope.layers, {**SMALL, "shuffles": 1, "shuffles_across": 0}),
        "damage": (dimscope.damage, {**SMALL, "perturbations": ["truncate:50%", "noise:0.1", "project:50%"]}),
    }
    for name, (study, options) in studies.items():
        damage = options.pop("perturbations", None)
        arguments = ("builtin", None, damage) if damage else ("builtin",)
        results = [study(*arguments, **options, device=device) for device in ("cpu", "cuda")]
        for table in sorted(set(results[0].tables) & set(results[1].tables)):
            found[f"{name}/{table}"] = difference(*(result.tables[table] for result in results))
    return found


def checkpoint_of(config: Any, folder: Path) -> Path:
    """Write a checkpoint with random weights and the tokenizer of the built-in model."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    source = as_checkpoint("builtin").source
    for name in source.files:
        if name.startswith("tokenizer"):
            (folder / name).write_bytes(source.fetch(name).read_bytes())
    AutoConfig.from_pretrained(folder)
    return folder


def timed_study(config: Any, **options: Any) -> dict[str, float]:
    """Return the seconds and the memory of the GPU that the layers study of a model of this shape takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint_of(config, Path(folder))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = dimscope.layers(path, device="cuda", **options)
        seconds = time.perf_counter() - start
        rows = result.tables["layers"].height
    return {"seconds": round(seconds, 1), "GB": round(torch.cuda.max_memory_allocated() / 1e9, 2), "rows": rows}


def main() -> None:
    """Print what was measured, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="also the shape of Llama-3-8B, at three layers")
    large = parser.parse_args().large
    print(json.dumps({"device": torch.cuda.get_device_name(0), "differences": same_numbers()}, indent=1), flush=True)
    qwen = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    options = {"shuffles": 1, "shuffles_across": 0, "random_weights": False, "windows": 8, "length": 512}
    print(json.dumps({"Qwen2.5-0.5B": timed_study(qwen, **options)}), flush=True)
    if large:
        llama = LlamaConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=8192,
        )  # fmt: skip
        options |= {"shuffles": 0, "windows": 4, "layers": "0,16,norm"}
        print(json.dumps({"Llama-3-8B, three layers": timed_study(llama, **options)}), flush=True)


if __name__ == "__main__":
    main()
