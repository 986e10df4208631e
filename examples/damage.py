"""Change the embedding table of a model and measure what it loses, as the original notebook did, in a few calls.

python examples/damage.py [MODEL]        # a folder, a hub id, or nothing for the built-in model
"""

import sys

import dimscope

checkpoint = dimscope.open(*sys.argv[1:2])
model, tokenizer = dimscope.load_model(checkpoint), dimscope.require_tokenizer(checkpoint.source)
table = dimscope.TableSummary(dimscope.moments_of(dimscope.open_table(checkpoint)))

windows = dimscope.middle_windows(dimscope.open_text("builtin:prose"), tokenizer, length=256, count=4)
base = dimscope.baseline(model, windows)
prompts = [dimscope.prepare_prompt(tokenizer, "Once upon a time")]
decoding = dimscope.Decoding(max_new_tokens=16)


def show(name: str) -> None:
    """Print the loss of the model as it is now, its agreement with the undamaged one, and a continuation."""
    result = dimscope.evaluate(model, base)
    [continuation] = dimscope.generate(model, tokenizer, prompts, decoding)
    print(f"{name:>34}: loss {result.loss:.2f} nats, same top prediction {result.top_1:.0%}, {continuation.text!r}")


show("undamaged")
for kind in ("truncate", "project", "project-rescaled"):
    for k in (table.dim * 2 // 3, table.dim // 3):
        change = dimscope.make_map(kind, table, k, seed=0)
        error = dimscope.exact_error(change, table.moments) / table.norm
        with dimscope.perturbed(model, change):
            show(f"{kind} {k}, error {error:.0%}")
for kind, strength in (("noise", 0.1), ("noise", 1.0), ("scale", 2.0)):
    with dimscope.perturbed(model, dimscope.make_map(kind, table, strength, seed=0)):
        show(f"{kind} {strength:g}")
