"""What `purify` refuses before any work starts, and what it takes all the same."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pbe_fast.attack import train_infected
from pbe_fast.config import AttackConfig, FineTuneConfig, PGDConfig, PurifyConfig
from pbe_fast.data import ImageSet
from pbe_fast.defenses import fine_tune, neural_cleanse
from pbe_fast.engine.forward import predict_logits
from pbe_fast.errors import InputError, PBEWarning
from pbe_fast.metrics import evaluate
from pbe_fast.purify import purify
from pbe_fast.result import PurifyResult
from pbe_fast.scan import scan

SHAPE = (1, 8, 8)
QUICK: dict[str, Any] = {
    "pgd": PGDConfig(eps=0.05, steps=1),
    "finetune": FineTuneConfig(batch_size=32, augment="none"),
    "adversarial_steps": 2,
    "clean_steps": 2,
    "clean_epochs": 0,
    "initial": "random",
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


@pytest.fixture
def data() -> ImageSet:
    images = torch.randint(0, 256, (160, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(160) % 4, tuple("abcd"))


def run(model: nn.Module, train: Any = None, clean: Any = None, **options: Any) -> PurifyResult:
    config = PurifyConfig(**{**QUICK, "fractions": (0.1, 0.3), **options})
    return purify(model, train, clean_data=clean, config=config, device="cpu", precision="fp32", progress=False)


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.mean((1, 2, 3)), images


def test_no_data(model: nn.Module, data: ImageSet) -> None:
    with pytest.raises(InputError, match="no data; got neither train_data nor clean_data; accepted: either or both"):
        run(model)


def test_sets_of_different_shapes(model: nn.Module, data: ImageSet) -> None:
    images = torch.zeros(4, 1, 9, 9, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"clean images of another shape.*got \(1, 9, 9\); accepted: \(1, 8, 8\)"):
        run(model, data, (images, torch.tensor([0, 1, 2, 3])))


def test_clean_labels_that_the_training_set_does_not_have(model: nn.Module, data: ImageSet) -> None:
    with pytest.raises(InputError, match="labels"):
        run(model, data, (torch.zeros(2, *SHAPE, dtype=torch.uint8), torch.tensor([0, 4])))


def test_images_of_one_class_are_none_to_purify_with(model: nn.Module, data: ImageSet) -> None:
    ones = data.select(data.labels == 2, name="ones")
    message = "classes of the images to purify with; got all 40 of ones of the class 'c'; accepted: images of 2 classes"
    one_logit = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    cases: list[Callable[[], Any]] = [
        lambda: run(model, ones),
        lambda: run(model, clean=ones),
        lambda: run(model, data, ones, refining_fractions=()),
        lambda: fine_tune(model, ones, train_data=data),
        lambda: run(one_logit, dataclasses.replace(ones, labels=ones.labels * 0, class_names=("c",))),
    ]
    for case in cases:
        with pytest.raises(InputError, match=message):
            case()
    # The rounds on the training set have the other classes.
    assert len(run(model, data, ones, refining_fractions=(0.5,)).history) == 2


@pytest.mark.parametrize(
    ("unusable", "text"),
    [
        (Pair(), "output of the model; got tuple of 2"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "fewer logits than the data has classes; got 3 logits"),
        (nn.Conv2d(1, 4, 3), "output of the model; got torch.float32 of shape"),
        (nn.Linear(5, 4), "forward pass fails"),
        (nn.Linear(5, 4).state_dict(), "model; got OrderedDict"),
    ],
)
def test_models_that_cannot_be_used(data: ImageSet, unusable: Any, text: str) -> None:
    for train, clean in ((data, None), (None, data)):
        with pytest.raises(InputError, match=text):
            run(unusable, train, clean)


class Uncopied(nn.Sequential):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("cannot pickle a lock")


def test_models_that_cannot_be_trained(model: nn.Module, data: ImageSet) -> None:
    images = torch.rand(2, *SHAPE)
    cases: list[tuple[nn.Module, str]] = [
        (nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(4)), "got Sequential without parameters"),
        (torch.jit.trace(model.eval(), images), "got a TorchScript model"),
        (Uncopied(nn.Flatten(), nn.Linear(64, 4)), r"cannot be copied .*Uncopied; got TypeError: cannot pickle a lock"),
    ]
    for untrainable, text in cases:
        for train, clean in ((data, None), (None, data)):
            with pytest.raises(InputError, match=text):
                run(untrainable, train, clean)


class Tutorial(nn.Module):
    """Flattens by ``view``, and keeps its features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(1024, 4)
        self.kept: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images)).relu()
        self.kept = [features]
        logits: Tensor = self.linear(features.view(-1, 1024))
        return logits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_models_that_flatten_by_view_and_keep_what_they_computed(data: ImageSet, precision: str) -> None:
    torch.manual_seed(0)
    model = Tutorial()
    images = data.floats()
    data = dataclasses.replace(data, labels=model.eval()(images).argmax(1))
    options: dict[str, Any] = {"device": "cpu", "precision": precision, "progress": False}
    config = PurifyConfig(**QUICK, fractions=(0.5, 0.6))
    seen: list[nn.Module] = []
    result = purify(model, data, config=config, on_round=lambda _, net, __: seen.append(net), **options)
    assert not any(net._forward_pre_hooks for net in (result.model, *seen)) and len(seen) == 2
    assert seen[0](images).shape == (160, 4)
    assert result.model(images).shape == (160, 4)
    assert fine_tune(model, data, **options).model(images).shape == (160, 4)
    assert evaluate(model, data).acc == 1
    config_of_attack = AttackConfig(attack="badnets", epochs=1)
    assert not train_infected(model, data, config=config_of_attack, **options).model._forward_pre_hooks


