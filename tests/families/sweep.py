"""The sweep over the model types of transformers: each one tiny with random weights, dimscope compared with stock transformers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from stock import Case, Reference, build, reference, some_ids
from transformers.utils import logging

from dimscope.activations.forward import run_batch
from dimscope.activations.sites import Site, find_sites
from dimscope.checkpoints.budget import parameter_budget
from dimscope.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dimscope.checkpoints.model import load_model
from dimscope.errors import UnsupportedCheckpoint
from dimscope.vectors.embedding import open_table

WITH_PREDICTIONS = ("causal", "multimodal")  # the kinds whose logits are compared


@dataclass(slots=True)
class Outcome:
    """What the sweep finds of a case.

    Attributes:
        not_built: The first line of what transformers raises for a tiny model of this type and text alone.
        refused: The reasons of dimscope, by check.
        failed: The first lines of what went wrong, by check.
    """

    not_built: str | None = None
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str | None:
        """Return why the case is not covered, or None."""
        if self.not_built is not None:
            return f"transformers: {self.not_built}"
        if self.failed:
            return "; ".join(f"{check}: {line}" for check, line in self.failed.items())
        return "; ".join(dict.fromkeys(self.refused.values())) or None

    @contextmanager
    def check(self, name: str, folder: Path) -> Iterator[None]:
        """Note the first line of what the block raises."""
        try:
            yield
        except UnsupportedCheckpoint as e:
            self.refused[name] = first_line(e).removeprefix(f"{type(e).__name__}: ").removeprefix(f"{folder}: ")
        except Exception as e:  # whatever it raises is the finding
            self.failed[name] = first_line(e).replace(str(folder), "the folder")


def examine(case: Case) -> Outcome:
    """Build the model of a case, save it, and compare what dimscope makes of the folder with stock transformers."""
    outcome = Outcome()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as name:
        warnings.simplefilter("ignore")
        folder = Path(name)
        try:
            model = build(case)
            ids = some_ids(model)
            expected = reference(model, ids)
            model.save_pretrained(folder)
        except Exception as e:  # whatever transformers raises is the reason
            outcome.not_built = first_line(e)
            return outcome
        checkpoint = None
        with outcome.check("open", folder):
            checkpoint = open_checkpoint(folder)
        if checkpoint is not None:
            compare_tables(checkpoint, folder, expected, outcome)
            with outcome.check("load", folder):
                compare_runs(load_model(checkpoint), case, folder, ids, expected, outcome)
    return outcome


def first_line(error: Exception) -> str:
    """Return an error as one line; that of a config class names the class in its first line, and the reason in the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    is_wrapped = "alidation error" in lines[0] and len(lines) > 1
    return f"{type(error).__name__}: {lines[1] if is_wrapped else lines[0]}"[:200]


def compare_tables(checkpoint: Checkpoint, folder: Path, expected: Reference, outcome: Outcome) -> None:
    """Compare parameters, tables and tie."""
    with outcome.check("parameters", folder):
        n = parameter_budget(checkpoint)["n_parameters"].sum()
        assert n == expected.n_parameters, f"{n} parameters, stock {expected.n_parameters}"
    with outcome.check("input table", folder):
        assert_equal(open_table(checkpoint, "input").load()[1], expected.input_table)
    with outcome.check("tie", folder):
        assert checkpoint.tied == expected.tied, f"tied is {checkpoint.tied}, stock {expected.tied}"
    with outcome.check("output table", folder):
        if expected.output_table is not None:
            assert_equal(open_table(checkpoint, "output").load()[1], expected.output_table)
        else:
            assert checkpoint.output_table is None


def compare_runs(
    model: Any, case: Case, folder: Path, ids: torch.Tensor, expected: Reference, outcome: Outcome
) -> None:
    """Compare hidden states at all sites, and logits at all positions."""
    caught: dict[int, torch.Tensor] = {}
    logits: list[torch.Tensor] = []

    def keep(site: Site, hidden: torch.Tensor) -> None:
        assert site.layer not in caught, f"site {site.name} gives out states twice"
        caught[site.layer] = hidden.clone()

    with outcome.check("states", folder):
        sites = find_sites(model)
        run_batch(model, ids, sites=sites, consume=keep)
        compare_states(caught, len(sites), expected)
    if case.kind in WITH_PREDICTIONS and expected.logits is not None:
        with outcome.check("logits", folder):
            run_batch(model, ids, logits=lambda rows, block: logits.append(block))
            assert_equal(torch.cat(logits), expected.logits.flatten(0, 1).float())


def compare_states(caught: dict[int, torch.Tensor], n_sites: int, expected: Reference) -> None:
    """Compare the states of all sites: embeddings, blocks, and the final norm where there is one."""
    assert list(caught) == list(range(n_sites)), f"sites {list(caught)} of {n_sites} have states"
    n_blocks = len(expected.hidden_states) - 1
    assert n_sites - n_blocks in (1, 2), f"{n_sites} sites, stock has {n_blocks + 1} hidden states"
    for layer, states in enumerate(expected.hidden_states[:-1]):
        assert caught[layer].ndim == 3, f"site {layer}: states of {caught[layer].ndim} axes"
        assert_equal(caught[layer], states, f"site {layer}")
    if expected.before_norm is not None:
        assert n_sites == n_blocks + 2, "the final norm is no site"
        assert_equal(caught[n_blocks], expected.before_norm, "last block")
    assert_equal(caught[n_sites - 1], expected.hidden_states[-1], "last site")


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor") -> None:
    """Compare two tensors; the message has the largest difference."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, stock {tuple(expected.shape)}"
    difference = float((actual - expected).abs().max())
    assert difference <= 1e-5 * float(expected.abs().max()), f"{name}: differs by {difference:.2g}"
