"""Tables of N x d vectors, streamed by blocks, and their moments."""
