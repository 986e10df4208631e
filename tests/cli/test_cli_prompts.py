"""Prompts and generation configs of checkpoints as people have them, through the command that generates."""

from __future__ import annotations

import json

import models
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow  # whole commands

LIGHT = ("--truncate", "50%", "--new-tokens", "6", "--windows", "1", "--length", "16", "--text", "builtin:prose")


def stock(folder, text: str, **options: object) -> str:
    """Return what stock transformers generates after a text, with the generation config of the folder or these options."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    rows = model.generate(**ids, max_new_tokens=6, **options)
    return tokenizer.decode(rows[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def undamaged(cli, folder, *options: object) -> list[str]:
    """Return what the undamaged model generates after each prompt."""
    result = cli("damage", folder, *LIGHT, *options, "--json")
    assert result.returncode == 0, result.stderr[-600:]
    assert "Warning" not in result.stderr
    printed = json.loads(result.stdout)
    return [row["continuation"] for row in printed["generations"] if row["change"] == "undamaged"]


def test_a_template_that_reads_parts_gets_the_prompt(checkpoint, editable, cli):
    folder = editable(checkpoint("llama"))
    parts = "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    template = "{% for m in messages %}user: " + parts + "{% endfor %}assistant: "
    settings = models.read_json(folder / "tokenizer_config.json") | {"chat_template": template}
    models.write_json(folder / "tokenizer_config.json", settings)
    for prompt in ("The keeper counted", "In the winter"):
        (found,) = undamaged(cli, folder, "--prompt", prompt)
        # Without its template the model reads the same characters.
        assert found == stock(folder, f"user: {prompt}assistant: ", do_sample=False)


def test_generation_configs_are_followed_as_stock_follows_them(checkpoint, editable, cli, refused):
    folder, prompts = editable(checkpoint("llama")), ("The keeper counted", "In the winter of the year")
    own = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2, "min_length": 9, "temperature": 0.0, "top_k": 0}
    models.write_json(folder / "generation_config.json", own | {"eos_token_id": 2, "prompt_lookup_num_tokens": 2})
    continued = undamaged(cli, folder, "--decoding", "model", "--prompt", *prompts)
    assert continued == [stock(folder, f"<s>{prompt}", prompt_lookup_num_tokens=None) for prompt in prompts]
    greedy = undamaged(cli, folder, "--prompt", *prompts)
    assert greedy != continued
    models.write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 0.0, "eos_token_id": 2})
    assert undamaged(cli, folder, "--prompt", *prompts) == greedy
    # Stock transformers refuses to sample at this temperature.
    line = refused(
        cli("damage", folder, *LIGHT, "--decoding", "model", "--prompt", *prompts), "temperature", "--decoding"
    )
    assert "--temperature" not in line
