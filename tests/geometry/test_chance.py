"""The chance edge: closed form of white noise, false positives on tables without structure, planted directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch import Tensor

from dimscope.geometry.chance import chance_edge, chance_participation_ratio

TABLES = 10  # structureless tables of each kind; one in twenty is expected to exceed the edge


def white(n: int, d: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=g, dtype=torch.float64)


def near_zero_rows(n: int, d: int, g: torch.Generator) -> Tensor:
    rows = white(n, d, g)
    rows[: 3 * n // 10] *= 1e-3
    return rows


def lognormal_norms(n: int, d: int, g: torch.Generator) -> Tensor:
    return white(n, d, g) * torch.exp(0.7 * torch.randn(n, 1, generator=g, dtype=torch.float64))


def heavy_tailed_rows(n: int, d: int, g: torch.Generator) -> Tensor:
    chi = torch.randn(n, 3, generator=g, dtype=torch.float64).square().sum(dim=1, keepdim=True)
    return white(n, d, g) / (chi / 3).sqrt()


def heavy_tailed_entries(n: int, d: int, g: torch.Generator) -> Tensor:
    chi = torch.randn(n, d, 3, generator=g, dtype=torch.float64).square().sum(dim=2)
    return white(n, d, g) / (chi / 3).sqrt()


def unequal_columns(n: int, d: int, g: torch.Generator) -> Tensor:
    return white(n, d, g) * torch.linspace(0.2, 3, d)


def unequal_rows_and_columns(n: int, d: int, g: torch.Generator) -> Tensor:
    return lognormal_norms(n, d, g) * torch.linspace(0.2, 3, d)


KINDS = (
    white, near_zero_rows, lognormal_norms, heavy_tailed_rows, heavy_tailed_entries, unequal_columns, unequal_rows_and_columns,
)  # fmt: skip


def edge_of(rows: Tensor) -> float:
    return chance_edge(rows.square().sum(dim=1), rows.square().mean(dim=0))


@pytest.mark.parametrize("shape", [(600, 40), (80, 160)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few_tables_without_structure_exceed_it(kind: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    exceeded, ratios = 0, []
    for seed in range(TABLES):
        rows = kind(*shape, torch.Generator().manual_seed(seed))
        rows = rows - rows.mean(dim=0)
        largest, edge = float(torch.linalg.matrix_norm(rows, 2)), edge_of(rows)
        exceeded += largest > edge
        ratios.append(edge / largest)
    assert exceeded <= 2
    assert median(ratios) < 1.3  # not so strict that nothing would ever be found


@pytest.mark.parametrize(("n", "d"), [(2000, 50), (50, 2000), (500, 500)])
def test_that_of_equal_rows_and_columns_is_marchenko_pastur_with_tracy_widom(n: int, d: int) -> None:
    a, b = math.sqrt(n), math.sqrt(d)
    johnstone = math.sqrt((a + b) ** 2 + 0.9793 * (a + b) * (1 / a + 1 / b) ** (1 / 3))
    assert chance_edge(torch.full((n,), float(d)), torch.ones(d)) == pytest.approx(johnstone, rel=1e-3)


def test_rows_and_columns_change_places() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(300, generator=generator).double() + 0.1
    columns = torch.rand(40, generator=generator).double() + 0.1
    rows *= columns.sum() / rows.mean()
    there = chance_edge(rows, columns)
    back = chance_edge(columns * 300, rows / 40)
    assert there == pytest.approx(back, rel=1e-3)


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_it_scales_with_the_table(factor: float) -> None:
    rows = lognormal_norms(400, 30, torch.Generator().manual_seed(0))
    assert edge_of(rows * factor) == pytest.approx(edge_of(rows) * factor, rel=1e-6)


def test_planted_directions_are_above_it_whatever_the_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = lognormal_norms(3000, 128, generator)
    directions = torch.linalg.qr(white(128, 10, generator)).Q
    rows += white(3000, 10, generator) * torch.linspace(6, 9, 10) @ directions.T
    rows -= rows.mean(dim=0)
    assert int((torch.linalg.svdvals(rows) > edge_of(rows)).sum()) == 10


def test_a_table_of_zeros_has_none() -> None:
    assert chance_edge(torch.zeros(5), torch.zeros(3)) == 0


def participation_ratio(rows: Tensor) -> float:
    return float(rows.square().sum() ** 2 / (rows.T @ rows).square().sum())


def by_chance(rows: Tensor) -> float:
    return chance_participation_ratio(rows.square().sum(dim=1), rows.square().mean(dim=0), float(rows.pow(4).sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_tables_without_structure_have_the_participation_ratio_of_chance(kind: Callable[..., Tensor]):
    tables = [kind(600, 40, torch.Generator().manual_seed(seed)) for seed in range(TABLES)]
    ratios = [participation_ratio(rows) / by_chance(rows) for rows in tables]
    # The heaviest tails scatter by 0.015 at this size.
    assert median(ratios) == pytest.approx(1, abs=0.02)
    assert max(abs(ratio - 1) for ratio in ratios) < 0.08


def test_the_participation_ratio_of_chance_is_that_of_random_signs():
    g = torch.Generator().manual_seed(0)
    rows = heavy_tailed_entries(12, 5, g)
    signs = torch.randint(0, 2, (20_000, 12, 5), generator=g) * 2.0 - 1
    products = torch.linalg.matrix_norm((signs * rows).mT @ (signs * rows)).square()
    error = float(products.std()) / len(products) ** 0.5
    expected = float(rows.square().sum()) ** 2 / by_chance(rows)
    assert abs(float(products.mean()) - expected) < 4 * error
