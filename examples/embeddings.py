"""What the book's notebook on token embeddings computes, for any model, in a few calls.

python examples/embeddings.py [MODEL]        # a folder, a hub id, or nothing for the built-in model
"""

import sys

import dimscope

checkpoint = dimscope.open(*sys.argv[1:2])
budget = dimscope.parameter_budget(checkpoint)
print(f"{dimscope.embedding_share(budget):.1%} of {budget['n_parameters'].sum():,} parameters are token embeddings")

leading = dimscope.spectrum(checkpoint).singular_values[:5]
print("leading singular values:", [round(value, 2) for value in leading.tolist()])
print(dimscope.dimensions(checkpoint))

neighbors = dimscope.neighbors(checkpoint, None, [" water", " king"], k=8)
for (query, space), rows in neighbors.group_by("query", "space", maintain_order=True):
    print(f"{query!r} in {space}: {' '.join(rows['label'])}")
