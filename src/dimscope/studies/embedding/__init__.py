"""How many dimensions the embedding table uses, and which tokens stand out in it."""
