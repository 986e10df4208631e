"""Models that do not repeat themselves, and what stock transformers generates with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from models import FAMILIES
from scipy.stats import chisquare
from transformers import GenerationConfig

from dimscope.evaluation.prompts import Prompt, prepare_prompt

CAUSAL = [name for name, family in FAMILIES.items() if family.output]
FEW = ["gpt2", "llama"]  # byte-level BPE and SentencePiece
BYTE_LEVEL = [name for name in CAUSAL if FAMILIES[name].tokenizer == "byte_bpe"]
TEXTS = ("The keeper", "She laughed at them both and put the kettle on the stove.", "In")
NEW = 12
END = {"byte_bpe": 1, "sentencepiece": 2}


def end_of(family: str) -> int:
    return END[FAMILIES[family].tokenizer]


def prompts_of(tokenizer: Any) -> list[Prompt]:
    """Return prompts of different lengths, among them one with the end token at its beginning and inside."""
    end = tokenizer.eos_token_id
    odd = Prompt("odd", (end, end, 40, 50, end, 60), False)
    return [*(prepare_prompt(tokenizer, text) for text in TEXTS), odd]


def alone(model: Any, ids: tuple[int, ...], new: int = NEW, ends: Any = None, **options: Any) -> tuple[int, ...]:
    """Return what stock transformers writes after one prompt, which needs no padding, up to the first end token."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        written = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=new, eos_token_id=ends, pad_token_id=0, **{"do_sample": False, **options},
        )  # fmt: skip
    finally:
        model.generation_config = own
    return until_end(tuple(written[0, len(ids) :].tolist()), ends)


def until_end(ids: tuple[int, ...], ends: Any) -> tuple[int, ...]:
    ends = ends if isinstance(ends, list) else [ends]
    return ids[: next((n for n, i in enumerate(ids) if i in ends), len(ids))]


@torch.no_grad()
def next_logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1].double()


def added_to_logits(model: Any, added: torch.Tensor | float) -> Any:
    """Add numbers to all logits of a model; returns the handle of the hook."""
    return model.get_output_embeddings().register_forward_hook(lambda module, args, out: out + added)


def likely(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether chi-squared gives p above 1e-5; tokens expected less than five times are counted together."""
    rare = expected < 5
    found, wanted = ([*values[~rare], values[rare].sum()] for values in (counts, expected))
    return chisquare(found, wanted).pvalue > 1e-5
