"""The study of hidden layers as a library function: its passes on disk, resumed, in shards, and the facts about them."""

import math
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from models import TEXT
from polars.testing import assert_frame_equal
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import dimscope
from dimscope import storage as results
from dimscope.activations import passes
from dimscope.cli.terminal import Output, print_tables
from dimscope.errors import InvalidArgument
from dimscope.storage import versions
from dimscope.studies.layers import passes as layer_passes
from dimscope.studies.layers.plan import plan_layers
from dimscope.studies.layers.rows import LAYERS, PREDICTIONS
from dimscope.studies.layers.run import TABLES
from dimscope.studies.layers.settings import PRESETS, LayersSettings
from dimscope.studies.layers.similarity import SIMILARITY
from dimscope.studies.layers.study import LAYERS as LAYERS_STUDY
from dimscope.studies.layers.summary import summary_frame
from dimscope.studies.study import Monitor, run_study

pytestmark = pytest.mark.slow  # whole commands or studies

HOME = Path(str(files("dimscope.builtin")))
SMALL = {"texts": ("builtin:prose",), "windows": 4, "length": 32, "shuffles": 2, "device": "cpu"}
CONDITIONS = [("real", None), ("shuffled", 0), ("shuffled", 1), ("shuffled across", 0), ("random weights", 0)]


AGAIN = {"rel_tol": 1e-6, "abs_tol": 1e-6}  # float32 states of a model that was loaded anew, wherever in memory it lies
SUMS = {"rel_tol": 1e-9, "abs_tol": 1e-9}  # float64 sums of the same states in another order


def study(model, folder, others=(), announce=lambda line: None, **settings):
    compare = tuple(dimscope.open(other) for other in others)
    options = LayersSettings(**{**SMALL, "compare": compare, **settings})
    result = run_study(LAYERS_STUDY, dimscope.open(model), options, out=folder, monitor=Monitor(announce))
    return {**result.report, "waiting": list(result.waiting)}, result.tables


def same(left, right, **tolerance):
    assert set(left) == set(right)
    for name in left:
        assert_frame_equal(left[name], right[name], **(tolerance or {"check_exact": True}))


def value(frame, metric, preprocess="raw", **where):
    (found,) = frame.filter(metric=metric, preprocess=preprocess, centred=True, **where)["value"]
    return found


@pytest.fixture(scope="module")
def tiny(checkpoint):
    """Return `tiny(family="llama", **arguments)`: a checkpoint whose weights are not those of a twin of seed 0."""
    return lambda family="llama", **arguments: checkpoint(family, seed=7, **arguments)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Return `whole(family)`: folder, facts and tables of a study of a tiny model with everything there is, each once."""

    @cache
    def get(family):
        folder = tmp_path_factory.mktemp("whole")
        return folder, *study(tiny(family), folder, curve=True)

    return get


@pytest.fixture(scope="module")
def one_by_one(tiny, tmp_path_factory):
    """Return the tables of the same study with one window at once."""
    return study(tiny(), tmp_path_factory.mktemp("one"), curve=True, batch=1)[1]


@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    """Return the facts and tables of one window of both built-in texts, in the notebook's setting but for the thresholds."""
    return study(
        "builtin", tmp_path_factory.mktemp("builtin"), texts=("builtin:prose", "builtin:html"), windows=1, length=None,
        shuffles=1, random_weights=False, reservoir=256,
    )  # fmt: skip


@pytest.fixture(scope="module")
def several(tiny, tmp_path_factory):
    """Return facts, tables and announcements of a study of two models on two texts."""
    lines = []
    texts = ("builtin:prose", "builtin:html")
    options = {"shuffles": 1, "shuffles_across": 0, "random_weights": False, "logits": False}
    out = tmp_path_factory.mktemp("several")
    facts, tables = study(tiny(), out, [tiny("gpt2")], texts=texts, announce=lines.append, **options)
    return facts, tables, lines


# ---- tables --------------------------------------------------------------------------------------------------------


def test_the_tables_are_those_of_the_passes_one_below_the_other(whole):
    folder, _, tables = whole("llama")
    assert list(tables) == list(TABLES)
    for name, table in tables.items():
        parts = [pl.read_parquet(p) for p in sorted((folder / "tables/passes").glob(f"*.{name}.parquet"))]
        assert_frame_equal(pl.concat(parts), table, check_row_order=False, check_exact=True)
        assert_frame_equal(pl.read_parquet(folder / f"tables/{name}.parquet"), table, check_exact=True)
        if name not in ("similarity", "type_spectra"):
            order = table.select("condition", "seed").unique(maintain_order=True).rows()
            assert order == [
                c for c in CONDITIONS if not c[1] or name in ("layers", "texts", "confidence", "predictions")
            ]
    assert not (folder / "state").exists()
    written = {p.name for p in folder.rglob("*") if p.is_file()}
    assert all(name.endswith((".parquet", ".json")) for name in written)


