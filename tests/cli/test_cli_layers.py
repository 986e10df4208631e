"""`dimscope layers` end to end: what it measures, from which texts, what it uses again, and what a violent end does to it.

Commands run through `main` in this process, so that each costs no start of Python; those that are killed, that run at the
same time or that need a hub or code of a model run in processes of their own, and so do long ones: there annotations are
not executed.
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import damage
import models
import numpy as np
import polars as pl
import pytest
import torch
import transformers
from polars.testing import assert_frame_equal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dimscope.cli.app import main

pytestmark = pytest.mark.slow  # whole commands

CAUSAL = ["gpt2", "opt", "qwen2", "llama", "gemma", "gpt_neox"]  # sites of every family: tests/activations
ROTARY = CAUSAL[2:]  # the others add a vector per position to the embeddings
TABLES = {"layers", "scree", "type_spectra", "texts", "confidence", "predictions", "similarity"}
SITES = {0: "embeddings", 1: "block 1", 2: "block 2, before final norm", 3: "after final norm"}
TINY = ("--length", "16", "--windows", "3")
SMALL = (*TINY, "--shuffles", "2", "--seed", "7")  # the seed of the checkpoints is 0
BARE = ("--shuffles", "0", "--shuffles-across", "0", "--no-random-weights")
LAYERS = ["model", "text", "condition", "seed", "site", "layer", "preprocess", "centred", "metric", "scale", "value",
          "stderr", "low", "high", "halves", "null", "gaussian",
          "share_of_dim", "share_of_rank", "share_of_null", "n_tokens", "n_dropped", "dim"]  # fmt: skip

AGAIN = {"rel_tol": 1e-6, "abs_tol": 1e-6}
"""float32 states of a model that was loaded anew, wherever in memory it lies."""

Run = Callable[..., str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return `run(*arguments)`: a command that succeeds, and what it prints on standard output, paths in one line."""
    monkeypatch.setenv("COLUMNS", "240")

    def command(*arguments: object) -> str:
        capfd.readouterr()
        code = main([*map(str, arguments)])
        out, err = capfd.readouterr()
        assert code == 0, err[-600:]
        return out

    return command


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A file with the text on which the tests' tokenizers were trained."""
    path = tmp_path_factory.mktemp("texts") / "keeper.txt"
    path.write_text(models.TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def studied(checkpoint, digest, text, tmp_path_factory) -> Callable[[str], Path]:
    """Return `studied(family)`: the folder of a small study of the family, run once for each. Read only."""
    folders: dict[str, Path] = {}

    def study(family: str) -> Path:
        if family not in folders:
            before = digest(checkpoint(family))
            out = tmp_path_factory.mktemp(f"layers-{family}")
            assert main(["layers", str(checkpoint(family)), "--text", str(text), *SMALL, "-o", str(out)]) == 0
            assert digest(checkpoint(family)) == before
            folders[family] = out
        return folders[family]

    return study


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    """Check that a command in another process succeeded, and return what it printed on standard output."""
    assert result.returncode == 0, result.stderr[-600:]
    return result.stdout


def read_tables(folder: Path) -> dict[str, pl.DataFrame]:
    return {path.stem: pl.read_parquet(path) for path in (folder / "tables").glob("*.parquet")}


def read_facts(folder: Path) -> dict[str, Any]:
    return models.read_json(folder / "report.json")


def in_report(*options: object) -> tuple[object, ...]:
    """Options of `layers` as `report` takes them: shared ones as they are, the others as --layers.OPTION."""
    shared = ("--text", "--length", "--windows", "--dtype", "--device", "--seed", "-o", "--json", "--studies")
    own = [isinstance(option, str) and option.startswith("--") and option not in shared for option in options]
    return tuple(f"--layers.{str(o)[2:]}" if is_own else o for o, is_own in zip(options, own, strict=True))


def without_seconds(report: dict[str, Any]) -> dict[str, Any]:
    """A report.json without the time that the studies took."""
    studies = {name: {**own, "seconds": 0} for name, own in report["studies"].items()}
    return {**report, "studies": studies}


def rows(frame: pl.DataFrame, **where: Any) -> pl.DataFrame:
    """The rows with these values, e.g. condition="real"."""
    return frame.filter(*(pl.col(name) == value for name, value in where.items()))


def spectral(frame: pl.DataFrame, metric: str, **where: Any) -> list[float]:
    """The raw, centred values of a metric."""
    return rows(frame, metric=metric, preprocess="raw", centred=True, **where)["value"].to_list()


def conditions(frame: pl.DataFrame) -> dict[str, list[int]]:
    """The conditions of a table and the number of their draws; real text has no seed."""
    assert frame.filter(condition="real")["seed"].is_null().all()
    return {name[0]: list(range(part["seed"].n_unique())) for name, part in frame.group_by("condition")}


def stamps(folder: Path) -> dict[str, int]:
    """When each file below the tables was written."""
    paths = (path for path in (folder / "tables").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in paths}


def sections(folder: Path) -> list[str]:
    """The anchors of the sections on the page."""
    return re.findall(r'<section id="([^"]+)"', (folder / "index.html").read_text(encoding="utf-8"))


def check_same(left: Path, right: Path, rel_tol: float, abs_tol: float) -> None:
    """Check that two studies say the same: names, counts and nulls exactly, numbers to a tolerance."""
    one, other = read_tables(left), read_tables(right)
    assert one.keys() == other.keys()
    for name in one:
        assert_frame_equal(one[name], other[name], rel_tol=rel_tol, abs_tol=abs_tol)


# ---- what is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CAUSAL)
def test_every_causal_family_is_studied_and_left_as_it_was(studied, text, family):
    out = studied(family)
    assert {path.name for path in out.iterdir()} == {"tables", "index.html", "report.json"}
    assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".safetensors")]
    tables = read_tables(out)
    assert tables.keys() == TABLES
    layers = tables["layers"]
    assert layers.columns == LAYERS
    assert dict(layers.select("layer", "site").unique().iter_rows()) == SITES
    expected = {"real": [0], "shuffled": [0, 1], "shuffled across": [0], "random weights": [0]}
    for name in ("layers", "texts", "confidence", "predictions"):
        assert conditions(tables[name]) == expected, name
    assert conditions(tables["scree"]) == {name: [0] for name in expected}
    assert set(tables["similarity"]["comparison"]) == {"between layers", "real and shuffled", "real and random weights"}
    whole = {"raw", "without first token", "without massive tokens", "z-scored"}
    assert set(layers["preprocess"]) == whole | {"one state per type", "type means", "type mean removed"}
    for percent in (80, 90, 95, 99):
        assert len(spectral(layers, f"variance count {percent}%")) == 5 * len(SITES)
    assert set(rows(layers, metric="stable rank", preprocess="raw")["n_tokens"]) == {48}
    assert set(rows(layers, metric="stable rank", preprocess="without first token")["n_tokens"]) == {45}
    told = read_facts(out)
    assert told["studies"]["layers"]["facts"]["texts"] == [text.name]
    assert told["studies"]["layers"]["facts"]["window_length"] == 16
    assert (out / "index.html").stat().st_size > 1_000_000
    page = {"layers-sample", "layers", "scree", "preprocessing", "intrinsic", "confidence", "similarity"}
    assert page <= set(sections(out))


