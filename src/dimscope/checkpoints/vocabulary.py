"""What each row of an embedding table represents: piece, bytes, a readable label, and a category."""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dimscope.checkpoints.hub import HubRepository, damaged_file
from dimscope.checkpoints.loaded import LoadedModel
from dimscope.checkpoints.sources import Source
from dimscope.errors import CorruptCheckpoint, DimscopeError, TokenizerMissing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
CATEGORIES = ("ordinary", "special", "byte", "undecodable", "unreachable", "beyond")
NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})  # RFC 3629, section 1
CHUNK = 8192  # texts encoded at once; an encoding takes 50 times the memory of its text
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")  # byte fallback of SentencePiece tokenizers
SPACE = "␣"


@dataclass(frozen=True, slots=True)
class Token:
    """One row of the table. `piece` and `data` are None for rows beyond the tokenizer."""

    id: int
    piece: str | None
    data: bytes | None
    label: str
    category: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a table.

    Attributes:
        tokens: In the order of its rows.
        tokenizer_size: Tokens of the tokenizer; None where there is none.
        encode: Returns the ids of a text; None where there is no tokenizer.
        missing: Why there is no tokenizer.
    """

    tokens: tuple[Token, ...] = field(repr=False)
    tokenizer_size: int | None
    encode: Callable[[str], list[int]] | None = field(repr=False)
    missing: str | None = None

    def ids(self, text: str) -> list[int]:
        """Return the token that spells exactly this text, leading space and all, else the tokens of the text.

        The spelling comes first so that " water" is one token also where the tokenizer puts a space before every text.

        Raises:
            TokenizerMissing: There is no tokenizer.
        """
        if self.encode is None:
            raise TokenizerMissing(f"{self.missing}, so text cannot be looked up; name tokens by id: '#123'")
        data = text.encode()
        exact = next((t.id for t in self.tokens if t.data == data and t.category == "ordinary"), None)
        return self.encode(text) if exact is None else [exact]


def read_tokenizer(source: Source) -> "PreTrainedTokenizerBase | None":
    """Return the tokenizer of a checkpoint, or None where it has none. Remote code is never run for it."""
    if isinstance(source, LoadedModel):
        return source.tokenizer
    from transformers import AutoTokenizer

    present = [f for f in TOKENIZER_FILES if f in source.files]
    vocabularies = {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"}
    if not vocabularies & set(present):
        return None
    if isinstance(source, HubRepository):
        # Some tokenizers find their class through the config; the template belongs to the tokenizer.
        present += [f for f in ("config.json", "chat_template.jinja") if f in source.files]
        if vocabularies & set(at_hand := source.at_hand(present)):  # one of several kinds is enough
            present = at_hand
    paths = [source.fetch(f) for f in present]
    return AutoTokenizer.from_pretrained(str(paths[0].parent), trust_remote_code=False)


def require_tokenizer(source: Source) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a checkpoint.

    Raises:
        TokenizerMissing: The checkpoint has none, or one that cannot be read.
    """
    tokenizer, missing = _try_tokenizer(source)
    if tokenizer is None:
        raise TokenizerMissing(f"{source.name}: {missing}, and texts cannot be read without one")
    return tokenizer


def read_vocabulary(source: Source, n_rows: int) -> Vocabulary:
    """Return labels and categories of the `n_rows` rows of a table. Without a tokenizer every row is `#id`, ordinary."""
    tokenizer, missing = _try_tokenizer(source)
    if tokenizer is None:
        tokens = tuple(Token(i, None, None, f"#{i}", "ordinary") for i in range(n_rows))
        return Vocabulary(tokens, None, None, missing)
    return describe_vocabulary(tokenizer, n_rows)


def _try_tokenizer(source: Source) -> "tuple[PreTrainedTokenizerBase | None, str]":
    """Return the tokenizer, or None and the reason: studies that need no text work without one."""
    in_memory = isinstance(source, LoadedModel)
    missing = (
        "the model came without a tokenizer (pass the tokenizer)" if in_memory else "the checkpoint has no tokenizer"
    )
    try:
        return read_tokenizer(source), missing
    except DimscopeError:
        raise
    except Exception as e:  # damaged or of an unknown kind: tokenizers raises bare Exception
        if damaged := damaged_file(source, TOKENIZER_FILES):
            raise CorruptCheckpoint(
                f"{source.name}: the cached file {damaged} is damaged: delete it and run the same command again"
            ) from e
        return None, f"the tokenizer cannot be read ({' '.join(str(e).split())[:200]})"


