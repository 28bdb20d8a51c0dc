from __future__ import annotations

import pytest
import torch

from pbe_fast.engine.seeding import generator_for, seeded

CPU = torch.device("cpu")


def test_inside_the_seed_decides_whatever_was_drawn_before() -> None:
    drawn = []
    for outer, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(outer)
        with seeded(seed, CPU):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_two_purposes_of_one_seed_draw_otherwise() -> None:
    def order(seed: int, purpose: str) -> list[int]:
        return torch.randperm(50, generator=generator_for(seed, purpose)).tolist()

    assert order(0, "purify") == order(0, "purify")
    plain = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [order(0, "purify"), order(1, "purify"), order(-1, "purify"), order(0, "scan"), plain]
    assert len({tuple(some) for some in drawn}) == 5


def test_afterwards_the_global_generator_goes_on_as_if_nothing_had_been_drawn() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError), seeded(0, CPU):
        torch.rand(1)
        raise ZeroDivisionError
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.gpu
def test_on_a_gpu_too() -> None:
    device = torch.device("cuda")
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device=device)
    torch.cuda.manual_seed(3)
    drawn = []
    for _ in range(2):
        with seeded(0, device):
            drawn.append(torch.rand(4, device=device))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.rand(4, device=device), expected)
