"""Damaged, incomplete and contradictory checkpoints through the command line: one line, exit code 2, nothing touched."""

from __future__ import annotations

import json

import damage
import models
import pytest
import torch

pytestmark = pytest.mark.slow  # whole commands or studies


def test_a_missing_folder_a_missing_file_and_a_cut_network(cli, refused, tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    for name in ("./nowhere", "/nowhere/at/all", "a/b/c", "spaces in a name", "x" * 3000):
        refused(cli("inspect", name), name[:60], "no such folder")
    refused(cli("inspect", tmp_path / "notes.txt"), "notes.txt", "file")
    refused(cli("inspect", tmp_path / "empty"), "empty", "config.json")
    refused(cli("tokens", "somebody/some-model", "-o", tmp_path / "out"), "somebody/some-model", "hub", "connection")
    assert not (tmp_path / "out").exists()


def test_the_interpreter_itself_answers_with_one_line_and_exit_code_2(run_cli, refused, tmp_path):
    refused(run_cli("report", tmp_path / "nowhere"), "--out is required")  # before torch is imported


def test_a_missing_shard(checkpoint, editable, refuses):
    folder = editable(checkpoint("llama", sharded=True))
    refuses(folder, folder, damage.drop_shard(folder), "missing")


def test_shards_without_their_index(checkpoint, editable, refuses):
    folder = editable(checkpoint("llama", sharded=True))
    (folder / damage.INDEX).unlink()
    refuses(folder, folder, damage.INDEX)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.999])
def test_truncated_safetensors(checkpoint, editable, refuses, keep):
    folder = editable(checkpoint("qwen2"))
    damage.truncate(folder / "model.safetensors", keep)
    refuses(folder, folder, "model.safetensors")


def test_a_truncated_shard_that_holds_no_table(checkpoint, editable, refuses):
    folder = editable(checkpoint("llama", sharded=True))
    shard = damage.truncate(damage.file_of(folder, "model.norm.weight"), 0.6)
    refuses(folder, folder, shard.name, "truncated", command="inspect")


HEADERS = {
    "flipped bytes": damage.flip_header_bytes,
    "an absurd length": damage.claim_header_length,
    "a length beyond the file": lambda path: damage.claim_header_length(path, 90_000_000),
    "a length of zero": lambda path: damage.claim_header_length(path, 0),
    "no JSON object": lambda path: path.write_bytes((8).to_bytes(8, "little") + b"[1,2,3] "),
    "deeply nested JSON": lambda path: path.write_bytes((99_000).to_bytes(8, "little") + b"[" * 99_000),
    "a shape of strings": lambda path: damage.edit_header(path, lambda h: first(h).update(shape=["many", "rows"])),
    "a negative shape": lambda path: damage.edit_header(path, lambda h: first(h).update(shape=[-512, -32])),
    "offsets backwards": lambda path: damage.edit_header(path, lambda h: first(h)["data_offsets"].reverse()),
    "offsets beyond the file": lambda path: damage.edit_header(
        path, lambda h: first(h).update(data_offsets=[0, 1 << 40])
    ),
    "offsets with a fraction": lambda path: damage.edit_header(path, lambda h: shift(first(h), 0.5)),
    "no dtype": lambda path: damage.edit_header(path, lambda h: first(h).pop("dtype")),
    "a shape that its bytes contradict": lambda path: damage.edit_header(
        path, lambda h: first(h).update(shape=[512, 31])
    ),
}


def first(header: dict) -> dict:
    """The entry of the input table."""
    return header["model.embed_tokens.weight"]


def shift(entry: dict, by: float) -> None:
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]


@pytest.mark.parametrize("damaged", HEADERS)
def test_a_corrupt_header(checkpoint, editable, refuses, damaged):
    folder = editable(checkpoint("qwen2"))
    HEADERS[damaged](folder / "model.safetensors")
    refuses(folder, folder, "model.safetensors")


def test_an_index_that_lies(checkpoint, editable, refuses):
    folder = editable(checkpoint("llama", sharded=True))
    name, shard = damage.lie_in_index(folder)
    refuses(folder, folder, damage.INDEX, name, shard)
    refuses(folder, folder, damage.INDEX, command="inspect")


def test_an_index_that_points_outside_the_folder_is_not_followed(checkpoint, editable, refuses, tmp_path):
    folder = editable(checkpoint("llama", sharded=True))
    held = damage.file_of(folder, models.embedding_key(folder))
    outside = damage.point_index_outside(folder)
    (tmp_path / "elsewhere").mkdir()
    (folder / outside).resolve().write_bytes(held.read_bytes())
    refuses(folder, folder, outside)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 5}', '{"weight_map": {"a": 1, "b": []}}', "{}"])
def test_a_damaged_index(checkpoint, editable, refuses, content):
    folder = editable(checkpoint("llama", sharded=True))
    (folder / damage.INDEX).write_text(content)
    refuses(folder, folder, damage.INDEX, command="inspect")


