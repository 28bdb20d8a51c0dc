"""The term that keeps what a teacher says of clean images."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tuners import ATTACK, few_images, first_batch, network, plain, tuner

from pbe_fast.data import ImageSet
from pbe_fast.pgd import pgd_attack


@pytest.fixture
def data() -> ImageSet:
    return few_images()


@pytest.mark.parametrize("adversarial", [False, True])
def test_distillation_adds_the_divergence_from_the_teacher_on_clean_images(data: ImageSet, adversarial: bool) -> None:
    model, teacher = network(), network(seed=1).eval().requires_grad_(False)
    teacher.get_parameter("5.weight").mul_(10)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    weight, t = 0.7, 1.5
    batch = first_batch(21, 8)
    images, labels = data.floats(batch), data.labels[batch]
    if adversarial:
        attacked = pgd_attack(copy.deepcopy(model).eval(), images, labels, ATTACK)
        logits = copy.deepcopy(model).train()(torch.cat([attacked, images]))
        cross_entropy = F.cross_entropy(logits, labels.repeat(2))
        logits = logits[len(images) :]
    else:
        logits = copy.deepcopy(model).train()(images)
        cross_entropy = F.cross_entropy(logits, labels)
    # Written out: sum over classes of p_teacher (log p_teacher - log p_student), mean over images.
    p, q = (teacher(images) / t).softmax(1), (logits / t).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    expected = cross_entropy + weight * t**2 * divergence
    assert divergence > 0.01

    config = plain(distill_weight=weight, distill_temperature=t)
    got = tuner(model, config, 1, teacher=teacher).run(data, steps=1, attack=ATTACK if adversarial else None)
    assert got == pytest.approx(expected.item(), rel=1e-4)
    assert not teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_teacher_heeded_where_it_is_right_says_nothing_of_other_images(data: ImageSet, adversarial: bool) -> None:
    teacher = network(seed=1).eval().requires_grad_(False)
    right = teacher(data.floats()).argmax(1) == data.labels
    assert 0.1 < right.double().mean() < 0.9
    attack = ATTACK if adversarial else None

    def trained(among: Tensor, **how: bool) -> tuple[float, nn.Module]:
        model = network()
        one = tuner(model, plain(distill_weight=1.0), 3)
        one.restart(total_steps=3, **how)
        return one.run(data, among=among, steps=3, attack=attack), model

    for among, same_as in ((~right, {}), (right, {"teacher": teacher})):
        loss, model = trained(among.nonzero()[:, 0], teacher=teacher, where_right=True)
        expected_loss, expected = trained(among.nonzero()[:, 0], **same_as)
        assert loss == expected_loss
        assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


def test_distillation_keeps_the_model_near_its_teacher(data: ImageSet) -> None:
    teacher = network().eval().requires_grad_(False)
    moved = []
    for weight in (0.0, 50.0):
        model = network()
        tuner(model, plain(lr=0.01, distill_weight=weight), 30, teacher=teacher).run(data, steps=30)
        moved.append(F.mse_loss(model.eval()(data.floats()), teacher(data.floats())).item())
    assert moved[1] < 0.5 * moved[0]
