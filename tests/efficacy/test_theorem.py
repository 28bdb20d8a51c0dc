"""The numerical check of Theorem 1: what is proved holds, what is printed does not, and the check can tell."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).parents[2] / "bench" / "efficacy" / "theorem.py"


@pytest.fixture(scope="module")
def theorem() -> ModuleType:
    spec = importlib.util.spec_from_file_location("theorem", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["theorem"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(theorem: ModuleType) -> list:
    return theorem.run_grid(counts=(1, 25), trigger_norms=(0.25, 2.0), regularisations=(1e-2, 1e-4), seeds=(0,))


def test_what_can_be_proved_holds_and_is_not_empty(theorem: ModuleType, rows: list) -> None:
    assert len(rows) == 8
    for bound in ("bound_infected", "bound_benign"):
        assert theorem.violations(rows, bound) == []
    assert all(row.measured < 3 * row.bound_infected for row in rows)
    assert all(row.measured == pytest.approx(row.closed_form, rel=1e-5) for row in rows)


def test_the_printed_bound_is_broken_under_its_own_assumption(theorem: ModuleType, rows: list) -> None:
    broken = theorem.violations(rows, "bound_paper")
    assert [(row.poisoned, row.trigger_norm) for row in broken if row.assumption_10] == [(1, 0.25)]
    assert theorem.violations(rows, "bound_paper_literal") == rows
    assert any(row.u_target < row.lemma_u_target for row in rows if row.assumption_10)
    # And where Eq. 11 holds, r is no adversarial perturbation at all.
    assert {row.fooled for row in rows} == {0.0}


def test_a_trigger_within_the_images_subspace_breaks_the_proved_bound(theorem: ModuleType) -> None:
    rows = theorem.run_grid(counts=(1, 5), trigger_norms=(0.5,), regularisations=(1e-2,), seeds=(0,), inside=0.9)
    assert theorem.violations(rows, "bound_infected") == rows


def test_the_minimiser_has_no_gradient_and_the_gradient_is_that_of_the_objective(theorem: ModuleType) -> None:
    problem = theorem.make_problem(0, 5, 1.0)
    data = (problem.infected_images, problem.labels, 1e-3)
    weights = torch.randn(theorem.DIMENSIONS, theorem.NUM_CLASSES, dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(theorem.objective(weights, *data), weights)
    assert torch.allclose(theorem.gradient(weights.detach(), *data), expected, atol=1e-12)
    minimum = theorem.minimise(*data)
    assert theorem.gradient(minimum, *data).norm() < 1e-12
    nearby = minimum + 1e-3 * torch.randn_like(minimum)
    assert theorem.objective(nearby, *data) > theorem.objective(minimum, *data)


@pytest.mark.parametrize("factor", [1.0, 20.0])
def test_no_perturbation_does_better(theorem: ModuleType, factor: float) -> None:
    problem = theorem.make_problem(1, 25, 1.0)
    weights = theorem.minimise(problem.infected_images, problem.labels, 1e-3)
    others = problem.labels != theorem.TARGET
    images, labels = problem.images[others], problem.labels[others]
    radius = factor * theorem.largest_radius(weights, images, labels)

    def value(r: torch.Tensor) -> torch.Tensor:
        logits = (images + r) @ weights
        rest = torch.cat([logits[:, : theorem.TARGET], logits[:, theorem.TARGET + 1 :]], dim=1)
        return (logits[:, theorem.TARGET] - rest.amax(1)).mean()

    found = theorem.perturbation(weights, images, radius)
    assert found.norm() == pytest.approx(radius)
    directions = torch.nn.functional.normalize(torch.randn(500, images.shape[1], dtype=torch.float64), dim=1)
    near = torch.nn.functional.normalize(found / radius + 0.1 * directions, dim=1)
    assert max(value(radius * d) for d in torch.cat([directions, near])) < value(found) + 1e-9


def test_images_reach_another_class_just_beyond_the_nearest_boundary(theorem: ModuleType) -> None:
    problem = theorem.make_problem(2, 5, 1.0)
    weights = theorem.minimise(problem.infected_images, problem.labels, 1e-2)
    images, labels = problem.images, problem.labels
    nearest, directions = theorem.nearest_boundaries(weights, images, labels)
    gap = theorem.margins(weights, images, labels).gather(1, nearest[:, None])[:, 0]
    slope = ((weights.T[nearest] - weights.T[labels]) * directions).sum(1)
    for scale, expected in ((0.999, labels), (1.001, nearest)):
        moved = images + (scale * gap / slope)[:, None] * directions
        assert torch.equal((moved @ weights).argmax(1), expected)


def test_the_files_that_it_writes(theorem: ModuleType, rows: list, tmp_path: Path) -> None:
    theorem.write_csv(tmp_path / "theorem.csv", rows)
    with (tmp_path / "theorem.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["measured"]) for line in lines] == pytest.approx([row.measured for row in rows], rel=1e-6)
    theorem.draw(tmp_path / "theorem.png", rows)
    assert (tmp_path / "theorem.png").read_bytes().startswith(b"\x89PNG")
