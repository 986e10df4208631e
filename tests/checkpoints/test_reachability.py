"""Reachable tokens are those that some text produces: by enumeration of all short texts over small vocabularies."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dimscope.checkpoints.pieces import byte_level_alphabet
from dimscope.checkpoints.vocabulary import describe_vocabulary

UNKNOWN = "z"


def words(generator: random.Random, letters: str, n: int) -> list[str]:
    """Return the letters, and `n` random words of them with two to four letters."""
    longer = {"".join(generator.choices(letters, k=generator.randint(2, 4))) for _ in range(n)}
    return [*letters, *sorted(longer)]


def word_piece(generator: random.Random) -> Tokenizer:
    pieces = ["[UNK]", *words(generator, "ab", 6), *(f"##{w}" for w in words(generator, "abc", 12)), "a.b", "##.", "aB"]
    model = models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]", max_input_chars_per_word=20)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def unigram(generator: random.Random) -> Tokenizer:
    pieces = [*words(generator, "ab", 12), "▁", *(f"▁{w}" for w in words(generator, "ab", 8))]
    scored = [("<unk>", 0.0), *((p, -generator.uniform(1, 4) * len(p) ** 0.8) for p in pieces)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def bpe_model(
    generator: random.Random, pieces: list[str], n: int, others: Sequence[str] = (), **options: object
) -> models.BPE:
    """Return random merges of some pieces, of which some make pieces that earlier merges take apart."""
    pieces, merges = list(pieces), []
    for _ in range(n):
        pair = (generator.choice(pieces), generator.choice(pieces))
        if len("".join(pair)) <= 4 and pair not in merges:
            merges.append(pair)
            pieces.append("".join(pair))
    generator.shuffle(merges)
    return models.BPE({p: i for i, p in enumerate(dict.fromkeys([*pieces, *others]))}, merges, **options)


def bpe(generator: random.Random) -> Tokenizer:
    tokenizer = Tokenizer(bpe_model(generator, ["<unk>", *"ab.▁"], 24, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


def byte_level_bpe(generator: random.Random) -> Tokenizer:
    letters = {byte: letter for letter, byte in byte_level_alphabet().items()}
    # ê is C3 AA and ë C3 AB, so that merges cross characters and stop inside them.
    merged = [letters[b] for b in (0x20, 0x61, 0xC3, 0xAA, 0xAB)]
    tokenizer = Tokenizer(bpe_model(generator, merged, 24, others=list(letters.values())))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def characters_of_two_bytes() -> list[str]:
    """Return the characters of three and four bytes whose later bytes are all AA or AB, and those of two bytes."""
    inner = [bytes(b) for n in (2, 3) for b in product((0xAA, 0xAB), repeat=n)]
    return [*"êëì", *(({2: b"\xe3", 3: b"\xf1"}[len(b)] + b).decode() for b in inner)]


@pytest.mark.parametrize(
    ("kind", "characters", "longest"),
    [
        (word_piece, "ab.c", 6),
        (unigram, f"ab {UNKNOWN}", 6),
        (bpe, f"ab. {UNKNOWN}", 6),
        (byte_level_bpe, ["a", " ", *characters_of_two_bytes()], 3),
    ],
)
def test_the_tokens_of_all_short_texts_are_the_reachable_ones(
    kind: Callable[[random.Random], Tokenizer], characters: Sequence[str], longest: int
) -> None:
    texts = ["".join(text) for n in range(1, longest + 1) for text in product(characters, repeat=n)]
    n_unproduced = 0
    for seed in range(6):
        backend = kind(random.Random(seed))
        produced = {i for encoding in backend.encode_batch_fast(texts) for i in encoding.ids}
        vocabulary = describe_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), backend.get_vocab_size())
        # Of the bytes of byte-level BPE only those that are merged are in the texts.
        made = {i: p for p, i in backend.get_vocab().items() if kind is not byte_level_bpe or len(p) > 1}
        unreachable = {i for i in made if vocabulary.tokens[i].category == "unreachable"}
        assert {made[i] for i in unreachable} == {p for i, p in made.items() if i not in produced}
        n_unproduced += len(unreachable)
    assert n_unproduced > 6