@pytest.mark.parametrize("on_round", [3, lambda t: t, lambda t, model, ranking, more: t])
def test_what_cannot_be_called_after_a_round(model: nn.Module, data: ImageSet, on_round: Any) -> None:
    with pytest.raises(
        InputError, match=r"on_round; got .*; accepted: a function of a round's number, model and ranking"
    ):
        purify(model, data, on_round=on_round, device="cpu", progress=False)


class Auxiliary(nn.Module):
    """With a second output in train mode, as torchvision's inception_v3."""

    def __init__(self, attached: bool) -> None:
        super().__init__()
        self.net, self.attached = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), attached

    def forward(self, images: Tensor) -> object:
        logits = self.net(images if self.attached else images.detach())
        return (logits, logits) if self.attached and self.training else logits


def test_models_that_change_their_output_or_have_no_gradient(data: ImageSet) -> None:
    auxiliary, detached = Auxiliary(attached=True), Auxiliary(attached=False)
    options: dict[str, Any] = {"device": "cpu", "progress": False}
    with pytest.raises(InputError, match="output of the model in train mode; got tuple of 2"):
        run(auxiliary, data)
    with pytest.raises(InputError, match="output of the model in train mode; got tuple of 2"):
        fine_tune(auxiliary, data, **options)
    with pytest.raises(InputError, match="output of the model in train mode; got tuple of 2"):
        train_infected(auxiliary, data, **options)
    gradient = "logits with respect to the images; got none"
    with pytest.raises(InputError, match=gradient):
        run(detached, data)
    with pytest.raises(InputError, match=gradient):
        scan(detached, data, **options)
    with pytest.raises(InputError, match=gradient):
        neural_cleanse(detached, data, **options)
    with pytest.raises(InputError, match=gradient):
        train_infected(detached, data, config=AttackConfig(attack="input_aware"), **options)


def test_one_image_is_too_few_for_batch_normalisation(model: nn.Module, data: ImageSet) -> None:
    with pytest.raises(InputError, match="number of clean images; got 1; accepted: 2 or more"):
        run(model, None, data.select(torch.arange(1)))
    with pytest.raises(InputError, match="images that the smallest fraction makes; got 1; accepted: 2 or more"):
        run(model, data, fractions=(0.3, 0.005))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    further = {"refining_fractions": (0.5,)}  # on images of the other classes
    assert run(plain, data, data.select(torch.arange(1)), **further).history[0]["extra_set_size"] == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"config": PGDConfig()}, "config; got PGDConfig; accepted: a PurifyConfig"),
        (
            {"config": {"fractions": (0.1,)}},
            r"config; got dict; accepted: a PurifyConfig; .*\(\*\*options\)",
        ),
        ({"config": {}}, "config; got dict"),
        ({"seed": 2**70}, f"seed; got {2**70}; accepted: a whole number from -2"),
        ({"seed": 1.5}, r"seed; got 1\.5"),
        ({"seed": True}, "seed; got True"),
    ],
)
def test_options_of_another_kind(model: nn.Module, data: ImageSet, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        purify(model, data, progress=False, **options)
    with pytest.raises(InputError, match=text.replace("PurifyConfig", "AttackConfig")):
        train_infected(model, data, progress=False, **options)


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("with_clean_set", [False, True])
def test_gradients_are_on_inside_wherever_it_is_called(
    model: nn.Module, data: ImageSet, switched_off: Callable[[], Any], with_clean_set: bool
) -> None:
    expected = run(model, data, data.select(torch.arange(40)) if with_clean_set else None)
    with switched_off():
        # Images that were made inside have no gradients for good.
        result = run(model, data, data.select(torch.arange(40)) if with_clean_set else None)
        assert not torch.is_grad_enabled()
    assert torch.equal(predict_logits(result.model, data.images), predict_logits(expected.model, data.images))
    assert [p.requires_grad for p in result.model.parameters()] == [True] * 6
    result.model(torch.rand(2, *SHAPE)).sum().backward()


def test_logits_that_stand_for_no_class_are_told(model: nn.Module, data: ImageSet) -> None:
    few = ImageSet(data.images, torch.arange(160) % 3, tuple("abc"))
    with pytest.warns(PBEWarning, match="the data has 3 classes and the model 4 logits"):
        run(model, few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, data)


@pytest.mark.parametrize("limit", [-1, "x", True, float("nan")])
def test_a_memory_limit_that_is_none(model: nn.Module, data: ImageSet, limit: Any) -> None:
    with pytest.raises(InputError, match=f"device_memory_limit; got {limit!r}; accepted: bytes, 0 or more, or None"):
        purify(model, data, device_memory_limit=limit, progress=False)


def test_the_name_of_a_trigger_to_train_with(model: nn.Module, data: ImageSet) -> None:
    with pytest.raises(InputError, match="trigger; got 'badnets'; accepted: a Trigger"):
        train_infected(model, data, trigger="badnets", device="cpu", progress=False)  # type: ignore[arg-type]


def test_a_device_and_a_precision_that_are_not_there(model: nn.Module, data: ImageSet) -> None:
    with pytest.raises(InputError, match="device; got 'tpu'"):
        purify(model, data, device="tpu", progress=False)
    with pytest.raises(InputError, match="precision; got 'fp8'"):
        purify(model, data, precision="fp8", device="cpu", progress=False)
