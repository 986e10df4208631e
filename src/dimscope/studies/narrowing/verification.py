"""Check of the method: a model rotated at full width predicts what it predicted before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from dimscope.activations.forward import run_batch
from dimscope.checkpoints.model import Placement, load_model, place
from dimscope.checkpoints.vocabulary import require_tokenizer
from dimscope.narrowing.assembly import narrow_model
from dimscope.narrowing.bases import make_basis
from dimscope.narrowing.projection import plan_narrowing
from dimscope.narrowing.target import resolve_target
from dimscope.studies.narrowing.session import LENGTH, table_summary
from dimscope.studies.reading import named_texts, window_length
from dimscope.texts.windows import Window, middle_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dimscope.checkpoints.checkpoint import Checkpoint
    from dimscope.studies.narrowing.settings import NarrowSettings

EXACT = 1e-4  # share of the largest logit by which a rotation in float32 may change a logit


@dataclass(frozen=True, slots=True)
class Verification:
    """A model rotated at full width compared with itself, in float32.

    Attributes:
        difference: The largest difference of a logit.
        largest: The largest absolute logit.
        same_first: Share of positions with the same first choice.
        n_positions: Number of positions.
    """

    difference: float
    largest: float
    same_first: float
    n_positions: int

    @property
    def holds(self) -> bool:
        """Whether the difference is no more than rounding."""
        return self.difference <= EXACT * self.largest


def verify_rotation(checkpoint: Checkpoint, settings: NarrowSettings) -> Verification:
    """Fold the norms of a model, rotate it at full width, and compare its logits on one window of text.

    Both models run in float32, whatever they are stored in: rounding to bfloat16 would hide a mistake.

    Raises:
        InvalidArgument: A setting does not fit the model, or the text is too short.
        UnsupportedCheckpoint: The family is not narrowed.
    """
    target = resolve_target(checkpoint, export=settings.export_as, tied=settings.tied)
    table, centred = table_summary(checkpoint), target.layout.centred
    rotation = make_basis("random", table, target.dim, centred=centred, seed=settings.seed)
    narrowing = plan_narrowing(target, rotation, dtype=torch.float32)
    placement, window = _placement(checkpoint, settings), _middle_window(checkpoint, settings)
    dense = _logits(load_model(checkpoint, placement, trust_remote_code=settings.trust_remote_code), window)
    return _compared(dense, _logits(narrow_model(narrowing, placement), window))


def _placement(checkpoint: Checkpoint, settings: NarrowSettings) -> Placement:
    # `load_model` refuses a model in memory that is not in float32: it is not converted.
    return Placement("float32", place(checkpoint, device=settings.device).device)


def _middle_window(checkpoint: Checkpoint, settings: NarrowSettings) -> Window:
    text = next(iter(named_texts(settings.texts, keep_line_ends=settings.keep_line_ends).values()))
    length = window_length(checkpoint, settings.length, LENGTH)
    [window] = middle_windows(text, require_tokenizer(checkpoint.source), length=length, count=1)
    return window


def _logits(model: PreTrainedModel, window: Window) -> Float[Tensor, "t v"]:
    blocks: list[Tensor] = []
    run_batch(model, window.ids[None], logits=lambda rows, block: blocks.append(block.cpu()))
    return torch.cat(blocks)


def _compared(dense: Float[Tensor, "t v"], rotated: Float[Tensor, "t v"]) -> Verification:
    same = dense.argmax(dim=1) == rotated.argmax(dim=1)
    return Verification(
        difference=float((dense - rotated).abs().max()),
        largest=float(dense.abs().max()),
        same_first=float(same.double().mean()),
        n_positions=len(dense),
    )
