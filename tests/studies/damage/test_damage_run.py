"""The study of damage as a library function: every number against numpy and stock transformers, its points on disk."""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import damage as spoil
import numpy as np
import polars as pl
import pytest
import torch
from models import TEXT, embedding_key, read_json, write_json
from polars.testing import assert_frame_equal
from scipy.special import log_softmax
from threadpoolctl import threadpool_limits
from transformers import AutoModelForCausalLM, AutoTokenizer

import dimscope
from dimscope.checkpoints.model import Placement
from dimscope.errors import InvalidArgument, NonFiniteRows, TokenizerMissing, UnsupportedCheckpoint
from dimscope.interventions.perturbations import PERTURBATIONS, make_map
from dimscope.interventions.table_summary import TableSummary, step_seed
from dimscope.storage import ResultFolder
from dimscope.studies import estimate
from dimscope.studies.damage import points
from dimscope.studies.damage.inputs import Loaded, damage_inputs
from dimscope.studies.damage.run import Writing, run_damage
from dimscope.studies.damage.settings import DamageSettings
from dimscope.studies.damage.study import DAMAGE as STUDY
from dimscope.studies.damage.summary import change_frames
from dimscope.studies.damage.tables import DAMAGE, GENERATIONS, POINT
from dimscope.studies.study import Monitor, run_study
from dimscope.vectors.moments import moments

pytestmark = pytest.mark.slow  # whole commands or studies

LENGTH, WINDOWS, D = 16, 3, 32
PROMPTS = ("The keeper counted", "On a clear morning there were seven")

# What the numbers are checked on: two draws of what is random, and chains, one linear and one that is none.
CHANGES = (
    "truncate:8", "truncate-centred:8", "remove-leading:3", "coordinates:20", "project:20", "project-rescaled:20",
    "project-sparse:20", "rotate", "scale:0.5", "noise:0.5", "shift:0.5", "quantise:3", "truncate:16+noise:0.5",
    "truncate:16+shift:1", "scale:-1+truncate-centred:16",
)  # fmt: skip
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "untied": ("llama", {}),
    "untied, stored in bfloat16": ("llama", {"dtype": "bfloat16"}),
    "tied, stored in bfloat16": ("qwen2", {"dtype": "bfloat16"}),
    "tied, with positions": ("gpt2", {}),
    "tied, scaled when looked up": ("gemma", {}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lively(checkpoint, tmp_path_factory) -> Callable[[str], Path]:
    """Return `lively(case)`: a checkpoint with decided predictions and norms that differ, where fresh ones are flat."""

    def enliven(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(11)
        for name in sorted(tensors):
            held = tensors[name].double()
            norm = "norm" in name or "ln_" in name
            if norm and name.endswith("weight"):
                held = held + torch.rand(held.shape, dtype=torch.float64, generator=generator) - 0.3
            elif held.dim() == 2:
                held = held * 8 + (0.05 if "embed" in name or "wte" in name else 0)  # the tables get a mean
            tensors[name] = held.to(tensors[name].dtype)
        return tensors

    @cache
    def make(case: str) -> Path:
        family, arguments = CASES[case]
        folder = shutil.copytree(checkpoint(family, **arguments), tmp_path_factory.mktemp("lively") / family)
        spoil.edit_tensors(folder / "model.safetensors", enliven)
        return folder

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("texts") / "keeper.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def study(text) -> Callable:
    """Return `study(model, folder, *changes, announce=None, watch=None, **settings)`: facts and tables."""

    def run(model: Path, folder: Path, *changes: str, announce=None, watch=None, **settings):
        monitor = Monitor(announce or (lambda line: None), watch=watch)
        output = run_damage(
            dimscope.open(str(model)), damage_settings(text, *changes, **settings), ResultFolder(folder, {}), monitor
        )
        return output.facts, output.tables

    return run


def damage_settings(text: str, *changes: str, **settings) -> DamageSettings:
    return DamageSettings(
        **{"changes": changes, "texts": (text,), "windows": WINDOWS, "length": LENGTH, "device": "cpu", **settings}
    )


def draws(case: str) -> int:
    """Return with how many seeds a case is studied: two of one of them."""
    return 2 if case == "untied" else 1


def changes_in(case: str) -> tuple[str, ...]:
    """Return the changes of a case: all of one of them, and one of each sort of map of the others."""
    return CHANGES if case == "untied" else ("truncate:8", "shift:0.5", "noise:0.5", "truncate:16+noise:0.5")


@pytest.fixture(scope="module")
def studied(lively, study, digest, tmp_path_factory) -> Callable:
    """Return `studied(case)`: folder, facts and tables of a study of changes on all sides, each once. Read only."""

    @cache
    def run(case: str):
        folder, before = tmp_path_factory.mktemp("studied"), digest(lively(case))
        sides = ("input", "output", "both")
        given = {"sides": sides, "draws": draws(case), "prompts": PROMPTS, "new_tokens": 6}
        facts, tables = study(lively(case), folder, *changes_in(case), **given)
        assert digest(lively(case)) == before  # the model is read, never written
        return folder, facts, tables

    return run


@pytest.fixture(scope="module")
def table_after(lively) -> Callable[[str, str, str, int | None], np.ndarray]:
    """Return `table_after(case, side, change, seed)`: a table of a case after a change, by numpy, each once."""

    @cache
    def make(case: str, side: str, change: str, seed: int | None) -> np.ndarray:
        return changed(spelled(change), tables_of(lively(case))[side], seed or 0)

    return make


def rows(frame: pl.DataFrame, **where) -> pl.DataFrame:
    return frame.filter(*(pl.col(name).eq_missing(pl.lit(value)) for name, value in where.items()))


def numbers(frame: pl.DataFrame, **where) -> dict[str, float]:
    """The values of a point on a text or table, by metric."""
    found = rows(frame, **where)
    assert found["metric"].is_unique().all(), where
    return dict(found.select("metric", "value").iter_rows())


def places(frame: pl.DataFrame) -> list[tuple[str, str, int | None]]:
    """The points of a table: change, side and seed, in order."""
    return list(frame.select("change", "side", "seed").unique(maintain_order=True).iter_rows())


# ---- oracles -------------------------------------------------------------------------------------------------------


def changed(steps: str, table: np.ndarray, seed: int) -> np.ndarray:
    """A table after a chain of changes, by numpy in float64; random numbers are torch's, of the seed of the step."""
    for number, step in enumerate(steps.split("+")):
        name, _, told = step.partition(":")
        table = change_once(name, float(told or 0), table, step_seed(seed, number))
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
    name, _, told = steps.partition(":")
    if "+" in steps or name == "quantise":
        return None
    amount, whole = float(told or 0), float(np.linalg.norm(table))
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
        held = deepcopy(self.model)
        modules = {"input": held.get_input_embeddings(), "output": held.get_output_embeddings()}
        for side, table in tables.items():
            modules[side].weight = torch.nn.Parameter(torch.from_numpy(table).to(modules[side].weight.dtype))
        return log_softmax(held(input_ids=self.ids).logits.double().numpy(), axis=-1)

    def judged(self, before: np.ndarray, after: np.ndarray) -> dict[str, tuple[float, float | None, int]]:
        """Value, standard error and number by metric."""
        start = max(self.n_prefix - 1, 0)
        targets = self.ids[:, start + 1 :, None].numpy()
        loss, base = (-np.take_along_axis(x[:, start:-1], targets, axis=2).ravel() for x in (after, before))
        kl = (np.exp(before) * (before - after)).sum(axis=2).ravel()
        first = (before.argmax(axis=2) == after.argmax(axis=2)).ravel()

        def stderr(values: np.ndarray) -> float:
            return float(values.std() / math.sqrt(len(values)))

        n, n_all = len(loss), len(kl)
        return {
            "loss": (loss.mean(), None, n),
            "loss rise": ((loss - base).mean(), stderr(loss - base), n),
            "perplexity": (math.exp(loss.mean()), None, n),
            "bits per byte": (loss.sum() / math.log(2) / self.n_bytes, None, n),
            "KL": (kl.mean(), stderr(kl), n_all),
            "top-1 agreement": (float(np.mean(first)), None, n_all),
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
    config, tensors = read_json(folder / "config.json"), spoil_tensors(folder)
    if config["model_type"] == "gpt2":
        mean, variance = rows.mean(axis=1, keepdims=True), rows.var(axis=1, keepdims=True)
        weight, bias = (tensors[f"transformer.h.0.ln_1.{name}"] for name in ("weight", "bias"))
        return (rows - mean) / np.sqrt(variance + config["layer_norm_epsilon"]) * weight + bias
    weight = tensors["model.layers.0.input_layernorm.weight"]
    if config["model_type"] == "gemma":
        rows, weight = rows * math.sqrt(D), weight + 1
    return rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + config["rms_norm_eps"]) * weight


def spoil_tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {name: held.double().numpy() for name, held in load_file(folder / "model.safetensors").items()}


def tables_of(folder: Path) -> dict[str, np.ndarray]:
    """The tables as they are stored, in float64."""
    held, config = spoil_tensors(folder), read_json(folder / "config.json")
    table = held[embedding_key(folder)]
    return {"input": table, "output": table if config["tie_word_embeddings"] else held["lm_head.weight"]}


def sides(side: str) -> tuple[str, ...]:
    return ("input", "output") if side == "both" else (side,)


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case != "untied, stored in bfloat16"])
def test_what_a_change_costs_is_what_stock_transformers_say_with_the_changed_table(studied, lively, table_after, case):
    """Logits in float32: 1e-4 of a loss of ten nats, 1e-3 of a small KL. Nearly equal logits may swap places."""
    folder, frame = lively(case), studied(case)[2]["damage"]
    plain = stock(folder)
    before = plain.log_probs({})
    judged = rows(frame, text="keeper.txt")
    checked, costs = 0, []
    for change, side, seed in places(judged):
        made = {} if change == "undamaged" else {s: table_after(case, s, change, seed) for s in sides(side)}
        wanted = plain.judged(before, plain.log_probs(made))
        found = rows(judged, change=change, side=side, seed=seed)
        assert found["metric"].to_list() == list(wanted)
        for row in found.iter_rows(named=True):
            value, stderr, n = wanted[row["metric"]]
            where, metric = (change, side, seed, row["metric"]), row["metric"]
            slack = 1.01 / n if metric == "top-1 agreement" else 5e-5
            assert row["value"] == pytest.approx(value, rel=1e-3, abs=slack), where
            assert row["stderr"] == (None if stderr is None else pytest.approx(stderr, rel=1e-2, abs=1e-5)), where
            assert row["n_tokens"] == n, where
            checked += 1
        costs.append(wanted["KL"][0])
    n_random = sum(any(PERTURBATIONS[part.partition(":")[0]].random for part in c.split("+")) for c in changes_in(case))
    assert checked == 6 * (1 + 3 * (len(changes_in(case)) + (draws(case) - 1) * n_random))
    # The two first of the table aside, nothing here is so small that the tolerances would hide it.
    assert np.median(costs) > 0.05


