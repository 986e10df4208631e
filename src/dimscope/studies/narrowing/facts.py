"""What report.json holds about a plan of a narrowing."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dimscope.page.section import Facts


@dataclass(frozen=True, slots=True)
class ShownCandidate:
    """The narrow model that the page shows beside the dense one."""

    basis: str
    width: int


@dataclass(frozen=True, slots=True)
class NarrowingFacts:
    """What the page must know of a plan beside its tables.

    Attributes:
        advice: What to do with the model, in a few sentences.
        shown: The candidate that is shown beside the dense model.
        texts: Names of the texts.
        window_length: Tokens per window.
        n_windows: Windows by purpose: calibration, evaluation, training.
        tied: Whether narrow models have one table for both sides.
        widths: The widths of the candidates.
        bases: Their bases.
        dim: The width of the dense model.
        n_layers: Its number of layers.
        export: The family that is written, where it is another.
        heal_steps: Steps of healing.
        kv_bytes_per_token: Bytes of keys and values per token, in the stored dtype: the same at every width.
        dtype: Dtype of the computation.
        device: Where the models ran.
    """

    advice: Sequence[str] = ()
    shown: ShownCandidate | None = None
    texts: Sequence[str] = ()
    window_length: int = 0
    n_windows: Mapping[str, int] = field(default_factory=dict)
    tied: bool = False
    widths: Sequence[int] = ()
    bases: Sequence[str] = ()
    dim: int = 0
    n_layers: int = 0
    export: str | None = None
    heal_steps: int = 0
    kv_bytes_per_token: int = 0
    dtype: str | None = None
    device: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the facts as report.json has them."""
        return asdict(self)


def narrowing_facts(facts: Facts) -> NarrowingFacts:
    """Return the facts of this study from those of the report."""
    stored = facts.of("narrowing")
    present = {name: stored[name] for name in NarrowingFacts.__dataclass_fields__ if stored.get(name) is not None}
    if shown := present.get("shown"):
        present["shown"] = ShownCandidate(**shown)
    return NarrowingFacts(**present)
