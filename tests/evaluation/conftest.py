"""Fixtures of the tests that generate text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are much faster on one thread where others use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def speaker(checkpoint) -> Callable[..., tuple[Any, Any]]:
    """Return `speaker(family, dtype=torch.float32, **arguments)`: a fresh model that does not repeat itself, and its tokenizer.

    Weights ten times as large as usual and an output table of its own: what it says depends on all that it read.
    """
    transformers.utils.logging.disable_progress_bar()

    def make(family: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> tuple[Any, Any]:
        spread = "init_std" if family == "opt" else "initializer_range"
        folder = checkpoint(family, tied=False, **{spread: 0.3}, **arguments)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return model, AutoTokenizer.from_pretrained(folder)

    return make
