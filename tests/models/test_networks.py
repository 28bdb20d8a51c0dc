from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.errors import InputError
from pbe_fast.models import Normalized, PreActResNet18, SmallCNN


def images(n: int, c: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.rand(n, c, h, w, generator=torch.Generator().manual_seed(seed))


def with_lively_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Eval mode after two batches of training mode, so that batch normalisation is no identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return model.eval()


def preact_by_the_book(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published definition, on the parameters alone, with its 1x1 shortcut of stride 2."""

    def bn_relu(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"]).relu()

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            activated = bn_relu(f"{name}.bn1", x)
            if f"{name}.shortcut.0.weight" in state:
                x = F.conv2d(activated, state[f"{name}.shortcut.0.weight"], stride=stride)
            inner = F.conv2d(activated, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            x = x + F.conv2d(bn_relu(f"{name}.bn2", inner), state[f"{name}.conv2.weight"], padding=1)
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize("width", [4, 15, 16])
@pytest.mark.parametrize("size", [(32, 32), (17, 23), (8, 8)])
def test_preact_resnet_computes_the_published_definition(width: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = with_lively_statistics(PreActResNet18(7, width=width))
    x = images(3, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), preact_by_the_book(model.state_dict(), x), rtol=1e-5, atol=1e-6)


def test_preact_resnet_has_the_published_parameters() -> None:
    model = PreActResNet18(10)
    assert sum(p.numel() for p in model.parameters()) == 11_171_146
    names = set(model.state_dict())
    assert {"conv1.weight", "layer2.0.shortcut.0.weight", "layer4.1.bn2.running_var", "linear.bias"} <= names
    assert not any("layer1.0.shortcut" in name for name in names)


@pytest.mark.parametrize(
    "model", [PreActResNet18(5, width=4), PreActResNet18(5, width=16), SmallCNN(5, in_channels=3, width=8)]
)
def test_channels_last_gives_the_same_logits_and_gradients(model: nn.Module) -> None:
    torch.manual_seed(1)
    model = with_lively_statistics(copy.deepcopy(model)).double()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = copy.deepcopy(model).to(memory_format=layout)
        x = images(3, 3, 20, 20).double().contiguous(memory_format=layout).requires_grad_()
        logits = net(x)
        F.cross_entropy(logits, torch.tensor([0, 3, 4])).backward()
        results.append((logits.detach(), x.grad, net.conv1.weight.grad))
    for plain, last in zip(*results, strict=True):
        torch.testing.assert_close(plain, last, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [8, 13, 28, 32])
def test_small_cnn_takes_digits_of_any_size(size: int) -> None:
    logits = SmallCNN(10)(images(2, 1, size, size))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("network", [PreActResNet18, SmallCNN])
def test_sizes_below_one_are_refused(network: type[nn.Module]) -> None:
    for arguments in ({"num_classes": 0}, {"num_classes": 2, "width": 0}, {"num_classes": 2, "in_channels": -1}):
        with pytest.raises(InputError, match="1 or more"):
            network(**arguments)


def test_normalized_is_the_network_on_normalised_images() -> None:
    torch.manual_seed(2)
    net = with_lively_statistics(SmallCNN(4, in_channels=3, width=4))
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    x = images(5, 3, 9, 9)
    by_hand = net(torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1))
    assert torch.equal(Normalized(net, mean.tolist(), std.tolist())(x), by_hand)


def test_normalized_follows_the_model_to_another_dtype_and_is_saved_with_it() -> None:
    model = Normalized(SmallCNN(3), [0.5], [0.25]).to(torch.float64)
    assert model(images(2, 1, 8, 8).double()).dtype == torch.float64
    assert {"mean", "std"} <= set(model.state_dict())


@pytest.mark.parametrize(
    ("mean", "std"), [([0.5], [0.0]), ([0.5], [-1.0]), ([0.5, 0.5], [0.2]), ([], []), ([float("nan")], [1.0])]
)
def test_normalized_refuses_what_cannot_divide(mean: list[float], std: list[float]) -> None:
    with pytest.raises(InputError, match=r"mean and std; got .*accepted"):
        Normalized(nn.Identity(), mean, std)