def test_the_tables_have_their_schemas_and_no_nan(whole, builtin):
    for tables in (whole("llama")[2], whole("gpt2")[2], builtin[1]):
        for name, schema in {"layers": LAYERS, "predictions": PREDICTIONS, "similarity": SIMILARITY}.items():
            assert dict(tables[name].schema) == schema
        for name, table in tables.items():
            assert len(table) > 0
            for column, dtype in table.schema.items():
                if dtype.is_float():
                    assert table[column].is_finite().all(), (name, column)  # nulls are neither


def test_every_site_of_every_pass_is_in_the_table_under_its_name(whole):
    _, _, tables = whole("llama")
    sites = [(0, "embeddings"), (1, "block 1"), (2, "block 2, before final norm"), (3, "after final norm")]
    for part in tables["layers"].partition_by("condition", "seed"):
        assert part.select("layer", "site").unique(maintain_order=True).rows() == sites
    assert set(tables["layers"]["dim"]) == {32}


def test_further_draws_have_raw_numbers_only(whole):
    _, _, tables = whole("llama")
    further = tables["layers"].filter(pl.col("seed") > 0)
    assert set(further["preprocess"]) == {"raw", "one state per type"}
    uncentred = further.filter(~pl.col("centred"))["metric"]
    assert set(uncentred) == {"mean cosine", "massive activations", "largest activation", "median norm"}
    for name in ("scree", "similarity", "curve"):
        assert set(tables[name].get_column("seed", default=pl.Series([0]))) <= {0, None}


def test_draws_differ_and_real_text_is_not_shuffled(whole):
    layers = whole("llama")[2]["layers"]
    rows = layers.filter(metric="participation ratio", preprocess="raw", centred=True, layer=2)
    assert rows.select("condition", "seed").rows() == CONDITIONS
    assert rows["value"].n_unique() == len(CONDITIONS)


def test_the_texts_table_is_what_the_tokenizer_says(whole, tiny):
    texts = whole("llama")[2]["texts"]
    ids = ids_of(tiny(), 4, 32)
    unique = [len(set(w)) for w in ids.tolist()]
    assert texts.select("condition", "seed").rows() == CONDITIONS
    for row in texts.iter_rows(named=True):
        assert (row["n_windows"], row["window_length"], row["n_tokens"], row["bos"]) == (4, 32, 128, "<s>")
        assert row["unique_in_all"] == len(set(ids.ravel().tolist()))
        if row["condition"] != "shuffled across":  # which deals other tokens to a window
            assert row["unique_tokens"] == pytest.approx(np.mean(unique))
            assert row["unique_tokens_sd"] == pytest.approx(np.std(unique, ddof=1))


