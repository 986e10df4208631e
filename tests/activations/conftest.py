"""Fixtures of the tests of a running model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from causal_models import CASES, OTHERS, SIZES, built


@pytest.fixture
def model_of(checkpoint) -> Callable[..., Any]:
    """Return `model_of(case, dtype=torch.float32)`: a model of stock transformers, of the test's own."""
    transformers.utils.logging.disable_progress_bar()

    def load(case: str, dtype: torch.dtype = torch.float32) -> Any:
        if case in OTHERS:
            config_class, extra = OTHERS[case]
            return built(case, getattr(transformers, config_class)(**{**SIZES, **extra})).to(dtype)
        family, arguments = CASES[case]
        folder = checkpoint(family, **arguments)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    return load
