"""Writes families.md: which model types agree with stock transformers, found by the sweep over all of them.

python docs/make_families.py                                        (some minutes; needs the `dev` extra)
"""

import sys
import time
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests" / "families"))

import torch  # noqa: E402
import transformers  # noqa: E402
from stock import Case, find_cases  # noqa: E402
from sweep import examine  # noqa: E402

TITLES = {
    "causal": ("Causal language models", "parameters, tables, hidden states, logits"),
    "multimodal": ("Models of images or sounds with a text decoder", "parameters, tables, hidden states, logits"),
    "encoder": ("Encoders", "parameters, tables, hidden states"),
    "encoder-decoder": ("Encoder-decoders", "parameters, tables, hidden states of the encoder"),
}
INTRODUCTION = """\
# Which model types are covered?

`docs/make_families.py` writes this page.
It takes every type that transformers {version} lists in its mappings for causal language models, for models of images or sounds
with text, for masked language models, for encoding text and for sequence-to-sequence models.
It builds a tiny model of the type with random weights, saves it and opens the folder with dimscope.
Then it compares these with what stock transformers has and computes:

* the number of parameters, the input and the output table, and whether they are tied.
  Decoders are compared a second time with tables tied the other way, encoders also without an output table.
* the hidden states at every site: embeddings, each block, and the final norm.
* the logits at all positions of a text, for causal language models and models of images or sounds.

A type is covered if all of them agree.
The others are refused by dimscope with the reason given here, or transformers does not build or run them from text alone here.
The comparisons took {seconds:.0f} s of processor time.

| kind | types | covered | compared |
|---|---:|---:|---|
"""


def page(reasons: dict[Case, str | None], seconds: float) -> str:
    """Return the page.

    Args:
        reasons: Why each case is not covered, or None.
        seconds: Processor time of the sweep.
    """
    text = INTRODUCTION.format(version=transformers.__version__, seconds=seconds)
    parts = []
    for kind, (title, compared) in TITLES.items():
        cases = {case: reason for case, reason in reasons.items() if case.kind == kind}
        covered = [case for case, reason in cases.items() if reason is None]
        text += f"| {title} | {len(cases)} | {len(covered)} | {compared} |\n"
        parts += [f"\n## {title}\n", "\n| model type | class | covered |\n|---|---|---|\n"]
        for case, reason in sorted(cases.items(), key=lambda item: (item[1] is not None, item[0].model_type)):
            answer = "yes" if reason is None else f"no: {reason}".replace("|", r"\|")
            parts.append(f"| `{case.model_type}` | `{case.model_class}` | {answer} |\n")
    return text + "".join(parts)


def main() -> None:
    """Sweep over all types, and write the page."""
    torch.set_num_threads(1)
    start = time.process_time()
    reasons = {}
    for case in find_cases():
        reasons[case] = examine(case).reason
        print(case, reasons[case] or "covered", flush=True)
    (DOCS / "families.md").write_text(page(reasons, time.process_time() - start), encoding="utf-8")


if __name__ == "__main__":
    main()
