"""Which tokens a tokenizer can produce, found by encoding short texts that are made for each of them.

A token that any text produces is reachable, so that every id in every encoded text counts. The texts of a token are its own
characters in several contexts, because what stands beside them decides where words begin, and whether a merge or a longer
piece takes a part of them. What the rules of the model exclude needs no contexts: a piece that BPE or Unigram does not make
of its own characters alone is part of no text, because what happens inside a piece does not depend on what surrounds it.

The first test of this kind is that of Land & Bartolo 2024 (arXiv 2405.05417), with the text of the token alone.
"""

import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from dimscope.checkpoints.pieces import BYTE_PIECE

CHUNK = 8192  # texts encoded at once; an encoding takes 50 times the memory of its text
# Usual contexts come first: most tokens appear in one of them, and are not searched any further.
CONTEXTS = (("", ""), ("\n", ""), ("a", ""), ("", "a"), ("a", "a"))
BESIDE = ("1", ".", " ", "\n", "A", "'", " a", "a ", " 1", "\n\n")
# Letters, symbols and digits that few vocabularies hold. Beside a character that is in no piece, no longer piece takes a part.
RARE = ("𐀀𐎠𒀀𓀀𐩠ᚠꀀ", "𐄀𐎟𒑰𝄞⌬", "𐒠𑁦𐴰꩐")
PREFIXES = 8  # texts of words that are tried before a piece that continues a word
COMPLETIONS = (4, 32, 1024)  # texts for a piece that holds a part of a character, in rounds
MOST_TEXTS = 1 << 16  # of a round
AROUND = ("{}", " {}", "a{}", "{}a", "\n{}", "{} ")
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token whose texts are searched.

    Attributes:
        piece: Its piece.
        data: The bytes that it stands for.
        continues: Whether it is marked as the continuation of a word.
    """

    piece: str
    data: bytes
    continues: bool = False


def reachable_ids(tokenizer: Any, candidates: Mapping[int, Candidate]) -> set[int]:
    """Return the ids that texts are known to produce, and no other.

    Args:
        tokenizer: The tokenizer.
        candidates: The tokens that are searched; others are returned only where they happen to appear.
    """
    search = _Search(tokenizer, dict(candidates))
    whole = {i: text for i, c in candidates.items() if not c.continues and (text := _decoded(c.data)) is not None}
    used = {character for text in whole.values() for character in text}
    rare = [next((c for c in characters if c not in used), characters[0]) for characters in RARE]
    search.add_contexts(whole, CONTEXTS)
    search.drop_impossible()
    search.add_contexts(whole, [pair for b in (*rare, *BESIDE) for pair in ((b, b), (b, ""), ("", b))])
    search.add_continuations()
    search.add_completions()
    return search.reached


@dataclass(slots=True)
class _Search:
    """The tokens that texts have produced so far, and those that are still searched."""

    tokenizer: Any
    left: dict[int, Candidate]
    reached: set[int] = field(default_factory=set)

    def add(self, texts: Iterable[str]) -> None:
        """Encode texts, and take the ids in them."""
        texts = list(dict.fromkeys(texts))
        for n in range(0, len(texts), CHUNK):
            for ids in _encode(self.tokenizer, texts[n : n + CHUNK]):
                self.reached.update(ids)
        self.left = {i: c for i, c in self.left.items() if i not in self.reached}

    def add_contexts(self, texts: Mapping[int, str], contexts: Iterable[tuple[str, str]]) -> None:
        """Encode the texts of the tokens that are left between the two parts of each context."""
        for before, after in contexts:
            self.add(before + texts[i] + after for i in self.left if i in texts)

    def drop_impossible(self) -> None:
        """Give up the pieces that the model does not make of their own characters."""
        model: Any = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        # Marks of the model are no characters of a text, and dropout makes a single answer one of many.
        marks = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
        if type(model).__name__ not in ("BPE", "Unigram") or any(getattr(model, mark, None) for mark in marks):
            return
        self.left = {
            i: c
            for i, c in self.left.items()
            if BYTE_PIECE.fullmatch(c.piece) or [t.value for t in model.tokenize(c.piece)] == [c.piece]
        }

    def add_continuations(self) -> None:
        """Encode pieces that continue a word after words from which no longer piece of the vocabulary begins."""
        texts = {i: t for i, c in self.left.items() if c.continues and (t := _decoded(c.data)) is not None}
        if not texts:
            return
        starts = _word_starts(self.tokenizer, self.reached)
        self.add_contexts(texts, [(start, "") for start in list(starts.values())[:PREFIXES]])
        self.add(starts.get(_script(texts[i][0]), "a") + texts[i] for i in self.left if i in texts)

    def add_completions(self) -> None:
        """Encode pieces that hold parts of characters inside characters that hold these parts."""
        for n_texts in COMPLETIONS:
            parts = {i: c.data for i, c in self.left.items() if _decoded(c.data) is None}
            n = min(n_texts, MOST_TEXTS // max(1, len(parts)))
            self.add(text for i, data in parts.items() for text in _completions(data, n, seed=i))


def _encode(tokenizer: Any, texts: list[str]) -> Iterator[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return
    # The call switches off a truncation that the file of the tokenizer sets; this way of encoding is twice as fast.
    tokenizer("a", truncation=False, padding=False)
    yield from (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))


def _word_starts(tokenizer: Any, reached: set[int]) -> dict[str, str]:
    """Return a short piece of each script that begins words, and of which no other piece is a continuation.

    After such a piece a longest match ends, whatever follows. The most frequent script comes first.
    """
    pieces = sorted(tokenizer.get_vocab())
    ids = tokenizer.convert_tokens_to_ids(pieces)
    ends = [p for p, after in zip(pieces, [*pieces[1:], ""], strict=True) if not after.startswith(p)]
    reached_pieces = {p for p, i in zip(pieces, ids, strict=True) if i in reached}
    by_script: dict[str, list[str]] = {}
    for piece in ends:
        if piece in reached_pieces and piece.isalnum():
            by_script.setdefault(_script(piece[-1]), []).append(piece)
    ordered = sorted(by_script.items(), key=lambda entry: -len(entry[1]))
    return {script: min(members, key=lambda piece: (len(piece), piece)) for script, members in ordered}


def _script(character: str) -> str:
    """Return what tells scripts and kinds of characters apart: the first word of the Unicode name, and the category.

    >>> _script("a"), _script("ж"), _script("7")
    ('LATIN L', 'CYRILLIC L', 'DIGIT N')
    """
    name = unicodedata.name(character, "unnamed").split()[0]
    return f"{name} {unicodedata.category(character)[0]}"


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


# ---- parts of characters -------------------------------------------------------------------------------------------


def _completions(data: bytes, n: int, seed: int) -> list[str]:
    r"""Return about `n` random texts that hold these bytes inside whole characters; none where no text can.

    >>> {text.strip("a \n")[0] for text in _completions(b"\xe2\x82", 1000, seed=0)} <= {chr(c) for c in range(0x2080, 0x20C0)}
    True
    >>> _completions(b"\xff", 1000, seed=0)
    []
    """
    generator = random.Random(seed)
    texts = _inner_characters(data, n, generator)
    tail, whole, head = _parts(data)
    if whole is not None:
        before = _draw(_ending_with(tail), n, generator, lambda code: code.endswith(tail)) if tail else [""]
        after = _draw([_beginning_with(head)], n, generator, lambda code: code.startswith(head)) if head else [""]
        if before and after:
            generator.shuffle(before)
            pairs = zip(range(n), cycle(before), cycle(after), strict=False)
            texts += [first + whole + last for _, first, last in pairs]
    return [generator.choice(AROUND).format(text) for text in texts]


def _parts(data: bytes) -> tuple[bytes, str | None, bytes]:
    """Divide bytes into the end of a character, whole characters (None where they are none), and the beginning of a character."""
    rest = data.lstrip(CONTINUATION_BYTES)
    tail, head = data[: len(data) - len(rest)], b""
    if _decoded(rest) is None:
        start = next((k for k in range(len(rest) - 1, -1, -1) if rest[k] >= 0xC0), len(rest))
        rest, head = rest[:start], rest[start:]
    return tail, _decoded(rest), head


def _beginning_with(head: bytes) -> range:
    """Return the code points of the characters whose UTF-8 begins with these bytes, and perhaps others."""
    length = 2 if head[0] < 0xE0 else 3 if head[0] < 0xF0 else 4
    code, missing = _bits(bytes([head[0] & (0x7F >> length)]) + head[1:]), 6 * max(0, length - len(head))
    return range(code << missing, (code + 1) << missing)


def _ending_with(tail: bytes) -> list[range]:
    """Return the code points of the characters whose UTF-8 ends with these bytes: of the first plane, and of the others."""
    code, step = _bits(tail), 64 ** len(tail)
    first_plane = range(code, 0x10000, step)
    return [first_plane, range(code + step * len(first_plane), 0x110000, step)]


def _inner_characters(data: bytes, n: int, generator: random.Random) -> list[str]:
    """Return characters that hold these continuation bytes with others after them."""
    if len(data) > 2 or data.strip(CONTINUATION_BYTES):
        return []
    characters = []
    for _ in range(n):
        after = generator.randint(1, 3 - len(data))
        before = generator.randrange(16 if len(data) + after == 2 else 8)
        code = (before << 6 * len(data) | _bits(data)) << 6 * after | generator.getrandbits(6 * after)
        characters += _valid([code], lambda utf8: data in utf8[1:])
    return characters


def _draw(codes: list[range], n: int, generator: random.Random, fits: Callable[[bytes], bool]) -> list[str]:
    """Draw up to `n` characters from each range, of those whose UTF-8 fits."""
    return [c for part in codes for c in _valid(generator.sample(part, min(n, len(part))), fits)]


def _valid(codes: Iterable[int], fits: Callable[[bytes], bool]) -> list[str]:
    characters = (chr(c) for c in codes if c < 0xD800 or 0xE000 <= c < 0x110000)
    return [c for c in characters if fits(c.encode())]


def _bits(data: bytes) -> int:
    """Return the six low bits of all bytes as one number."""
    code = 0
    for byte in data:
        code = code << 6 | byte & 0x3F
    return code