@pytest.mark.parametrize("case", CASES)
def test_errors_are_those_of_the_numpy_tables_beside_their_closed_forms(studied, lively, table_after, case):
    """Linear maps exactly; noise and rounding are added in float32, which is 1e-7 of a row."""
    folder, frame = lively(case), studied(case)[2]["damage"]
    tables = tables_of(folder)
    for change, side, seed in places(frame)[1:]:
        for name in sides(side):
            table, steps = tables[name], spelled(change)
            after, whole = table_after(case, name, change, seed), np.linalg.norm(table)
            error, expected = np.linalg.norm(table - after), closed_form(steps, table)
            found = rows(frame, change=change, side=side, seed=seed, table=name)
            told = {row["metric"]: row for row in found.iter_rows(named=True)}
            where = (change, side, seed, name)
            exact = not {"noise", "quantise"} & {part.partition(":")[0] for part in steps.split("+")}
            rel = 1e-9 if exact else 1e-5
            assert told["error"]["value"] == pytest.approx(error, rel=rel), where
            assert told["relative error"]["value"] == pytest.approx(error / whole, rel=rel), where
            cosines = (table * after).sum(axis=1) / np.linalg.norm(table, axis=1) / np.linalg.norm(after, axis=1)
            assert told["cosine"]["value"] == pytest.approx(cosines.mean(), rel=1e-5), where
            cast = np.linalg.norm(table - after.astype(np.float32)) / whole
            assert told["relative error, cast"]["value"] == pytest.approx(cast, rel=1e-5), where
            assert ("relative error, first norm" in told) == (name == "input")
            if name == "input":
                normed, other = (first_norm(folder, x) for x in (table, after))
                relative = np.linalg.norm(normed - other) / np.linalg.norm(normed)
                assert told["relative error, first norm"]["value"] == pytest.approx(relative, rel=1e-4, abs=1e-7), where
            for metric, share in (("error", 1), ("relative error", whole)):
                form = None if expected is None else pytest.approx(expected / share, rel=1e-9)
                assert told[metric]["null"] == form, where
                assert (told[metric]["n_tokens"], told[metric]["stderr"]) == (512, None), (
                    where
                )  # all rows: nothing to sample
            assert {row["n_tokens"] for row in told.values()} == {512}


