"""What the book's notebook on token embeddings looks at, on any model, in a few calls.

python examples/embeddings.py [MODEL]        # a folder, a hub id, or nothing for the built-in model
"""

import sys

import dimscope

checkpoint = dimscope.open(*sys.argv[1:2])
table = dimscope.open_table(checkpoint)

budget = dimscope.parameter_budget(checkpoint)
print(f"{dimscope.embedding_share(budget):.1%} of {budget['n_parameters'].sum():,} parameters are token embeddings")

moments = dimscope.moments_of(table)
spectrum = dimscope.spectrum(moments, centred=True)
print("leading singular values:", [round(s, 2) for s in spectrum.singular_values[:5].tolist()])
for dimension in dimscope.linear_dimensions(spectrum):
    print(f"{dimension.metric:36} {dimension.value:8.1f} of {table.dim}")

for query, found in dimscope.neighbor_tables(checkpoint, table, [" water", " king"], k=8).items():
    for (space,), part in found.group_by("space", maintain_order=True):
        print(f"{query!r} in {space}: {' '.join(part['label'])}")