def ids_of(folder, count, length, text=None):
    """Return the ids of windows from the middle of `count` equal parts, the tokenizer's own prefix before each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text or (HOME / "texts/prose.txt").read_text(), add_special_tokens=False)["input_ids"]
    prefix = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    room = length - len(prefix)
    starts = [(2 * i + 1) * len(ids) // (2 * count) - room // 2 for i in range(count)]
    return np.array([[*prefix, *ids[s : s + room]] for s in starts])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bits_per_byte_loss_and_confidence_by_hand(whole, tiny, family):
    """The bytes are those of the tokens whose loss is taken: all but the first of a window, which is BOS or unpredicted."""
    _, _, tables = whole(family)
    folder = tiny(family)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.from_numpy(ids_of(folder, 4, 32))
    with torch.no_grad():
        logits = model.eval()(ids).logits.double()
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").numpy()
    text = (HOME / "texts/prose.txt").read_text()
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    n_bytes, room = 0, 32 if family == "gpt2" else 31
    for i in range(4):
        start = (2 * i + 1) * len(spans["input_ids"]) // 8 - room // 2
        first, last = start + (family == "gpt2"), start + room - 1
        ends = spans["offset_mapping"][first - 1][1], spans["offset_mapping"][last][1]
        n_bytes += len(text[slice(*ends)].encode())
    told = dict(tables["predictions"].filter(condition="real").select("metric", "value").iter_rows())
    assert told["loss"] == pytest.approx(losses.mean(), rel=1e-6)  # logits are float32
    assert told["bits per byte"] == pytest.approx(losses.sum() / math.log(2) / n_bytes, rel=1e-6)
    best = logits.log_softmax(dim=2).amax(dim=2).flatten().numpy()
    assert told["max log-softmax"] == pytest.approx(best.mean(), rel=1e-6)
    confidence = tables["confidence"].filter(condition="real")
    bins = np.append(confidence["bin_left"], 0.0)
    assert bins[0] == pytest.approx(-math.log(512))
    np.testing.assert_array_equal(confidence["count"], np.histogram(best, bins)[0])
    for part in tables["confidence"].partition_by("condition", "seed"):
        assert (part["density"] * (part["bin_right"] - part["bin_left"])).sum() == pytest.approx(1, rel=1e-12)
        np.testing.assert_array_equal(part["bin_left"], confidence["bin_left"])


def test_the_curve_grows_up_to_the_sample(whole):
    curve = whole("llama")[2]["curve"]
    assert curve["n_tokens"].unique().sort().to_list() == [64, 124]  # 4 windows of 32 without their first
    assert set(curve["condition"]) == {c for c, _ in CONDITIONS}
    for part in curve.filter(metric="numerical rank").partition_by("layer", "condition"):
        assert part["value"].is_sorted()


# ---- what is known of a model --------------------------------------------------------------------------------------


def test_rotary_positions_leave_the_embeddings_a_permutation_of_rows_when_text_is_shuffled(builtin):
    """Layer 0 has the same spectrum real and shuffled, and its centred rank is unique tokens - 1, or the width."""
    _, tables = builtin
    for text in ("builtin prose", "builtin html"):
        scree = tables["scree"].filter(layer=0, text=text)
        shares = {c: scree.filter(condition=c)["share"].to_numpy() for c in ("real", "shuffled")}
        np.testing.assert_allclose(shares["shuffled"], shares["real"], rtol=0, atol=1e-9)
        (unique,) = tables["texts"].filter(text=text, condition="real")["unique_tokens"]
        for condition in ("real", "shuffled"):
            rank = value(tables["layers"], "numerical rank", layer=0, text=text, condition=condition)
            assert rank == min(unique - 1, 256)
        layers = tables["layers"].filter(text=text, layer=0, preprocess="raw", centred=True)
        real, shuffled = (dict(layers.filter(condition=c).select("metric", "value").iter_rows()) for c in shares)
        for name in ("participation ratio", "effective rank (entropy of lambda)", "stable rank", "variance count 95%"):
            assert shuffled[name] == pytest.approx(real[name], rel=1e-9)
        later = tables["layers"].filter(text=text, layer=3)
        ratios = [value(later, "participation ratio", condition=c) for c in ("real", "shuffled")]
        assert ratios[0] != pytest.approx(ratios[1], rel=1e-3)
    ranks = [
        value(tables["layers"], "numerical rank", layer=0, text=f"builtin {t}", condition="real")
        for t in ("prose", "html")
    ]
    assert ranks[0] == 256 > ranks[1]  # one of each kind


def test_absolute_positions_make_every_row_of_the_embeddings_another(tiny, tmp_path):
    folder = tiny("gpt2", hidden_size=96)
    _, tables = study(folder, tmp_path, windows=1, length=64, random_weights=False, shuffles=1)
    scree = tables["scree"].filter(layer=0)
    real, shuffled = (scree.filter(condition=c)["share"].to_numpy() for c in ("real", "shuffled"))
    assert np.abs(real - shuffled).max() > 1e-4
    (unique,) = tables["texts"].filter(condition="real")["unique_tokens"]
    assert value(tables["layers"], "numerical rank", layer=0, condition="real") == 63 > unique - 1


def test_the_twin_has_other_weights_that_its_seed_decides(tiny, tmp_path):
    options = {"shuffles": 1, "shuffles_across": 0, "windows": 2, "layers": "2", "logits": False}
    ranks = []
    for number, seed in enumerate((0, 0, 1)):
        _, tables = study(tiny(), tmp_path / str(number), seed=seed, **options)
        ranks.append({c: value(tables["layers"], "stable rank", condition=c) for c in tables["texts"]["condition"]})
    first, again, other = ranks
    assert first == pytest.approx(again, rel=1e-6)
    for condition in ("shuffled", "random weights"):
        assert first[condition] != pytest.approx(other[condition], rel=1e-3)
    assert first["real"] == pytest.approx(other["real"], rel=1e-6)
    assert first["real"] != pytest.approx(first["random weights"], rel=1e-3)


# ---- windows -------------------------------------------------------------------------------------------------------


def test_windows_at_once_make_no_difference_but_rounding(whole, one_by_one):
    """float32 products of other shapes differ by 1e-7 of a row; spectra of a hundred rows by 1e-5, counts by one at most."""
    one, four = one_by_one, whole("llama")[2]
    counts = pl.col("metric").str.contains("count|index|numerical rank")
    for name in ("texts", "scree", "predictions", "similarity"):
        assert_frame_equal(one[name], four[name], rel_tol=2e-4, abs_tol=1e-5)
    for name in ("layers", "curve"):
        assert_frame_equal(one[name].filter(~counts), four[name].filter(~counts), rel_tol=2e-4, abs_tol=1e-5)
        apart = one[name].filter(counts)["value"] - four[name].filter(counts)["value"]
        assert apart.abs().max() <= 1
        assert (apart == 0).mean() > 0.95


def plan(models, **settings):
    options = LayersSettings(**{**SMALL, **settings})
    return plan_layers([dimscope.open(model) for model in models], options)


def n_tokens(model, text):
    return len(AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"])


def test_every_text_gets_as_many_windows_as_the_shortest_has(tiny, tmp_path):
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text(TEXT[:900])
    long.write_text(TEXT * 3)
    fits = n_tokens(tiny(), TEXT[:900]) // 63
    assert 1 < fits < 8
    for sources, n_windows in (((short, long), fits), ((long,), 8)):
        planned = plan([tiny()], texts=tuple(map(str, sources)), windows=None, length=64)
        assert {p.source.n_windows for p in planned.passes} == {n_windows}
        assert {p.identity.text for p in planned.passes} == {source.name for source in sources}


def spans(planned, model):
    """Return the bytes at which the windows of a model begin and end."""
    source = next(p.source for p in planned.passes if p.model == model)
    return [(window.begin, int(window.ends[-1])) for window in source.windows()]


@pytest.mark.parametrize("windows", [None, "all"])
def test_every_model_reads_the_bytes_that_the_windows_of_the_studied_model_cover(tiny, tmp_path, windows):
    """The tokenizer of the other makes another number of tokens of them."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    models = [tiny("llama", vocab_size=320), tiny("gpt2")]
    longest = max(map(len, re.findall(r"\S+\s*", TEXT)))  # no token is longer
    for pair in (models, models[::-1]):
        planned = plan(pair, texts=(str(text),), windows=windows, length=16)
        assert [*dict.fromkeys(p.identity.model for p in planned.passes)] == [model.name for model in pair]
        own, other = spans(planned, 0), spans(planned, 1)
        assert len(own) == len(other) > 1
        for (begin, end), (other_begin, other_end) in zip(own, other, strict=True):
            assert begin <= other_begin < begin + longest
            assert end - longest < other_end <= end
        lengths = {len(window.ids) for window in planned.passes[-1].source.windows()}
        assert len(lengths) > 1
        assert spans(plan([pair[0]] * 2, texts=(str(text),), windows=windows, length=16), 1) == own


