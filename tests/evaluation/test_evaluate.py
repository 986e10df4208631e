"""What a changed model loses, against stock logits in float64; nothing lost where nothing is changed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import FAMILIES, TEXT
from scipy.special import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GraniteConfig

from dimscope.activations import output_head
from dimscope.evaluation import evaluate as module
from dimscope.evaluation.evaluate import SUMS, baseline, evaluate, evaluation_of
from dimscope.interventions.insertion import perturbed
from dimscope.interventions.perturbations import make_map
from dimscope.interventions.table_summary import TableSummary
from dimscope.texts.texts import open_text
from dimscope.texts.windows import middle_windows
from dimscope.vectors.moments import moments

CAUSAL = [name for name, family in FAMILIES.items() if family.output]


@pytest.fixture(scope="module")
def case(checkpoint, tmp_path_factory):
    """Return `case(family)`: a fresh model and five windows of 24 tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")

    def make(family):
        folder = checkpoint(family)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return model, middle_windows(open_text(str(path)), tokenizer, length=24, count=5)

    return make


def truncation(model, k=6):
    rows = model.get_input_embeddings().weight.detach()
    return make_map("truncate", TableSummary(moments([rows], dtype=torch.float64)), k)


@torch.no_grad()
def stock(model, windows):
    """Return float64 log-probabilities of every window by the model's own forward pass."""
    return [log_softmax(model(input_ids=w.ids[None]).logits[0].double().numpy(), axis=-1) for w in windows]


def by_hand(before, after, windows):
    """Return loss, rise, KL and agreement of every position, a list for each window, and the bytes that are predicted."""
    loss, rise, kl, first, n_bytes = [], [], [], [], 0
    for p, q, w in zip(before, after, windows, strict=True):
        start = max(w.n_prefix - 1, 0)
        loss.append([-q[i, int(w.ids[i + 1])] for i in range(start, len(w.ids) - 1)])
        rise.append([p[i, int(w.ids[i + 1])] - q[i, int(w.ids[i + 1])] for i in range(start, len(w.ids) - 1)])
        kl.append((np.exp(p) * (p - q)).sum(axis=1).tolist())
        first.append((p.argmax(axis=1) == q.argmax(axis=1)).tolist())
        n_bytes += int(w.n_bytes[max(w.n_prefix, 1) :].sum())
    return loss, rise, kl, first, n_bytes


def spread(values):
    """Return the standard error of a mean over windows of one length: that of the means of the windows."""
    means = np.mean(values, axis=1)
    return np.std(means, ddof=1) / math.sqrt(len(means))


@pytest.mark.parametrize(
    ("family", "side"), [*((family, "both") for family in CAUSAL), ("llama", "input"), ("llama", "output")]
)
def test_an_evaluation_is_that_of_stock_logits(case, family, side, monkeypatch):
    """To 1e-4: logits in float32 by blocks of three positions, computed here in float64 by whole windows."""
    monkeypatch.setattr(output_head, "BLOCK_ROWS", 3)
    model, windows = case(family)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:  # Phi's, which starts at zero
        torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(0))
    check(model, windows, side)


def test_logits_that_are_scaled_or_capped_are_so_on_both_sides(case):
    _, windows = case("llama")
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    torch.manual_seed(0)
    for config in (GraniteConfig(**sizes, logits_scaling=0.05), Gemma2Config(**sizes, final_logit_softcapping=0.05)):
        check(AutoModelForCausalLM.from_config(config).eval(), windows, "both")


def check(model, windows, side):
    base, before = baseline(model, windows, batch=2), stock(model, windows)
    with perturbed(model, truncation(model), side):
        found, after = evaluate(model, base), stock(model, windows)
    loss, rise, kl, first, n_bytes = by_hand(before, after, windows)
    total, n_predicted = np.sum(loss), np.size(loss)
    assert found.loss.value == pytest.approx(np.mean(loss), rel=1e-4)
    assert found.loss.stderr == pytest.approx(spread(loss), rel=1e-3)
    # of differences of numbers of 6, each right to 1e-6
    assert found.loss_rise.value == pytest.approx(np.mean(rise), rel=1e-3, abs=2e-6)
    assert found.loss_rise.stderr == pytest.approx(spread(rise), rel=1e-2, abs=2e-6)
    assert found.perplexity == pytest.approx(math.exp(np.mean(loss)), rel=1e-3)
    assert found.bits_per_byte.value == pytest.approx(total / math.log(2) / n_bytes, rel=1e-4)
    assert found.kl.value == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-6)
    assert found.kl.stderr == pytest.approx(spread(kl), rel=1e-2, abs=1e-6)
    # a tie of the first two may fall otherwise
    assert found.top_1.value == pytest.approx(np.mean(first), abs=1.01 / np.size(first))
    assert (found.n_predicted, found.n_positions) == (n_predicted, 5 * 24)
    assert found.kl.value > 1e-5


def test_errors_come_from_windows_not_from_positions():
    """Planted: 16 windows of 100 positions, alike inside, whose losses lie apart with a standard deviation of 1."""
    n, positions = 16, 100
    offsets = np.random.default_rng(0).standard_normal(n)
    offsets = (offsets - offsets.mean()) / offsets.std(ddof=1)
    sums = torch.zeros(n, len(SUMS), dtype=torch.float64)
    sums[:, :3] = positions
    sums[:, SUMS.index("loss")] = torch.from_numpy(positions * (3 + offsets))
    sums[:, SUMS.index("loss_rise")] = positions * 0.5
    found = evaluation_of(sums)
    assert (found.loss.value, found.loss.stderr) == pytest.approx((3, 1 / 4))  # over positions it would be 1/40
    assert (found.loss.high - 3) / found.loss.stderr == pytest.approx(2.13145, rel=1e-5)  # t of 15 degrees of freedom
    assert (found.loss_rise.value, found.loss_rise.stderr) == pytest.approx((0.5, 0))  # paired: the offsets cancel
    assert evaluation_of(sums[:1]).loss.stderr is None