def test_places_say_what_was_changed(studied):
    frame = studied("untied")[2]["damage"]
    assert dict(frame.schema) == DAMAGE
    assert set(frame["model"]) == {"llama"}
    for row in frame.select(*POINT).unique().iter_rows(named=True):
        steps = [part.split(":") for part in spelled(row["change"]).split("+")]
        if row["change"] == "undamaged":
            assert (row["kind"], row["side"]) == ("undamaged", "input")
            assert {row[name] for name in ("strength", "unit", "kept_share", "seed")} == {None}
            continue
        assert row["kind"] == "+".join(name for name, *_ in steps)
        unit = PERTURBATIONS[steps[0][0]].unit if len(steps) == 1 else None
        assert row["unit"] == (unit or None)
        assert row["strength"] == (float(steps[0][1]) if unit else None)
        keeps = unit == "dimensions" and row["kind"] != "remove-leading"
        assert row["kept_share"] == (row["strength"] / D if keeps else None)
        assert (row["seed"] is not None) == any(PERTURBATIONS[name].random for name, *_ in steps)
    expected = [("undamaged", "input", None)]
    for side in ("input", "output", "both"):
        for change in CHANGES:
            label = change.replace(":", " ").replace("+", " + ")
            seeded = any(PERTURBATIONS[name.split(":")[0]].random for name in change.split("+"))
            expected += [(label, side, seed) for seed in ((0, 1) if seeded else (None,))]
    assert places(frame) == expected


@pytest.mark.parametrize("case", ["untied"])
def test_the_undamaged_model_is_compared_with_itself(studied, case):
    found = numbers(studied(case)[2]["damage"], change="undamaged", text="keeper.txt")
    assert (found["KL"], found["loss rise"]) == (0, 0)
    assert found["top-1 agreement"] == 1
    assert found["loss"] > 0


@pytest.mark.parametrize("case", ["untied", "tied, stored in bfloat16"])
def test_changes_that_change_nothing_cost_nothing(study, lively, case, tmp_path):
    """All dimensions kept, no noise, a factor of one: KL of float32 rounding, 1e-6 of a logit of order ten."""
    nothing = ("truncate:32", "truncate-centred:32", "remove-leading:0", "coordinates:100%", "project:32",
               "project-rescaled:32",
               "project-sparse:100%", "noise:0", "shift:0", "scale:1")  # fmt: skip
    _, tables = study(lively(case), tmp_path, *nothing, sides=("input", "output", "both"), draws=1)
    frame = tables["damage"]
    assert len(places(frame)) == 1 + 3 * len(nothing)
    metric = pl.col("metric")
    assert frame.filter(metric == "relative error")["value"].max() < 1e-7
    assert frame.filter(metric == "relative error, cast")["value"].max() < 1e-6  # rounded to float32 on the way
    assert frame.filter(metric == "KL")["value"].max() < 1e-6
    assert frame.filter(metric == "loss rise")["value"].abs().max() < 1e-4
    assert frame.filter(metric == "top-1 agreement")["value"].min() > 1 - 1.01 / 48  # a tie may fall otherwise
    for change in ("noise 0", "scale 1"):
        for side in ("input", "both"):
            found = numbers(frame, change=change, side=side, text="keeper.txt")
            assert (found["KL"], found["loss rise"], found["top-1 agreement"]) == (0, 0, 1)  # no bit differs


