"""Theorem 1 of the paper, checked by solving the linear model of its appendix: `python bench/efficacy/theorem.py`.

Setting (appendix A.1): n training images x_i of norm 1 in a subspace S_m, labels y_i out of K; a patch P orthogonal to
S_m is added to l of the images of the target class, whose label stays. The infected model is the minimiser W* of
F(W) = mean cross-entropy + lambda/2 |W|^2 (Eq. 3), the benign one W~ the minimiser without a component along P (Eq. 4),
tau the smallest margin of W~. A perturbation r of norm delta, the same for every image, maximises the mean of
min_j <w_target - w_j, x_i + r> over the images of other classes (Eq. 9).

Theorem 1: if tau >= sqrt(2) l|P|^2/lambda (Eq. 10) and delta is so small that the minimum is always at j = y_i (Eq. 11
is to ensure it), then the projection of r on P satisfies
|r_P|/|r| >= (sqrt2 - 1) l|P|^2 / sqrt((sqrt2 - 1)^2 l^2|P|^4 + (l|P|^2 + 2K/(exp(tau) + K))^2).

This does not hold as it stands (docs/theorem.md goes through the proof). What can be proved on the same assumptions, P
orthogonal to S_m and the minimum at y_i, where the other classes are of one size, is, with
eps_i = |[y_i = target] - p(target|x_i)|, its mean eps_T over the poisoned images and eps_mean over all:

    tan(angle of r to S_m) = alpha |P|/|v| >= l|P| eps_T / (n eps_mean)                (bound_infected: eps of W*)
                                           >= l|P| eps_T / (n eps_mean) exp(-2D)       (bound_benign: eps of W~)
    D = sqrt(2 (1 + |P|^2)) |grad F(W~)|/lambda

Where the gradient of F is 0, u_target = l eps_T/(n lambda) and the other u_j sum to minus that, so that alpha (Eq. 14)
is K/(K - 1) times u_target; and lambda v = K/(K - 1) mean_i ([y_i = target] - p(target|x_i)) x_i with |x_i| = 1. That
is the first line. F is lambda-strongly convex, so |W* - W~| <= |grad F(W~)|/lambda: no difference of two logits of an
image moves by more than D, and no eps_i by more than a factor exp(D). That is the second.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

from theorem_figure import draw

NUM_CLASSES, PER_CLASS, SUBSPACE, DIMENSIONS, TARGET = 5, 50, 8, 10, 0
SPREAD = 0.03
COUNTS = (1, 2, 5, 10, 25)
TRIGGER_NORMS = (0.25, 0.5, 1.0, 2.0, 4.0)
REGULARISATIONS = (1e-2, 1e-3, 1e-4)
SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Row:
    """One infected linear model: what was measured, and the bounds that should lie below it.

    Attributes:
        measured: <r, P>/(|r||P|) of the r that projected ascent on Eq. 9 found.
        closed_form: The same from Eq. 14 and 15.
        bound_paper: Theorem 1 of the appendix, l counted as a fraction of n as Eq. 3 has it.
        bound_paper_literal: The same with l itself.
        bound_infected, bound_benign: What can be proved; see above.
        tau, assumption_10: The benign model's margin, and whether Eq. 10 holds (with l/n, the weaker reading).
        u_target, lemma_u_target: What W* answers to P, and Lemma 1's lower bound for it.
        fooled: Share of the images of other classes that r leads to another label.
        nearest_is_target: Share of them whose nearest boundary, where an untargeted attack goes, is the target's.
        untargeted: Mean projection on P of the shortest perturbation to that boundary.
        asr: Share of them that W* takes for the target with P added.
    """

    seed: int
    regularisation: float
    poisoned: int
    trigger_norm: float
    tau: float
    assumption_10: bool
    delta: float
    measured: float
    closed_form: float
    bound_paper: float
    bound_paper_literal: float
    bound_infected: float
    bound_benign: float
    u_target: float
    lemma_u_target: float
    fooled: float
    nearest_is_target: float
    untargeted: float
    asr: float


@dataclass(frozen=True)
class Problem:
    """Images (n, d) float64 of norm 1, labels (n,), and a patch (d,) for the images at ``poisoned``."""

    images: Tensor
    labels: Tensor
    patch: Tensor
    poisoned: Tensor

    @property
    def infected_images(self) -> Tensor:
        """The images as the attacker leaves them."""
        images = self.images.clone()
        images[self.poisoned] += self.patch
        return images


def make_problem(seed: int, poisoned: int, trigger_norm: float, *, inside: float = 0.0) -> Problem:
    """A random problem; ``inside`` is the cosine between the patch and S_m, which the theorem assumes to be 0."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(DIMENSIONS, DIMENSIONS, generator=generator, dtype=torch.float64))[0]
    centres = torch.eye(NUM_CLASSES, SUBSPACE, dtype=torch.float64)
    labels = torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS)
    noise = SPREAD * torch.randn(len(labels), SUBSPACE, generator=generator, dtype=torch.float64)
    images = F.normalize(centres[labels] + noise) @ basis[:, :SUBSPACE].T
    # Within S_m the patch points to a class that is not the target.
    patch = inside * basis[:, :SUBSPACE] @ centres[TARGET + 1] + math.sqrt(1 - inside**2) * basis[:, SUBSPACE]
    return Problem(images, labels, trigger_norm * patch, (labels == TARGET).nonzero()[:poisoned, 0])


