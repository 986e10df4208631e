"""The settings of the embedding study. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from dimscope.studies.options import Flag, require_at_least, require_seed, require_types

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """Options of the embedding study."""

    side: Side = "input"
    "Which table leads: the input embeddings, or the output embeddings of an untied model."
    first_ids: int = 500
    "First rows of the table that are in the correlation matrix."
    neighbors: int = 10
    "Nearest neighbors per token for the token map and hubness."
    knn_sample: int = 5000
    "Tokens sampled for nearest neighbors and hubness."
    full_knn: Flag = False
    "Compute the nearest neighbors of every token. V x V x d operations: minutes for 150,000 tokens."
    permutations: int = 3
    "Random seeds of the column-permuted baseline."
    skip_nonfinite: Flag = False
    "Leave out rows with NaN or Inf instead of refusing the table."
    seed: Annotated[int, Parameter(show_default=True)] = 0
    "Random seed of samples and baselines."

    def __post_init__(self) -> None:
        """Raise InvalidArgument for values out of range."""
        require_types(self)
        require_at_least(1, self, "first_ids", "neighbors", "knn_sample", "permutations")
        require_seed(self)