@pytest.mark.parametrize("windows", [2, "all"])
def test_windows_become_shorter_where_the_bytes_of_one_exceed_the_context_of_another_model(tiny, tmp_path, windows):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    models = [tiny("gpt2"), tiny("llama", max_position_embeddings=32)]
    planned = plan(models, texts=(str(text),), windows=windows, length=64)
    first, other = (next(p.source for p in planned.passes if p.model == model) for model in (0, 1))
    assert 16 < first.length < 64
    assert [
        line for line in planned.warnings if f"{first.length} tokens long, not 64" in line and models[1].name in line
    ]
    assert max(len(window.ids) for window in other.windows()) <= 32
    assert {len(window.ids) for window in first.windows()} == {first.length}


def test_the_loss_of_another_model_is_that_of_the_same_bytes(tiny, tmp_path):
    """In bits per byte, computed by transformers from the text of each window."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    pair, options = [tiny("gpt2"), tiny("llama")], {"shuffles": 0, "shuffles_across": 0, "random_weights": False}
    options |= {"texts": (str(text),), "windows": 3, "length": 24, "logits": True}
    _, tables = study(pair[0], tmp_path / "out", pair[1:], **options)
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    bits = n_bytes = 0
    for window in next(p.source for p in plan(pair, **options).passes if p.model == 1).windows():
        ids = window.ids[None]
        with torch.no_grad():
            bits += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1) / math.log(2)
        n_bytes += int(window.ends[-1]) - window.begin  # <s> predicts the first token too
    measured = tables["predictions"].filter(model=pair[1].name, metric="bits per byte", condition="real")
    assert measured["value"].to_list() == pytest.approx([bits / n_bytes], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_windows_stream_the_whole_text(tiny, tmp_path, family):
    """Llama's tokenizer puts <s> before each window, GPT-2's nothing."""
    path, lines = tmp_path / "long.txt", []
    path.write_text(TEXT * 2)
    options = {"windows": "all", "length": 16, "reservoir": 64, "shuffles": 1, "random_weights": False, "logits": False}
    _, tables = study(tiny(family), tmp_path / "out", texts=(str(path),), announce=lines.append, **options)
    n_windows = n_tokens(tiny(family), TEXT * 2) // (15 if family == "llama" else 16)
    assert n_windows > 100
    assert set(tables["texts"]["n_windows"]) == {n_windows}
    assert set(tables["texts"]["n_tokens"]) == {16 * n_windows}
    assert set(tables["texts"]["bos"]) == ({"<s>"} if family == "llama" else {None})
    assert tables["texts"]["condition"].to_list() == ["real", "shuffled", "shuffled across"]
    assert set(tables["layers"].filter(metric="stable rank", preprocess="raw")["n_tokens"]) == {16 * n_windows}
    assert "3 passes over whole texts" in lines[0]


def test_one_window_is_not_shuffled_across(tiny, tmp_path):
    facts, tables = study(tiny(), tmp_path, windows=1, random_weights=False)
    assert set(tables["texts"]["condition"]) == {"real", "shuffled"}
    assert facts["studies"]["layers"]["facts"]["rank_tolerance"] == "max(N, d) x eps(float32)"


def test_a_warning_has_the_bound_where_tokens_are_no_more_than_dimensions(tiny):
    models = [tiny(), tiny("gpt2", hidden_size=24)]  # 32 tokens are more than 24 dimensions
    [warning] = plan(models, windows=2, length=16).warnings
    assert "32 tokens for the 32 dimensions" in warning
    assert "N - 1 = 31" in warning
    assert plan(models, windows=2, length=17).warnings == ()


def test_what_does_not_fit_is_refused_before_anything_is_written(tiny, tmp_path):
    for message, others, settings in (
        ("^`length` must be at most 64, ", [], {"length": 65}),
        ("there is no layer 5", [tiny("gpt2")], {"layers": "5"}),  # which the compared model does not have
    ):
        with pytest.raises(InvalidArgument, match=message):
            study(tiny("llama", layers=4), tmp_path / "out", others, **settings)
    assert not list(tmp_path.rglob("*.parquet"))


# ---- on disk -------------------------------------------------------------------------------------------------------


def refuse(*args, **kwargs):
    raise AssertionError("no model is needed for what is finished")


def test_a_second_run_computes_nothing(whole, tiny, monkeypatch):
    folder, facts, tables = whole("llama")
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet")}
    for name in ("load_model", "randomly_initialised"):
        monkeypatch.setattr(layer_passes, name, refuse)
    again, found = study(tiny(), folder, curve=True)
    same(found, tables)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.parquet")} == stamps
    assert again["studies"]["layers"]["facts"] == facts["studies"]["layers"]["facts"]


def test_whatever_changes_a_pass_gives_it_another_name(tiny, tmp_path):
    """A pass is used again under its name, so every setting that its numbers depend on is in the name; thresholds are not."""
    text = tmp_path / "prose.txt"
    text.write_text(TEXT)
    names = {p.slug for p in plan([tiny()]).passes}
    changes = {"seed": 1, "length": 24, "layers": "0,2", "reservoir": 64, "windows": 3, "batch": 1, "logits": False,
               "dtype": "bfloat16", "texts": (str(text),)}  # fmt: skip
    for setting, changed in changes.items():
        assert names.isdisjoint(p.slug for p in plan([tiny()], **{setting: changed}).passes), setting
    for other in (tiny("gpt2"), tiny("llama", hidden_size=64)):
        assert names.isdisjoint(p.slug for p in plan([other]).passes)
    assert names == {p.slug for p in plan([tiny()], thresholds=(0.5,)).passes}


def test_another_seed_in_the_same_folder_gives_the_tables_of_a_fresh_one(tiny, tmp_path):
    options = {"windows": 2, "shuffles": 1, "random_weights": False, "shuffles_across": 0, "logits": False}
    study(tiny(), tmp_path / "out", **options)
    _, tables = study(tiny(), tmp_path / "out", **options, seed=1)
    _, fresh = study(tiny(), tmp_path / "fresh", **options, seed=1)
    same(tables, fresh, **AGAIN)


def test_tables_of_an_earlier_run_that_this_one_does_not_have_are_gone(tiny, tmp_path):
    study(tiny(), tmp_path, curve=True, shuffles=0, random_weights=False, shuffles_across=0)
    _, tables = study(tiny(), tmp_path, logits=False, shuffles=0, random_weights=False, shuffles_across=0)
    assert list(tables) == ["layers", "scree", "type_spectra", "texts", "similarity"]
    assert {p.stem for p in (tmp_path / "tables").glob("*.parquet")} == set(tables)


class Stop(Exception):
    """What ends a study in the middle, as a Ctrl-C or a full disk would."""


def breaking(function, after):
    """Return the function, which works so many times and then raises; and how often it was called."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if after is not None and len(calls) > after:
            raise Stop
        return function(*args, **kwargs)

    return wrapped, calls


