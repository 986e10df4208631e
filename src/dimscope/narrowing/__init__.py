"""Making a model narrower for good: bases, calibration, projection, training, and the narrow checkpoint."""
