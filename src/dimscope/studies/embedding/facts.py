"""What report.json holds about a run of the embedding study."""

from dataclasses import dataclass

from dimscope.page.section import Facts


@dataclass(frozen=True, slots=True)
class EmbeddingFacts:
    """What the page must know of a run beside its tables.

    Attributes:
        side: The table that leads: "input", "output", or "vectors" where the source is no model.
        radius: The distance within which rows count as duplicates.
        neighbors: Nearest neighbors per token in the table `knn`.
        n_queries: Tokens whose neighbors were computed.
        full_knn: Whether those are all tokens.
        tokenizer_size: Tokens of the tokenizer; None without one.
        knn_sample: Tokens whose neighbors were to be computed.
        permutations: Random seeds of the column-permuted baseline.
        seed: The seed of samples and baselines.
    """

    side: str = "input"
    radius: float | None = None
    neighbors: int = 0
    n_queries: int = 0
    full_knn: bool = False
    tokenizer_size: int | None = None
    knn_sample: int | None = None
    permutations: int | None = None
    seed: int = 0


def embedding_facts(facts: Facts) -> EmbeddingFacts:
    """Return the facts of this study from those of the report."""
    return facts.typed("embedding", EmbeddingFacts)
