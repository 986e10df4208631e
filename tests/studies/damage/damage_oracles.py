"""What a study of damage must give, by numpy and stock transformers, and short forms to read its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from models import TEXT, embedding_key, read_json
from scipy.special import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from dimscope.interventions.perturbations import make_map
from dimscope.interventions.table_summary import TableSummary, step_seed
from dimscope.studies.damage.settings import DamageSettings
from dimscope.vectors.moments import moments

LENGTH, WINDOWS, D = 16, 3, 32
PROMPTS = ("The keeper counted", "On a clear morning there were seven")

# Every kind, with two draws of what is random, and chains: one linear, and one that is not.
CHANGES = (
    "truncate:8", "truncate-centred:8", "remove-leading:3", "coordinates:20", "project:20", "project-rescaled:20",
    "project-sparse:20", "rotate", "scale:0.5", "noise:0.5", "shift:0.5", "quantise:3", "truncate:16+noise:0.5",
    "truncate:16+shift:1", "scale:-1+truncate-centred:16",
)  # fmt: skip
SOME_CHANGES = ("truncate:8", "shift:0.5", "noise:0.5", "truncate:16+noise:0.5")  # one of each sort of map
SIDES = ("input", "output", "both")


@dataclass(frozen=True)
class Case:
    """A model, and what is done to it: the changes, the sides that are changed, and the seeds of what is random."""

    family: str
    arguments: Mapping[str, str]
    changes: tuple[str, ...] = SOME_CHANGES
    sides: tuple[str, ...] = SIDES
    draws: int = 1


CASES = {
    "untied": Case("llama", {}, CHANGES, ("both",), 2),
    "untied, stored in bfloat16": Case("llama", {"dtype": "bfloat16"}),
    "tied, stored in bfloat16": Case("qwen2", {"dtype": "bfloat16"}),
    "tied, with positions": Case("gpt2", {}),
    "tied, scaled when looked up": Case("gemma", {}),
}


def damage_settings(text: str, *changes: str, **settings) -> DamageSettings:
    return DamageSettings(
        **{"changes": changes, "texts": (text,), "windows": WINDOWS, "length": LENGTH, "device": "cpu", **settings}
    )


# ---- reading tables ------------------------------------------------------------------------------------------------


def rows(frame: pl.DataFrame, **where) -> pl.DataFrame:
    return frame.filter(*(pl.col(name).eq_missing(pl.lit(value)) for name, value in where.items()))


def numbers(frame: pl.DataFrame, **where) -> dict[str, float]:
    """Return the values of a point on a text or table, by metric."""
    point = rows(frame, **where)
    assert point["metric"].is_unique().all(), where
    return dict(point.select("metric", "value").iter_rows())


def places(frame: pl.DataFrame) -> list[tuple[str, str, int | None]]:
    """The points of a table: change, side and seed, in order."""
    return list(frame.select("change", "side", "seed").unique(maintain_order=True).iter_rows())


# ---- tables after a change ---------------------------------------------------------------------------------------


def changed(steps: str, table: np.ndarray, seed: int) -> np.ndarray:
    """A table after a chain of changes, by numpy in float64; random numbers are torch's, of the seed of the step."""
    for number, step in enumerate(steps.split("+")):
        name, _, strength = step.partition(":")
        table = change_once(name, float(strength or 0), table, step_seed(seed, number))
    return table


