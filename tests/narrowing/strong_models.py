"""Models that lose a lot when they are narrowed, and windows of random tokens: what learning and healing are tested on."""

from typing import Any

import torch

from dimscope.texts.windows import Window


def strengthen(model: Any, generator: torch.Generator) -> None:
    """Make matrices large, so that blocks write as much as the table and logits are far from even.

    Gains and biases become what a fresh model does not have.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(noise)
            elif name.endswith("bias"):
                parameter.copy_(noise)
            else:
                parameter.mul_(8)


def random_windows(n: int, seed: int, length: int = 16) -> list[Window]:
    """Return windows of random tokens of a byte each."""
    ones = torch.ones(length, dtype=torch.int64)
    ids = torch.randint(3, 400, (n, length), generator=torch.Generator().manual_seed(seed))
    return [Window(i, row, ones.cumsum(0), ones, 0) for i, row in enumerate(ids)]
