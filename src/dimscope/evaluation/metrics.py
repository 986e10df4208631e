"""The names of what an evaluation measures, as they stand in tables."""

LOSS, RISE, BITS, KL = "loss", "loss rise", "bits per byte", "KL"
PERPLEXITY, TOP_1 = "perplexity", "top-1 agreement"
