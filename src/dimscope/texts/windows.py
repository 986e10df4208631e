"""Windows of tokens: a text as the sequences that a model is given, and their shuffles. Knows nothing of models."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dimscope.checkpoints.vocabulary import piece_decoder
from dimscope.errors import InvalidArgument
from dimscope.texts.texts import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1 << 16  # characters encoded at once; an encoding takes 500 times the memory of its text
MARGIN = 1024  # characters on both sides of a cut in the text; tokens feel their neighbours much less far
MOST_WINDOWS = 8  # where no number is asked for
LARGEST = 256 * 10**6  # bytes of text whose tokens are held at once, about 1 GB of them

Tokens = tuple[Int[Tensor, " n"], Int[Tensor, " n"]]  # ids, and the bytes where they end


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens as a model is given them: the tokenizer's prefix, then a stretch of the text. All three are int64.

    `ends` is the byte of the UTF-8 text at which each token ends (for the prefix, at which the window begins).
    `n_bytes` is what each token covers: from the end of the token before it to its own. So what no token stands for
    (white space in WordPiece, some accents that normalisation composes) goes to the token after it, the prefix covers
    0, and the sum is exact. A shuffle permutes `ids` and `n_bytes`; `ends` stays, as the name of the position.
    """

    index: int  # running number in the text
    ids: Int[Tensor, " t"]
    ends: Int[Tensor, " t"]
    n_bytes: Int[Tensor, " t"]
    n_prefix: int

    @property
    def predicted_bytes(self) -> int:
        """Bytes of the text under the tokens that can be predicted: not the prefix, and not the first token of all."""
        return int(self.n_bytes[max(self.n_prefix, 1) :].sum())

    @property
    def unique_tokens(self) -> int:
        """Different ids, those of the prefix included."""
        return len(self.ids.unique())


def special_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids that the tokenizer puts before a text: BOS for Llama, nothing for GPT-2. What it appends is not used."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    return next((full[:n] for n in starts if full[n : n + len(bare)] == bare), [])


# ---- text to tokens ------------------------------------------------------------------------------------------------


def encode(text: Text, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Tokens]:
    """Ids of the tokens (int64) and the bytes at which they end, chunk by chunk, without special tokens.

    The ids are those that the whole text would give at once: every chunk is encoded with `MARGIN` characters of text
    on both sides, whose tokens are then taken from the neighbour, so that neither a word is cut nor the space added
    that SentencePiece puts before a text. (Where two chunks find no common end of a token, the second is encoded as
    a text of its own: a single word or number of more than a thousand characters can do that.)

    Ends never decrease. Tokens that share a character end inside it, at the byte to which their bytes reach. What no
    token stands for at the very end of the text (white space, in WordPiece) is not counted.
    Memory: a piece, and the encoding of `CHUNK` characters.
    Raises InvalidArgument for a tokenizer without offsets (a slow one): it could neither join chunks nor tell where
    in the text its tokens are.
    """
    if not tokenizer.is_fast:
        raise InvalidArgument(
            f"{type(tokenizer).__name__} does not tell where in the text its tokens are; "
            "give a checkpoint with a fast tokenizer (tokenizer.json)"
        )
    to_bytes = piece_decoder(tokenizer)
    held, known, before = "", 0, 0  # the tokens of held[:known] are out already; bytes before held
    for chunk in chain(_chunks(text), [None]):
        held += chunk or ""
        if chunk is not None and len(held) < known + 2 * MARGIN:
            continue
        spans = _encode_spans(held, tokenizer)
        first = spans.token_at(known)
        if first is None:
            before += len(held[:known].encode())
            held, known = held[known:], 0
            spans, first = _encode_spans(held, tokenizer), 0
        last = len(spans.ids) if chunk is None else spans.tokens_within(len(held) - MARGIN)
        if last <= first:
            continue
        ends = before + _byte_ends(held, spans, lambda ids: map(to_bytes, tokenizer.convert_ids_to_tokens(ids)))
        yield torch.from_numpy(spans.ids[first:last]), torch.from_numpy(ends[first:last])
        done = int(spans.stops[last - 1])
        dropped = max(0, done - MARGIN)
        before += len(held[:dropped].encode())
        held, known = held[dropped:], done - dropped