def change_once(name: str, strength: float, table: np.ndarray, seed: int) -> np.ndarray:
    dim, k, mean = table.shape[1], int(strength), table.mean(axis=0)
    if name == "truncate":
        left, values, right = np.linalg.svd(table, full_matrices=False)
        return left[:, :k] * values[:k] @ right[:k]
    if name == "truncate-centred":
        return change_once("truncate", k, table - mean, seed) + mean
    if name == "remove-leading":
        return table - change_once("truncate", k, table, seed)
    if name == "coordinates":
        energy = (table**2).sum(axis=0)
        return np.where(energy >= np.sort(energy)[-k], table, 0.0)
    if name in ("project", "project-rescaled"):
        a = drawn(dim, k, seed)
        return table @ a @ np.linalg.pinv(a) * (dim / k if name == "project-rescaled" else 1)
    if name == "project-sparse":
        u = torch.rand(dim, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()
        a = np.where(u < 1 / 6, 1.0, np.where(u > 5 / 6, -1.0, 0.0))
        return table @ a @ np.linalg.pinv(a)
    if name == "rotate":
        q, r = np.linalg.qr(drawn(dim, dim, seed))
        return table @ (q * np.sign(np.diag(r)))
    if name == "scale":
        return table * strength
    if name == "shift":
        direction = drawn(dim, 1, seed)[:, 0]
        return table + direction / np.linalg.norm(direction) * strength * table.std() * math.sqrt(dim)
    if name == "noise":
        return table + strength * table.std() * unit_noise(len(table), dim, seed)
    unit = np.abs(table).max(axis=1, keepdims=True) / (2 ** (k - 1) - 1)
    assert name == "quantise"
    return np.rint(table / unit) * unit


def drawn(n: int, columns: int, seed: int) -> np.ndarray:
    return torch.randn(n, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()


def unit_noise(n: int, dim: int, seed: int) -> np.ndarray:
    """The noise of every token at one standard deviation; that it is white is tested with the perturbations."""
    ones = TableSummary(moments([torch.tensor([[-1.0], [1.0]]).repeat(1, dim)]))  # of standard deviation 1
    return make_map("noise", ones, 1.0, seed)(torch.zeros(n, dim), torch.arange(n)).double().numpy()


def closed_form(steps: str, table: np.ndarray) -> float | None:
    """The error that theory expects, ||W - W'||_F; None where there is no formula."""
    name, _, strength = steps.partition(":")
    if "+" in steps or name == "quantise":
        return None
    amount, whole = float(strength or 0), float(np.linalg.norm(table))
    k = int(amount)
    if name in ("truncate", "truncate-centred", "remove-leading"):
        rows = table - table.mean(axis=0) if name == "truncate-centred" else table
        squares = np.linalg.svd(rows, compute_uv=False) ** 2
        return math.sqrt((squares[:k] if name == "remove-leading" else squares[k:]).sum())
    if name == "coordinates":
        return math.sqrt(np.sort((table**2).sum(axis=0))[: D - k].sum())
    if name in ("noise", "shift"):
        return amount * float(table.std()) * math.sqrt(table.size)
    shares = {"project": 1 - k / D, "project-sparse": 1 - k / D, "rotate": 2.0, "scale": (amount - 1) ** 2}
    return whole * math.sqrt(D / k - 1 if name == "project-rescaled" else shares[name])


def spelled(change: str) -> str:
    """Return a label as it was requested: "truncate 16 + noise 0.5" as "truncate:16+noise:0.5"."""
    return change.replace(" + ", "+").replace(" ", ":")


# ---- stock transformers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stock:
    """A model of stock transformers on windows of a text, cut here from the middle of equal parts."""

    model: torch.nn.Module
    ids: torch.Tensor
    n_prefix: int
    n_bytes: int  # under the tokens that are predicted

    @torch.no_grad()
    def log_probs(self, tables: Mapping[str, np.ndarray]) -> np.ndarray:
        """Float64, by a copy of the model with other tables; a tied copy has two tables from here on."""
        model = deepcopy(self.model)
        modules = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
        for side, table in tables.items():
            modules[side].weight = torch.nn.Parameter(torch.from_numpy(table).to(modules[side].weight.dtype))
        return log_softmax(model(input_ids=self.ids).logits.double().numpy(), axis=-1)

    def evaluated(self, before: np.ndarray, after: np.ndarray) -> dict[str, tuple[float, Any, int]]:
        """Value, standard error (... where it is not compared) and number by metric."""
        start = max(self.n_prefix - 1, 0)
        targets = self.ids[:, start + 1 :, None].numpy()
        loss, base = (-np.take_along_axis(x[:, start:-1], targets, axis=2)[..., 0] for x in (after, before))
        kl = (np.exp(before) * (before - after)).sum(axis=2)
        first = before.argmax(axis=2) == after.argmax(axis=2)

        def stderr(values: np.ndarray) -> float:
            """Over windows of one length: of the means of the windows."""
            return float(values.mean(axis=1).std(ddof=1) / math.sqrt(len(values)))

        n, n_all = loss.size, kl.size
        return {
            "loss": (loss.mean(), stderr(loss), n),
            "loss rise": ((loss - base).mean(), stderr(loss - base), n),
            "perplexity": (math.exp(loss.mean()), None, n),
            "bits per byte": (loss.sum() / math.log(2) / self.n_bytes, ..., n),
            "KL": (kl.mean(), stderr(kl), n_all),
            "top-1 agreement": (float(np.mean(first)), ..., n_all),
        }  # fmt: skip


def stock(
    folder: Path, *, from_start: bool = False, count: int = WINDOWS, length: int = LENGTH, of: str = TEXT
) -> Stock:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    spans = tokenizer(of, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, stops = spans["input_ids"], [stop for _, stop in spans["offset_mapping"]]
    prefix = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    room = length - len(prefix)
    starts = [i * room if from_start else (2 * i + 1) * len(ids) // (2 * count) - room // 2 for i in range(count)]
    n_bytes = 0
    for start in starts:
        first = start + (0 if prefix else 1)  # without a prefix nothing predicts the first token
        begin = stops[first - 1] if first else 0
        n_bytes += len(of[begin : stops[start + room - 1]].encode())
    windows = torch.tensor([[*prefix, *ids[start : start + room]] for start in starts])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Stock(model, windows, len(prefix), n_bytes)


def first_norm(folder: Path, rows: np.ndarray) -> np.ndarray:
    """Rows as they are stored through the norm with which the first block begins, by numpy."""
    config, tensors = read_json(folder / "config.json"), stored_tensors(folder)
    if config["model_type"] == "gpt2":
        mean, variance = rows.mean(axis=1, keepdims=True), rows.var(axis=1, keepdims=True)
        weight, bias = (tensors[f"transformer.h.0.ln_1.{name}"] for name in ("weight", "bias"))
        return (rows - mean) / np.sqrt(variance + config["layer_norm_epsilon"]) * weight + bias
    weight = tensors["model.layers.0.input_layernorm.weight"]
    if config["model_type"] == "gemma":
        rows, weight = rows * math.sqrt(D), weight + 1
    return rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + config["rms_norm_eps"]) * weight


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def tables_of(folder: Path) -> dict[str, np.ndarray]:
    """The tables as they are stored, in float64."""
    tensors, config = stored_tensors(folder), read_json(folder / "config.json")
    table = tensors[embedding_key(folder)]
    return {"input": table, "output": table if config["tie_word_embeddings"] else tensors["lm_head.weight"]}


def sides(side: str) -> tuple[str, ...]:
    return ("input", "output") if side == "both" else (side,)


def continued(
    folder: Path, tables: Mapping[str, np.ndarray], prompts: list[list[int]], n: int, seed: int | None = None
) -> list[list[int]]:
    """Stock `generate` with other tables: greedy, each prompt alone; or all of them sampled at once, with a seed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for side, module in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
        if side in tables:
            module.weight = torch.nn.Parameter(torch.from_numpy(tables[side]).float())
    end = model.generation_config.eos_token_id
    longest = max(map(len, prompts))
    groups = [[p] for p in prompts] if seed is None else [[[end] * (longest - len(p)) + p for p in prompts]]
    continuations = []
    for group in groups:
        ids = torch.tensor(group)
        own = [longest - len(p) for p in prompts] if seed is not None else [0]
        mask = torch.tensor([[0] * pad + [1] * (ids.shape[1] - pad) for pad in own])
        how = (
            {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed or 0)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=n, pad_token_id=end, **how)
        for row in out[:, ids.shape[1] :].tolist():
            continuations.append(row[: row.index(end)] if end in row else row)
    return continuations


def prompt_ids(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
