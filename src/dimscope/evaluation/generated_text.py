"""Windows of text that a model generates itself: a text of its own distribution, where there is no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dimscope.checkpoints.pieces import piece_decoder
from dimscope.errors import InvalidArgument
from dimscope.evaluation.generation import end_ids, sample_ids
from dimscope.texts.encoding import special_prefix
from dimscope.texts.windows import Window, text_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what a generated text begins with: the tokenizer's prefix, else its begin or end token.

    Raises:
        InvalidArgument: The tokenizer has none of them.
    """
    marks = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if not (begin := special_prefix(tokenizer) or marks[:1]):
        raise InvalidArgument("this tokenizer has no token that begins a text, so the model cannot write one by itself")
    return begin


def sample_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, seed: int
) -> list[Window]:
    """Return windows that the model generates, each from the beginning of a text, sampled from its own distribution.

    They begin with `begin_ids`, and have no end token inside.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        count: Number of windows.
        length: Tokens of each window, with those that it begins with.
        seed: Of the draw.

    Raises:
        InvalidArgument: There is nothing to begin with, or the windows are too short.
    """
    begin = begin_ids(tokenizer)
    ends = end_ids(model, tokenizer) | ({tokenizer.eos_token_id} - {None})
    rows_without_token = range(len(tokenizer), model.config.get_text_config().vocab_size)
    rows = sample_ids(
        model, torch.tensor([begin] * count), new_tokens=text_tokens(begin, length), seed=seed,
        never=sorted(ends | set(rows_without_token)),
    )  # fmt: skip
    to_bytes = piece_decoder(tokenizer)
    windows, start = [], 0
    for index, row in enumerate(rows):
        pieces = tokenizer.convert_ids_to_tokens(row[len(begin) :].tolist())
        n_bytes = torch.tensor([0] * len(begin) + [len(to_bytes(p)) for p in pieces])
        token_ends = start + n_bytes.cumsum(0)
        windows.append(Window(index, row, token_ends, n_bytes, len(begin)))
        start = int(token_ends[-1])
    return windows