@pytest.mark.parametrize("case", ["tied, stored in bfloat16", "tied, with positions"])
def test_a_tied_head_reads_hidden_states_as_before_while_the_input_is_damaged(lively, text, tmp_path, case):
    settings = damage_settings(text, "truncate:4", sides=("input", "output", "both"))
    work = Loaded(damage_inputs(dimscope.open(str(lively(case))), settings))
    head, table = work.model.get_output_embeddings(), work.model.get_input_embeddings()
    hidden = torch.randn(5, D, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(20, 30)
    undamaged, only_input, only_output, both = work.inputs.points
    with torch.no_grad():
        said, read = head(hidden), table(ids)
        for point, head_changes, reading_changes in (
            (undamaged, False, False),
            (only_input, False, True),
            (only_output, True, False),
            (both, True, True),
        ):
            with points.damaged(work, point, points.make_maps(work, point)):
                assert torch.equal(head(hidden), said) != head_changes
                assert torch.equal(table(ids), read) != reading_changes
            assert torch.equal(head(hidden), said)
            assert torch.equal(table(ids), read)


def test_sides_of_untied_tables_are_changed_each_by_its_own_directions(studied, lively):
    """The widest directions of two tables differ, so both at once is no one map."""
    frame, tables = studied("untied")[2]["damage"], tables_of(lively("untied"))
    errors = {name: np.sqrt((np.linalg.svd(table, compute_uv=False)[8:] ** 2).sum()) for name, table in tables.items()}
    assert errors["input"] != pytest.approx(errors["output"], rel=1e-3)
    for side in ("input", "output", "both"):
        found = rows(frame, change="truncate 8", side=side, metric="error").sort("table")
        assert found["table"].to_list() == list(sides(side))
        assert found["value"].to_list() == pytest.approx([errors[name] for name in sides(side)], rel=1e-9)


def test_in_bfloat16_rows_are_rounded_to_it_and_the_model_runs_in_it(study, lively, tmp_path):
    """8 bits of mantissa: a relative error of 2^-9 at most, 1.7e-3 on average, beside that of the change itself."""
    folder = lively("untied, stored in bfloat16")
    changes = ("truncate:31", "noise:0.001", "scale:1")
    facts, tables = study(folder, tmp_path, *changes, draws=1, dtype="bfloat16")
    assert facts["dtype"] == "bfloat16"
    frame, table = tables["damage"], tables_of(folder)["input"]
    for change in ("truncate:31", "noise:0.001", "scale:1"):
        label, after = change.replace(":", " "), changed(change, table, 0)
        rounded = torch.from_numpy(after).float().bfloat16().double().numpy()
        told = numbers(frame, change=label, table="input")
        cast = np.linalg.norm(table - rounded) / np.linalg.norm(table)
        assert told["relative error, cast"] == pytest.approx(cast, rel=1e-3)
        normed = [first_norm(folder, x) for x in (table, rounded)]
        relative = np.linalg.norm(normed[0] - normed[1]) / np.linalg.norm(normed[0])
        # The norm itself rounds to bfloat16 twice: what it gives, and the product with its weight.
        assert told["relative error, first norm"] == pytest.approx(relative, rel=0.1, abs=2**-8)
    fine = numbers(frame, change="noise 0.001", table="input")
    assert fine["relative error, cast"] != pytest.approx(
        fine["relative error"], rel=0.1
    )  # finer than bfloat16 can tell
    assert fine["relative error"] == pytest.approx(0.001 * table.std() / math.sqrt((table**2).mean()), rel=0.05)
    exact = stock(folder)
    before = exact.log_probs({})
    undamaged = numbers(frame, change="undamaged", text="keeper.txt")
    assert undamaged["loss"] == pytest.approx(exact.judged(before, before)["loss"][0], rel=0.05)
    assert numbers(frame, change="scale 1", text="keeper.txt")["KL"] == 0


def test_errors_without_an_exact_form_are_told_by_a_sample_of_a_large_table(study, checkpoint, tmp_path):
    """9,000 rows, 8,192 of them drawn; the standard error says how far off the sample may be."""
    folder = checkpoint("llama", vocab_size=9000, tokenizer_size=512, hidden_size=8)
    table = tables_of(folder)["input"]
    found = {}
    for seed in (0, 1):
        _, tables = study(
            folder, tmp_path / str(seed), "quantise:3", "noise:1", "truncate:4", draws=1, seed=seed, windows=1
        )
        frame = tables["damage"]
        for change in ("quantise:3", "noise:1"):
            truth = np.linalg.norm(table - changed(change, table, seed)) / np.linalg.norm(table)
            [row] = rows(frame, change=change.replace(":", " "), metric="relative error").iter_rows(named=True)
            found[seed, change] = row["value"]
            assert row["n_tokens"] == 8192
            assert 0 < row["stderr"] < 0.01 * truth
            assert row["value"] == pytest.approx(truth, abs=5 * row["stderr"])
            assert row["value"] != pytest.approx(truth, rel=1e-7)
            [whole] = rows(frame, change=change.replace(":", " "), metric="error").iter_rows(named=True)
            norm = np.linalg.norm(table)
            assert (whole["value"], whole["stderr"]) == pytest.approx(
                (norm * row["value"], norm * row["stderr"]), rel=1e-9
            )
        [exact] = rows(frame, change="truncate 4", metric="relative error").iter_rows(named=True)
        assert (exact["n_tokens"], exact["stderr"]) == (9000, None)
        assert rows(frame, change="truncate 4", metric="cosine")["n_tokens"].to_list() == [8192]
    assert found[0, "quantise:3"] != found[1, "quantise:3"]  # other rows are drawn


# ---- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["untied", "tied, with positions"])
def test_from_the_start_means_the_first_windows(study, lively, tmp_path, case):
    _, tables = study(lively(case), tmp_path / "start", "truncate:8", from_start=True)
    _, spread = study(lively(case), tmp_path / "spread", "truncate:8")
    made = {"input": changed("truncate:8", tables_of(lively(case))["input"], 0)}
    for frame, plain in (
        (tables["damage"], stock(lively(case), from_start=True)),
        (spread["damage"], stock(lively(case))),
    ):
        wanted = plain.judged(plain.log_probs({}), plain.log_probs(made))
        found = numbers(frame, change="truncate 8", text="keeper.txt")
        for metric in ("loss", "bits per byte", "KL"):
            assert found[metric] == pytest.approx(wanted[metric][0], rel=1e-4)
    losses = [numbers(t["damage"], change="truncate 8", text="keeper.txt")["loss"] for t in (tables, spread)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_four_windows_of_the_models_context_are_read_where_nothing_is_asked(study, lively, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 2)
    n = {}
    for name, from_start in (("start", True), ("spread", False)):
        facts, tables = study(
            lively("untied"),
            tmp_path / name,
            "scale:1",
            texts=(str(long),),
            windows=None,
            length=None,
            from_start=from_start,
        )
        assert facts["window_length"] == 64
        n[name] = rows(tables["damage"], metric="KL")["n_tokens"].to_list()
    assert n == {"start": [256, 256], "spread": [256, 256]}


def test_several_texts_are_judged_each_by_itself(study, lively, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    folder = lively("untied")
    facts, tables = study(
        folder, tmp_path / "out", "truncate:8", "noise:1", texts=(text, str(other), "generated"), draws=1
    )
    assert list(facts["texts"]) == ["keeper.txt", "other.txt", "generated"]
    frame = tables["damage"]
    for change, changed_tables in (("undamaged", []), ("truncate 8", ["input"]), ("noise 1", ["input"])):
        found = rows(frame, change=change)
        assert found["text"].drop_nulls().unique(maintain_order=True).to_list() == [
            "keeper.txt",
            "other.txt",
            "generated",
        ]
        assert found["table"].drop_nulls().unique().to_list() == changed_tables
        assert (found["text"].is_null() != found["table"].is_null()).all()
    table = tables_of(folder)["input"]
    for name, of in (("keeper.txt", TEXT), ("other.txt", TEXT[::-1])):
        plain = stock(folder, of=of)
        wanted = plain.judged(plain.log_probs({}), plain.log_probs({"input": changed("truncate:8", table, 0)}))
        assert numbers(frame, change="truncate 8", text=name)["loss"] == pytest.approx(wanted["loss"][0], rel=1e-4)
    assert tables["claims"]["text"].unique(maintain_order=True).to_list() == ["keeper.txt", "other.txt", "generated"]
    assert set(tables["breaking"]["text"]) == {"keeper.txt", "other.txt", "generated"}


def test_texts_of_one_name_are_told_apart(study, lively, text, tmp_path):
    (tmp_path / "keeper.txt").write_text(TEXT[::-1])
    _, tables = study(lively("untied"), tmp_path / "out", "truncate:8", texts=(text, str(tmp_path / "keeper.txt")))
    losses = rows(tables["damage"], change="truncate 8", metric="loss")
    assert losses["text"].to_list() == [text, str(tmp_path / "keeper.txt")]
    assert losses["value"].n_unique() == 2


@pytest.mark.parametrize("case", ["untied", "tied, with positions"])
def test_the_text_that_the_model_writes_is_sampled_from_it_and_seeded(study, lively, tmp_path, case):
    """The same windows by stock `generate`: from the begin token on, its own distribution, no end token inside.

    Half of all tokens end a text here, so that they would be met.
    """
    folder = shutil.copytree(lively(case), tmp_path / "model")
    config = read_json(folder / "generation_config.json")
    ends = sorted({config["eos_token_id"], *range(256)} - {config["bos_token_id"]})
    write_json(folder / "generation_config.json", {**config, "eos_token_id": ends})
    found = {}
    for number, seed in enumerate((5, 5, 6)):
        _, tables = study(folder, tmp_path / str(number), "truncate:8", texts=("generated",), seed=seed)
        found[number] = tables["damage"]
    same(found[0], found[1])
    loss = {n: numbers(frame, change="undamaged", text="generated")["loss"] for n, frame in found.items()}
    assert loss[0] != pytest.approx(loss[2], rel=1e-3)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        ids = model.generate(
            torch.full((WINDOWS, 1), tokenizer.bos_token_id), attention_mask=torch.ones(WINDOWS, 1, dtype=torch.int64),
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=LENGTH - 1, suppress_tokens=ends,
            pad_token_id=ends[0],
        )  # fmt: skip
    assert ids.shape == (WINDOWS, LENGTH)
    assert not set(ids[:, 1:].flatten().tolist()) & set(ends)
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    own = replace(stock(folder), ids=ids, n_prefix=1)
    table = tables_of(folder)["input"]
    wanted = own.judged(own.log_probs({}), own.log_probs({"input": changed("truncate:8", table, 0)}))
    told = numbers(found[0], change="truncate 8", text="generated")
    for metric in ("loss", "loss rise", "KL"):
        assert told[metric] == pytest.approx(wanted[metric][0], rel=1e-3)
    assert set(rows(found[0], metric="loss")["n_tokens"]) == {WINDOWS * (LENGTH - 1)}


def test_windows_at_once_make_no_difference_but_rounding(study, lively, studied, tmp_path):
    _, tables = study(lively("untied"), tmp_path, "truncate:8", "noise:0.5", batch=1, draws=2)
    metrics = ["error", "loss", "KL", "bits per byte", "relative error, first norm"]
    one, all_ = (
        t.filter(
            pl.col("metric").is_in(metrics),
            pl.col("side") == "input",
            pl.col("change").is_in(["truncate 8", "noise 0.5"]),
        )
        for t in (tables["damage"], studied("untied")[2]["damage"])
    )
    assert_frame_equal(one, all_, rel_tol=1e-4, abs_tol=1e-6)


# ---- errors token by token, and operators --------------------------------------------------------------------------


def test_token_errors_have_a_row_for_every_token_of_every_change(study, lively, tmp_path):
    folder = lively("untied")
    changes = ("truncate:8", "noise:0.5", "quantise:3")
    facts, tables = study(folder, tmp_path, *changes, sides=("both",), draws=1, token_errors=True)
    frame = tables["token_errors"]
    assert facts["n_changes"] == 3
    assert frame.columns == ["change", "side", "seed", "table", "id", "norm", "error", "cosine"]
    for change in changes:
        for name, table in tables_of(folder).items():
            found = rows(frame, change=change.replace(":", " "), table=name)
            assert found["id"].to_list() == list(range(512))
            after = changed(change, table, 0)
            norms, errors = np.linalg.norm(table, axis=1), np.linalg.norm(table - after, axis=1)
            cosines = (table * after).sum(axis=1) / norms / np.linalg.norm(after, axis=1)
            # rows in float32: 1e-7 of their length, and more of an error that is small beside it
            np.testing.assert_allclose(found["norm"], norms, rtol=1e-6)
            np.testing.assert_allclose(found["error"], errors, rtol=1e-5, atol=1e-6 * norms.max())
            np.testing.assert_allclose(found["cosine"], cosines, rtol=1e-5, atol=1e-5)
    assert len(frame) == 2 * 3 * 512
    _, without = study(folder, tmp_path, *changes, sides=("both",), draws=1)
    assert "token_errors" not in without
    assert not (tmp_path / "tables" / "token_errors.parquet").exists()


def test_the_operator_of_a_random_projection_is_the_one_nearest_to_two_thirds(study, lively, tmp_path):
    """P = A A^+ of the draws of its seed: the mean of its diagonal is k / d exactly, for every k."""
    _, tables = study(
        lively("untied"),
        tmp_path,
        "project:8",
        "project:20",
        "project-rescaled:29",
        "project:32",
        "truncate:21",
        draws=2,
        seed=4,
    )
    a = drawn(D, 20, 4)
    projector = a @ np.linalg.pinv(a)
    told = {row["metric"]: row for row in tables["operator"].iter_rows(named=True)}
    assert {(row["k"], row["d"]) for row in told.values()} == {(20, D)}
    assert told["mean of the diagonal"]["value"] == pytest.approx(20 / D, rel=1e-12)
    assert told["mean of the diagonal"]["null"] == 20 / D
    rest = projector[~np.eye(D, dtype=bool)]
    for metric, value, expected in (
        ("sd of the diagonal", np.diag(projector).std(), math.sqrt(2 * 20 * 12 / (D**2 * (D + 2)))),
        ("sd off the diagonal", math.sqrt((rest**2).mean()), math.sqrt(20 * 12 / ((D - 1) * D * (D + 2)))),
    ):
        assert told[metric]["value"] == pytest.approx(value, rel=1e-9)
        assert told[metric]["null"] == pytest.approx(expected, rel=1e-12)
    block = tables["operator_block"]
    assert block.columns == ["row", "column", "value"]
    held = np.full((D, D), np.nan)
    held[block["row"], block["column"]] = block["value"]
    np.testing.assert_allclose(held, projector, atol=1e-12)
    histogram = tables["operator_histogram"]
    width = 10 / len(histogram)
    assert np.diff(histogram["middle"]) == pytest.approx(width)
    inside = np.abs(rest / told["sd off the diagonal"]["null"]) <= 5
    assert (histogram["density"] * width).sum() == pytest.approx(inside.mean(), rel=1e-9)
    assert inside.mean() > 0.999
    # Half of the entries are on either side of zero, and most of them within two standard deviations.
    assert (histogram["density"] * histogram["middle"]).sum() * width == pytest.approx(0, abs=0.1)
    assert (histogram["density"] * histogram["middle"] ** 2).sum() * width == pytest.approx(1, abs=0.15)


def test_a_large_operator_is_shown_by_its_top_left(study, checkpoint, tmp_path):
    folder = checkpoint("llama", hidden_size=128)
    _, tables = study(folder, tmp_path, "project-rescaled:96", draws=1, windows=1)
    block, a = tables["operator_block"], drawn(128, 96, 0)
    assert (len(block), block["row"].max(), block["column"].max()) == (100 * 100, 99, 99)
    held = block["value"].to_numpy().reshape(100, 100)
    np.testing.assert_allclose(held, (a @ np.linalg.pinv(a))[:100, :100], atol=1e-12)  # the projector, not d/k times it
    assert rows(tables["operator"], metric="mean of the diagonal")["value"][0] == pytest.approx(0.75, rel=1e-12)


@pytest.mark.parametrize("changes", [("truncate:8",), ("project:32", "project-rescaled:0"), ("project-sparse:8",)])
def test_there_is_no_operator_where_no_proper_random_projection_is(study, lively, tmp_path, changes):
    study(lively("untied"), tmp_path, "project:8", draws=1)
    assert (tmp_path / "tables" / "operator.parquet").exists()
    _, tables = study(lively("untied"), tmp_path, *changes, draws=1)
    assert not [name for name in tables if name.startswith("operator")]
    assert not list((tmp_path / "tables").glob("operator*"))  # of the study before


# ---- texts that are written ----------------------------------------------------------------------------------------


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
    found = []
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
            found.append(row[: row.index(end)] if end in row else row)
    return found


def prompt_ids(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.mark.parametrize("case", ["untied", "tied, with positions"])
def test_answers_are_those_of_stock_generate_with_the_changed_table(studied, lively, table_after, case):
    folder, frame = lively(case), studied(case)[2]["generations"]
    assert dict(frame.schema) == GENERATIONS | {"n_same": pl.Int64}
    tokenizer, tables = AutoTokenizer.from_pretrained(folder), tables_of(folder)
    own = continued(folder, {}, prompt_ids(folder), 6)
    told, answers = places(frame), []
    for change, side, seed in told:
        if change not in ("undamaged", "truncate 8", "project 20", "noise 0.5", "truncate 16 + shift 1"):
            continue
        made = {} if change == "undamaged" else {s: changed(spelled(change), tables[s], seed or 0) for s in sides(side)}
        wanted = continued(folder, made, prompt_ids(folder), 6)
        found = rows(frame, change=change, side=side, seed=seed)
        assert found["prompt"].to_list() == list(PROMPTS)
        assert found["number"].to_list() == [0, 1]
        assert found["chat"].to_list() == [False, False]
        assert found["ids"].to_list() == wanted, (change, side, seed)
        assert found["text"].to_list() == [tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]
        assert found["n_tokens"].to_list() == list(map(len, wanted))
        shared = [
            next((n for n in range(len(a)) if a[: n + 1] != b[: n + 1]), len(a))
            for a, b in zip(wanted, own, strict=True)
        ]
        assert found["n_same"].to_list() == shared
        answers += wanted
    assert len(answers) == 2 * (1 + 3 * (4 if case == "untied" else 2))
    assert len(set(map(tuple, answers))) > 4  # changes change what is said
    # one draw of what is random is answered, and everything else
    assert told == [place for place in places(studied(case)[2]["damage"]) if place[2] in (None, 0)]


@pytest.mark.parametrize("case", ["untied", "tied, with positions"])
def test_sampled_answers_are_seeded(study, lively, tmp_path, case):
    folder = lively(case)
    given = {"prompts": PROMPTS, "draws": 1}
    made = {"input": changed("truncate:24", tables_of(folder)["input"], 0)}
    texts = {}
    for seed in (3, 4):
        _, tables = study(
            folder, tmp_path / str(seed), "truncate:24", decoding="sample", new_tokens=8, seed=seed, **given
        )
        for change, of in (("undamaged", {}), ("truncate 24", made)):
            wanted = continued(folder, of, prompt_ids(folder), 8, seed)
            assert rows(tables["generations"], change=change)["ids"].to_list() == wanted
        texts[seed] = rows(tables["generations"], change="undamaged")["text"].to_list()
    assert texts[3] != texts[4]


def test_repetition_is_the_share_of_fours_that_stood_there_before(study, lively, tmp_path):
    """A table of zeros makes every token the same to the model: it says one word again and again."""
    _, tables = study(lively("untied"), tmp_path, "scale:0", prompts=PROMPTS[:1], new_tokens=12)
    for row in tables["generations"].iter_rows(named=True):
        fours = [tuple(row["ids"][i : i + 4]) for i in range(len(row["ids"]) - 3)]
        assert row["repetition"] == (pytest.approx(1 - len(set(fours)) / len(fours)) if fours else None)
    _, tables = study(lively("untied"), tmp_path, "scale:0", prompts=PROMPTS[:1], new_tokens=3)
    assert tables["generations"]["repetition"].to_list() == [None, None]


def test_as_many_draws_are_answered_as_were_asked_for(study, lively, tmp_path):
    given = {"prompts": PROMPTS[:1], "draws": 3, "seed": 7, "new_tokens": 2}
    for n in (1, 2, 9):
        _, tables = study(lively("untied"), tmp_path, "noise:1", "truncate:8", text_draws=n, **given)
        seeds = [seed for _, _, seed in places(tables["generations"])]
        assert seeds == [None, *range(7, 7 + min(n, 3)), None]


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chatty(lively, tmp_path) -> Path:
    """A checkpoint whose tokenizer brings a chat template."""
    folder = shutil.copytree(lively("untied"), tmp_path / "chatty")
    settings = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**settings, "chat_template": TEMPLATE})
    return folder


def test_a_template_stands_around_prompts_unless_they_are_to_be_plain(study, chatty, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    given = {"prompts": ("Count the ships",), "new_tokens": 5}
    templated = "<|user|>Count the ships\n<|assistant|>"

    def bare(whole: str) -> list[int]:
        return tokenizer(whole, add_special_tokens=False)["input_ids"]

    cases = {
        "auto": ({}, True, bare(templated)),
        "chat": ({"chat": True}, True, bare(templated)),
        "system": ({"system": "Be brief."}, True, bare("<|system|>Be brief.\n" + templated)),
        "plain": ({"chat": False}, False, tokenizer("Count the ships")["input_ids"]),
    }  # fmt: skip
    said = {}
    for name, (settings, chat, ids) in cases.items():
        facts, tables = study(chatty, tmp_path / "out", "truncate:24", **given, **settings)
        found = rows(tables["generations"], change="undamaged")
        assert found["chat"].to_list() == [chat]
        assert found["ids"].to_list() == continued(chatty, {}, [ids], 5), name
        assert (facts["template"], facts["chat"]) == (True, chat)
        said[name] = found["ids"].to_list()
    assert said["auto"] == said["chat"] != said["plain"]
    assert said["system"] != said["chat"]


def test_whoever_watches_sees_every_answer_grow_beside_that_of_the_undamaged_model(study, lively, tmp_path):
    heard: list[Writing] = []
    _, tables = study(
        lively("untied"),
        tmp_path,
        "truncate:8",
        "noise:1",
        watch=heard.append,
        prompts=PROMPTS,
        draws=2,
        new_tokens=4,
    )
    final = {w.change: w for w in heard}
    assert list(final) == ["undamaged", "truncate 8", "noise 1"]
    frame = tables["generations"]
    own = rows(frame, change="undamaged")["text"].to_list()
    for number, (change, last) in enumerate(final.items(), 1):
        assert (last.number, last.total, last.prompts) == (number, 4, PROMPTS)
        assert last.texts == rows(frame, change=change)["text"].to_list()
        assert last.undamaged == (None if change == "undamaged" else own)
        assert (last.seconds_left is None) == (number == 1)
        grown = [w.texts for w in heard if w.change == change]
        assert len(grown) == 4  # one for each new token
    assert min(w.seconds_left for w in heard if w.seconds_left is not None) > 0


# ---- on disk -------------------------------------------------------------------------------------------------------

FULL = {"prompts": PROMPTS, "decoding": "sample", "new_tokens": 6, "draws": 2, "token_errors": True}
SOME = ("truncate:8", "project:20", "noise:0.5", "truncate:16+shift:1")
AGAIN = {"rel_tol": 1e-6, "abs_tol": 1e-6}  # float32 states of a model that was loaded anew, wherever in memory it lies


def same(left: pl.DataFrame, right: pl.DataFrame) -> None:
    """Check that two tables are equal: texts, tokens, counts and nulls exactly, float32 numbers to their rounding."""
    assert_frame_equal(left, right, **AGAIN)


def same_tables(left: Mapping[str, pl.DataFrame], right: Mapping[str, pl.DataFrame]) -> None:
    assert list(left) == list(right)
    for name in left:
        same(left[name], right[name])


def stamps(folder: Path) -> dict[str, int]:
    """When each file of the tables was written."""
    paths = (path for path in (folder / "tables").rglob("*") if path.is_file())
    return {path.relative_to(folder / "tables").as_posix(): path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def uninterrupted(study, lively, tmp_path_factory):
    """Folder, facts and tables of a study that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, *study(lively("untied"), folder, *SOME, **FULL)


def test_the_tables_are_those_of_the_points_one_below_the_other(uninterrupted):
    folder, _, tables = uninterrupted
    assert set(tables) == {
        "damage",
        "breaking",
        "claims",
        "generations",
        "token_errors",
        "operator",
        "operator_block",
        "operator_histogram",
    }
    for name, table in tables.items():
        assert_frame_equal(pl.read_parquet(folder / f"tables/{name}.parquet"), table, check_exact=True)
    for name, n in (("damage", 8), ("generations", 5), ("token_errors", 7)):
        parts = [pl.read_parquet(path) for path in (folder / "tables/points").glob(f"*.{name}*.parquet")]
        assert len(parts) == n
        whole = tables[name].drop("n_same", strict=False)
        assert_frame_equal(pl.concat(parts), whole, check_row_order=False, check_exact=True)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".parquet", ".json"}


@pytest.mark.parametrize("after", [9])
def test_an_interrupted_study_goes_on_where_it_stopped(study, lively, uninterrupted, tmp_path, after):
    """Six tokens are heard at each of the five points whose prompts are answered; Ctrl-C comes with one of them."""
    heard: list[Writing] = []

    def stop(writing: Writing) -> None:
        heard.append(writing)
        if len(heard) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(lively("untied"), tmp_path, *SOME, watch=stop, **FULL)
    assert not (tmp_path / "tables/damage.parquet").exists()
    finished = stamps(tmp_path)
    # all numbers of the points before, and those of the point that was being written
    assert len([name for name in finished if name.endswith(".damage.json")]) == heard[-1].number
    assert len([name for name in finished if name.endswith(".generations.json")]) == (after - 1) // 6
    # of every table of the points before, the undamaged one aside
    errors = [name for name in finished if ".token_errors." in name and name.endswith(".json")]
    assert len(errors) == max(0, heard[-1].number - 2)
    _, tables = study(lively("untied"), tmp_path, *SOME, **FULL)
    same_tables(tables, uninterrupted[2])
    now = stamps(tmp_path)
    assert {name: now[name] for name in finished} == finished
    assert now.keys() == stamps(uninterrupted[0]).keys()


def test_ctrl_c_before_the_first_point_leaves_nothing(study, lively, tmp_path):
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(lively("untied"), tmp_path / "out", "truncate:8", announce=stop)
    assert not list(tmp_path.rglob("*.*"))


def test_what_is_finished_needs_no_model(study, lively, uninterrupted, tmp_path, monkeypatch):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "out")
    before = stamps(folder)
    for name in ("load_model", "open_table"):
        monkeypatch.delattr(f"dimscope.studies.damage.inputs.{name}")
    _, tables = study(lively("untied"), folder, *SOME, **FULL)
    for name, table in uninterrupted[2].items():
        assert_frame_equal(tables[name], table, check_exact=True)
    assert stamps(folder) == before


def test_without_a_folder_the_tables_are_the_same(lively, text, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = damage_settings(text, *SOME, **FULL)
    result = run_study(STUDY, dimscope.open(str(lively("untied"))), settings)
    same_tables(result.tables, uninterrupted[2])
    assert not list(tmp_path.iterdir())


def test_a_lost_point_is_computed_again_and_no_other(study, lively, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "out")
    lost = sorted((folder / "tables/points").glob("noise-*.damage.parquet"))[0]
    lost.unlink()
    (folder / "tables/damage.json").unlink()
    before = stamps(folder)
    _, tables = study(lively("untied"), folder, *SOME, **FULL)
    same_tables(tables, uninterrupted[2])
    changed_files = {name for name, stamp in stamps(folder).items() if before.get(name) != stamp}
    stem = lost.name.removesuffix(".parquet")
    assert changed_files == {f"points/{stem}.parquet", f"points/{stem}.json", "damage.parquet", "damage.json"}


def test_other_prompts_do_not_judge_the_points_anew(study, lively, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "out")
    before = stamps(folder)
    other = {**FULL, "prompts": ("In the winter of 1907",)}
    _, tables = study(lively("untied"), folder, *SOME, **other)
    assert set(tables["generations"]["prompt"]) == {"In the winter of 1907"}
    changed_files = {name for name, stamp in stamps(folder).items() if before[name] != stamp}
    assert changed_files == {name for name in before if "generations" in name}
    assert_frame_equal(tables["damage"], uninterrupted[2]["damage"], check_exact=True)
    _, without = study(lively("untied"), folder, *SOME, draws=2)
    assert "generations" not in without
    assert not (folder / "tables/generations.parquet").exists()  # it would be taken for one of this study
    assert_frame_equal(without["damage"], uninterrupted[2]["damage"], check_exact=True)


@pytest.mark.parametrize(
    "settings",
    [{"seed": 1}, {"length": 12, "windows": 2}],
    ids=str,
)
def test_whatever_the_numbers_depend_on_computes_them_anew(study, lively, uninterrupted, tmp_path, settings):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "out")
    before = stamps(folder)
    _, tables = study(lively("untied"), folder, *SOME, draws=2, **settings)
    _, fresh = study(lively("untied"), tmp_path / "fresh", *SOME, draws=2, **settings)
    same_tables(tables, fresh)
    now = stamps(folder)
    for name in stamps(tmp_path / "fresh"):
        if ".damage." in name:
            assert now[name] != before.get(name), name
    losses = [
        t.filter(pl.col("metric") == "loss")["value"].to_list() for t in (tables["damage"], uninterrupted[2]["damage"])
    ]
    assert losses[0][-1] != losses[1][-1]


def test_another_text_is_read_and_the_old_numbers_are_not_mixed_in(study, lively, uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "out")
    other = tmp_path / "keeper.txt"  # of the same name
    other.write_text(TEXT.replace("the", "one"))
    _, tables = study(lively("untied"), folder, *SOME, draws=2, texts=(str(other),))
    _, fresh = study(lively("untied"), tmp_path / "fresh", *SOME, draws=2, texts=(str(other),))
    same_tables(tables, fresh)
    assert (
        tables["damage"].filter(pl.col("metric") == "loss")["value"][0]
        != uninterrupted[2]["damage"].filter(pl.col("metric") == "loss")["value"][0]
    )


# ---- what is said --------------------------------------------------------------------------------------------------


def test_the_facts_say_what_was_run(uninterrupted):
    assert uninterrupted[1] == {
        "preset": None, "draws": 2, "seed": 0, "sides": ("input",), "system": None, "decoding": "sample",
        "new_tokens": 6, "texts": ("keeper.txt",), "window_length": LENGTH, "n_changes": 7, "template": False,
        "chat": False, "dtype": "float32", "device": "cpu",
    }  # fmt: skip


def test_the_announcement_counts_changes_tokens_and_steps(study, lively, tmp_path):
    said: list[str] = []
    given = {
        "prompts": PROMPTS,
        "new_tokens": 5,
        "draws": 3,
        "texts": ("generated", "builtin:prose"),
    }
    study(lively("untied"), tmp_path / "one", "truncate:8", "noise:1", announce=said.append, **given)
    study(lively("untied"), tmp_path / "two", "truncate:8", announce=said.append)
    # three answers of five tokens at most: undamaged, truncated, and one of the three draws of noise
    assert [line.partition(" on cpu")[0] for line in said] == [
        "4 changes and the unchanged model, 96 tokens each, 15 steps of generation",
        "1 change and the unchanged model, 48 tokens each",
    ]


def test_the_time_is_that_of_products_and_of_reading_the_weights(checkpoint, monkeypatch):
    """Two operations for each weight and token of a pass; every weight read for each token that is written."""
    monkeypatch.setattr(estimate, "_operations_per_second", lambda placement: 1e6)
    monkeypatch.setattr(estimate, "_bytes_per_second", lambda placement: 1e6)
    opened = dimscope.open(str(checkpoint("llama")))
    weights = sum(info.n_elements for info in opened.tensors.values()) - 512 * D  # a look-up multiplies nothing
    said = {}
    for n_points, tokens, written in ((11, 1000, 0), (11, 1000, 500)):
        line = estimate.estimate_damage(opened, Placement("float32", "cpu"), n_points, tokens, written)
        said[written] = line
        seconds = n_points * 2 * weights * tokens / 1e6 + written * weights * 4 / 1e6
        assert f": {seconds / 60:.0f} min or more; " in line
    assert said[0].startswith("10 changes and the unchanged model, 1,000 tokens each on cpu")
    assert ", 500 steps of generation on cpu" in said[500]
    n_bytes = 4 * (weights + 512 * D) + 4 * 1_000_000 * (D + 512)
    assert f"; {n_bytes / 1e9:.1f} GB at most" in estimate.estimate_damage(
        opened, Placement("float32", "cpu"), 1, 1_000_000, 0
    )


def test_the_summary_has_a_row_for_every_change_of_a_side(studied):
    frame = studied("untied")[2]["damage"]
    base = numbers(frame, change="undamaged", text="keeper.txt")["loss"]
    for side, summary in zip(("input", "output", "both"), change_frames(frame), strict=True):
        assert (set(summary["text"]), set(summary["side"])) == ({"keeper.txt"}, {side})
        labels = [change for change, of, _ in places(frame) if of == side or change == "undamaged"]
        assert summary["change"].to_list() == list(dict.fromkeys(labels))
        for row in summary.iter_rows(named=True):
            of = frame if row["change"] == "undamaged" else rows(frame, side=side)
            of = rows(of, change=row["change"])
            losses, kl, same_first = (
                rows(of, metric=m, text="keeper.txt")["value"].to_numpy() for m in ("loss", "KL", "top-1 agreement")
            )
            assert row["loss"] == pytest.approx(losses.mean())
            assert row["sd"] == (pytest.approx(losses.std(ddof=1)) if len(losses) > 1 else None)
            assert row["rise %"] == pytest.approx(100 * (losses.mean() / base - 1))
            assert (row["KL"], row["same %"]) == pytest.approx((kl.mean(), 100 * same_first.mean()))
            errors = rows(of, metric="relative error")
            for column, source in (("error", "value"), ("theory", "null")):
                known = errors[source].drop_nulls()
                assert row[column] == (pytest.approx(known.mean()) if len(known) else None)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 65}, "^`length` must be at most 64, "),
        ({"length": 2}, "`length` must be 3 or more, got 2"),
        ({"length": 1, "texts": ("generated",)}, "`length` must be 2 or more"),
        ({"texts": ()}, "^`texts` takes files"),
        ({"windows": 4000}, "`windows` must be 1 to .* windows of 16 tokens, got 4000"),
        ({"texts": ("short",)}, "at least 2"),
        ({"texts": ("short",), "from_start": True}, "at least 2"),
        ({"prompts": ("word " * 40,)}, "the prompt .* the model reads at most 64"),
        ({"prompts": ("word",), "chat": True}, "no chat template"),
        ({"changes": ("truncate:33",)}, "from 0 to 32, got 33"),
        ({"device": "abacus"}, "`device` .*abacus"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(study, lively, tmp_path, settings, message):
    if settings.get("texts") == ("short",):
        (tmp_path / "short.txt").write_text("A")
        settings = {**settings, "texts": (str(tmp_path / "short.txt"),)}
    with pytest.raises(InvalidArgument, match=message):
        study(lively("untied"), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_damaged(study, checkpoint, editable, tmp_path):
    for folder, error in (
        (checkpoint("llama", tokenizer=None), TokenizerMissing),
        (checkpoint("bert"), UnsupportedCheckpoint),
    ):
        with pytest.raises(error):
            study(folder, tmp_path / "out", "truncate:8")
        assert not (tmp_path / "out").exists()
    broken = editable(checkpoint("llama"))
    spoil.set_rows(broken, [5, 9], math.nan)
    with pytest.raises(NonFiniteRows, match="2 of 512 rows"):
        study(broken, tmp_path / "out", "truncate:8")
    assert not (tmp_path / "out" / "tables" / "damage.parquet").exists()
