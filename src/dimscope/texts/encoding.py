"""A text as tokens, chunk by chunk, with the bytes at which they end. Knows nothing of models."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dimscope.checkpoints.pieces import piece_decoder
from dimscope.errors import InvalidArgument
from dimscope.texts.texts import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1 << 16  # characters encoded at once; an encoding takes 500 times the memory of its text
MARGIN = 1024  # characters on both sides of a cut in the text; tokens depend on their neighbours much less far


@dataclass(frozen=True, slots=True)
class Tokens:
    """Consecutive tokens of a text: their ids and the bytes of the UTF-8 text at which they end, both int64."""

    ids: Int[Tensor, " n"]
    ends: Int[Tensor, " n"]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)

    def part(self, start: int, stop: int) -> "Tokens":
        """Return the tokens from `start` up to `stop`, as views."""
        return Tokens(self.ids[start:stop], self.ends[start:stop])


def join_tokens(parts: Iterable[Tokens]) -> Tokens:
    """Return consecutive tokens as one; none for no parts."""
    parts = list(parts)
    empty = torch.empty(0, dtype=torch.int64)
    return Tokens(torch.cat([empty, *(p.ids for p in parts)]), torch.cat([empty, *(p.ends for p in parts)]))


def special_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that the tokenizer puts before a text: BOS for Llama, none for GPT-2. What it appends is not used."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    return next((full[:n] for n in starts if full[n : n + len(bare)] == bare), [])


def encode(text: Text, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Tokens]:
    """Yield the tokens of a text, chunk by chunk, without special tokens.

    The ids are those that the whole text would give at once. To that end every chunk is encoded with `MARGIN`
    characters of text on both sides, and the tokens of the margins are dropped: no word is cut, and the space that
    SentencePiece puts before a text is not added to every chunk. (Where two chunks have no end of a token in common,
    the second is encoded as a text of its own: a single word or number of more than a thousand characters can do that.)

    Ends never decrease. Tokens that share a character end inside it, at the byte to which their bytes reach. What no
    token stands for at the very end of the text (white space, in WordPiece) is not counted.
    Memory: a piece of the text, and the encoding of `CHUNK` characters.

    Raises:
        InvalidArgument: for a tokenizer without offsets (a slow one), with which chunks cannot be joined.
    """
    if not tokenizer.is_fast:
        raise InvalidArgument(
            f"{type(tokenizer).__name__} does not tell where in the text its tokens are; "
            "give a checkpoint with a fast tokenizer (tokenizer.json)"
        )
    encoder = _Encoder(tokenizer)
    for chunk in _chunks(text):
        encoder.buffer += chunk
        if len(encoder.buffer) >= encoder.done + 2 * MARGIN:
            yield from encoder.next_tokens(at_end=False)
    yield from encoder.next_tokens(at_end=True)


def _chunks(text: Text) -> Iterator[str]:
    for piece in text.pieces():
        for start in range(0, len(piece), CHUNK):
            yield piece[start : start + CHUNK]


@dataclass(slots=True)
class _Encoder:
    """A part of the text, of which the beginning is encoded already and the end cannot be encoded yet.

        buffer   |  left margin  |  tokens of this call  |  right margin, cut off by the next chunk  |
                 0             done                len(buffer) - MARGIN                     len(buffer)

    Tokens are taken from the first joint (an end of one token and of no other) at `done` to the last one before the
    right margin.
    """

    tokenizer: "PreTrainedTokenizerBase"
    buffer: str = ""
    done: int = 0  # characters of the buffer whose tokens were yielded
    bytes_before: int = 0  # bytes of the text before the buffer
    decode_piece: Callable[[str], bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.decode_piece = piece_decoder(self.tokenizer)

    def next_tokens(self, *, at_end: bool) -> Iterator[Tokens]:
        """Yield the tokens that can be known now, if there are any, and drop their text but for the left margin."""
        spans = _encode_spans(self.buffer, self.tokenizer)
        first = spans.token_at(self.done)
        if first is None:
            self._drop(self.done)
            spans, first = _encode_spans(self.buffer, self.tokenizer), 0
        last = len(spans.ids) if at_end else spans.tokens_within(len(self.buffer) - MARGIN)
        if last <= first:
            return
        ends = self.bytes_before + _byte_ends(self.buffer, spans, self._spell)
        yield Tokens(torch.from_numpy(spans.ids[first:last]), torch.from_numpy(ends[first:last]))
        self.done = int(spans.stops[last - 1])
        self._drop(max(0, self.done - MARGIN))

    def _drop(self, n_characters: int) -> None:
        self.bytes_before += len(self.buffer[:n_characters].encode())
        self.buffer, self.done = self.buffer[n_characters:], self.done - n_characters

    def _spell(self, ids: list[int]) -> Iterator[bytes]:
        return map(self.decode_piece, self.tokenizer.convert_ids_to_tokens(ids))


@dataclass(frozen=True, slots=True)
class _Spans:
    """Tokens and the characters that they stand for, from `starts` up to `stops`."""

    ids: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " n"]
    stops: Int[np.ndarray, " n"]

    def joints(self) -> Int[np.ndarray, " j"]:
        """Return the tokens that end where the next one has not begun yet, and which alone end there."""
        stops, following = self.stops[:-1], self.stops[1:]
        return np.flatnonzero((stops <= self.starts[1:]) & (stops < following))

    def token_at(self, character: int) -> int | None:
        """Return the token that begins after a joint at this character; None where there is no joint."""
        joints = self.joints()
        if character == 0:
            return 0
        following = joints[self.stops[joints] == character] + 1
        return int(following[0]) if len(following) else None

    def tokens_within(self, character: int) -> int:
        """Return the number of tokens up to the last joint that is not behind this character."""
        joints = self.joints()
        inside = joints[self.stops[joints] <= character]
        return int(inside[-1]) + 1 if len(inside) else 0


def _encode_spans(text: str, tokenizer: "PreTrainedTokenizerBase") -> _Spans:
    # verbose=False: texts longer than the model's context are meant here, and need no warning.
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return _Spans(np.array(encoded["input_ids"], dtype=np.int64), offsets[:, 0], offsets[:, 1])


def _byte_ends(text: str, spans: _Spans, spell: Callable[[list[int]], Iterable[bytes]]) -> Int[np.ndarray, " n"]:
    """The bytes of the text where tokens end. A token that ends inside a character ends before its successor's bytes."""
    offsets = _byte_offsets(text)
    ends = offsets[spans.stops]
    shared = np.flatnonzero(spans.stops[:-1] > spans.starts[1:])[::-1]
    for i, piece in zip(shared, spell(spans.ids[shared + 1].tolist()), strict=True):
        # The bound holds where normalisation made more bytes of the character than the text has.
        ends[i] = max(offsets[spans.starts[i + 1]], ends[i + 1] - len(piece))
    return np.maximum.accumulate(ends)


def _byte_offsets(text: str) -> Int[np.ndarray, " n"]:
    """The byte at which each character begins in UTF-8, and that at which the text ends."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])