def _chunks(text: Text) -> Iterator[str]:
    for piece in text.pieces():
        for start in range(0, len(piece), CHUNK):
            yield piece[start : start + CHUNK]


@dataclass(frozen=True, slots=True)
class _Spans:
    """Tokens and the characters that they stand for, from `starts` up to `stops`."""

    ids: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " n"]
    stops: Int[np.ndarray, " n"]

    def joints(self) -> Int[np.ndarray, " j"]:
        """The tokens that end where the next one has not begun yet, and which alone end there."""
        stops, following = self.stops[:-1], self.stops[1:]
        return np.flatnonzero((stops <= self.starts[1:]) & (stops < following))

    def token_at(self, character: int) -> int | None:
        """The token that begins after a joint at this character; None where there is no joint."""
        joints = self.joints()
        found = joints[self.stops[joints] == character] + 1
        return 0 if character == 0 else int(found[0]) if len(found) else None

    def tokens_within(self, character: int) -> int:
        """How many tokens there are up to the last joint that is not behind this character."""
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


# ---- tokens to windows ---------------------------------------------------------------------------------------------


def middle_windows(
    text: Text,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    length: int,
    count: int | None,
    most: int = MOST_WINDOWS,
    cap_bytes: int = LARGEST,
) -> list[Window]:
    """`count` windows of `length` tokens (the prefix among them), each from the middle of one of `count` equal parts of the text.

    One window is that from the middle of the text. Without a count: as many as fit without overlap, `most` at
    most. Windows never overlap. The tokens of the whole text are held, 16 bytes each.
    Raises InvalidArgument for a length below 2 and the prefix, a text shorter than a window, a count below 1 or above
    what fits, a text above `cap_bytes`.
    """
    prefix = special_prefix(tokenizer)
    room = room_after(prefix, length)
    blocks = list(_capped(text, tokenizer, cap_bytes))
    total = sum(len(ids) for ids, _ in blocks)
    _require_window(text, prefix, total, length)
    fits = total // room
    count = min(fits, most) if count is None else count
    if not 1 <= count <= fits:
        raise InvalidArgument(
            f"{text.name} fits {fits} windows of {length}, not {count}: --windows {fits} or a smaller --length"
        )
    starts = [(2 * i + 1) * total // (2 * count) - room // 2 for i in range(count)]
    return [_window(i, prefix, *_stretch(blocks, start, room)) for i, start in enumerate(starts)]


def stream_windows(text: Text, tokenizer: "PreTrainedTokenizerBase", *, length: int) -> Iterator[Window]:
    """The whole text, window after window of `length` tokens (the prefix among them), without overlap, in bounded memory.

    The tokens at the end that fill no window are left out: fewer than length - n_prefix, and
    the last window's `ends[-1]` tells where they begin.
    Raises InvalidArgument, with the first window, for a length below 2 and the prefix or a text shorter than a window.
    """
    prefix = special_prefix(tokenizer)
    room = room_after(prefix, length)
    index, begin = 0, 0
    left = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    for block in encode(text, tokenizer):
        ids, ends = (torch.cat(pair) for pair in zip(left, block, strict=True))
        whole = len(ids) // room * room
        for start in range(0, whole, room):
            window = _window(index, prefix, begin, ids[start : start + room], ends[start : start + room])
            index, begin = index + 1, int(window.ends[-1])
            yield window
        left = ids[whole:].clone(), ends[whole:].clone()
    if index == 0:
        _require_window(text, prefix, len(left[0]), length)


def require_rows(largest: int, n_rows: int) -> None:
    """Raises InvalidArgument where the largest id of a text has no row in a table."""
    if largest >= n_rows:
        raise InvalidArgument(
            f"the tokenizer gives the id {largest}, and the table of the model has {n_rows} rows: they do not belong together"
        )


def grouped(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """The windows in lists of `size`; the last may be shorter."""
    iterator = iter(windows)
    while group := list(islice(iterator, size)):
        yield group


def room_after(prefix: list[int], length: int) -> int:
    """How many tokens of the text a window holds, after its prefix. Raises InvalidArgument for fewer than two."""
    if length < 2 + len(prefix):
        raise InvalidArgument(
            f"--length {length} is too short: a window holds two tokens of the text at least"
            + (f", after the {len(prefix)} that the tokenizer puts before it" if prefix else "")
            + f": --length {2 + len(prefix)} or more"
        )
    return length - len(prefix)


def _require_window(text: Text, prefix: list[int], total: int, length: int) -> None:
    """Raises where the tokens fill no window. One as long as the text is suggested where that is allowed."""
    whole = total + len(prefix)
    if whole < length:
        suggestion = f" or --length {whole}" if total >= 2 else ""
        raise InvalidArgument(
            f"{text.name} has {total} tokens, fewer than one window of {length}: give a longer text{suggestion}"
        )


def _capped(text: Text, tokenizer: "PreTrainedTokenizerBase", cap_bytes: int) -> Iterator[Tokens]:
    too_large = InvalidArgument(
        f"{text.name} is larger than {cap_bytes / 10**6:g} MB, the most from which windows are picked: "
        "pass --windows all, which streams"
    )
    if (text.n_bytes or 0) > cap_bytes:
        raise too_large
    for ids, ends in encode(text, tokenizer):
        if int(ends[-1]) > cap_bytes:
            raise too_large
        yield ids, ends


def _stretch(blocks: Sequence[tuple[Tensor, Tensor]], start: int, size: int) -> tuple[int, Tensor, Tensor]:
    """`size` tokens from token `start` on: the byte before them, their ids and ends."""
    begin, parts = 0, []
    for ids, ends in blocks:
        if 0 < start <= len(ids):
            begin = int(ends[start - 1])
        inside = slice(max(start, 0), max(start + size, 0))
        parts.append((ids[inside], ends[inside]))
        start -= len(ids)
    ids, ends = (torch.cat(p) for p in zip(*parts, strict=True))
    return begin, ids, ends


def _window(index: int, prefix: list[int], begin: int, ids: Int[Tensor, " t"], ends: Int[Tensor, " t"]) -> Window:
    ids = torch.cat([torch.tensor(prefix, dtype=torch.int64), ids])
    ends = torch.cat([torch.full((len(prefix),), begin), ends])
    return Window(index, ids, ends, ends.diff(prepend=torch.tensor([begin])), len(prefix))


# ---- shuffles ------------------------------------------------------------------------------------------------------


def shuffle_within(window: Window, seed: int, draw: int) -> Window:
    """The window with the tokens after its prefix in random order. Depends on seed, draw and the window's index only."""
    return shuffle_across([window], seed, draw)[0]


def shuffle_across(windows: Sequence[Window], seed: int, draw: int) -> list[Window]:
    """The windows with the tokens after their prefixes dealt out anew over all of them. Prefixes and lengths stay.

    Depends on seed, draw, the index of the first window, and which windows are given.
    """
    if not windows:
        return []
    ids = torch.cat([w.ids[w.n_prefix :] for w in windows])
    n_bytes = torch.cat([w.n_bytes[w.n_prefix :] for w in windows])
    order = torch.from_numpy(_permutation(len(ids), seed, draw, windows[0].index))
    sizes = [len(w.ids) - w.n_prefix for w in windows]
    return [
        replace(w, ids=torch.cat([w.ids[: w.n_prefix], i]), n_bytes=torch.cat([w.n_bytes[: w.n_prefix], n]))
        for w, i, n in zip(windows, ids[order].split(sizes), n_bytes[order].split(sizes), strict=True)
    ]


def _permutation(n: int, seed: int, draw: int, index: int) -> Int[np.ndarray, " n"]:
    # A stream of its own for every draw and window, so that the order of the work does not matter.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(draw, index))).permutation(n)