def test_windows_that_differ_give_a_larger_error_than_their_positions_do(case):
    """A window of one token again and again beside windows of text: the positions of each are alike."""
    model, windows = case("llama")
    torch.manual_seed(0)
    for weights in model.parameters():
        weights.data *= 3  # predictions that depend on what is read
    same = replace(windows[0], ids=windows[0].ids[3].expand(len(windows[0].ids)).clone())
    read = [*windows[:2], same, same]
    found = evaluate(model, baseline(model, read), changed=False)
    loss = by_hand(stock(model, read), stock(model, read), read)[0]
    assert found.loss.stderr == pytest.approx(spread(loss), rel=1e-3)
    assert found.loss.stderr > 1.5 * np.std(loss) / math.sqrt(np.size(loss))


def test_an_unchanged_model_loses_nothing(case):
    model, windows = case("llama")
    found = evaluate(model, baseline(model, windows, batch=5))
    assert found.kl.value == pytest.approx(0, abs=1e-7)
    assert found.loss_rise.value == pytest.approx(0, abs=1e-6)
    assert found.loss_rise.stderr == pytest.approx(0, abs=1e-6)
    assert found.top_1.value == 1


@pytest.mark.parametrize(("family", "batch"), [("llama", 1), ("gpt2", 2)])
def test_a_model_that_is_not_changed_is_evaluated_by_the_pass_of_its_baseline_bit_for_bit(case, family, batch):
    model, windows = case(family)
    base = baseline(model, windows, batch)
    passes = []
    with_pass = evaluate(model, base)
    handle = model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    assert evaluate(model, base, changed=False) == with_pass
    handle.remove()
    assert passes == []


def test_the_baseline_outlives_a_table_put_in_its_place(case):
    model, windows = case("qwen2")
    base = baseline(model, windows)
    with perturbed(model, truncation(model), "both"):
        quick = evaluate(model, base)
    with perturbed(model, truncation(model), "both", materialise=True):
        slow = evaluate(model, base)
    assert slow.kl.value == pytest.approx(quick.kl.value, rel=1e-3)
    assert evaluate(model, base).kl.value == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_rise_is_the_loss_above_that_of_the_model_as_it_was_and_told_more_sharply_than_either(case, family):
    model, windows = case(family)
    base = baseline(model, windows, batch=2)
    own = evaluate(model, base)
    with perturbed(model, truncation(model, 28)):  # little is taken away: the losses of a position stay alike
        found = evaluate(model, base)
    # float32 losses of 6 nats
    assert found.loss_rise.value == pytest.approx(found.loss.value - own.loss.value, abs=2e-6)
    assert 0 < found.loss_rise.stderr < found.loss.stderr


@pytest.mark.parametrize(("family", "materialise"), [("llama", False), ("phi", True)])
def test_log_probabilities_that_were_kept_give_bit_for_bit_the_numbers_of_those_computed_again(
    case, family, materialise, monkeypatch
):
    """In blocks of seven positions of 48, the last of one window of 24 alone."""
    monkeypatch.setattr(output_head, "BLOCK_ROWS", 7)
    model, windows = case(family)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(0))
    kept = baseline(model, windows, batch=2)
    monkeypatch.setattr(module, "CACHE_SHARE", 0.0)
    again = baseline(model, windows, batch=2)
    assert again.cache is None
    assert [[len(block) for block in batch] for batch in kept.cache] == [[7] * 6 + [6]] * 2 + [[7, 7, 7, 3]]
    assert evaluate(model, kept) == evaluate(model, again)
    for side in ("input", "output", "both"):
        with perturbed(model, truncation(model), side, materialise=materialise):
            found = evaluate(model, kept)
            assert found == evaluate(model, again)
        assert found.kl.value > 1e-5


def test_kept_log_probabilities_are_those_of_stock_logits(case):
    model, windows = case("mistral")
    kept = baseline(model, windows, batch=2).cache
    expected = np.concatenate(stock(model, windows))
    found = torch.cat([block for batch in kept for block in batch])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)  # numbers of 6 to 10 in float32


def test_log_probabilities_are_kept_where_they_are_little_of_the_memory_alone(case, monkeypatch):
    """5 windows of 24 positions and 512 tokens in float32 are 245,760 bytes; twice a share or half of it decides."""
    model, windows = case("llama")
    free = module.available_memory()
    for share, kept in ((1.9, True), (0.55, False)):
        monkeypatch.setattr(module, "CACHE_SHARE", share * 245_760 / free)
        assert (baseline(model, windows).cache is not None) == kept


def test_the_batch_does_not_matter(case):
    model, windows = case("gpt2")
    one, five = baseline(model, windows, batch=1), baseline(model, windows, batch=5)
    with perturbed(model, truncation(model)):
        first, second = evaluate(model, one), evaluate(model, five)
    assert first.kl.value == pytest.approx(second.kl.value, rel=1e-4)
    assert first.loss.value == pytest.approx(second.loss.value, rel=1e-5)


def test_windows_of_several_lengths_are_refused(case):
    model, windows = case("gpt2")
    short = type(windows[0])(9, windows[0].ids[:5], windows[0].ends[:5], windows[0].n_bytes[:5], windows[0].n_prefix)
    with pytest.raises(ValueError, match="one length"):
        baseline(model, [*windows, short])