def test_a_shape_that_contradicts_the_config(checkpoint, editable, refuses):
    folder = damage.change_config(editable(checkpoint("qwen2")), vocab_size=600)
    refuses(folder, folder, "512 x 32", "600 x 32")
    damage.change_config(folder, vocab_size=512, hidden_size=64)
    refuses(folder, folder, "512 x 32", "512 x 64")


def test_a_config_that_says_untied_over_weights_without_a_head(checkpoint, editable, refuses):
    folder = damage.change_config(editable(checkpoint("qwen2")), tie_word_embeddings=False)
    refuses(folder, folder, "lm_head.weight")


CONFIGS = {
    "no JSON": lambda folder: damage.break_json(folder / "config.json"),
    "a list": lambda folder: (folder / "config.json").write_text("[1, 2]"),
    "not text": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
    "no model type": lambda folder: damage.change_config(folder, model_type=None),
    "an unknown model type": lambda folder: damage.change_config(folder, model_type="unheard-of"),
    "heads that do not divide": lambda folder: damage.change_config(folder, num_attention_heads=0),
    "a negative vocabulary": lambda folder: damage.change_config(folder, vocab_size=-5),
    "a text for a number": lambda folder: damage.change_config(folder, hidden_size="wide"),
    "an unknown activation": lambda folder: damage.change_config(folder, hidden_act="unheard-of"),
}


@pytest.mark.parametrize("damaged", CONFIGS)
def test_a_damaged_config(checkpoint, editable, refuses, damaged):
    folder = editable(checkpoint("qwen2"))
    CONFIGS[damaged](folder)
    refuses(folder, folder, command="inspect")


def test_a_folder_without_weights_or_without_the_table(checkpoint, editable, refuses):
    refuses(damage.remove_weights(editable(checkpoint("qwen2"), "bare")), "bare", "no weights")
    folder = editable(checkpoint("qwen2"))
    damage.edit_tensors(folder / "model.safetensors", lambda t: {n: v for n, v in t.items() if "embed" not in n})
    refuses(folder, folder, "model.embed_tokens.weight")


# ---- values --------------------------------------------------------------------------------------------------------


def test_rows_with_nan_or_inf_are_counted_and_named_by_every_command(checkpoint, editable, refuses):
    folder = editable(checkpoint("qwen2"))
    damage.set_rows(folder, [7, 300], float("nan"))
    damage.set_rows(folder, [41], float("inf"))
    damage.set_rows(folder, [511], float("-inf"))
    said = ("4 of 512 rows", "model.embed_tokens.weight", "7, 41, 300, 511", "--skip-nonfinite")
    for command in ("tokens", "pairs", "correlate", "spectrum", "report"):
        refuses(folder, folder, *said, command=command)


def test_skip_nonfinite_goes_on_without_those_rows(checkpoint, editable, cli, tmp_path, refused):
    folder = editable(checkpoint("qwen2"))
    damage.set_rows(folder, [7, 300], float("nan"))
    tokens = json.loads(cli("tokens", folder, "--skip-nonfinite", "--json").stdout)["tokens"]
    assert [t["id"] for t in tokens if t["norm"] is None] == [7, 300]
    assert len(tokens) == 512
    facts = json.loads(cli("spectrum", folder, "--skip-nonfinite", "--json").stdout)
    assert facts["rows"] == 510
    report = cli("report", folder, "--skip-nonfinite", "-o", tmp_path / "report")
    assert report.returncode == 0, report.stderr
    own = json.loads((tmp_path / "report" / "report.json").read_text())["studies"]["embedding"]
    assert "2 rows with NaN or Inf" in own["warnings"][0]
    for command, options in (("pairs", ()), ("correlate", ("--ids", "0:20")), ("neighbors", ("#5",))):
        result = cli(command, folder, *options, "--skip-nonfinite", "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)
    refused(cli("neighbors", folder, "#7", "--skip-nonfinite"), "row 7")


def test_a_table_of_nothing_but_nan_is_refused_even_with_the_flag(checkpoint, editable, refuses):
    folder = editable(checkpoint("qwen2"))
    damage.set_rows(folder, range(512), float("nan"))
    for command in ("tokens", "spectrum", "pairs", "report"):
        refuses(folder, folder, command=command, options=("--skip-nonfinite",))


def test_a_range_of_nothing_but_skipped_rows_is_refused(checkpoint, editable, cli, refused):
    folder = damage.set_rows(editable(checkpoint("qwen2")), [7], float("nan")).parent
    refused(cli("correlate", folder, "--ids", "7:8", "--skip-nonfinite"), "7", "NaN")


def test_nan_in_the_output_table_alone_is_found_before_anything_is_written(checkpoint, editable, refuses, cli):
    folder = editable(checkpoint("llama"))
    damage.set_rows(folder, [3], torch.nan, tensor="lm_head.weight")
    refuses(folder, folder, "lm_head.weight", "row", command="tokens", options=("--side", "output"))
    assert cli("tokens", folder, "--limit", "1").returncode == 0
    refuses(folder, folder, "lm_head.weight", command="report")
