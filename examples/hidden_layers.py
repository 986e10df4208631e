"""What the book's notebook on hidden layers computes, for any causal model, in a few calls.

python examples/hidden_layers.py [MODEL] [TEXT]     # nothing for the built-in model and its built-in text
"""

import sys

import polars as pl

import dimscope

model = sys.argv[1] if len(sys.argv) > 1 else "builtin"
text = sys.argv[2] if len(sys.argv) > 2 else "builtin:prose"

# One window from the middle of the text, as it is and with its tokens in random order.
result = dimscope.layers(model, texts=[text], preset="notebook")

rows = result.tables["layers"].filter(metric="variance count 95%", preprocess="raw", centred=True)
real, shuffled = (rows.filter(condition=condition).sort("layer") for condition in ("real", "shuffled"))
print("components for 95% of the variance")
for (site, count, noise), other in zip(
    real.select("site", "value", "null").iter_rows(), shuffled["value"], strict=True
):
    print(f"{site:>26}: {count:.0f} on real text, {other:.0f} shuffled, {noise:.0f} for white noise")

sure = result.tables["predictions"].filter((pl.col("metric") == "max log-softmax") & (pl.col("condition") == "real"))
print(f"mean log-probability of the top prediction: {sure['value'][0]:.2f}")