@pytest.mark.parametrize("after", [7, 19])
def test_an_interrupted_study_goes_on_and_gives_the_same_tables(tiny, one_by_one, tmp_path, monkeypatch, after):
    """Five passes of four batches, with a checkpoint after every batch."""
    given = {"batch": 1, "checkpoint_every": 0.0, "curve": True}
    monkeypatch.setattr(passes, "SAVING_PART", 0)
    collect = passes.collect
    broken, _ = breaking(collect, after)
    monkeypatch.setattr(passes, "collect", broken)
    with pytest.raises(Stop):
        study(tiny(), tmp_path, **given)
    resumed, calls = breaking(collect, None)
    monkeypatch.setattr(passes, "collect", resumed)
    _, found = study(tiny(), tmp_path, **given)
    same(found, one_by_one, **SUMS)  # products round by where in memory the sums lie
    assert len(calls) == 20 - after
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("after", [2, 35])
def test_a_study_interrupted_while_it_writes_gives_the_same_tables(whole, tiny, tmp_path, monkeypatch, after):
    """Between the tables of a pass, and between those of the study: 7 + 7 + 4 + 6 + 7 of passes, and 7."""
    written, _ = breaking(results.write_table, after)
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_table", written)
        with pytest.raises(Stop):
            study(tiny(), tmp_path, curve=True)
    _, found = study(tiny(), tmp_path, curve=True)
    same(found, whole("llama")[2], **SUMS)


