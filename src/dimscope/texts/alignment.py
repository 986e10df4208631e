"""Windows of one tokenizer over the bytes that windows of another tokenizer cover. Knows nothing of models."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dimscope.texts.encoding import Tokens, encode, join_tokens, special_prefix
from dimscope.texts.texts import Text
from dimscope.texts.windows import Window, make_window, text_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def aligned_windows(
    text: Text, tokenizer: "PreTrainedTokenizerBase", like: Iterable[Window], *, longest: int | None = None
) -> Iterator[Window]:
    """Yield a window of this tokenizer over the bytes of each window of another tokenizer, in bounded memory.

    It begins with the first token that begins inside the bytes of the other window, and ends with the last token that
    ends inside them. A window inside which no token lies whole is left out.

    Args:
        text: the text.
        tokenizer: of the model that reads the windows.
        like: windows of the same text, in its order and without overlap.
        longest: tokens of a window at most, with those that the tokenizer puts before it; tokens beyond are left out.

    Raises:
        InvalidArgument: for a `longest` below 2 and the prefix.
    """
    prefix = special_prefix(tokenizer)
    most = None if longest is None else text_tokens(prefix, longest)
    reader = _Reader(encode(text, tokenizer))
    for window in like:
        begin, tokens = reader.within(window.begin, int(window.ends[-1]))
        tokens = tokens.part(0, len(tokens) if most is None else most)
        if len(tokens):
            yield make_window(window.index, prefix, begin, tokens)


@dataclass(slots=True)
class _Reader:
    """Tokens of a text, read as far as needed: those in memory, and the byte at which they begin."""

    blocks: Iterator[Tokens]
    begin: int = 0
    tokens: Tokens = field(default_factory=lambda: join_tokens([]))

    def within(self, start: int, stop: int) -> tuple[int, Tokens]:
        """Return the tokens whose bytes are between `start` and `stop`, after the byte at which they begin.

        A token without bytes, such as the space that SentencePiece puts before a text, belongs to what follows it.
        """
        self._read_to(start, stop)
        ends = self.tokens.ends
        begins = torch.cat([torch.tensor([self.begin]), ends])
        first = int(torch.searchsorted(begins[: len(ends)], start))
        last = min(int(torch.searchsorted(ends, stop, right=True)), int(torch.searchsorted(begins[: len(ends)], stop)))
        last = max(first, last)
        begin, tokens = int(begins[first]), self.tokens.part(first, last)
        self.begin, self.tokens = int(begins[last]), join_tokens([self.tokens.part(last, len(ends))])  # a copy
        return begin, tokens

    def _read_to(self, start: int, stop: int) -> None:
        parts = [self.tokens]
        while not (len(parts[-1]) and int(parts[-1].ends[-1]) >= stop) and (block := next(self.blocks, None)):
            if int(block.ends[-1]) < start:  # nothing of it is needed: a long text is never in memory whole
                parts, self.begin = [join_tokens([])], int(block.ends[-1])
            else:
                parts.append(block)
        self.tokens = join_tokens(parts)