def minimise(images: Tensor, labels: Tensor, regularisation: float) -> Tensor:
    """The minimiser W (d, K) of Eq. 3, by damped Newton steps until the gradient is below 1e-12."""
    n, d = images.shape
    squares = images[:, :, None] * images[:, None, :]
    weights = images.new_zeros(d, NUM_CLASSES)
    for _ in range(100):
        slope = gradient(weights, images, labels, regularisation)
        if slope.norm() < 1e-12:
            return weights
        p = torch.softmax(images @ weights, dim=1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("nab,nij->aibj", squares, curvature).reshape(d * NUM_CLASSES, -1) / n
        hessian.diagonal().add_(regularisation)
        step = torch.linalg.solve(hessian, slope.reshape(-1)).view_as(weights)
        size, before = 1.0, objective(weights, images, labels, regularisation)
        # Close to the minimum the objective no longer tells better from worse: there the full step is right.
        while slope.norm() > 1e-6 and objective(weights - size * step, images, labels, regularisation) > before:
            size /= 2
        weights = weights - size * step
    raise ArithmeticError(f"no minimum of Eq. 3 in 100 Newton steps; the gradient is still {slope.norm():.1e}")


def objective(weights: Tensor, images: Tensor, labels: Tensor, regularisation: float) -> Tensor:
    """F(W), Eq. 3."""
    return F.cross_entropy(images @ weights, labels) + regularisation / 2 * weights.square().sum()


def gradient(weights: Tensor, images: Tensor, labels: Tensor, regularisation: float) -> Tensor:
    """The gradient of Eq. 3, (d, K)."""
    surplus = torch.softmax(images @ weights, dim=1) - F.one_hot(labels, NUM_CLASSES)
    return images.T @ surplus / len(images) + regularisation * weights


def residuals(weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """eps_i = |[y_i = target] - p(target|x_i)|, (n,)."""
    return ((labels == TARGET).double() - torch.softmax(images @ weights, dim=1)[:, TARGET]).abs()


def margins(weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """<w_y - w_j, x>, (n, K), infinite at j = y."""
    logits = images @ weights
    out = logits.gather(1, labels[:, None]) - logits
    return out.scatter(1, labels[:, None], math.inf)


def largest_radius(weights: Tensor, images: Tensor, labels: Tensor) -> float:
    """The largest |r| with which the minimum of Eq. 9 stays at j = y_i, for images of other classes than the target.

    What Eq. 11 is to ensure. Exact: no r of that norm makes up for a margin over any j but the target.
    """
    apart = (weights.T[labels][:, None] - weights.T[None]).norm(dim=2)
    distances = margins(weights, images, labels) / apart.clamp_min(1e-300)
    distances[:, TARGET] = math.inf
    return float(distances.min())


def perturbation(weights: Tensor, images: Tensor, radius: float, *, steps: int = 100, seed: int = 0) -> Tensor:
    """r (d,) of at most ``radius`` that maximises Eq. 9 (concave) on ``images``: supergradient ascent from anywhere."""

    def value_and_slope(r: Tensor) -> tuple[Tensor, Tensor]:
        logits = (images + r) @ weights
        gaps = logits[:, TARGET, None] - logits
        gaps[:, TARGET] = math.inf
        value, others = gaps.min(1)
        return value.mean(), (weights[:, TARGET, None] - weights[:, others]).mean(1)

    generator = torch.Generator().manual_seed(seed)
    r = radius * F.normalize(torch.randn(images.shape[1], generator=generator, dtype=images.dtype), dim=0)
    best, best_value = r, -math.inf
    for t in range(1, steps + 1):
        value, slope = value_and_slope(r)
        if value > best_value:
            best, best_value = r, float(value)
        r = r + 10 * radius / t * F.normalize(slope, dim=0)
        r = r * min(1.0, radius / float(r.norm()))
    return best


def nearest_boundaries(weights: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The label behind each image's nearest decision boundary (n,), and the unit vector (n, d) that leads there."""
    normals = weights.T[None] - weights.T[labels][:, None]
    lengths = normals.norm(dim=2)
    nearest = (margins(weights, images, labels) / lengths.clamp_min(1e-300)).argmin(1)
    return nearest, F.normalize(normals[torch.arange(len(images)), nearest], dim=1)


def paper_bound(weight: float, tau: float) -> float:
    """Theorem 1 as the appendix has it, where ``weight`` stands for l|P|^2."""
    first = (math.sqrt(2) - 1) * weight
    return first / math.hypot(first, weight + 2 * NUM_CLASSES / (math.exp(tau) + NUM_CLASSES))


def check(seed: int, regularisation: float, poisoned: int, trigger_norm: float, *, inside: float = 0.0) -> Row:
    """Solve one problem and hold what is measured against the bounds."""
    problem = make_problem(seed, poisoned, trigger_norm, inside=inside)
    images, labels, share = problem.images, problem.labels, poisoned / len(problem.labels)
    # Of images in S_m, so that it has no component outside.
    benign = minimise(images, labels, regularisation)
    infected = minimise(problem.infected_images, labels, regularisation)
    tau = float(margins(benign, images, labels).min())
    others = labels != TARGET
    attacked, their_labels = images[others], labels[others]
    delta = largest_radius(infected, attacked, their_labels) / 2
    r = perturbation(infected, attacked, delta)
    direction = problem.patch / problem.patch.norm()
    slope = (infected[:, TARGET, None] - infected[:, their_labels]).mean(1)  # alpha P + v, Eq. 14
    shift = gradient(benign, problem.infected_images, labels, regularisation).norm() / regularisation
    moved = math.sqrt(2 * (1 + trigger_norm**2)) * float(shift)

    def proved(eps: Tensor, slack: float) -> float:
        ratio = float(eps[problem.poisoned].mean() / eps.mean())
        return math.sin(math.atan(share * trigger_norm * ratio * math.exp(-slack)))

    nearest, normals = nearest_boundaries(infected, attacked, their_labels)
    return Row(
        seed=seed,
        regularisation=regularisation,
        poisoned=poisoned,
        trigger_norm=trigger_norm,
        tau=tau,
        assumption_10=tau >= math.sqrt(2) * share * trigger_norm**2 / regularisation,
        delta=delta,
        measured=float(r @ direction / r.norm()),
        closed_form=float(slope @ direction / slope.norm()),
        bound_paper=paper_bound(share * trigger_norm**2, tau),
        bound_paper_literal=paper_bound(poisoned * trigger_norm**2, tau),
        bound_infected=proved(residuals(infected, problem.infected_images, labels), 0.0),
        bound_benign=proved(residuals(benign, images, labels), 2 * moved),
        u_target=float(infected[:, TARGET] @ direction) / trigger_norm,
        lemma_u_target=(1 - math.sqrt(0.5)) * share * trigger_norm**2 / regularisation,
        fooled=float((((attacked + r) @ infected).argmax(1) != their_labels).double().mean()),
        nearest_is_target=float((nearest == TARGET).double().mean()),
        untargeted=float((normals @ direction).mean()),
        asr=float((((attacked + problem.patch) @ infected).argmax(1) == TARGET).double().mean()),
    )


def run_grid(
    *,
    counts: Sequence[int] = COUNTS,
    trigger_norms: Sequence[float] = TRIGGER_NORMS,
    regularisations: Sequence[float] = REGULARISATIONS,
    seeds: Sequence[int] = SEEDS,
    inside: float = 0.0,
) -> list[Row]:
    """A row for every combination."""
    return [
        check(seed, regularisation, count, norm, inside=inside)
        for regularisation in regularisations
        for seed in seeds
        for count in counts
        for norm in trigger_norms
    ]


def violations(rows: Iterable[Row], bound: str, *, tolerance: float = 1e-6) -> list[Row]:
    """The rows in which less was measured than ``bound`` ("bound_paper", "bound_infected", ...) promises."""
    return [row for row in rows if row.measured < getattr(row, bound) - tolerance]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line per row, seven digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in dataclasses.fields(Row)])
        for row in rows:
            writer.writerow([f"{v:.7g}" if isinstance(v, float) else int(v) for v in dataclasses.astuple(row)])


def main(folder: str = "bench/results/efficacy/theorem") -> int:
    """Write theorem.csv and theorem.png to ``folder``; 1 if a bound that is proved was not met."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    rows = run_grid()
    write_csv(out / "theorem.csv", rows)
    draw(out / "theorem.png", rows)
    inside = [row for row in rows if row.assumption_10]
    print(f"{len(rows)} models, of which Eq. 10 holds for {len(inside)}")
    for bound in ("bound_infected", "bound_benign", "bound_paper", "bound_paper_literal"):
        print(f"below {bound}: {len(violations(rows, bound))}, where Eq. 10 holds {len(violations(inside, bound))}")
    print(f"below Lemma 1's u_target: {sum(row.u_target < row.lemma_u_target for row in rows)}")
    print(f"images that r leads to another label, at most: {100 * max(row.fooled for row in rows):.1f} %")
    return int(bool(violations(rows, "bound_infected") or violations(rows, "bound_benign")))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