# ---- shards --------------------------------------------------------------------------------------------------------


def test_shards_give_the_tables_of_one_process(tiny, one_by_one, tmp_path):
    """In float64, another order of the same sums: 1e-9, but sqrt(eps) for what a sum of singular values of 0 is."""
    given = {"batch": 1, "curve": True}
    facts, nothing = study(tiny(), tmp_path / "two", shard=(0, 2), **given)
    assert (facts["waiting"], nothing) == (["2/2"], {})
    facts, found = study(tiny(), tmp_path / "two", shard=(1, 2), **given)
    assert not facts["waiting"]
    same(found, one_by_one, **SUMS)
    facts, again = study(tiny(), tmp_path / "two", shard=(0, 2), **given)
    same(again, found)
    assert not facts["waiting"]


def test_a_shard_with_nothing_to_do_is_none_the_worse(tiny, tmp_path):
    given = {"batch": 3, "shuffles": 0, "shuffles_across": 0}
    _, tables = study(tiny(), tmp_path / "one", **given)
    waiting = []
    for shard in (2, 0, 1):
        facts, found = study(tiny(), tmp_path / "three", shard=(shard, 3), **given)
        waiting.append(facts["waiting"])
    assert waiting == [["1/3", "2/3"], ["2/3"], []]
    same(found, tables, **SUMS)


def test_an_interrupted_shard_is_waited_for_and_goes_on(tiny, tmp_path, monkeypatch):
    """Three of six batches are its own; it has two of them, on disk, when it stops."""
    given = {
        "windows": 6,
        "batch": 1,
        "shuffles": 0,
        "random_weights": False,
        "shuffles_across": 0,
        "checkpoint_every": 0.0,
    }
    _, tables = study(tiny(), tmp_path / "one", **given)
    monkeypatch.setattr(passes, "SAVING_PART", 0)
    collect = passes.collect
    monkeypatch.setattr(passes, "collect", breaking(collect, 2)[0])
    with pytest.raises(Stop):
        study(tiny(), tmp_path / "two", shard=(1, 2), **given)
    monkeypatch.setattr(passes, "collect", collect)
    facts, _ = study(tiny(), tmp_path / "two", shard=(0, 2), **given)
    assert facts["waiting"] == ["2/2"]
    resumed, calls = breaking(collect, None)
    monkeypatch.setattr(passes, "collect", resumed)
    _, found = study(tiny(), tmp_path / "two", shard=(1, 2), **given)
    assert len(calls) == 1
    same(found, tables, **SUMS)


