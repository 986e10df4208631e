"""Which blocks are dropped, and the model without them, compared with one whose blocks do nothing."""

from copy import deepcopy
from typing import Any

import torch
from strong_models import random_windows, strengthen
from transformers import AutoModelForCausalLM

from dimscope.checkpoints.families import LAYOUTS
from dimscope.checkpoints.model import Placement
from dimscope.narrowing.calibration import calibrate
from dimscope.narrowing.layer_dropping import least_blocks, without_blocks

CPU = Placement("float32", "cpu")
WINDOWS = random_windows(4, 1)
IDS = torch.stack([w.ids for w in WINDOWS])


def silenced(model: Any, blocks: range) -> Any:
    """Return a copy in which some blocks add nothing to the stream."""
    other = deepcopy(model)
    with torch.no_grad():
        for i in blocks:
            for name, parameter in other.model.layers[i].named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter.zero_()
    return other


def strong(checkpoint: Any, layers: int) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint("llama", layers=layers)).eval()
    strengthen(model, torch.Generator().manual_seed(0))
    return model


def test_without_blocks_the_model_predicts_what_it_predicts_with_blocks_that_do_nothing(checkpoint):
    model = strong(checkpoint, 4)
    shorter = without_blocks(model, range(1, 3), CPU)
    assert shorter.config.num_hidden_layers == len(shorter.model.layers) == 2
    with torch.no_grad():
        logits, expected = (m(input_ids=IDS).logits for m in (shorter, silenced(model, range(1, 3))))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert shorter.model.layers[1].mlp.up_proj.weight.data_ptr() == model.model.layers[3].mlp.up_proj.weight.data_ptr()


def test_blocks_that_do_nothing_are_dropped_first(checkpoint):
    model = silenced(strong(checkpoint, 5), range(2, 4))
    calibration = calibrate(model, LAYOUTS["llama"], WINDOWS)
    assert least_blocks(calibration, 2) == range(2, 4)
    assert least_blocks(calibration, 1) in (range(2, 3), range(3, 4))
