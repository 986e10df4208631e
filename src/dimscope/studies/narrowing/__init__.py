"""What a smaller hidden size costs and saves."""
