"""A model on a text: loss, KL and agreement, what it generates, how fast it is."""
