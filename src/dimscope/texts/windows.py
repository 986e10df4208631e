"""Windows of tokens: a text as the sequences that a model reads, and their shuffles. Knows nothing of models."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dimscope.errors import InvalidArgument
from dimscope.texts.encoding import Tokens, encode, join_tokens, special_prefix
from dimscope.texts.texts import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_WINDOWS = 8  # where no number is given
LARGEST = 256 * 10**6  # bytes of text whose tokens are in memory at once, about 1 GB of them
FEWEST = 2  # tokens of the text in a window: one to read, one to predict


@dataclass(frozen=True, slots=True, repr=False)
class Window:
    """Tokens as a model reads them: the tokenizer's prefix, then a stretch of the text. All three tensors are int64.

    `ends` is the byte of the UTF-8 text at which each token ends (for the prefix, at which the window begins).
    `n_bytes` is what each token covers: from the end of the token before it to its own. So what no token stands for
    (white space in WordPiece, some accents that normalisation composes) goes to the token after it, the prefix covers
    0, and the sum is exact. A shuffle permutes `ids` and `n_bytes`; `ends` stays, as the name of the position.
    """

    index: int  # running number in the text
    ids: Int[Tensor, " t"] = field(repr=False)
    ends: Int[Tensor, " t"] = field(repr=False)
    n_bytes: Int[Tensor, " t"] = field(repr=False)
    n_prefix: int

    def __repr__(self) -> str:
        """Return one line: number, tokens and bytes."""
        return f"Window({self.index}: {len(self.ids):,} tokens, {int(self.n_bytes.sum()):,} bytes)"

    @property
    def begin(self) -> int:
        """The byte of the text at which the window begins."""
        return int(self.ends[-1] - self.n_bytes.sum())

    @property
    def predicted_bytes(self) -> int:
        """Bytes of the text in the tokens that can be predicted: not the prefix, and not the very first token."""
        return int(self.n_bytes[max(self.n_prefix, 1) :].sum())

    @property
    def unique_tokens(self) -> int:
        """Number of different ids, those of the prefix included."""
        return len(self.ids.unique())


# ---- the length of windows -------------------------------------------------------------------------------------------


def text_tokens(prefix: Sequence[int], length: int) -> int:
    """Return how many tokens of the text are in a window of `length` tokens, after its prefix.

    Raises:
        InvalidArgument: for fewer than two.
    """
    if length < FEWEST + len(prefix):
        raise InvalidArgument(
            f"`length` must be {FEWEST + len(prefix)} or more, got {length}: a window has at least two tokens of the text"
            + (f", after the {len(prefix)} that the tokenizer puts before it" if prefix else "")
        )
    return length - len(prefix)


def fitting_length(text: Text, tokenizer: "PreTrainedTokenizerBase", length: int) -> int:
    """Return `length`, or the length of the one window that the whole text fills where the text is shorter.

    Reads the text only until it has enough tokens for a window of `length`.

    Args:
        text: the text to cut into windows.
        tokenizer: of the model.
        length: tokens of a window, with those that the tokenizer puts before a text.

    Raises:
        InvalidArgument: for a text of fewer than 2 tokens, or a `length` below 2 and the prefix.
    """
    prefix = special_prefix(tokenizer)
    enough, total = text_tokens(prefix, length), 0
    for tokens in encode(text, tokenizer):
        total += len(tokens)
        if total >= enough:
            return length
    if total < FEWEST:
        raise InvalidArgument(f"{text.name} has {total} tokens; a text needs at least {FEWEST}")
    return len(prefix) + total


def _require_window(text: Text, prefix: list[int], total: int, length: int) -> None:
    """Raise InvalidArgument where the tokens fill no window; suggest one as long as the text where that is allowed."""
    whole = total + len(prefix)
    if whole < length:
        suggestion = f" or pass `length` {whole}" if total >= FEWEST else ""
        raise InvalidArgument(
            f"{text.name} has {total} tokens, fewer than one window of {length}: give a longer text{suggestion}"
        )


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
    """Return `count` windows, each from the middle of one of `count` equal parts of the text. They never overlap.

    One window is that from the middle of the text. The tokens of the whole text are in memory, 16 bytes each.

    Args:
        text: the text to cut.
        tokenizer: of the model.
        length: tokens of a window, with those that the tokenizer puts before a text.
        count: number of windows; None for as many as fit without overlap, `most` at most.
        most: see `count`.
        cap_bytes: size of the largest text.

    Raises:
        InvalidArgument: for a length below 2 and the prefix, a text shorter than a window, a count below 1 or above
            what fits, a text above `cap_bytes`.
    """
    prefix = special_prefix(tokenizer)
    size = text_tokens(prefix, length)
    blocks = list(_capped(text, tokenizer, cap_bytes))
    total = sum(map(len, blocks))
    _require_window(text, prefix, total, length)
    fits = total // size
    count = min(fits, most) if count is None else count
    if not 1 <= count <= fits:
        raise InvalidArgument(
            f"`windows` must be 1 to {fits} for {text.name} and windows of {length} tokens, got {count}; "
            "pass fewer or take a smaller `length`"
        )
    starts = [(2 * i + 1) * total // (2 * count) - size // 2 for i in range(count)]
    return [make_window(i, prefix, *_stretch(blocks, start, size)) for i, start in enumerate(starts)]


def stream_windows(text: Text, tokenizer: "PreTrainedTokenizerBase", *, length: int) -> Iterator[Window]:
    """Yield the whole text, window after window of `length` tokens (the prefix among them), in bounded memory.

    The tokens at the end that fill no window are left out: fewer than length - n_prefix. `ends[-1]` of the last window
    tells where they begin.

    Raises:
        InvalidArgument: with the first window, for a length below 2 and the prefix or a text shorter than a window.
    """
    prefix = special_prefix(tokenizer)
    size = text_tokens(prefix, length)
    index, begin, rest = 0, 0, join_tokens([])
    for block in encode(text, tokenizer):
        tokens = join_tokens([rest, block])
        whole = len(tokens) // size * size
        for start in range(0, whole, size):
            window = make_window(index, prefix, begin, tokens.part(start, start + size))
            index, begin = index + 1, int(window.ends[-1])
            yield window
        rest = join_tokens([tokens.part(whole, len(tokens))])  # a copy, so that the block can be freed
    if index == 0:
        _require_window(text, prefix, len(rest), length)


def require_rows(largest: int, n_rows: int) -> None:
    """Check that the largest id of a text has a row in a table.

    Raises:
        InvalidArgument: where it has none.
    """
    if largest >= n_rows:
        raise InvalidArgument(
            f"the tokenizer gives the id {largest}, and the table of the model has {n_rows} rows: they do not belong together"
        )


def grouped(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """Yield the windows in lists of `size`; the last may be shorter."""
    iterator = iter(windows)
    while group := list(islice(iterator, size)):
        yield group


def _capped(text: Text, tokenizer: "PreTrainedTokenizerBase", cap_bytes: int) -> Iterator[Tokens]:
    too_large = InvalidArgument(
        f"{text.name} is larger than {cap_bytes / 10**6:g} MB, the most from which windows are picked: "
        "pass `windows` all, which streams"
    )
    if (text.n_bytes or 0) > cap_bytes:
        raise too_large
    for tokens in encode(text, tokenizer):
        if int(tokens.ends[-1]) > cap_bytes:
            raise too_large
        yield tokens


def _stretch(blocks: Sequence[Tokens], start: int, size: int) -> tuple[int, Tokens]:
    """Return `size` tokens from token `start` on, after the byte at which they begin."""
    begin, parts = 0, []
    for block in blocks:
        if 0 < start <= len(block):
            begin = int(block.ends[start - 1])
        parts.append(block.part(max(start, 0), max(start + size, 0)))
        start -= len(block)
    return begin, join_tokens(parts)


def make_window(index: int, prefix: list[int], begin: int, tokens: Tokens) -> Window:
    """Return the window of a prefix and tokens of a text, of which the first begins at byte `begin`."""
    ids = torch.cat([torch.tensor(prefix, dtype=torch.int64), tokens.ids])
    ends = torch.cat([torch.full((len(prefix),), begin), tokens.ends])
    return Window(index, ids, ends, ends.diff(prepend=torch.tensor([begin])), len(prefix))


# ---- shuffles ------------------------------------------------------------------------------------------------------


def shuffle_within(window: Window, seed: int, draw: int) -> Window:
    """Return the window with the tokens after its prefix in random order.

    Depends on seed, draw and the window's index only.
    """
    return shuffle_across([window], seed, draw)[0]


def shuffle_across(windows: Sequence[Window], seed: int, draw: int) -> list[Window]:
    """Return the windows with the tokens after their prefixes permuted over all of them. Prefixes and lengths stay.

    Depends on seed, draw, the index of the first window, and the windows passed.
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
