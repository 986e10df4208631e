"""How the pieces of a tokenizer spell text: their bytes, and a label that shows them."""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")  # byte fallback of SentencePiece tokenizers
SPACE = "␣"


@dataclass(frozen=True, slots=True)
class Spelling:
    """How the pieces of one tokenizer spell bytes.

    Attributes:
        decode: Returns the bytes of a piece without its marks.
        continuation: The mark before pieces that continue a word ("##" in WordPiece); empty where there is none.
        word_end: The mark after pieces that end a word ("</w>" of CLIP); empty where there is none.
    """

    decode: Callable[[str], bytes]
    continuation: str = ""
    word_end: str = ""

    def continues(self, piece: str) -> bool:
        """Return whether a piece continues a word."""
        return bool(self.continuation) and piece.startswith(self.continuation) and piece != self.continuation

    def ends(self, piece: str) -> bool:
        """Return whether a piece ends a word by its mark."""
        return bool(self.word_end) and piece.endswith(self.word_end) and piece != self.word_end

    def bytes_of(self, piece: str) -> bytes:
        """Return the bytes that a piece stands for."""
        start = len(self.continuation) if self.continues(piece) else 0
        stop = len(piece) - len(self.word_end) if self.ends(piece) else len(piece)
        return self.decode(piece[start:stop])

    def label(self, piece: str, data: bytes) -> str:
        """Return a printable label of a piece that stands for these bytes, with its marks."""
        if BYTE_PIECE.fullmatch(piece):
            return piece
        before = self.continuation if self.continues(piece) else ""
        return before + label_of(data) + (self.word_end if self.ends(piece) else "")


def spelling_of(tokenizer: Any) -> Spelling:
    """Return how the pieces of this tokenizer spell bytes: byte-level, byte fallback with ▁, or WordPiece."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Spelling(sentencepiece_bytes)
    decoders = _decoders(backend)
    model = backend.model
    before = decoders.get("WordPiece", {}).get("prefix") or getattr(model, "continuing_subword_prefix", None) or ""
    after = getattr(model, "end_of_word_suffix", None) or ""
    if "ByteLevel" in decoders:
        return Spelling(byte_level_bytes, before, after)
    return Spelling(str.encode if "WordPiece" in decoders else sentencepiece_bytes, before, after)


def piece_decoder(tokenizer: Any) -> Callable[[str], bytes]:
    """Return the function from the pieces of this tokenizer to their bytes."""
    return spelling_of(tokenizer).bytes_of


def _decoders(backend: Any) -> dict[str, dict[str, Any]]:
    """Return the decoders of a tokenizer by their types."""
    if backend.decoder is None:
        return {}
    decoder = json.loads(backend.decoder.__getstate__())
    parts: Sequence[dict[str, Any]] = decoder.get("decoders", [decoder])
    return {str(part.get("type", "")): part for part in parts}


def sentencepiece_bytes(piece: str) -> bytes:
    """Return the bytes of a piece of SentencePiece, whose spaces are ▁ and whose byte fallback is <0xNN>."""
    if BYTE_PIECE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def byte_level_bytes(piece: str) -> bytes:
    """Return the bytes of a piece of byte-level BPE."""
    try:
        return piece.translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:  # a character that is no byte: a token that somebody added
        return b"".join(bytes([_BYTES[ord(c)]]) if ord(c) in _BYTES else c.encode() for c in piece)


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte of every character of byte-level BPE (Radford et al. 2019): most bytes stand for themselves.

    >>> byte_level_alphabet()["Ġ"]
    32
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(moved)}


_BYTES = {ord(character): byte for character, byte in byte_level_alphabet().items()}


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
