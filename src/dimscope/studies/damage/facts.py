"""What report.json holds about a run of the study of damage."""

from collections.abc import Sequence
from dataclasses import dataclass

from dimscope.page.section import Facts


@dataclass(frozen=True, slots=True)
class DamageFacts:
    """What the page must know of a run beside its tables.

    Attributes:
        texts: Names of the texts, the main one first.
        sides: The tables that were changed.
        n_changes: Number of points beside the undamaged model.
        draws: Seeds per random perturbation.
        seed: The first seed.
        window_length: Tokens per window.
        decoding: How prompts were continued.
        new_tokens: Tokens per continuation, at most.
        template: Whether the tokenizer has a chat template.
        chat: Whether prompts were put into it.
        system: The system prompt.
        dtype: Dtype of the computation.
        device: Where the model ran.
        preset: The preset that was chosen.
    """

    texts: Sequence[str] = ()
    sides: Sequence[str] = ("input",)
    n_changes: int = 0
    draws: int = 5
    seed: int = 0
    window_length: int | None = None
    decoding: str = "greedy"
    new_tokens: int | None = None
    template: bool = False
    chat: bool = False
    system: str | None = None
    dtype: str | None = None
    device: str | None = None
    preset: str | None = None


def damage_facts(facts: Facts) -> DamageFacts:
    """Return the facts of this study from those of the report."""
    return facts.typed("damage", DamageFacts)
