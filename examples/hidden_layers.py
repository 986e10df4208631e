"""What the book's notebook on hidden layers looks at, on any causal model, in a few calls.

python examples/hidden_layers.py [MODEL] [TEXT]     # nothing for the built-in model and its built-in text
"""

import sys

import dimscope

checkpoint = dimscope.open(*sys.argv[1:2])
model, tokenizer = dimscope.load_model(checkpoint), dimscope.require_tokenizer(checkpoint.source)
sites = dimscope.find_sites(model)

# One window from the middle of the text, as it is and with its tokens in random order.
text = dimscope.open_text(*sys.argv[2:3] or ["builtin:prose"])
length = min(1024, model.config.max_position_embeddings)
[window] = dimscope.middle_windows(text, tokenizer, length=length, count=1)
passes = [dimscope.run_pass(model, sites, [w]) for w in (window, dimscope.shuffle_within(window, seed=0, draw=0))]

n, total, _ = passes[0].predictions.sums[2].tolist()
print(
    f"{window.unique_tokens} of {length} tokens are different; mean log-probability of the first choice {total / n:.2f}"
)


def count(spectrum: "dimscope.Spectrum") -> int:
    """Components for 95% of the variance."""
    return next(round(d.value) for d in dimscope.linear_dimensions(spectrum) if d.metric == "variance count 95%")


print(f"{'layer':>26} {'real':>5} {'shuffled':>8} {'noise':>5}   components for 95% of the variance")
real, shuffled = (dimscope.raw_spectra(of) for of in passes)
for layer, sums in passes[0].sites.items():
    noise = dimscope.white_noise_spectrum(length, sums.dim, 1.0, centred=True)
    print(f"{sums.name:>26} {count(real[layer]):5} {count(shuffled[layer]):8} {count(noise):5}")
