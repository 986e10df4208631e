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
from stock import Case, Reference, Tables, build, reference, some_ids, stock_fault, tables, with_pooler
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
        folder: Where models are saved.
        not_built: The first line of what transformers raises for a tiny model of this type and text alone.
        refused: The reasons of dimscope, by check.
        failed: The first lines of what went wrong, by check.
    """

    folder: Path
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
    def check(self, name: str) -> Iterator[None]:
        """Note the first line of what the block raises."""
        try:
            yield
        except UnsupportedCheckpoint as e:
            self.refused[name] = first_line(e).partition(": ")[2].removeprefix(f"{self.folder}: ")
        except Exception as e:  # whatever it raises is the finding
            self.failed[name] = first_line(e).replace(str(self.folder), "the folder")

    def save(self, model: Any) -> None:
        """Save a model to the folder, in the place of the one before."""
        for file in self.folder.iterdir():
            file.unlink()
        model.save_pretrained(self.folder)

    def open(self, name: str) -> Checkpoint | None:
        """Return the checkpoint in the folder; what opening it raises is noted."""
        with self.check(name):
            return open_checkpoint(self.folder)
        return None


def examine(case: Case) -> Outcome:
    """Build the model of a case, save it, and compare what dimscope makes of the folder with stock transformers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        outcome = Outcome(Path(folder))
        try:
            model = build(case)
            ids = some_ids(model)
            expected = reference(model, ids)
            outcome.save(model)
        except (ModuleNotFoundError, OSError):  # the environment is broken, which says nothing about the type
            raise
        except Exception as e:  # whatever transformers raises is the reason
            outcome.not_built = first_line(e)
            return outcome
        if (checkpoint := outcome.open("open")) is not None:
            compare_tables(checkpoint, expected.tables, outcome)
            with outcome.check("load"):
                loaded = load_model(checkpoint)
                compare_states(loaded, ids, expected, outcome)
                if case.kind in WITH_PREDICTIONS and expected.logits is not None:
                    compare_logits(loaded, ids, expected.logits, outcome)
        compare_variant(case, model, ids, expected, outcome)
        if outcome.failed:  # only then: loading costs as much as all the rest
            outcome.save(model)
            if (fault := stock_fault(model, outcome.folder)) is not None:
                outcome.not_built = fault
                outcome.failed.clear()
    return outcome


def compare_variant(case: Case, model: Any, ids: torch.Tensor, expected: Reference, outcome: Outcome) -> None:
    """Compare a decoder tied the other way, or an encoder without its output table, as sentence-transformers saves it."""
    is_decoder = case.kind in WITH_PREDICTIONS
    if not is_decoder and case.kind != "encoder":
        return
    variant = ", tied the other way" if is_decoder else ", base model"
    try:
        other = build(case, tie_other_way=True) if is_decoder else with_pooler(model)
        outcome.save(other)
    except Exception:  # transformers has no such model
        return
    if (checkpoint := outcome.open(f"open{variant}")) is not None:
        compare_tables(checkpoint, tables(other), outcome, variant)
        if not is_decoder:
            with outcome.check(f"load{variant}"):
                compare_states(load_model(checkpoint), ids, expected, outcome, variant)


def first_line(error: Exception) -> str:
    """Return an error as one line; that of a config class names the class in its first line, and the reason in the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    is_wrapped = "alidation error" in lines[0] and len(lines) > 1
    return f"{type(error).__name__}: {lines[1] if is_wrapped else lines[0]}"[:200]


def compare_tables(checkpoint: Checkpoint, expected: Tables, outcome: Outcome, variant: str = "") -> None:
    """Compare parameters, tables and tie."""
    with outcome.check(f"parameters{variant}"):
        n = parameter_budget(checkpoint)["n_parameters"].sum()
        assert n == expected.n_parameters, f"{n} parameters, stock {expected.n_parameters}"
    with outcome.check(f"input table{variant}"):
        assert_equal(open_table(checkpoint, "input").load()[1], expected.input_table)
    with outcome.check(f"tie{variant}"):
        assert checkpoint.tied == expected.tied, f"tied is {checkpoint.tied}, stock {expected.tied}"
    with outcome.check(f"output table{variant}"):
        if expected.output_table is not None:
            assert_equal(open_table(checkpoint, "output").load()[1], expected.output_table)
        else:
            assert checkpoint.output_table is None


def compare_states(model: Any, ids: torch.Tensor, expected: Reference, outcome: Outcome, variant: str = "") -> None:
    """Compare the states of all sites: embeddings, blocks, and the final norm where there is one."""
    caught: dict[int, torch.Tensor] = {}

    def keep(site: Site, hidden: torch.Tensor) -> None:
        assert site.layer not in caught, f"site {site.name} gives out states twice"
        caught[site.layer] = hidden.clone()

    with outcome.check(f"states{variant}"):
        n_sites, n_blocks = len(sites := find_sites(model)), len(expected.hidden_states) - 1
        run_batch(model, ids, sites=sites, consume=keep)
        assert list(caught) == list(range(n_sites)), f"sites {list(caught)} of {n_sites} have states"
        assert n_sites - n_blocks in (1, 2), f"{n_sites} sites, stock has {n_blocks + 1} hidden states"
        for layer, states in enumerate(expected.hidden_states[:-1]):
            assert caught[layer].ndim == 3, f"site {layer}: states of {caught[layer].ndim} axes"
            assert_equal(caught[layer], states, f"site {layer}")
        if expected.before_norm is not None:
            assert n_sites == n_blocks + 2, "the final norm is no site"
            assert_equal(caught[n_blocks], expected.before_norm, "last block")
        assert_equal(caught[n_sites - 1], expected.hidden_states[-1], "last site")


def compare_logits(model: Any, ids: torch.Tensor, expected: torch.Tensor, outcome: Outcome) -> None:
    """Compare the logits at all positions."""
    blocks: list[torch.Tensor] = []
    with outcome.check("logits"):
        run_batch(model, ids, logits=lambda rows, block: blocks.append(block))
        assert_equal(torch.cat(blocks), expected.flatten(0, 1).float())


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, name: str = "tensor") -> None:
    """Compare two tensors; the message has the largest difference."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, stock {tuple(expected.shape)}"
    difference = float((actual - expected).abs().max())
    assert difference <= 1e-5 * float(expected.abs().max()), f"{name}: differs by {difference:.2g}"