def describe_vocabulary(tokenizer: "PreTrainedTokenizerBase", n_rows: int) -> Vocabulary:
    """Return labels and categories of the rows of a table that is read with this tokenizer."""
    pieces: dict[int, str] = {i: p for p, i in tokenizer.get_vocab().items()}
    to_bytes = piece_decoder(tokenizer)
    added = tokenizer.added_tokens_decoder
    special = {i for i, t in added.items() if t.special} | set(tokenizer.all_special_ids)
    data = {i: p.encode() if i in added else to_bytes(p) for i, p in pieces.items()}
    texts = {i: t for i, d in data.items() if i not in special and (t := _decoded(d)) is not None}
    unreachable = set(texts) - _reachable(tokenizer, texts)
    tokens = []
    for i in range(n_rows):
        if i not in pieces:
            tokens.append(Token(i, None, None, f"#{i}", "beyond", "no token of the tokenizer has this id"))
            continue
        category, reason = _categorise(pieces[i], data[i], i in special, i in unreachable)
        label = pieces[i] if BYTE_PIECE.fullmatch(pieces[i]) else label_of(data[i])
        tokens.append(Token(i, pieces[i], data[i], label, category, reason))
    return Vocabulary(tuple(tokens), len(tokenizer), lambda text: tokenizer.encode(text, add_special_tokens=False))


def _categorise(piece: str, data: bytes, special: bool, unreachable: bool) -> tuple[str, str | None]:
    if special:
        return "special", None
    if len(data) == 1 and data[0] in NEVER_IN_UTF8:
        return "unreachable", f"the byte {data[0]:02X} never occurs in UTF-8"
    if unreachable:
        return "unreachable", "the tokenizer never makes it from its own text"
    if BYTE_PIECE.fullmatch(piece) or (len(data) == 1 and data[0] >= 0x80):
        return "byte", None
    if _decoded(data) is None:
        return "undecodable", "a part of a character"
    return "ordinary", None


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _reachable(tokenizer: Any, texts: dict[int, str]) -> set[int]:
    """Return the ids that come out when their own text is encoded: alone, at the start of a line, beside or inside a word.

    The test of Land & Bartolo 2024 (arXiv 2405.05417), in several contexts: tokenizers that mark word starts give
    the first word of a text a space of its own, and others split spaces differently where a word follows.
    """
    reachable: set[int] = set()
    for before, after in (("", ""), ("\n", ""), ("a", ""), ("", "a"), ("a", "a")):
        left = [i for i in texts if i not in reachable]
        for chunk in (left[n : n + CHUNK] for n in range(0, len(left), CHUNK)):
            encoded = tokenizer([before + texts[i] + after for i in chunk], add_special_tokens=False)["input_ids"]
            reachable |= {i for i, ids in zip(chunk, encoded, strict=True) if i in ids}
    return reachable


def label_of(data: bytes) -> str:
    r"""Return a printable label: spaces at the ends visible, control characters escaped, stray bytes as <0xNN>.

    >>> label_of(b" water"), label_of(b"\n\n"), label_of(b"\xf5"), label_of("été".encode())
    ('␣water', '\\n\\n', '<0xF5>', 'été')
    """
    text = data.decode("utf-8", errors="surrogateescape")
    core = text.strip(" ")
    head = len(text) - len(text.lstrip(" "))
    tail = len(text) - head - len(core)
    return SPACE * head + "".join(map(_visible, core)) + SPACE * tail


def _visible(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that surrogateescape kept
        return f"<0x{code - 0xDC00:02X}>"
    category = unicodedata.category(character)
    # Controls, formats (bidirectional marks among them), surrogates, private and unassigned; separators but the space.
    if category[0] == "C" or (category[0] == "Z" and character != " "):
        return character.encode("unicode_escape").decode()
    return "◌" + character if category in ("Mn", "Me") else character  # a combining mark needs something to stand on


def piece_decoder(tokenizer: Any) -> Callable[[str], bytes]:
    """Return how the pieces of this tokenizer spell bytes: byte-level, byte fallback with ▁, or WordPiece."""
    kinds = _decoder_kinds(tokenizer)
    if "ByteLevel" in kinds:
        table = byte_level_alphabet()
        return lambda piece: b"".join(bytes([table[c]]) if c in table else c.encode() for c in piece)
    if "WordPiece" in kinds:
        return lambda piece: (piece[2:] if piece.startswith("##") and len(piece) > 2 else piece).encode()
    return _sentencepiece_bytes


def _decoder_kinds(tokenizer: Any) -> set[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    parts: Sequence[dict] = decoder.get("decoders", [decoder])
    return {p.get("type", "") for p in parts}


def _sentencepiece_bytes(piece: str) -> bytes:
    if BYTE_PIECE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte of every character of byte-level BPE (Radford et al. 2019): most bytes stand for themselves.

    >>> byte_level_alphabet()["Ġ"]
    32
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(moved)}
