"""How many dimensions the hidden states of every layer use."""
