"""Texts that the study of damage reads and writes: windows, generated text, and continuations of prompts."""

import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from damage_oracles import (
    CASES,
    LENGTH,
    PROMPTS,
    WINDOWS,
    changed,
    continued,
    damage_settings,
    numbers,
    places,
    prompt_ids,
    rows,
    sides,
    stock,
    tables_of,
)
from models import TEXT, read_json, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer

import dimscope
from dimscope.studies.damage.inputs import damage_inputs
from dimscope.studies.damage.run import GenerationProgress
from dimscope.studies.damage.tables import GENERATIONS

pytestmark = pytest.mark.slow  # whole commands or studies


# ---- texts that are read -------------------------------------------------------------------------------------------


def test_from_the_start_means_the_first_windows(study, lively, tmp_path):
    folder = lively("tied, with positions")
    table = {"input": changed("truncate:8", tables_of(folder)["input"], 0)}
    losses = []
    for from_start in (True, False):
        _, tables = study(folder, tmp_path / str(from_start), "truncate:8", from_start=from_start)
        plain = stock(folder, from_start=from_start)
        expected = plain.evaluated(plain.log_probs({}), plain.log_probs(table))
        point = numbers(tables["damage"], change="truncate 8", text="keeper.txt")
        for metric in ("loss", "bits per byte", "KL"):
            assert point[metric] == pytest.approx(expected[metric][0], rel=1e-4)
        losses.append(point["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("from_start", [True, False])
def test_the_default_is_four_windows_of_the_models_context(lively, tmp_path, from_start):
    (tmp_path / "long.txt").write_text(TEXT * 2)
    settings = damage_settings(str(tmp_path / "long.txt"), windows=None, length=None, from_start=from_start)
    inputs = damage_inputs(dimscope.open(str(lively("untied"))), settings)
    assert (inputs.length, [len(w.ids) for w in inputs.windows["long.txt"]]) == (64, [64] * 4)


def test_the_model_is_evaluated_on_each_of_several_texts(study, lively, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    folder = lively("untied")
    facts, tables = study(
        folder, tmp_path / "out", "truncate:8", "noise:1", texts=(text, str(other), "generated"), draws=1
    )
    names = ["keeper.txt", "other.txt", "generated"]
    assert list(facts["texts"]) == names
    frame = tables["damage"]
    for change, changed_tables in (("undamaged", []), ("truncate 8", ["input"]), ("noise 1", ["input"])):
        point = rows(frame, change=change)
        assert point["text"].drop_nulls().unique(maintain_order=True).to_list() == names
        assert point["table"].drop_nulls().unique().to_list() == changed_tables
        assert (point["text"].is_null() != point["table"].is_null()).all()
    table = tables_of(folder)["input"]
    for name, of in (("keeper.txt", TEXT), ("other.txt", TEXT[::-1])):
        plain = stock(folder, of=of)
        expected = plain.evaluated(plain.log_probs({}), plain.log_probs({"input": changed("truncate:8", table, 0)}))
        assert numbers(frame, change="truncate 8", text=name)["loss"] == pytest.approx(expected["loss"][0], rel=1e-4)
    assert tables["claims"]["text"].unique(maintain_order=True).to_list() == names
    assert set(tables["breaking"]["text"]) == set(names)


def test_the_text_that_the_model_writes_is_sampled_from_it_and_seeded(study, lively, tmp_path):
    """The same windows by stock `generate`: from the begin token on, its own distribution, no end token inside.

    Half of all tokens end a text here, so that they would be met.
    """
    folder = shutil.copytree(lively("tied, with positions"), tmp_path / "model")
    config = read_json(folder / "generation_config.json")
    ends = sorted({config["eos_token_id"], *range(256)} - {config["bos_token_id"]})
    write_json(folder / "generation_config.json", {**config, "eos_token_id": ends})
    frames = {
        seed: study(folder, tmp_path / str(seed), "truncate:8", texts=("generated",), seed=seed)[1]["damage"]
        for seed in (5, 6)
    }
    loss = {seed: numbers(frame, change="undamaged", text="generated")["loss"] for seed, frame in frames.items()}
    assert loss[5] != pytest.approx(loss[6], rel=1e-3)
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
    expected = own.evaluated(own.log_probs({}), own.log_probs({"input": changed("truncate:8", table, 0)}))
    point = numbers(frames[5], change="truncate 8", text="generated")
    for metric in ("loss", "loss rise", "KL"):
        assert point[metric] == pytest.approx(expected[metric][0], rel=1e-3)
    assert set(rows(frames[5], metric="loss")["n_tokens"]) == {WINDOWS * (LENGTH - 1)}


# ---- continuations of prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["untied", "tied, with positions"])
def test_continuations_are_those_of_stock_generate_with_the_changed_table(studied, lively, table_after, case):
    folder, frame = lively(case), studied(case)[2]["generations"]
    assert dict(frame.schema) == GENERATIONS | {"n_same": pl.Int64}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = continued(folder, {}, prompt_ids(folder), 6)
    continuations = []
    for change, side, seed in places(frame):
        if change not in ("undamaged", "truncate 8", "project 20", "noise 0.5", "truncate 16 + shift 1"):
            continue
        tables = {} if change == "undamaged" else {s: table_after(case, s, change, seed) for s in sides(side)}
        expected = continued(folder, tables, prompt_ids(folder), 6)
        point = rows(frame, change=change, side=side, seed=seed)
        assert point["prompt"].to_list() == list(PROMPTS)
        assert point["number"].to_list() == [0, 1]
        assert point["chat"].to_list() == [False, False]
        assert point["ids"].to_list() == expected, (change, side, seed)
        assert point["continuation"].to_list() == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
        assert point["n_tokens"].to_list() == list(map(len, expected))
        shared = [
            next((n for n in range(len(a)) if a[: n + 1] != b[: n + 1]), len(a))
            for a, b in zip(expected, own, strict=True)
        ]
        assert point["n_same"].to_list() == shared
        continuations += expected
    assert len(continuations) == 2 * (1 + (4 if case == "untied" else 2) * len(CASES[case].sides))
    assert len(set(map(tuple, continuations))) > 4  # changes change the texts
    # Prompts are continued at one seed of what is random, and at everything else.
    assert places(frame) == [place for place in places(studied(case)[2]["damage"]) if place[2] in (None, 0)]


def test_sampled_continuations_are_seeded(study, lively, tmp_path):
    folder = lively("tied, with positions")
    table = {"input": changed("truncate:24", tables_of(folder)["input"], 0)}
    texts = {}
    for seed in (3, 4):
        settings = {"prompts": PROMPTS, "draws": 1, "decoding": "sample", "new_tokens": 8, "seed": seed, "windows": 1}
        _, tables = study(folder, tmp_path / str(seed), "truncate:24", **settings)
        for change, tables_of_it in (("undamaged", {}), ("truncate 24", table)):
            expected = continued(folder, tables_of_it, prompt_ids(folder), 8, seed)
            assert rows(tables["generations"], change=change)["ids"].to_list() == expected
        texts[seed] = rows(tables["generations"], change="undamaged")["continuation"].to_list()
    assert texts[3] != texts[4]


def test_repetition_is_the_share_of_fours_that_occurred_before(study, lively, tmp_path):
    """A table of zeros makes every token the same to the model: it repeats one word."""
    _, tables = study(lively("untied"), tmp_path, "scale:0", prompts=PROMPTS[:1], new_tokens=12, windows=1)
    for row in tables["generations"].iter_rows(named=True):
        fours = [tuple(row["ids"][i : i + 4]) for i in range(len(row["ids"]) - 3)]
        assert row["repetition"] == (pytest.approx(1 - len(set(fours)) / len(fours)) if fours else None)


@pytest.mark.parametrize("text_draws", [1, 2, 9])
def test_prompts_are_continued_at_the_first_seeds(lively, text, text_draws):
    settings = damage_settings(
        text, "noise:1", "truncate:8", prompts=PROMPTS, new_tokens=4, draws=3, seed=7, text_draws=text_draws
    )
    inputs = damage_inputs(dimscope.open(str(lively("untied"))), settings)
    seeds = [point.seed for point in inputs.points if inputs.continues_prompts(point)]
    assert seeds == [None, *range(7, 7 + min(text_draws, 3)), None]


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


def test_prompts_are_put_into_the_template_unless_they_are_to_be_plain(study, chatty, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    settings = {"prompts": ("Count the ships",), "new_tokens": 5, "windows": 1}
    templated = "<|user|>Count the ships\n<|assistant|>"

    def bare(whole: str) -> list[int]:
        return tokenizer(whole, add_special_tokens=False)["input_ids"]

    cases = {
        "auto": ({}, True, bare(templated)),
        "system": ({"system": "Be brief."}, True, bare("<|system|>Be brief.\n" + templated)),
        "plain": ({"chat": False}, False, tokenizer("Count the ships")["input_ids"]),
    }
    texts = []
    for name, (options, chat, ids) in cases.items():
        facts, tables = study(chatty, tmp_path / "out", "truncate:24", **settings, **options)
        point = rows(tables["generations"], change="undamaged")
        assert point["chat"].to_list() == [chat]
        assert point["ids"].to_list() == continued(chatty, {}, [ids], 5), name
        assert (facts["template"], facts["chat"]) == (True, chat)
        texts.append(point["continuation"][0])
    assert len(set(texts)) == 3


def test_the_system_prompt_of_a_preset_is_left_out_without_a_template(lively, text):
    settings = damage_settings(text, "rotate", prompts=("Hello",), new_tokens=4, system="Be brief.", preset="notebook")
    inputs = damage_inputs(dimscope.open(str(lively("untied"))), settings)
    assert [(prompt.text, prompt.chat) for prompt in inputs.prompts] == [("Hello", False)]


def test_a_watcher_sees_every_continuation_grow_beside_that_of_the_undamaged_model(study, lively, tmp_path):
    heard: list[GenerationProgress] = []
    _, tables = study(
        lively("untied"), tmp_path, "truncate:8", "noise:1", watch=heard.append, prompts=PROMPTS, draws=2, new_tokens=4
    )
    final = {w.change: w for w in heard}
    assert list(final) == ["undamaged", "truncate 8", "noise 1"]
    frame = tables["generations"]
    own = rows(frame, change="undamaged")["continuation"].to_list()
    for number, (change, last) in enumerate(final.items(), 1):
        assert (last.number, last.total, last.prompts) == (number, 4, PROMPTS)
        assert last.texts == rows(frame, change=change)["continuation"].to_list()
        assert last.undamaged == (None if change == "undamaged" else own)
        assert (last.seconds_left is None) == (number == 1)
        grown = [w.texts for w in heard if w.change == change]
        assert len(grown) == 4  # one for each new token
    assert min(w.seconds_left for w in heard if w.seconds_left is not None) > 0
