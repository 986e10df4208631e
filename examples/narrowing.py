"""What the notebook announces and does not do: a model with fewer dimensions that is really smaller.

python examples/narrowing.py [MODEL]        # a folder, a hub id, or nothing for the built-in model
"""

import sys
import tempfile

from transformers import AutoModelForCausalLM

import dimscope
from dimscope.studies.narrowing.verification import verify_rotation

checkpoint = dimscope.open(*sys.argv[1:2])
check = verify_rotation(checkpoint, dimscope.NarrowSettings(length=256))
print(f"rotated at full width, a logit changes by {check.difference:.1e}; the largest logit is {check.largest:.1f}")

width = checkpoint.input_table.shape[1] * 3 // 4
small = dimscope.narrow(checkpoint, width=width, windows=4, length=256)
print(small)

with tempfile.TemporaryDirectory() as folder:
    small.model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # stock transformers: dimscope is not needed from here on
    print(f"transformers counts {loaded.num_parameters():,} parameters, hidden size {loaded.config.hidden_size}")