def middle_windows(folder: Path, length: int, count: int) -> tuple[list[list[int]], list[int]]:
    """Windows of TEXT as the definition has them: each from the middle of one of `count` equal parts, BOS first.

    Also the bytes of the tokens that are predicted in each, for tokenizers whose pieces are bytes.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(models.TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = tokenizer("a")["input_ids"][: -len(tokenizer("a", add_special_tokens=False)["input_ids"])]
    room = length - len(prefix)
    starts = [(2 * part + 1) * len(ids) // (2 * count) - room // 2 for part in range(count)]
    found = [[*prefix, *ids[start : start + room]] for start in starts]
    return found, [len(tokenizer.decode(window[1:]).encode()) for window in found]


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
def test_the_numbers_are_those_of_stock_transformers(checkpoint, studied, family):
    folder, tables = checkpoint(family), read_tables(studied(family))
    windows, n_bytes = middle_windows(folder, 16, 3)
    ids = torch.tensor(windows)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    before_norm: list[torch.Tensor] = []  # the library's list of hidden states does not have it
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    norm.register_forward_pre_hook(lambda module, arguments: before_norm.append(arguments[0]))
    with torch.inference_mode():
        said = model(ids, output_hidden_states=True)
    for layer, states in enumerate([*said.hidden_states[:2], *before_norm, said.hidden_states[-1]]):
        cloud = states.flatten(0, 1).double().numpy()
        variances = np.linalg.svd(cloud - cloud.mean(axis=0), compute_uv=False) ** 2
        shares = variances / variances.sum()
        where = {"condition": "real", "layer": layer}
        # float32 states of another batch: 1e-5 of a state, and less in sums over 48 of them
        [ratio] = spectral(tables["layers"], "participation ratio", **where)
        assert ratio == pytest.approx(1 / (shares**2).sum(), rel=1e-5)
        [count] = spectral(tables["layers"], "variance count 95%", **where)
        assert count == np.searchsorted(shares.cumsum(), 0.95) + 1
        scree = rows(tables["scree"], **where).sort("index")["share"].to_numpy()
        assert scree[:20] == pytest.approx(shares[:20], rel=1e-4)
    losses = torch.nn.functional.cross_entropy(
        said.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    told = dict(rows(tables["predictions"], condition="real").select("metric", "value").iter_rows())
    assert told["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    best = said.logits.log_softmax(dim=2).amax(dim=2)
    assert told["max log-softmax"] == pytest.approx(float(best.mean()), rel=1e-5)
    if family != "llama":  # its pieces are no bytes
        assert told["bits per byte"] == pytest.approx(float(losses.sum()) / math.log(2) / sum(n_bytes), rel=1e-5)
    texts = rows(tables["texts"], condition="real").row(0, named=True)
    assert texts["unique_tokens"] == pytest.approx(np.mean([len(set(window)) for window in windows]))
    assert texts["unique_in_all"] == len(set(ids.flatten().tolist()))


def spectrum(tables: dict[str, pl.DataFrame], condition: str, layer: int) -> np.ndarray:
    return rows(tables["scree"], condition=condition, layer=layer).sort("index")["share"].to_numpy()


@pytest.mark.parametrize("family", CAUSAL)
def test_order_leaves_the_spectrum_of_rotary_embeddings_alone(studied, family):
    tables = read_tables(studied(family))
    for condition in ("shuffled", "shuffled across"):
        change = np.abs(spectrum(tables, "real", 0) - spectrum(tables, condition, 0)).max()
        assert change < 1e-9 if family in ROTARY else change > 1e-5
        assert np.abs(spectrum(tables, "real", 3) - spectrum(tables, condition, 3)).max() > 1e-5
    assert np.abs(spectrum(tables, "real", 0) - spectrum(tables, "random weights", 0)).max() > 1e-5


def test_half_precision_and_a_spread_model_give_the_same_within_their_precision(
    checkpoint, run, text, studied, tmp_path
):
    exact = spectral(read_tables(studied("qwen2"))["layers"], "participation ratio", condition="real")
    for options, rel in ((("--dtype", "bfloat16", "--device", "cpu"), 0.05), (("--device", "map"), 1e-6)):
        out = tmp_path / options[1]
        run("layers", checkpoint("qwen2"), "--text", text, *TINY, *BARE, "--seed", "7", *options, "-o", out)
        ratios = spectral(read_tables(out)["layers"], "participation ratio", condition="real")
        assert ratios == pytest.approx(exact, rel=rel)


# ---- texts ---------------------------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a log."""

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture
def site(text) -> Iterator[str]:
    """Return the address of a server of the folder in which the text lies."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(text.parent))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_files_folders_parquet_and_urls_give_the_same_text(checkpoint, run, text, site, tmp_path):
    (tmp_path / "corpus" / "below").mkdir(parents=True)
    cut = models.TEXT.index("\n") + 1
    (tmp_path / "corpus" / "a.md").write_text(models.TEXT[:cut])
    (tmp_path / "corpus" / "below" / "b.txt").write_text(models.TEXT[cut:])
    (tmp_path / "corpus" / "image.png").write_bytes(bytes(range(256)))
    lines = models.TEXT.splitlines(keepends=True)
    pl.DataFrame({"body": [*lines, None], "title": ["no"] * (len(lines) + 1)}).write_parquet(tmp_path / "data.parquet")
    sources = {
        text.name: text,
        "corpus/": tmp_path / "corpus",
        "data.parquet:body": f"{tmp_path / 'data.parquet'}:body",
        f"{site}/keeper.txt": f"{site}/keeper.txt?token=secret",
    }
    out = tmp_path / "out"
    run("layers", checkpoint("qwen2"), "--text", *sources.values(), *TINY, *BARE, "-o", out)
    assert read_facts(out)["studies"]["layers"]["facts"]["texts"] == list(sources)
    for name, frame in read_tables(out).items():
        first, *others = (rows(frame, text=source).drop("text", "other_text", strict=False) for source in sources)
        assert len(first) > 0, name
        for other in others:
            assert_frame_equal(first, other)
    assert "texts" in sections(out)
    assert b"secret" not in b"".join(path.read_bytes() for path in out.rglob("*.json"))


def test_standard_input_to_json_leaves_nothing_on_disk(checkpoint, run, studied, tmp_path, monkeypatch):
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(models.TEXT.encode())))
    result = json.loads(run("layers", checkpoint("qwen2"), "--text=-", *SMALL, "--json"))
    assert result["model"] == str(checkpoint("qwen2"))
    tables = read_tables(studied("qwen2"))
    for name in ("layers", "texts", "predictions", "similarity"):
        frame = pl.DataFrame(result[name], schema=tables[name].schema)
        assert set(frame["text"]) == {"standard input"}
        assert_frame_equal(*(f.drop("text", "other_text", strict=False) for f in (frame, tables[name])), rel_tol=1e-6)
    assert [row["layer"] for row in result["dimensions 1"]] == ["emb", "1", "2", "norm"]
    counts = spectral(tables["layers"], "variance count 95%", condition="real")
    assert [row["95%"] for row in result["dimensions 1"]] == counts
    assert not list((tmp_path / "here").iterdir())
    # torch makes a cache folder of its own there when its compiler is imported.
    assert not [path for path in (tmp_path / "temporary").iterdir() if not path.name.startswith("torchinductor")]


def test_without_a_model_and_a_text_the_built_in_ones_are_studied(run, tmp_path):
    result = json.loads(run("layers", "--length", "32", "--windows", "2", *BARE, "--json", "-o", tmp_path))
    assert result["model"] == "builtin"
    assert read_facts(tmp_path)["studies"]["layers"]["facts"]["texts"] == ["builtin prose", "builtin html"]
    assert set(read_tables(tmp_path)["layers"]["text"]) == {"builtin prose", "builtin html"}


# ---- options -------------------------------------------------------------------------------------------------------


def test_options_choose_what_is_measured(checkpoint, run, text, tmp_path):
    options = (
        "--length", "16", "--windows", "4", "--thresholds", "95,80", "--layers", "0,2,norm", "--no-logits", "--curve",
        "--reservoir", "64", "--show-layer", "0",
    )  # fmt: skip
    run("layers", checkpoint("qwen2"), "--text", text, *options, *BARE, "-o", tmp_path)
    tables = read_tables(tmp_path)
    assert tables.keys() == TABLES - {"confidence", "predictions"} | {"curve"}
    for name in ("layers", "scree", "curve"):
        assert dict(tables[name].select("layer", "site").unique().iter_rows()) == {i: SITES[i] for i in (0, 2, 3)}
        assert conditions(tables[name]) == {"real": [0]}
    for name in ("layers", "curve"):
        counts = {metric for metric in tables[name]["metric"] if metric.startswith("variance count")}
        assert counts == {"variance count 80%", "variance count 95%"}
    assert set(tables["curve"]["n_tokens"]) == {60}  # of 64, without the first of every window
    assert set(tables["similarity"]["comparison"]) == {"between layers"}
    study = read_facts(tmp_path)["studies"]["layers"]["facts"]
    assert (study["thresholds"], study["layers"], study["show_layer"]) == ([0.8, 0.95], "0,2,norm", 0)
    run("layers", checkpoint("qwen2"), "--text", text, "--length", "16", "--windows", "4", *BARE, "-o", tmp_path)
    assert read_tables(tmp_path).keys() == TABLES  # the curve of before is not taken for one of this run


@pytest.mark.parametrize(("length", "windows"), [(2, 1), (3, 2)])
def test_the_smallest_study_has_a_page(checkpoint, run, tmp_path, length, windows):
    (tmp_path / "same.txt").write_text("a" * 200)
    options = ("--length", length, "--windows", windows, "--shuffles", "1")
    out = tmp_path / "out"
    command = ("layers", checkpoint("qwen2"), "--text", tmp_path / "same.txt", *options, "-o", out, "--json")
    result = json.loads(run(*command))
    assert result["page"] == str(out / "index.html")
    assert "layers" in sections(out)
    frame = pl.DataFrame(result["layers"], infer_schema_length=None)
    assert set(spectral(frame, "numerical rank", layer=0)) == {0.0}


def test_the_preset_of_the_notebook_and_options_on_top_of_it(checkpoint, run, text, tmp_path):
    options = ("--length", "32", "--preset", "notebook", "--shuffles", "3", "--thresholds", "80,99")
    run("layers", checkpoint("qwen2"), "--text", text, *options, "-o", tmp_path)
    facts, layers = read_facts(tmp_path)["studies"]["layers"]["facts"], read_tables(tmp_path)["layers"]
    # Of a model of two blocks, layer 3 is the nearest to layer 10 of the notebook.
    assert (facts["preset"], facts["show_layer"], facts["windows"]) == ("notebook", 3, 1)
    assert conditions(layers) == {"real": [0], "shuffled": [0, 1, 2]}
    assert {metric for metric in layers["metric"] if "count" in metric} == {"variance count 80%", "variance count 99%"}
    assert set(rows(layers, metric="stable rank", preprocess="raw")["n_tokens"]) == {32}


def test_another_model_is_compared_whatever_its_tokenizer_and_width(checkpoint, run, text, tmp_path):
    first, wide = checkpoint("qwen2"), checkpoint("llama", hidden_size=64, vocab_size=600)
    options = ("--length", "32", "--windows", "4", *BARE)
    run("layers", first, "--text", text, "--compare", wide, first, *options, "-o", tmp_path)
    study = read_facts(tmp_path)["studies"]["layers"]["facts"]
    assert len(set(study["models"])) == 3
    tables = read_tables(tmp_path)
    assert set(tables["layers"]["dim"]) == {32, 64}
    between = rows(tables["similarity"], comparison="between models", model=study["models"][0])
    against = rows(between, other_model=study["models"][1])
    assert set(against.select("layer", "other_layer").iter_rows()) == {(i, j) for i in SITES for j in SITES}
    assert against["overlap"].null_count() == len(against)  # no common space to span
    assert min(against["n_tokens"]) >= 4
    assert max(against["cka"].abs()) <= 1
    itself = rows(between, other_model=study["models"][2]).filter(pl.col("layer") == pl.col("other_layer"))
    assert itself["cka"].to_list() == pytest.approx([1.0] * 4, abs=1e-9)
    assert itself["overlap"].to_list() == pytest.approx([1.0] * 4, abs=1e-9)
    assert {"alignment", "models"} & set(sections(tmp_path))
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert study["models"][1] in page


# ---- what is used again --------------------------------------------------------------------------------------------


def test_the_same_command_again_computes_nothing_but_what_is_lost(checkpoint, run, text, studied, tmp_path):
    out = shutil.copytree(studied("qwen2"), tmp_path / "out")
    first, page = stamps(out), sections(out)
    printed = run("layers", checkpoint("qwen2"), "--text", text, *SMALL, "-o", out)
    assert stamps(out) == first
    assert sections(out) == page
    assert "index.html" in printed
    assert "keeper.txt" in printed
    for layer in ("emb", "1", "2", "norm"):
        assert re.search(rf"^ +{layer} +48 ", printed, re.MULTILINE)
    victim = next(out.glob("tables/passes/shuffled-1-*.layers.parquet"))
    victim.write_bytes(victim.read_bytes()[:100])
    (out / "tables" / "layers.json").unlink()  # a table without provenance is not finished
    run("layers", checkpoint("qwen2"), "--text", text, *SMALL, "-o", out)
    changed = {name.rpartition(".")[0] for name, stamp in stamps(out).items() if stamp != first.get(name)}
    assert changed == {"tables/layers", victim.relative_to(out).as_posix().removesuffix(".parquet")}
    check_same(out, studied("qwen2"), **AGAIN)


def test_another_threshold_changes_what_depends_on_it(checkpoint, run, text, studied, tmp_path):
    out = shutil.copytree(studied("qwen2"), tmp_path / "out")
    before = {path.stem: path.read_bytes() for path in out.glob("tables/*.parquet")}
    run("layers", checkpoint("qwen2"), "--text", text, *SMALL, "--thresholds", "50,95", "-o", out)
    after = {path.stem: path.read_bytes() for path in out.glob("tables/*.parquet")}
    assert after.pop("layers") != before.pop("layers")
    assert after == before
    old, new = (read_tables(folder)["layers"] for folder in (studied("qwen2"), out))
    other = ~pl.col("metric").str.starts_with("variance count") | (pl.col("metric") == "variance count 95%")
    assert_frame_equal(old.filter(other), new.filter(other), rel_tol=1e-6, abs_tol=1e-6)
    counts = {metric for metric in new["metric"] if metric.startswith("variance count")}
    assert counts == {"variance count 50%", "variance count 95%"}
    for layer in SITES:
        [half] = spectral(new, "variance count 50%", condition="real", layer=layer)
        assert half == np.searchsorted(spectrum(read_tables(out), "real", layer).cumsum(), 0.5) + 1


def test_more_texts_draws_and_models_are_added_to_what_is_finished(checkpoint, run, text, tmp_path):
    out, few = tmp_path / "out", ("--shuffles-across", "0", "--no-random-weights", "--seed", "7")
    run("layers", checkpoint("qwen2"), "--text", text, *TINY, *few, "--shuffles", "1", "-o", out)
    passes = {name: stamp for name, stamp in stamps(out).items() if "/passes/" in name}
    (tmp_path / "other.txt").write_text(models.TEXT.replace("keeper", "sailor"))
    more = ("--text", text, tmp_path / "other.txt", *TINY, *few, "--shuffles", "2")
    for folder in (out, tmp_path / "alone"):
        run("layers", checkpoint("qwen2"), *more, "--compare", checkpoint("gpt2"), "-o", folder)
    now = stamps(out)
    assert {name: now[name] for name in passes} == passes
    check_same(out, tmp_path / "alone", **AGAIN)
    assert {path.name for path in out.iterdir()} == {"tables", "index.html", "report.json"}


def test_a_text_that_changed_is_read_again(checkpoint, run, tmp_path):
    path, out = tmp_path / "a.txt", tmp_path / "out"
    ratios = []
    for content in (models.TEXT, models.TEXT.replace("the", "one")):
        path.write_text(content)
        run("layers", checkpoint("qwen2"), "--text", path, *TINY, *BARE, "-o", out)
        ratios.append(spectral(read_tables(out)["layers"], "participation ratio"))
    assert len(ratios[0]) == len(ratios[1]) == 4
    assert ratios[0] != ratios[1]


def test_both_studies_are_on_one_page_in_whatever_order_they_came(checkpoint, run, text, tmp_path):
    folder, together, turns = checkpoint("qwen2"), tmp_path / "together", tmp_path / "layers first"
    small, light = ("--text", text, *TINY, *BARE), ("--embedding.knn-sample", "50", "--embedding.permutations", "1")
    both = (*light, *in_report(*small), "-o", together, "--studies")
    assert "index.html" in run("report", folder, *both, "embedding", "layers")
    run("layers", folder, *small, "-o", turns)
    run("report", folder, *light, "-o", turns)
    for out in (together, turns):
        assert set(read_facts(out)["studies"]) == {"embedding", "layers"}
        assert sections(out) == sections(together)
    assert {"map", "spectrum", "hubness", "layers", "scree", "confidence"} <= set(sections(together))
    check_same(turns, together, **AGAIN)
    first = stamps(together)
    run("report", folder, *both, "layers", "embedding")
    assert stamps(together) == first


def page_of(folder: Path) -> tuple[str, list[str]]:
    """What the page says of the model and the run before its provenance, and the tables that it offers."""
    page = (folder / "index.html").read_text(encoding="utf-8")
    return page.split('<section id="provenance"')[0], re.findall(r'id="table-([^"]+)"', page)


def test_another_model_in_the_same_folder_takes_nothing_from_the_first(checkpoint, run, text, tmp_path):
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    for family, out in (("qwen2", shared), ("gpt2", shared), ("gpt2", alone)):
        run("layers", checkpoint(family), "--text", text, *TINY, *BARE, "-o", out)
    facts = read_facts(shared)
    assert facts["studies"].keys() == read_facts(alone)["studies"].keys()
    assert without_seconds(facts) == without_seconds(read_facts(alone))
    for name, frame in read_tables(alone).items():
        assert_frame_equal(read_tables(shared)[name], frame, rel_tol=1e-6, abs_tol=1e-6)
    assert page_of(shared)[1] == page_of(alone)[1]
    assert sections(shared) == sections(alone)


def test_what_the_user_keeps_beside_the_tables_is_not_touched(checkpoint, run, digest, text, tmp_path):
    for name in ("state", "passes", "tables", "tables/passes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    before = digest(tmp_path)
    run("layers", checkpoint("qwen2"), "--text", text, *TINY, *BARE, "-o", tmp_path)
    after = digest(tmp_path)
    assert {name: after.get(name) for name in before} == before


# ---- shards --------------------------------------------------------------------------------------------------------


def test_the_first_of_two_shards_names_the_missing_one_and_makes_no_page(checkpoint, run, text, tmp_path):
    out, folder = tmp_path / "out", checkpoint("qwen2")
    command = ("--text", text, *TINY, *BARE, "--batch", "1", "--shard")
    result = json.loads(run("layers", folder, *command, "1/2", "-o", out, "--json"))
    assert result.pop("seconds") >= 0
    assert result == {"model": str(folder), "waiting_for_shards": "2/2"}
    assert "2/2" in run("layers", folder, *command, "1/2", "-o", out)
    options = in_report("--studies", "layers", *command, "1/2", "-o", out, "--json")
    report = json.loads(run("report", folder, *options))
    assert "page" not in report
    assert report["waiting_for_shards"] == "2/2"
    assert not [path for path in out.rglob("*") if path.suffix in (".parquet", ".html")]
    assert "index.html" in run("layers", folder, *command, "2/2", "-o", out)
    run("layers", folder, *command[:-1], "-o", tmp_path / "whole")
    check_same(out, tmp_path / "whole", **AGAIN)
    first = stamps(out)
    assert "index.html" in run("layers", folder, *command, "1/2", "-o", out)
    run("layers", folder, *command[:-1], "-o", out)
    assert stamps(out) == first


# ---- other processes -----------------------------------------------------------------------------------------------

LONG = ("--length", "16", "--windows", "all", "--reservoir", "64", *BARE[2:], "--shuffles", "1")


@pytest.fixture(scope="module")
def long_text(tmp_path_factory) -> Path:
    """A text of many batches, so that there is a middle."""
    path = tmp_path_factory.mktemp("texts") / "long.txt"
    path.write_text(models.TEXT * 3, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, cli, long_text, tmp_path_factory) -> Path:
    """The folder of a study that nothing interrupted."""
    out = tmp_path_factory.mktemp("uninterrupted")
    succeed(cli("layers", checkpoint("qwen2"), "--text", long_text, *LONG, "-o", out))
    return out


SUMS = "**/{}*-of-*.safetensors"  # of unfinished passes of a condition


def is_complete(path: Path) -> bool:
    return bool(load_file(path)["numbers"][-1])


def test_kill_9_in_the_middle_of_a_pass_and_the_same_command_again(
    checkpoint, cli, digest, long_text, uninterrupted, tmp_path
):
    folder, out = checkpoint("qwen2"), tmp_path / "killed"
    command = ("--text", long_text, *LONG, "--checkpoint-every", "0", "-o", out)
    before = digest(folder)
    ended = cli.interrupt("layers", folder, *command, after=out / SUMS.format("shuffled"), count=1, by=signal.SIGKILL)
    assert ended.returncode == -signal.SIGKILL
    [path] = out.glob(SUMS.format("shuffled"))
    assert not is_complete(path)
    assert not list(out.glob("tables/passes/shuffled-*"))
    assert not (out / "report.json").exists()
    assert not (out / "index.html").exists()
    finished = stamps(out)
    assert {"layers", "predictions"} <= {name.split(".")[-2] for name in finished}
    # Spoiled sums show that they are resumed, and not thrown away.
    spoiled = shutil.copytree(out, tmp_path / "spoiled")
    [path] = spoiled.glob(SUMS.format("shuffled"))
    with safe_open(path, "pt") as state:
        metadata = state.metadata()
    tensors = load_file(path)
    tensors["numbers"][0] += 1_000_000
    save_file(tensors, path, metadata)
    for target in (spoiled, out):
        succeed(cli("layers", folder, *command[:-1], target))
    counts = [rows(read_tables(o)["texts"], condition="shuffled")["n_tokens"][0] for o in (out, spoiled)]
    assert counts[1] - counts[0] == 1_000_000
    now = stamps(out)
    assert {name: now[name] for name in finished} == finished
    check_same(out, uninterrupted, **AGAIN)
    assert {path.name for path in out.iterdir()} == {"tables", "index.html", "report.json"}
    assert not list(out.rglob("*.tmp"))
    assert without_seconds(read_facts(out)) == without_seconds(read_facts(uninterrupted))
    assert digest(folder) == before


def test_ctrl_c_in_the_middle_and_the_same_command_again(checkpoint, cli, long_text, uninterrupted, tmp_path):
    out = tmp_path / "interrupted"
    command = ("--text", long_text, *LONG, "--checkpoint-every", "0", "-o", out)
    after = out / SUMS.format("real")
    result = cli.interrupt("layers", checkpoint("qwen2"), *command, after=after, count=1, by=signal.SIGINT)
    [path] = out.glob(SUMS.format("real"))
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1].startswith("stopped; "), result.stderr
    assert not is_complete(path)
    succeed(cli("layers", checkpoint("qwen2"), *command))
    check_same(out, uninterrupted, **AGAIN)


def test_two_shards_at_the_same_time_give_what_one_process_gives(
    checkpoint, run, cli, long_text, uninterrupted, tmp_path
):
    command = ("--text", long_text, *LONG, "-o", tmp_path / "out", "--shard")
    other = cli.start("layers", checkpoint("qwen2"), *command, "2/2")
    printed = run("layers", checkpoint("qwen2"), *command, "1/2")
    assert "index.html" in printed + succeed(other.end())
    check_same(tmp_path / "out", uninterrupted, **AGAIN)


def test_two_shards_that_finish_together_do_not_trip_each_other(checkpoint, run, cli, text, tmp_path):
    options = (*TINY, "--shuffles", "2", "--no-random-weights", "--batch", "1")
    command = ("--text", text, *options, "-o", tmp_path, "--shard")
    for number in (1, 2):
        run("layers", checkpoint("qwen2"), *command, f"{number}/2")
    shutil.rmtree(tmp_path / "tables")  # all sums are there: both begin with the tables
    other = cli.start("layers", checkpoint("qwen2"), *command, "2/2")
    assert "index.html" in run("layers", checkpoint("qwen2"), *command, "1/2")
    assert "index.html" in succeed(other.end())
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_model_on_the_hub_is_fetched_once_and_gives_the_numbers_of_its_folder(
    checkpoint, hub, cli, text, studied, tmp_path
):
    commit = hub.add("owner/layered", checkpoint("qwen2"))
    succeed(cli("layers", "owner/layered", "--text", text, *SMALL, "-o", tmp_path / "out"))
    facts, here = read_facts(tmp_path / "out"), read_tables(studied("qwen2"))
    assert (facts["model"], facts["revision"]) == ("owner/layered", commit.sha)
    for name, frame in read_tables(tmp_path / "out").items():
        folders = (f.drop("model", "other_model", strict=False) for f in (frame, here[name]))
        assert_frame_equal(*folders, rel_tol=1e-6, abs_tol=1e-6)
    size = (checkpoint("qwen2") / "model.safetensors").stat().st_size
    before = hub.bytes_sent("model.safetensors")
    assert size <= before < 2 * size
    succeed(cli("layers", "owner/layered", "--text", text, *TINY, *BARE))
    assert hub.bytes_sent("model.safetensors") == before


def test_remote_code_runs_only_where_that_is_allowed(checkpoint, editable, cli, refused, text, tmp_path):
    marker = tmp_path / "it-ran"
    stranger = damage.to_remote_code(editable(checkpoint("llama"), "stranger"), marker)
    refused(cli("layers", stranger, "--text", text, *TINY), "--trust-remote-code")
    assert not marker.exists()
    succeed(cli("layers", stranger, "--text", text, *TINY, *BARE, "--trust-remote-code"))
    assert marker.exists()
