"""Models with decided predictions, and studies of them that several modules read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import damage as spoil
import numpy as np
import pytest
import torch
from damage_oracles import CASES, PROMPTS, changed, damage_settings, spelled, tables_of
from models import TEXT
from threadpoolctl import threadpool_limits

import dimscope
from dimscope.storage import ResultFolder
from dimscope.studies.damage.run import run_damage
from dimscope.studies.study import Monitor


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lively(checkpoint, tmp_path_factory) -> Callable[[str], Path]:
    """Return `lively(case)`: a checkpoint with decided predictions and norms that differ, where fresh ones are flat."""

    def enliven(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(11)
        for name in sorted(tensors):
            values = tensors[name].double()
            norm = "norm" in name or "ln_" in name
            if norm and name.endswith("weight"):
                values = values + torch.rand(values.shape, dtype=torch.float64, generator=generator) - 0.3
            elif values.dim() == 2:
                values = values * 8 + (0.05 if "embed" in name or "wte" in name else 0)  # the tables get a mean
            tensors[name] = values.to(tensors[name].dtype)
        return tensors

    @cache
    def make(name: str) -> Path:
        case = CASES[name]
        source = checkpoint(case.family, **case.arguments)
        folder = shutil.copytree(source, tmp_path_factory.mktemp("lively") / case.family)
        spoil.edit_tensors(folder / "model.safetensors", enliven)
        return folder

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("texts") / "keeper.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def study(text) -> Callable:
    """Return `study(model, folder, *changes, announce=None, watch=None, **settings)`: facts and tables."""

    def run(model: Path, folder: Path, *changes: str, announce=None, watch=None, **settings):
        monitor = Monitor(announce or (lambda line: None), watch=watch)
        output = run_damage(
            dimscope.open(str(model)), damage_settings(text, *changes, **settings), ResultFolder(folder, {}), monitor
        )
        return output.facts, output.tables

    return run


@pytest.fixture(scope="session")
def studied(lively, study, digest, tmp_path_factory) -> Callable:
    """Return `studied(case)`: folder, facts and tables of the study of a case, each once. Read only."""

    @cache
    def run(name: str):
        folder, before, case = tmp_path_factory.mktemp("studied"), digest(lively(name)), CASES[name]
        settings = {"sides": case.sides, "draws": case.draws, "prompts": PROMPTS, "new_tokens": 6}
        facts, tables = study(lively(name), folder, *case.changes, **settings)
        assert digest(lively(name)) == before  # the model is read, never written
        return folder, facts, tables

    return run


@pytest.fixture(scope="session")
def table_after(lively) -> Callable[[str, str, str, int | None], np.ndarray]:
    """Return `table_after(case, side, change, seed)`: a table of a case after a change, by numpy, each once."""

    @cache
    def make(case: str, side: str, change: str, seed: int | None) -> np.ndarray:
        return changed(spelled(change), tables_of(lively(case))[side], seed or 0)

    return make
