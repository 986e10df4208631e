"""What the notebook announces and does not do: a model with fewer dimensions that is really smaller, in a few calls.

python examples/narrowing.py [MODEL]        # a folder, a hub id, or nothing for the built-in model
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

import dimscope

checkpoint = dimscope.open(*sys.argv[1:2])
settings = dimscope.NarrowSettings(windows=4, length=256)
dim = checkpoint.input_table.shape[1]

found = dimscope.verify_rotation(checkpoint, settings)
print(f"turned at full width, a logit changes by {found.difference:.1e} of {found.largest:.1f}")

with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "narrow"
    facts, tables = dimscope.narrow(checkpoint, out, dim * 3 // 4, settings, command="examples/narrowing.py")
    model = AutoModelForCausalLM.from_pretrained(out)  # stock transformers: no dimscope is needed from here on
    account = facts["account"]
    print(
        f"{facts['width']} of {dim} dimensions: {account['narrow_parameters']:,} of {account['dense_parameters']:,} parameters"
    )
    print(f"transformers counts {model.num_parameters():,}")
    for row in tables["measured"].iter_rows(named=True):
        print(f"{row['metric']:>28} {row['dense']:14,.4g} {row['narrow']:14,.4g}")
