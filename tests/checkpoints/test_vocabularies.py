"""What rows stand for: byte-level, SentencePiece and WordPiece tokenizers trained here, and none at all."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import damage
import models
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dimscope.checkpoints.pieces import byte_level_alphabet, label_of
from dimscope.checkpoints.sources import LocalFolder
from dimscope.checkpoints.vocabulary import CATEGORIES, Vocabulary, read_vocabulary
from dimscope.errors import TokenizerMissing

KINDS = {"byte_bpe": "gpt2", "sentencepiece": "llama", "wordpiece": "bert"}


def read(folder: Path, n_rows: int = 512) -> Vocabulary:
    return read_vocabulary(LocalFolder(folder, str(folder)), n_rows)


def is_printable(label: str) -> bool:
    return bool(label) and all(unicodedata.category(c)[0] not in "CZ" or c == " " for c in label)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_a_printable_label_and_one_known_category(checkpoint, kind):
    vocabulary = read(checkpoint(KINDS[kind], tokenizer_size=480))
    assert [token.id for token in vocabulary.tokens] == list(range(512))
    assert vocabulary.tokenizer_size == 480
    for token in vocabulary.tokens:
        assert is_printable(token.label), token
        assert token.category in CATEGORIES
        assert token.label == token.label.strip(" ")
        assert (token.category == "beyond") == (token.id >= 480)
        assert (token.piece is None) == (token.data is None) == (token.id >= 480)
        assert (token.reason is not None) == (token.category in ("beyond", "unreachable", "undecodable")), token
    assert vocabulary.tokens[511].label == "#511"


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_bytes_and_special_tokens_agree_with_the_tokenizer_itself(checkpoint, kind):
    folder = checkpoint(KINDS[kind])
    stock = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = read(folder)
    specials = set(models.TOKENIZERS[kind].special_tokens.values())
    for token in vocabulary.tokens:
        assert token.piece == stock.id_to_token(token.id)
        assert (token.category == "special") == (token.piece in specials)
        if token.category == "ordinary" and kind != "wordpiece":
            # inside a sentence, where no decoder strips a leading space
            before = stock.encode("a", add_special_tokens=False).ids
            whole = stock.decode([*before, token.id], skip_special_tokens=False)
            assert whole.endswith(token.data.decode()), token


def test_byte_level_spells_spaces_newlines_and_single_bytes(checkpoint):
    tokens = {token.data: token for token in read(checkpoint("gpt2")).tokens}
    assert tokens[b" the"].label == "␣the"
    assert tokens[b"\n"].label == "\\n"
    assert tokens[b"\x00"].label == "\\x00"
    assert tokens[b" "].label == "␣"
    assert tokens[b"a"].category == tokens[b" the"].category == tokens[b"\x7f"].category == "ordinary"
    assert (tokens[b"\x80"].label, tokens[b"\x80"].category) == ("<0x80>", "byte")
    for byte in (0xC0, 0xC1, *range(0xF5, 0x100)):
        token = tokens[bytes([byte])]
        assert (token.label, token.category) == (f"<0x{byte:02X}>", "unreachable")
        assert f"{byte:02X}" in token.reason
    assert {bytes([byte]) for byte in range(256)} <= tokens.keys()
    assert (tokens[b"<|endoftext|>"].label, tokens[b"<|endoftext|>"].category) == ("<|endoftext|>", "special")


def test_sentencepiece_spells_word_starts_and_byte_fallback(checkpoint):
    tokens = read(checkpoint("llama")).tokens
    by_piece = {token.piece: token for token in tokens}
    assert (by_piece["▁the"].label, by_piece["▁the"].data, by_piece["▁the"].category) == ("␣the", b" the", "ordinary")
    assert by_piece["<0x0A>"].data == b"\n"
    assert by_piece["<0x80>"].label == "<0x80>"
    assert by_piece["<0x80>"].category == "byte"
    assert by_piece["<0xFF>"].category == by_piece["<0xC0>"].category == "unreachable"
    assert [token.category for token in tokens[:3]] == ["special"] * 3
    # a letter of the vocabulary never comes as its byte: the fallback for it is never used
    assert by_piece["<0x61>"].category == "unreachable"


def test_wordpiece_labels_endings_with_their_mark_and_finds_them_by_it(checkpoint):
    vocabulary = read(checkpoint("bert"))
    by_piece = {token.piece: token for token in vocabulary.tokens}
    endings = [piece for piece in by_piece if piece and piece.startswith("##") and len(piece) > 3]
    ending = next(piece for piece in endings if piece[2:] not in by_piece)
    assert (by_piece[ending].data, by_piece[ending].label) == (ending[2:].encode(), ending)
    assert by_piece[ending].category == "ordinary"
    assert vocabulary.ids(ending) == [by_piece[ending].id]
    assert by_piece[ending].id not in vocabulary.ids(ending[2:])
    assert by_piece["[MASK]"].category == "special"
    assert by_piece["the"].category == "ordinary"


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_looked_up_as_single_tokens_where_there_is_one(checkpoint, kind):
    vocabulary = read(checkpoint(KINDS[kind]))
    spelled = "the" if kind == "wordpiece" else " the"
    (found,) = vocabulary.ids(spelled)
    assert vocabulary.tokens[found].data == spelled.encode()
    assert len(vocabulary.ids("the keeper counted ships")) > 1


def test_without_a_tokenizer_rows_are_numbers(checkpoint):
    vocabulary = read(checkpoint("gpt2", tokenizer=None))
    assert vocabulary.tokenizer_size is None
    assert {(t.piece, t.data, t.category, t.reason) for t in vocabulary.tokens} == {(None, None, "ordinary", None)}
    assert vocabulary.tokens[17].label == "#17"
    with pytest.raises(TokenizerMissing, match="#123"):
        vocabulary.ids("water")


def test_a_tokenizer_larger_than_the_table_and_holes_in_its_ids(checkpoint, editable):
    folder = editable(checkpoint("gpt2"))
    assert len(read(folder, 300).tokens) == 300
    stored = models.read_json(folder / "tokenizer.json")
    stored["added_tokens"].append(
        {"id": 700, "content": "<extra>", "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": False}
    )
    models.write_json(folder / "tokenizer.json", stored)
    tokens = read(folder, 720).tokens
    # the library gives an added token the next free id, whatever the file says
    extra = next(token for token in tokens if token.piece == "<extra>")
    assert (extra.label, extra.data) == ("<extra>", b"<extra>")
    assert [t.category for t in tokens if t.piece is None] == ["beyond"] * (720 - 513)


def test_planted_merges_that_the_tokenizer_never_makes_are_unreachable(checkpoint, editable):
    folder = editable(checkpoint("gpt2"))
    stored = models.read_json(folder / "tokenizer.json")
    taken = {left + right: index for index, (left, right) in enumerate(map(tuple, stored["model"]["merges"]))}
    victim = max(taken, key=taken.get)
    # without its merge a piece stays in the vocabulary, and no text leads to it any more
    del stored["model"]["merges"][taken[victim]]
    models.write_json(folder / "tokenizer.json", stored)
    token = next(token for token in read(folder).tokens if token.piece == victim)
    assert token.category == "unreachable"
    assert "tokenizer" in token.reason


# ---- labels --------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=12))
def test_labels_of_any_bytes_are_printable_and_show_the_ends(data):
    label = label_of(data)
    assert is_printable(label)
    assert not label.startswith(" ")
    assert not label.endswith(" ")


@given(st.text(alphabet="abcé中 ", min_size=1, max_size=8))
def test_labels_of_plain_text_are_the_text(text):
    assert label_of(text.encode()).replace("␣", " ") == text


@pytest.mark.parametrize(
    ("data", "label"),
    [
        (b"  two  ", "␣␣two␣␣"),
        (b"a b", "a b"),
        (b"\t\r\x1b[31m", "\\t\\r\\x1b[31m"),
        ("\u202eabc".encode(), "\\u202eabc"),
        ("\u00a0".encode(), "\\xa0"),
        ("\u2028".encode(), "\\u2028"),
        ("\ue000".encode(), "\\ue000"),
        ("\u0301".encode(), "◌\u0301"),
        (b"\xe4\xb8", "<0xE4><0xB8>"),
        (b"abc\xff", "abc<0xFF>"),
        ("🙂".encode(), "🙂"),
    ],
)
def test_labels_of_hard_cases(data, label):
    assert label_of(data) == label
    assert is_printable(label)


def test_the_byte_alphabet_is_that_of_the_tokenizers_library():
    alphabet = byte_level_alphabet()
    assert set(alphabet) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    decoder = tokenizers.decoders.ByteLevel()
    for piece, byte in alphabet.items():
        if byte < 0x80:
            assert decoder.decode([piece]) == chr(byte)
    assert sorted(alphabet.values()) == list(range(256))


# ---- tokenizers of real models -------------------------------------------------------------------------------------


def real(shared_data: Path, name: str) -> Path:
    folder = shared_data / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"the tokenizer {name} is not in the test data")
    return folder


def test_qwen2_has_rows_beyond_it_and_bytes_that_never_occur(shared_data):
    vocabulary = read(real(shared_data, "qwen2"), 151_936)
    assert vocabulary.tokenizer_size == 151_646
    beyond = [token.id for token in vocabulary.tokens if token.category == "beyond"]
    assert beyond == list(range(151_646, 151_936))
    for byte, token in zip(range(0xF5, 0x100), vocabulary.tokens[177:188], strict=True):
        assert (token.label, token.data) == (f"<0x{byte:02X}>", bytes([byte]))
        assert token.category == "unreachable"
    assert all(is_printable(token.label) for token in vocabulary.tokens)
    assert vocabulary.ids(" water") == [3015]
    assert vocabulary.tokens[151_643].category == "special"


@pytest.mark.parametrize(("name", "n_rows", "end"), [("gpt2", 50_257, 50_256), ("gpt_neox", 50_432, 0)])
def test_gpt2_and_gpt_neox(shared_data, name, n_rows, end):
    vocabulary = read(real(shared_data, name), n_rows)
    stock = tokenizers.Tokenizer.from_file(str(real(shared_data, name) / "tokenizer.json"))
    beyond = [token.id for token in vocabulary.tokens if token.category == "beyond"]
    assert beyond == list(range(stock.get_vocab_size(), n_rows))
    assert vocabulary.tokens[end].category == "special"
    assert vocabulary.tokens[end].label == "<|endoftext|>"
    assert all(is_printable(token.label) for token in vocabulary.tokens)
    # GPT-NeoX's lacks the bytes that its training text lacked
    possible = range(256) if name == "gpt2" else range(0x80)
    assert {bytes([byte]) for byte in possible} <= {token.data for token in vocabulary.tokens}
    ordinary = [token for token in vocabulary.tokens if token.category == "ordinary"]
    assert len(ordinary) > 0.95 * stock.get_vocab_size()
    for token in ordinary[::97]:
        assert stock.decode([token.id]) == token.data.decode()


def test_a_damaged_tokenizer_is_as_good_as_none(checkpoint, editable):
    folder = editable(checkpoint("gpt2"))
    damage.break_json(folder / "tokenizer.json")
    assert read(folder).tokenizer_size is None
    assert json.loads((folder / "config.json").read_text())