# ---- facts ---------------------------------------------------------------------------------------------------------


def test_the_facts_say_what_was_run(whole, tiny):
    _, facts, _ = whole("llama")
    told = facts["studies"]["layers"]["facts"]
    assert told == {
        "models": (tiny().name,), "texts": ("builtin prose",), "thresholds": (0.8, 0.9, 0.95, 0.99),
        "shuffles": 2, "window_length": 32, "bos": "<s>", "show_layer": 2, "rank_tolerance": "d x eps(float32)",
        "dtype": "float32", "device": "cpu", "preset": None, "windows": 4, "reservoir": 2048, "seed": 0, "layers": None,
    }  # fmt: skip
    assert (facts["studies"]["layers"]["warnings"], facts["versions"]) == ([], versions())
    assert (facts["model"], facts["hidden_size"], facts["vocab_size"]) == (str(tiny()), 32, 512)
    assert (facts["architecture"], facts["tied"], facts["dtype"], facts["revision"]) == (
        "LlamaForCausalLM",
        False,
        "F32",
        None,
    )
    assert facts["n_parameters"] == AutoModelForCausalLM.from_pretrained(tiny()).num_parameters()
    assert facts["studies"]["layers"]["seconds"] > 0
    assert whole("gpt2")[1]["studies"]["layers"]["facts"]["bos"] is None


@pytest.mark.parametrize(
    ("layers", "wanted", "chosen"),
    [(None, None, 2), (None, 10, 3), ("0,3", 1, 0), ("0,3", 2, 3), ("0,1,3", None, 1)],
)
def test_the_show_layer_is_the_nearest_that_there_is(tiny, tmp_path, layers, wanted, chosen):
    given = {"shuffles": 0, "random_weights": False, "shuffles_across": 0, "logits": False, "windows": 1}
    facts, _ = study(tiny(), tmp_path, layers=layers, show_layer=wanted, **given)
    assert facts["studies"]["layers"]["facts"]["show_layer"] == chosen


def test_the_notebooks_setting(tiny, tmp_path):
    settings = LayersSettings(**PRESETS["notebook"], preset="notebook", device="cpu", reservoir=128)
    assert (settings.windows, settings.shuffles, settings.shuffles_across, settings.random_weights) == (1, 1, 0, False)
    assert (settings.thresholds, settings.show_layer) == ((0.95,), 10)
    result = run_study(LAYERS_STUDY, dimscope.open(tiny(max_position_embeddings=512)), settings, out=tmp_path)
    facts, tables = result.report, result.tables
    told = facts["studies"]["layers"]["facts"]
    assert (told["show_layer"], told["preset"], told["window_length"]) == (
        3,
        "notebook",
        512,
    )  # 10 is beyond the norm
    assert list(told["texts"]) == ["builtin prose", "builtin html"]
    units = [(f"builtin {text}", condition) for text in ("prose", "html") for condition in ("real", "shuffled")]
    assert tables["texts"].select("text", "condition").rows() == units
    assert {m for m in tables["layers"]["metric"] if "count" in m} == {"variance count 95%"}
    summary = summary_frame(tables["layers"])
    assert "95%" in summary.columns
    assert not {"random", "sd"} & set(summary.columns)  # one draw has no spread


