"""How the benchmarks measure: wall time, peak memory of a child process, the machine's own peak, and tables to measure on."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

Result = TypeVar("Result")
VOCAB_SIZE, HIDDEN_SIZE, PLANTED = 151_936, 896, 2300


def timed(call: Callable[[], Result], repeats: int = 1) -> tuple[float, Result]:
    """The shortest wall time of some calls, in seconds, and the last result."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def matmul_peak(size: int = 3000) -> float:
    """GFLOP/s of the float32 matrix product that torch reaches here, at its best of five."""
    a = torch.randn(size, size)
    seconds, _ = timed(lambda: a @ a, repeats=5)
    return 2 * size**3 / seconds / 1e9


def in_child(code: str, *arguments: str) -> dict[str, Any]:
    """Runs Python code in a process of its own: what it prints last as JSON, with its wall time and peak memory."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    return json.loads(done.stdout.splitlines()[-1]) | {"process_seconds": seconds}


# VmHWM, not getrusage: the latter counts what the parent held when it forked.
PEAK = """
import json, pathlib
status = pathlib.Path("/proc/self/status").read_text()
peak = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
print(json.dumps({"peak_gb": int(peak) / 1e6, **facts}))
"""


def qwen_sized_table(vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    """A bfloat16 table of 896 dimensions, by default as long as that of Qwen2.5-0.5B.

    It has a mean, columns of unequal variance and 2,300 rows that all but coincide, as the real one has.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(vocab_size, HIDDEN_SIZE, generator=generator)
    table *= 0.0146 * torch.linspace(1.4, 0.5, HIDDEN_SIZE)
    table += 0.006 * torch.randn(HIDDEN_SIZE, generator=generator)
    rows = torch.randperm(vocab_size, generator=generator)[:PLANTED]
    # Coordinates of size 0.01 whose last bfloat16 digit differs here and there: about 1e-4 apart.
    table[rows] = table[rows[0]].bfloat16().float() * (
        1 + 0.004 * (torch.rand(PLANTED, HIDDEN_SIZE, generator=generator) < 0.002)
    )
    return table.bfloat16()


def qwen_sized_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A Qwen2-class checkpoint of one small layer whose bfloat16 table is 151,936 x 896."""
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=64, num_hidden_layers=1, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    save_file({"model.embed_tokens.weight": qwen_sized_table(seed=seed)}, folder / "model.safetensors")
    return folder


def random_model(family: str, seed: int) -> Any:
    """Return a Llama or a GPT-2 of three blocks, 32 dimensions and 200 tokens, with random weights."""
    torch.manual_seed(seed)
    config = (
        LlamaConfig(vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
        if family == "Llama"
        else GPT2Config(vocab_size=200, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    )
    return AutoModelForCausalLM.from_config(config).eval()
