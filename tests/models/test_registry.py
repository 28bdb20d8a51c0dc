from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pbe_fast.errors import InputError
from pbe_fast.models import ModelSpec, Normalized, PreActResNet18, SmallCNN, build_from_spec, build_model, spec_of

USER_CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels=3):
        super().__init__()
        self.head = nn.Linear(in_channels, num_classes)
    def forward(self, x):
        return self.head(x.mean((2, 3)))

def fixed():
    return Net(4)

def anything(**options):
    net = Net(options["num_classes"], options["in_channels"])
    net.options = options
    return net

def needs_more(num_classes, depth):
    return Net(num_classes)

def no_model(num_classes):
    return {"num_classes": num_classes}

not_a_function = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize(
    ("arch", "channels", "kind"), [("preact_resnet18", 3, PreActResNet18), ("small_cnn", 1, SmallCNN)]
)
def test_our_networks_by_name(arch: str, channels: int, kind: type[nn.Module]) -> None:
    model = build_model(arch, num_classes=6, in_channels=channels, width=5)
    assert type(model) is kind
    assert model.conv1.out_channels == 5
    assert model.linear.out_features == 6
    assert model(torch.rand(2, channels, 12, 12)).shape == (2, 6)


def test_default_widths() -> None:
    assert build_model("preact_resnet18", num_classes=2).conv1.out_channels == 64
    assert build_model("small_cnn", num_classes=2, in_channels=1).conv1.out_channels == 32


def test_mean_and_std_put_the_network_inside_normalized() -> None:
    model = build_model("small_cnn", num_classes=2, in_channels=1, mean=[0.1], std=[0.3])
    assert isinstance(model, Normalized)
    assert isinstance(model.net, SmallCNN)
    with pytest.raises(InputError, match="both or none"):
        build_model("small_cnn", num_classes=2, in_channels=1, mean=[0.1])
    with pytest.raises(InputError, match="2 values; accepted: one per channel"):
        build_model("preact_resnet18", num_classes=2, mean=[0.1, 0.2], std=[1, 1])


def test_torchvision_networks() -> None:
    short, long = (build_model(arch, num_classes=7) for arch in ("resnet18", "torchvision:resnet18"))
    assert type(short) is type(long)
    assert {k: v.shape for k, v in short.state_dict().items()} == {k: v.shape for k, v in long.state_dict().items()}
    assert short.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 7)


def test_googlenet_returns_plain_logits_in_training_too() -> None:
    logits = build_model("torchvision:googlenet", num_classes=3).train()(torch.rand(2, 3, 64, 64))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 3)


@pytest.mark.parametrize("name", ["no_such_net", "fasterrcnn_resnet50_fpn", "fcn_resnet50"])
def test_torchvision_offers_classifiers_only(name: str) -> None:
    with pytest.raises(InputError, match=rf"unknown torchvision classifier; got '{name}'; accepted: .*resnet18"):
        build_model(f"torchvision:{name}", num_classes=3)


def test_torchvision_has_neither_grey_images_nor_width() -> None:
    for options in ({"in_channels": 1}, {"width": 16}):
        with pytest.raises(InputError, match="3 channels, no width"):
            build_model("resnet18", num_classes=3, **options)


def test_user_function_gets_what_its_signature_has(user_module: str) -> None:
    assert build_model(f"{user_module}:Net", num_classes=9, in_channels=1, width=3).head.weight.shape == (9, 1)
    assert build_model(f"{user_module}:fixed", num_classes=9).head.out_features == 4
    model = build_model(f"{user_module}:anything", num_classes=2, in_channels=5)
    assert model.options == {"num_classes": 2, "in_channels": 5}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("needs_more", "without a value; got depth"),
        ("no_model", "got dict; accepted: a torch.nn.Module"),
        ("not_a_function", "got int; accepted: a function"),
        ("absent", "cannot be imported; got .*absent"),
    ],
)
def test_user_functions_that_do_not_fit(user_module: str, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(f"{user_module}:{function}", num_classes=2)


@pytest.mark.parametrize("arch", ["no_such_arch", "no_such_module_anywhere:f", ":f", "unknown"])
def test_unknown_names_are_refused_with_the_accepted_forms(arch: str) -> None:
    with pytest.raises(InputError, match="'torchvision:NAME' or 'module:function'"):
        build_model(arch, num_classes=2)


def test_spec_goes_through_json_and_builds() -> None:
    spec = ModelSpec("small_cnn", 4, 1, (8, 10), width=3, mean=(0.5,), std=(0.25,))
    again = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.image_shape == (1, 8, 10)
    model = build_from_spec(again)
    assert isinstance(model, Normalized)
    assert model.net.conv1.weight.shape == (3, 1, 3, 3)


def test_spec_takes_one_number_for_a_square_and_none_for_unknown() -> None:
    assert ModelSpec("small_cnn", 4, 1, 8).image_size == (8, 8)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="none recorded"):
        _ = ModelSpec("small_cnn", 4, 1).image_shape


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 0},
        {"num_classes": 2.0},
        {"num_classes": True},
        {"in_channels": "3"},
        {"image_size": [8]},
        {"image_size": [8, 0]},
        {"width": -1},
        {"width": 0},
        {"mean": [0.5]},
        {"mean": ["x"], "std": [1]},
        {"mean": 0.5, "std": 0.5},
        {"arch": 3},
        {"surprise": 1},
    ],
)
def test_spec_refuses_damaged_values(change: dict[str, object]) -> None:
    good = ModelSpec("small_cnn", 4, 1, (8, 8)).to_dict()
    with pytest.raises(InputError, match=r"got .*accepted"):
        ModelSpec.from_dict(good | change)


def test_spec_needs_its_required_names() -> None:
    with pytest.raises(InputError, match="num_classes"):
        ModelSpec.from_dict({"arch": "small_cnn", "in_channels": 1})


def test_spec_of_recognises_our_networks_and_says_unknown_for_others() -> None:
    net = PreActResNet18(5, width=6)
    spec = spec_of(Normalized(net, [0.5] * 3, [0.25] * 3), num_classes=5, image_shape=(3, 16, 12))
    assert spec == ModelSpec("preact_resnet18", 5, 3, (16, 12), 6, (0.5,) * 3, (0.25,) * 3)
    assert spec_of(SmallCNN(3), num_classes=3, image_shape=(1, 8, 8)).width == 32
    other = spec_of(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), num_classes=2, image_shape=(1, 8, 8))
    assert other.arch == "unknown"


class _Derived(SmallCNN):
    pass


def test_spec_of_does_not_mistake_a_subclass_for_its_parent() -> None:
    assert spec_of(_Derived(3), num_classes=3, image_shape=(1, 8, 8)).arch == "unknown"
