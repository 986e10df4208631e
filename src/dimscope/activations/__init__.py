"""A running model: places in its residual stream, what is collected there, and what it predicts."""
