"""What the book's notebook does to the embedding table of a model, with measures, in a few calls.

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


def told(name: str) -> None:
    """The loss, and the answer, of the model as it is now."""
    found = dimscope.judge(model, base)
    [answer] = dimscope.generate(model, tokenizer, prompts, decoding)
    print(f"{name:>34}: loss {found.loss:.2f}, first choice the same at {found.top_1:.0%}, {answer.text!r}")


told("as it is")
for kind in ("truncate", "project", "project-rescaled"):
    for k in (table.dim * 2 // 3, table.dim // 3):
        change = dimscope.make_map(kind, table, k, seed=0)
        error = dimscope.exact_error(change, table.moments) / table.norm
        with dimscope.perturbed(model, change):
            told(f"{kind} {k}, error {error:.0%}")
for kind, strength in (("noise", 0.1), ("noise", 1.0), ("scale", 2.0)):
    with dimscope.perturbed(model, dimscope.make_map(kind, table, strength, seed=0)):
        told(f"{kind} {strength:g}")
