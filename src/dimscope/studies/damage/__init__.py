"""What a model loses when its embedding table is changed."""
