"""The settings of the study of hidden layers. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token

from dimscope.errors import InvalidArgument
from dimscope.studies.options import (
    DType,
    Flag,
    Strings,
    Texts,
    as_tuple,
    require_at_least,
    require_not_empty,
    require_seed,
    require_types,
)

THRESHOLDS = (0.80, 0.90, 0.95, 0.99)


def _parse_percents(kind: Any, tokens: Sequence[Token]) -> tuple[float, ...]:
    """Parse percents, or shares of 1, separated by commas, such as "80,95"."""
    text = ",".join(token.value for token in tokens)
    try:
        numbers = [float(part) for part in text.split(",")]
        return tuple(number / 100 if number > 1 else number for number in numbers)
    except ValueError:
        raise InvalidArgument(f"`thresholds` must be percents such as 80,95, got {text!r}") from None


def _parse_shard(kind: Any, tokens: Sequence[Token]) -> tuple[int, int]:
    """Parse "I/N", where I starts at 1."""
    part, _, whole = tokens[0].value.partition("/")
    if not (part.isdecimal() and whole.isdecimal()):
        raise InvalidArgument(f"`shard` must be I/N such as 1/2, got {tokens[0].value!r}")
    return int(part) - 1, int(whole)


@dataclass(frozen=True, slots=True)
class LayersSettings:
    """Options of the study of hidden layers."""

    compare: Strings = ()
    "Other models to compare with this one on the same texts."
    texts: Texts = ("builtin:prose", "builtin:html")
    "Texts: files, folders, FILE.parquet:COLUMN, FILE.jsonl:FIELD, URLs, - for standard input, builtin:prose or builtin:html."
    keep_line_ends: Flag = False
    "Keep CRLF and CR line ends of the texts, which are read as LF otherwise."
    windows: int | Literal["all"] | None = None
    "Windows per text, spread evenly over it; 'all' streams whole texts [default: 8, or as many as every text has]."
    length: int | None = None
    "Tokens per window [default: the context length of the model, at most 1,024]."
    shuffles: int = 5
    "Random seeds of the text shuffled within each window."
    shuffles_across: int = 1
    "Random seeds of the text shuffled across its windows."
    random_weights: bool = True
    "Run the same architecture with randomly initialised weights too."
    logits: bool = True
    "Measure confidence, loss and bits per byte."
    curve: Flag = False
    "Measure every dimension over growing numbers of tokens too."
    thresholds: Annotated[tuple[float, ...], Parameter(converter=_parse_percents, n_tokens=1, show_default=False)] = (
        THRESHOLDS
    )
    "Percents of the variance for which components are counted [default: 80,90,95,99]."
    layers: str | None = None
    "Layers to measure, such as 0,4:8,norm: 0 or emb is the input of block 1, norm the final norm [default: all]."
    show_layer: int | None = None
    "Layer for figures that show a single one [default: the middle]."
    reservoir: int = 2048
    "Token positions sampled for measures that need individual hidden states (intrinsic dimension, CKA)."
    batch: int | None = None
    "Windows per forward pass [default: what fits the device]."
    dtype: DType = "auto"
    "Dtype of the computation; auto is float32 on a CPU where that fits into memory, else the stored dtype."
    device: str = "auto"
    "auto, cpu, cuda, cuda:1, mps, or map: spread over all devices by accelerate."
    seed: int = 0
    "Random seed of shuffles, random weights and samples."
    checkpoint_every: float = 60.0
    "Seconds between two saves of an unfinished pass."
    shard: Annotated[tuple[int, int], Parameter(converter=_parse_shard, n_tokens=1, show_default=False)] = (0, 1)
    "I/N: run only this part of every pass; the last of N processes on one folder merges them."
    preset: Literal["notebook"] | None = None
    "notebook: one window from the middle, one shuffle, 95%, layer 10; other options override it."
    trust_remote_code: Annotated[bool, Parameter(parse=False)] = False

    def __post_init__(self) -> None:
        """Raise InvalidArgument for values out of range."""
        as_tuple(self, "compare", "texts", "thresholds")
        require_types(self, opened=("compare", "texts"))
        require_not_empty(self, "texts", "files, URLs or builtin:prose")
        require_not_empty(self, "thresholds", "shares of the variance")
        if self.windows != "all":
            require_at_least(1, self, "windows")
        require_at_least(0, self, "shuffles", "shuffles_across", "show_layer", "checkpoint_every")
        require_at_least(1, self, "batch")
        require_at_least(2, self, "length")
        require_at_least(64, self, "reservoir")
        require_seed(self)
        if not all(0 < threshold < 1 for threshold in self.thresholds):
            raise InvalidArgument(f"`thresholds` must be between 0% and 100% of the variance, got {self.thresholds}")
        object.__setattr__(self, "thresholds", tuple(sorted(set(self.thresholds))))
        part, whole = self.shard
        if not 0 <= part < whole:
            raise InvalidArgument(f"`shard` must be part 1 to N of N, got part {part + 1} of {whole}")


PRESETS = {
    "notebook": {
        "windows": 1, "shuffles": 1, "shuffles_across": 0, "random_weights": False, "thresholds": (0.95,), "show_layer": 10,
    },
}  # fmt: skip
"""The settings of the original notebook: one window from the middle, one shuffle, 95%, layer 10."""