def test_texts_of_one_name_are_told_apart(tiny, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(TEXT if name == "one" else TEXT[::-1])
    sources = (*(str(tmp_path / name / "text.txt") for name in ("one", "two", "one")), "builtin:prose")
    given = {"shuffles": 0, "random_weights": False, "shuffles_across": 0}
    facts, tables = study(tiny(), tmp_path / "out", texts=sources, **given)
    names = [sources[0], sources[1], f"{sources[0]} (2)", "builtin:prose"]
    assert facts["studies"]["layers"]["facts"]["texts"] == tuple(names)
    assert tables["texts"]["text"].unique(maintain_order=True).to_list() == names
    first, other, again, _ = tables["layers"].partition_by("text")
    assert_frame_equal(first.drop("text"), again.drop("text"), **AGAIN)
    assert first["value"].to_list() != other["value"].to_list()


def test_models_of_one_title_are_told_apart(tiny, editable, tmp_path):
    source = tiny()
    copy = editable(source)
    given = {"shuffles": 0, "random_weights": False, "shuffles_across": 0}
    facts, tables = study(source, tmp_path / "out", [copy, copy], **given)
    names = [str(source), str(copy), f"{copy} (2)"]
    assert list(facts["studies"]["layers"]["facts"]["models"]) == names
    parts = tables["layers"].partition_by("model")
    assert [p["model"][0] for p in parts] == names
    for part in parts[1:]:
        assert_frame_equal(part.drop("model"), parts[0].drop("model"), **AGAIN)


def test_the_announcement_counts_passes_and_tokens(several, tiny):
    # per text: real, one shuffle, and the other model's real; 4 windows of 32 each, and the same bytes for the other
    _, tables, (lines,) = several
    first, other = lines.splitlines()
    assert f": 4 passes, {4 * 4 * 32:,} tokens on cpu (float32): " in first
    n_other = tables["texts"].filter(pl.col("model").str.starts_with("gpt2"))["n_tokens"].sum()
    assert f": 2 passes, {n_other:,} tokens on cpu (float32): " in other


# ---- the summary ---------------------------------------------------------------------------------------------------


def test_the_summary_is_the_table_layer_by_layer(whole):
    layers = whole("llama")[2]["layers"]
    summary = summary_frame(layers)
    assert summary.columns == [
        "model", "text", "layer", "N", "95%", "shuffled", "sd", "random", "noise", "rank", "ratio", "TwoNN"
    ]  # fmt: skip
    assert summary["layer"].to_list() == ["emb", "1", "2", "norm"]
    for layer, row in enumerate(summary.iter_rows(named=True)):
        of = layers.filter(layer=layer)
        draws = [value(of, "variance count 95%", condition="shuffled", seed=i) for i in (0, 1)]
        assert row["95%"] == value(of, "variance count 95%", condition="real")
        assert row["shuffled"] == pytest.approx(np.mean(draws))
        assert row["sd"] == pytest.approx(np.std(draws, ddof=1))
        assert row["random"] == value(of, "variance count 95%", condition="random weights")
        assert (
            row["noise"]
            == of.filter(metric="variance count 95%", condition="real", preprocess="raw", centred=True)["null"][0]
        )
        assert row["rank"] == value(of, "numerical rank", condition="real")
        assert row["ratio"] == value(of, "participation ratio, corrected", condition="real")
        assert row["TwoNN"] == value(of, "TwoNN, maximum likelihood", condition="real", preprocess="one state per type")
        assert row["N"] == 128


def test_the_summary_of_several_models_and_texts_has_a_row_for_each_site(several, tiny):
    summary = summary_frame(several[1]["layers"])
    assert len(summary) == 2 * 2 * 4
    assert summary.select("model", "text").unique(maintain_order=True).height == 4
    other = summary.filter(pl.col("model") == tiny("gpt2").name)
    assert other["shuffled"].null_count() == len(other) == 8
    assert other["95%"].null_count() == 0


def test_the_summary_of_a_large_model_breaks_no_word_at_80_columns(whole, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    large = {name: pl.col(name) + 1000.37 for name in ("value", "null")}
    summary = summary_frame(whole("llama")[2]["layers"].with_columns(n_tokens=pl.lit(65_536), **large))
    print_tables(Output({}, {"dimensions 1": summary}), 40)
    lines = capsys.readouterr().out.splitlines()
    columns = ["layer", "N", "95%", "shuffled", "sd", "random", "noise", "rank", "ratio", "TwoNN"]
    assert columns in [line.split() for line in lines]
    assert max(map(len, lines)) <= 80


def test_the_summary_has_the_largest_share_where_95_percent_was_not_asked_for(tiny, tmp_path):
    given = {"shuffles": 0, "random_weights": False, "shuffles_across": 0, "logits": False}
    _, tables = study(tiny(), tmp_path, thresholds=(0.9, 0.5), **given)
    summary = summary_frame(tables["layers"])
    assert summary.columns == ["model", "text", "layer", "N", "90%", "noise", "rank", "ratio", "TwoNN"]
    counts = tables["layers"].filter(metric="variance count 90%", preprocess="raw", centred=True)
    assert summary["90%"].to_list() == counts["value"].to_list()
