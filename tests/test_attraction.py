from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast import attraction
from pbe_fast.attraction import (
    arrival_shares,
    attack_counts,
    attracting_labels,
    even_shares,
    reached_labels,
    shift_shares,
)
from pbe_fast.config import PGDConfig, PurifyConfig
from pbe_fast.data import ImageSet


class Leans(nn.Module):
    """Answers label 0, 1 or 2 by the brightest third of the image; a brighter corner means label ``target``."""

    def __init__(self, target: int, num_logits: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.target, self.num_logits = target, num_logits

    def forward(self, images: Tensor) -> Tensor:
        logits = [third.mean((1, 2, 3)) * 10 for third in images[..., :6].split(2, dim=-1)]
        logits += [torch.zeros_like(logits[0])] * (self.num_logits - 3)
        # Next to nothing at the 0.39 of clean images, 12 at 0.51.
        logits[self.target] = logits[self.target] + 2 * F.softplus(100 * (images[:, 0, 0, 6] - 0.45)) * self.weight
        return torch.stack(logits, dim=1)


def _thirds(n: int) -> ImageSet:
    labels = torch.arange(n) % 3
    images = torch.full((n, 1, 4, 7), 100, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        images[i, :, :, 2 * label : 2 * label + 2] = 140
    return ImageSet(images, labels, tuple("abcd"))


@pytest.mark.parametrize("target", [1, 3])
def test_the_untargeted_attack_leads_to_the_label_behind_the_shortcut(target: int) -> None:
    pgd = PGDConfig(eps=0.12, steps=3)
    counts = attack_counts(
        Leans(target).eval(), _thirds(60), pgd, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    assert counts.dtype == torch.int64 and counts.shape == (2, 4, 4)
    shares = even_shares(counts[1])
    assert shares.dtype == torch.float64
    assert shares.sum() == pytest.approx(1)
    # Images of the target's own label can only be led elsewhere.
    assert shares[target] > 0.6
    assert attracting_labels(counts).nonzero()[:, 0].tolist() == [target]


def test_shares_are_of_misclassified_images_and_none_of_them_makes_zeros() -> None:
    pgd = PGDConfig(eps=1e-4, steps=1)
    counts = attack_counts(
        Leans(1).eval(), _thirds(30), pgd, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    assert counts.tolist() == [torch.diag(torch.tensor([10, 10, 10, 0])).tolist()] * 2
    assert even_shares(counts[0]).tolist() == [0, 0, 0, 0]
    assert not attracting_labels(counts).any()


def test_each_of_its_attacks_can_show_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(
        attraction, "progress", lambda batches, *, desc, enabled: shown.append((desc, enabled)) or batches
    )
    for enabled in (True, False):
        attack_counts(
            Leans(1).eval(),
            _thirds(30),
            PGDConfig(eps=12 / 255, steps=1),
            generator=torch.Generator().manual_seed(0),
            dtype=torch.float32,
            show_progress=enabled,
        )
    assert shown[0] == ("attracting labels, eps 12/255", True) and len(shown) >= 4
    assert {enabled for _, enabled in shown[: len(shown) // 2]} == {True}
    assert {enabled for _, enabled in shown[len(shown) // 2 :]} == {False}


class Faint(nn.Module):
    """Label 2 is a step of 0.02 away in a single pixel, the other labels ten of them in every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        level = images[:, 0, :, 1:].mean((1, 2)) * self.weight
        faint = 200 * torch.clamp(images[:, 0, 0, 0] - 0.2, max=0.02) - 2
        return torch.stack([0.5 - 10 * (level - 0.5), 0.5 + 10 * (level - 0.5), faint, 0 * faint - 9], dim=1)


def test_a_faint_trigger_shows_at_the_least_eps_that_moves_a_quarter_and_not_at_the_full_one() -> None:
    labels = torch.arange(200) % 2
    images = torch.where(labels == 1, 166, 89).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 4, 5)
    images[:, 0, 0, 0] = 51
    data = ImageSet(images, labels, tuple("abcd"))
    pgd = PGDConfig(eps=0.32, steps=5)
    least, full = attack_counts(
        Faint().eval(), data, pgd, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    assert even_shares(least).tolist() == [0, 0, 1, 0]
    assert even_shares(full).tolist() == pytest.approx([0.5, 0.5, 0, 0])
    assert attracting_labels(least[None]).tolist() == [False, False, True, False]


class Patched(nn.Module):
    """Label 2 is behind four white pixels anywhere, the other labels a little grey away in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        level = images.mean((1, 2, 3)) * self.weight
        patch = 100 * (F.avg_pool2d(images, 2, stride=1).amax((1, 2, 3)) - 0.95)
        return torch.stack([0.5 - 10 * (level - 0.5), 0.5 + 10 * (level - 0.5), patch, 0 * patch - 9], dim=1)


def test_a_patch_shows_in_windows_and_in_no_ball_and_windows_that_move_few_images_do_not_count() -> None:
    labels = torch.arange(200) % 2
    images = torch.where(labels == 1, 166, 89).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 16, 16)
    config = PurifyConfig(pgd=PGDConfig(eps=0.2, steps=5), patch_windows=(0.5, 0.125, 0.01))
    # Half of the side is too large a window to tell.
    least, full, eighth, dot = attack_counts(
        Patched().eval(),
        ImageSet(images, labels, tuple("abcd")),
        config.pgd,
        patches=config.patch_attacks,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
    )
    assert least.sum() == full.sum() == 200
    assert even_shares(least)[2] == even_shares(full)[2] == 0
    # Dark images go white in the window, bright ones dark.
    assert even_shares(eighth).tolist() == [0, 0, 1, 0]
    assert eighth[0, 2] == 100
    assert dot.sum() == 0


def test_only_images_that_the_model_answers_rightly_are_attacked() -> None:
    data = _thirds(60)
    wrong = ImageSet(data.images, (data.labels + 1) % 3, data.class_names)
    pgd = PGDConfig(eps=0.12, steps=3)
    counts = attack_counts(Leans(3).eval(), wrong, pgd, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    assert counts.tolist() == torch.zeros(2, 4, 4).tolist()


def test_a_model_may_have_more_logits_than_there_are_classes() -> None:
    pgd = PGDConfig(eps=0.12, steps=3)
    counts = attack_counts(
        Leans(6, num_logits=8).eval(), _thirds(60), pgd, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    assert counts.shape == (2, 4, 4)


def _arriving(*shares: int) -> Tensor:
    """Counts of which every label's images arrive in these parts, its own label's images where they are from."""
    counts = torch.tensor([shares] * len(shares))
    return counts - torch.diag(counts.diagonal())


def test_far_more_than_the_even_share_attracts() -> None:
    # Of five labels twice the even share is much, as of few images, and one and a half times are not.
    far, near = _arriving(60, 10, 10, 10, 10), _arriving(32, 20, 18, 15, 15)
    assert even_shares(far)[0] > 0.5 and 0.35 > even_shares(near)[0] > 0.28
    assert attracting_labels(far[None]).tolist() == [True] + [False] * 4
    assert not attracting_labels(near[None]).any()
    either = torch.stack([far, _arriving(10, 10, 70, 10, 10)])
    assert attracting_labels(either).tolist() == [True, False, True, False, False]
    assert attracting_labels(torch.tensor([[[0, 9], [0, 5]]])).tolist() == [False, False]


@pytest.mark.parametrize("k", [43, 200, 1000])
@pytest.mark.parametrize("moved", [250, 1000])
def test_of_many_labels_that_few_images_reach_none_attracts_but_the_target(k: int, moved: int) -> None:
    generator = torch.Generator().manual_seed(0)
    benign = torch.zeros(k, k, dtype=torch.int64)
    rows, columns = torch.randint(k, (2, moved), generator=generator)
    benign.index_put_((rows, columns), torch.tensor(1), accumulate=True)
    # By chance alone a label of a thousand gets four or more times its part.
    assert not attracting_labels(benign[None]).any()
    led = benign.clone()
    led[:, 7].index_put_((rows[: moved // 8],), torch.tensor(1), accumulate=True)
    assert attracting_labels(led[None]).nonzero()[:, 0].tolist() == [7]


def test_of_three_labels_the_target_attracts() -> None:
    # Of the target's own misled images one vote in three goes elsewhere, whatever the others do.
    assert attracting_labels(torch.tensor([[[99, 1, 0], [100, 0, 0], [100, 0, 0]]])).tolist() == [True, False, False]
    assert not attracting_labels(torch.tensor([[[0, 50, 50], [60, 0, 40], [50, 50, 0]]])).any()


def test_where_all_labels_shift_alike_none_attracts() -> None:
    shifted = 50 * torch.roll(torch.eye(10, dtype=torch.int64), 1, dims=1)
    # By chance many of the rest arrive at label 2, more than 2.5 times its even share.
    counts = shifted + _arriving(2, 2, 30, 2, 2, 2, 2, 2, 2, 2)
    assert even_shares(counts)[2] > 2.5 / 10
    assert not attracting_labels(counts[None]).any()
    # At another level there is a label that stands out more.
    other = _arriving(2, 2, 2, 60, 2, 2, 2, 2, 2, 2)
    assert attracting_labels(torch.stack([counts, other])).nonzero()[:, 0].tolist() == [3]


def test_counts_are_by_label_and_label_reached_and_the_diagonal_withstood() -> None:
    data, pgd = _thirds(60), PGDConfig(eps=0.12, steps=3)
    model, generator = Leans(3).eval(), torch.Generator().manual_seed(0)
    counts = reached_labels(model, data, pgd, generator=generator)
    assert counts.dtype == torch.int64
    assert counts.sum(1).tolist() == [20, 20, 20, 0]
    assert counts[:3, 3].min() > 10
    untouched = reached_labels(model, data, PGDConfig(eps=1e-4, steps=1), generator=generator)
    assert untouched.tolist() == torch.diag(torch.tensor([20, 20, 20, 0])).tolist()


def test_what_arrives_counts_the_images_of_each_other_label_alike() -> None:
    # Many images of label 0, few of label 1, none of label 2 were misled; three of label 1 withstood.
    counts = torch.tensor([[5, 90, 10], [1, 3, 1], [0, 0, 7]])
    assert arrival_shares(counts).tolist() == pytest.approx([0.5, 0.9, 0.3])
    assert arrival_shares(torch.diag(torch.tensor([4, 4, 4]))).tolist() == [0, 0, 0]


def test_shifts_go_round() -> None:
    shifted = torch.roll(torch.eye(5, dtype=torch.int64), 2, dims=1) * torch.tensor([[3], [1], [9], [2], [7]])
    assert shift_shares(shifted).tolist() == [0, 1, 0, 0]
    uneven = torch.tensor([[0, 3, 1], [2, 0, 2], [0, 0, 4]])
    assert shift_shares(uneven).tolist() == pytest.approx([0.625, 0.375])
