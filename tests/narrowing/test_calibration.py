"""Bases and gains from a calibration pass, against the states that transformers itself hands out."""

import pytest
import torch
from strong_models import random_windows

from dimscope.checkpoints.checkpoint import open_checkpoint
from dimscope.checkpoints.families import LAYOUTS
from dimscope.checkpoints.model import load_model
from dimscope.errors import InvalidArgument
from dimscope.interventions.table_summary import TableSummary
from dimscope.narrowing.bases import BASES, FROM_TABLE, FROM_TEXT, check_basis, make_basis
from dimscope.narrowing.calibration import Calibration, calibrate, calibrated_gains, rms_normed
from dimscope.texts.windows import Window
from dimscope.vectors.moments import moments

D = 32


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    return random_windows(4, 1, 20)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(open_checkpoint(checkpoint("llama")))


@pytest.fixture(scope="module")
def found(model, windows) -> Calibration:
    return calibrate(model, LAYOUTS["llama"], windows, batch=2)


def test_the_moments_are_those_of_all_norm_inputs(model, windows, found):
    """The inputs of the norms before attention are the hidden states of transformers; the others are caught here."""
    raw = torch.zeros(D, D, dtype=torch.float64)
    normalised = raw.clone()
    caught = []
    norms = [m for name, m in model.named_modules() if name.endswith("layernorm") or name == "model.norm"]
    handles = [m.register_forward_pre_hook(lambda module, args: caught.append(args[0])) for m in norms]
    with torch.no_grad():
        for window in windows:
            states = model(input_ids=window.ids[None], output_hidden_states=True).hidden_states
            assert torch.equal(caught[-5], states[0])
            for x in caught[-5:]:
                rows = x[0].double()
                raw += rows.T @ rows
                unit = rows / (rows.square().mean(dim=1, keepdim=True) + model.config.rms_norm_eps).sqrt()
                normalised += unit.T @ unit
    for handle in handles:
        handle.remove()
    assert len(caught) == 5 * len(windows)
    # Windows two at a time or alone: float32 products of the model in another order.
    torch.testing.assert_close(found.raw, raw, rtol=1e-5, atol=1e-7 * float(raw.trace()))
    torch.testing.assert_close(found.normalised, normalised, rtol=1e-5, atol=1e-6 * float(normalised.trace()))
    assert found.n_tokens == 80
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4, 20, D])
@pytest.mark.parametrize("name", BASES)
def test_every_basis_is_orthonormal_or_that_without_the_mean(found, name, k, centred):
    table = TableSummary(
        moments([torch.randn(200, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))])
    )
    basis = make_basis(name, table if name in FROM_TABLE else found, k, centred=centred)
    assert basis.shape == (D, k)
    expected = torch.eye(k, dtype=torch.float64) - centred / k
    torch.testing.assert_close(basis.T @ basis, expected, rtol=0, atol=1e-10)
    if centred:
        assert float(basis.sum(dim=0).abs().max()) < 1e-10
        assert float(basis.sum(dim=1).abs().max()) < 1e-10


def test_the_raw_basis_loses_the_least_of_the_stream_and_the_normalised_one_of_what_norms_see(found):
    def lost(moment: torch.Tensor, basis: torch.Tensor) -> float:
        return float(moment.trace() - (basis.T @ moment @ basis).trace())

    raw, normalised = FROM_TEXT["raw"](found, 8), FROM_TEXT["normalised"](found, 20)
    values = torch.linalg.eigvalsh(found.raw)
    assert lost(found.raw, raw) == pytest.approx(float(values[: D - 8].sum()), rel=1e-9)
    assert lost(found.normalised, normalised) < lost(found.normalised, FROM_TEXT["raw"](found, 20))


def test_a_massive_direction_that_norms_make_small_is_kept():
    """Planted: one token a thousand times as long as the others, in a direction that no other has."""
    rows = torch.randn(500, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows[:, 0] = 0
    massive = torch.zeros(1, D, dtype=torch.float64)
    massive[0, 0] = 1000
    together = torch.cat([massive, rows])
    unit = rms_normed(together, 0.0)
    planted = Calibration(together.T @ together, unit.T @ unit, {}, 0.0, 501)
    kept = FROM_TEXT["normalised"](planted, 12)
    assert float(kept[0].norm()) == pytest.approx(1, abs=1e-6)


def test_gains_are_one_at_full_width_and_make_up_for_what_is_cut_below_it(found):
    for gain in calibrated_gains(found, torch.eye(D, dtype=torch.float64)).values():
        assert gain == pytest.approx(1.0, rel=1e-9)
    basis = FROM_TEXT["normalised"](found, 16)
    gains = calibrated_gains(found, basis)
    assert len(gains) == 5
    for name, rows in found.samples.items():
        dense = rms_normed(rows.double(), found.eps) @ basis
        narrow = rms_normed(rows.double() @ basis, found.eps * D / 16)
        errors = [
            float((dense - c * narrow).square().sum()) for c in (gains[name], gains[name] * 1.01, gains[name] * 0.99)
        ]
        assert errors[0] < min(errors[1:])


def test_an_unknown_basis_is_refused():
    with pytest.raises(InvalidArgument, match="got 'best'"):
        check_basis("best")
