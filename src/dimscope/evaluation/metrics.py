"""The names of what an evaluation measures, as they stand in tables."""

LOSS, RISE, BITS, KL = "loss", "loss rise", "bits per byte", "KL"
PERPLEXITY, TOP_1, UNIGRAMS = "perplexity", "top-1 agreement", "unigram entropy"

DEFINITIONS = dict.fromkeys((LOSS, RISE, BITS, KL, PERPLEXITY, TOP_1), 2) | {UNIGRAMS: 1}
"""The number of each definition: it grows by one when a change of the code changes what the name stands for."""
