"""Numbers from rows, moments and samples. Knows no model and no study."""
