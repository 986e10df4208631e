"""Change the embedding table of a model and measure what it loses, as the original notebook did, in a few calls.

python examples/damage.py [MODEL]        # a folder, a hub id, or nothing for the built-in model
"""

import sys

import dimscope

model = sys.argv[1] if len(sys.argv) > 1 else "builtin"
shares = ("67%", "33%")
changes = [f"{kind}:{share}" for kind in ("truncate", "project", "project-rescaled") for share in shares]
changes += ["noise:0.1", "noise:1", "scale:2"]

result = dimscope.damage(
    model, None, changes, windows=4, length=256, draws=1, prompts=["Once upon a time"], new_tokens=16
)

print(result.summary().answer)
damage, continuations = result.tables["damage"], result.tables["generations"]
for change in damage["change"].unique(maintain_order=True):
    rows = damage.filter(change=change)
    loss, same = (rows.filter(metric=metric)["value"][0] for metric in ("loss", "top-1 agreement"))
    text = continuations.filter(change=change)["continuation"][0]
    print(f"{change:>24}: loss {loss:.2f} nats, same top prediction at {same:.0%}, {text!r}")
