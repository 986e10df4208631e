"""What travels from the hub: headers for an inspect, headers and one table for a study, nothing the second time."""

from __future__ import annotations

import json
from pathlib import Path

import models
import numpy as np
import polars as pl
import pytest
import torch
import transformers

pytestmark = pytest.mark.slow  # whole commands or studies

VOCABULARY, WIDTH, LAYERS, INNER = 6000, 256, 16, 1_000_000
TABLE = VOCABULARY * WIDTH * 2  # bytes in bfloat16
GUESS = 100_000  # bytes of a file that one look at its header may take
SMALL_FILES = 200_000  # config, index, tokenizer, answers of the API


def write_giant(folder: Path) -> Path:
    """Write an untied Llama of 25 GB in eight shards: all but its two tables are holes in sparse files."""
    folder.mkdir()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    models.write_tokenizer(folder, "byte_bpe", 500)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    weight_map = {}
    for number in range(8):
        name = f"model-{number + 1:05}-of-00008.safetensors"
        held = [n for at, n in enumerate(shapes) if at * 8 // len(shapes) == number]
        # the embedding table is not the first thing in its file
        streams = {n: stream(n, shapes[n]) for n in reversed(held)}
        models.write_safetensors(folder / name, streams)
        weight_map |= dict.fromkeys(held, name)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    models.write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return folder


def stream(name: str, shape: tuple[int, ...]) -> models.Stream:
    tables = {"model.embed_tokens.weight": 1, "lm_head.weight": 2}
    if name not in tables:
        return models.Stream(shape, torch.bfloat16, None)
    return models.Stream(shape, torch.bfloat16, lambda: models.row_blocks(*shape, None, tables[name]))


@pytest.fixture(scope="module")
def giant(tmp_path_factory) -> Path:
    folder = write_giant(tmp_path_factory.mktemp("giant") / "model")
    assert sum(path.stat().st_size for path in folder.iterdir()) > 24e9
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 10e6
    return folder


def weights_sent(hub) -> int:
    return sum(request.bytes_sent for request in hub.asked() if request.path.endswith(".safetensors"))


def test_inspect_reads_headers_only(giant, hub, cli):
    hub.add("giant/inspected", giant)
    before = weights_sent(hub)
    result = cli("inspect", "giant/inspected", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["n_parameters"] > 12e9
    assert weights_sent(hub) - before <= 8 * GUESS
    ranges = [r.range for r in hub.asked() if r.path.endswith(".safetensors") and r.method == "GET"]
    assert all(ranges)


def test_a_study_transfers_its_table_once_and_never_the_rest(giant, hub, cli, tmp_path):
    hub.add("giant/studied", giant)
    before, all_before = weights_sent(hub), hub.bytes_sent()
    first = cli("tokens", "giant/studied", "--vectors", "-o", tmp_path)
    assert first.returncode == 0, first.stderr
    sent = weights_sent(hub) - before
    assert TABLE <= sent <= TABLE + 8 * GUESS
    assert hub.bytes_sent() - all_before <= TABLE + 8 * GUESS + SMALL_FILES
    vectors = pl.read_parquet(tmp_path / "tokens.parquet")["vector"].to_numpy()
    table = torch.cat(list(models.row_blocks(VOCABULARY, WIDTH, None, 1))).bfloat16().float().numpy()
    np.testing.assert_array_equal(vectors, table)
    before = weights_sent(hub)
    for command in ("tokens", "spectrum"):
        again = cli(command, "giant/studied", "--json")
        assert again.returncode == 0, again.stderr
    assert weights_sent(hub) - before <= 2 * 8 * GUESS
    before = weights_sent(hub)
    assert cli("tokens", "giant/studied", "--side", "output").returncode == 0
    assert TABLE <= weights_sent(hub) - before <= TABLE + 8 * GUESS


def test_a_report_transfers_both_tables_and_a_rerun_neither(giant, hub, cli, tmp_path):
    hub.add("giant/reported", giant)
    before = weights_sent(hub)
    result = cli("report", "giant/reported", "-o", tmp_path, "--embedding.knn-sample", "50")
    assert result.returncode == 0, result.stderr
    assert 2 * TABLE <= weights_sent(hub) - before <= 2 * TABLE + 8 * GUESS
    before = weights_sent(hub)
    assert cli("report", "giant/reported", "-o", tmp_path, "--embedding.knn-sample", "50").returncode == 0
    assert weights_sent(hub) - before <= 8 * GUESS


def test_a_broken_download_goes_on_where_it_stopped(giant, hub, cli, refused, tmp_path):
    hub.add("giant/broken", giant)
    hub.abort_bodies(2_500_000)  # longer than a header's request, shorter than the table
    stopped = cli("tokens", "giant/broken", "-o", tmp_path / "out")
    refused(stopped, "giant/broken")
    assert not (tmp_path / "out").exists()
    before = weights_sent(hub)
    resumed = cli("tokens", "giant/broken", "--vectors", "-o", tmp_path / "out")
    assert resumed.returncode == 0, resumed.stderr
    # the last megabyte on the way when the connection broke may be lost, what had come before is not asked for again
    assert weights_sent(hub) - before <= TABLE - 1_400_000 + 8 * GUESS
    vectors = pl.read_parquet(tmp_path / "out" / "tokens.parquet")["vector"].to_numpy()
    table = torch.cat(list(models.row_blocks(VOCABULARY, WIDTH, None, 1))).bfloat16().float().numpy()
    np.testing.assert_array_equal(vectors, table)


def test_a_connection_that_breaks_in_a_header_is_one_line(giant, hub, cli, forked_python, refused):
    hub.add("giant/cut", giant)
    hub.abort_bodies(50, times=1000)
    impatient = (
        "import runpy, time; time.sleep = lambda seconds: None; runpy.run_module('dimscope', run_name='__main__')"
    )
    result = forked_python("-c", impatient, "inspect", "giant/cut")  # the client sleeps before it asks again
    hub.aborts_left = 0
    refused(result, "giant/cut")
    assert cli("inspect", "giant/cut").returncode == 0
