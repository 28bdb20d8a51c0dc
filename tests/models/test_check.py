from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pbe_fast.errors import InputError, PBEWarning
from pbe_fast.models import SmallCNN, check_differentiable, check_model, check_trainable


class Answers(nn.Module):
    """Answers with whatever a function makes of the images."""

    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer(x)


def test_good_models_pass_and_tell_their_number_of_logits() -> None:
    assert check_model(SmallCNN(10, width=2), (1, 8, 8), 10) == 10
    assert check_model(SmallCNN(12, width=2), (1, 8, 8), 10) == 12
    assert check_model(SmallCNN(3, in_channels=3, width=2).to(torch.bfloat16), (3, 9, 11), 3) == 3
    assert check_model(SmallCNN(3, width=2).double(), (1, 8, 8), 3) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: (x.flatten(1), x), "got tuple of 2: Tensor, Tensor"),
        (lambda x: {"logits": x.flatten(1), "loss": 0}, "got dict with the keys logits, loss"),
        (lambda x: None, "got NoneType"),
        (lambda x: x, r"torch.float32 of shape \(2, 1, 4, 4\)"),
        (lambda x: x.flatten(), r"of shape \(32,\)"),
        (lambda x: x.flatten(1)[:1], r"of shape \(1, 16\) for images of shape \(2, 1, 4, 4\)"),
        (lambda x: x.flatten(1).long(), "torch.int64 of shape"),
        (lambda x: x.flatten(1)[:, :9], "got 9 logits and 10 classes"),
        (lambda x: x.flatten(1) * float("nan"), "NaN or infinite"),
        (lambda x: x.flatten(1) / 0, "NaN or infinite"),
    ],
)
def test_what_is_not_finite_logits_is_refused(answer: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(InputError, match=rf"{message}.*accepted: .*logits"):
        check_model(Answers(answer), (1, 4, 4), 10)


@pytest.mark.parametrize("thing", [None, "model.pt", lambda x: x, SmallCNN])
def test_what_is_no_module_is_refused(thing: object) -> None:
    with pytest.raises(InputError, match=f"got {type(thing).__name__}; accepted: a torch.nn.Module"):
        check_model(thing, (1, 8, 8), 10)


def test_a_state_dict_is_told_what_to_do() -> None:
    with pytest.raises(InputError, match=r"OrderedDict .*load_state_dict"):
        check_model(SmallCNN(2, width=2).state_dict(), (1, 8, 8), 2)


def test_a_failing_forward_names_the_shape() -> None:
    with pytest.raises(InputError, match=r"images of shape \(2, 3, 8, 8\), torch.float32 on cpu; got RuntimeError"):
        check_model(SmallCNN(2, width=2), (3, 8, 8), 2)


class Restless(nn.Module):
    """Changes its own buffers and the random state in every forward pass, in eval mode too."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(SmallCNN(2, width=2), nn.Dropout())
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(2))
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.latest = torch.rand(2)
        assert not self.net.training
        if self.fails:
            raise RuntimeError("late")
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_untouched(fails: bool) -> None:
    model = Restless(fails).train()
    model.net[0].bn2.eval()  # as in a model with one frozen layer
    model.net[0].conv1.weight.grad = torch.ones_like(model.net[0].conv1.weight)
    modes = {name: module.training for name, module in model.named_modules()}
    before, latest = copy.deepcopy(model.state_dict()), model.latest
    random_state = torch.get_rng_state()
    if fails:
        with pytest.raises(InputError, match="late"):
            check_model(model, (1, 8, 8), 2)
    else:
        check_model(model, (1, 8, 8), 2)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.latest is latest
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model.net[0].conv1.weight.grad, torch.ones_like(model.net[0].conv1.weight))


def test_buffers_made_in_inference_mode_are_no_obstacle() -> None:
    with torch.inference_mode():
        model = SmallCNN(2, width=2)
    assert check_model(model, (1, 8, 8), 2) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_pass_too() -> None:
    model = torch.jit.script(SmallCNN(2, width=2)).train()
    assert check_model(model, (1, 8, 8), 2) == 2
    assert model.training
    assert model.bn1.training


class Around(nn.Module):
    """A network, and what is made of it and the images."""

    def __init__(self, answer: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.net = nn.Sequential(SmallCNN(3, width=2), nn.Dropout())
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer(self.net, x)


SHAPE = (1, 8, 8)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda net, x: (net(x), net(x)) if net.training else net(x), "in train mode; got tuple of 2: Tensor, Tensor"),
        (lambda net, x: {"out": net(x)} if net.training else net(x), "in train mode; got dict with the keys out"),
        (lambda net, x: net(x)[0] if net.training else net(x), r"in train mode; got torch.float32 of shape \(3,\)"),
        (lambda net, x: net(x, 1) if net.training else net(x), "forward pass in train mode fails; got TypeError"),
        (lambda net, x: net(x).detach(), "logits with respect to its parameters; got none"),
        (torch.no_grad()(lambda net, x: net(x)), "logits with respect to its parameters; got none"),
        (lambda net, x: torch.from_numpy(net(x).detach().numpy()), "with respect to its parameters; got none"),
    ],
)
def test_what_cannot_be_trained_is_refused(answer: Callable[..., object], text: str) -> None:
    assert check_model(Around(answer), SHAPE, 3) == 3
    with pytest.raises(InputError, match=text):
        check_trainable(Around(answer), SHAPE)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda net, x: net(x.detach()), "with respect to the images; got none; accepted: a forward pass without"),
        (torch.no_grad()(lambda net, x: net(x)), "with respect to the images; got none"),
        (lambda net, x: net(x.cpu().detach().clone().requires_grad_(True)), "with respect to the images; got none"),
        (lambda net, x: net(torch.from_numpy(x.numpy())), "respect to the images fails; got RuntimeError"),
    ],
)
def test_what_cannot_be_attacked_is_refused(answer: Callable[..., object], text: str) -> None:
    assert check_model(Around(answer), SHAPE, 3) == 3
    with pytest.raises(InputError, match=text):
        check_differentiable(Around(answer), SHAPE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_no_logits(dtype: torch.dtype) -> None:
    with pytest.raises(
        InputError, match=r"got probabilities: no value is below 0.*; accepted: logits, as they are before"
    ):
        check_model(Around(lambda net, x: net(x).softmax(1)).to(dtype), SHAPE, 3)
    for as_good in (lambda net, x: net(x).log_softmax(1), lambda net, x: net(x).sigmoid()):
        assert check_model(Around(as_good), SHAPE, 3) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("check", [check_trainable, check_differentiable])
def test_scripted_models_can_neither_be_trained_nor_attacked(check: Callable[..., None]) -> None:
    with pytest.raises(InputError, match=r"got a TorchScript model \(RecursiveScriptModule\); accepted: the torch.nn"):
        check(torch.jit.script(SmallCNN(2, width=2)), SHAPE)


@pytest.mark.parametrize("check", [check_trainable, check_differentiable])
def test_distributed_models_are_refused(check: Callable[..., None]) -> None:
    # As one that is there: to make one takes a process group.
    model = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(model)
    with pytest.raises(InputError, match=r"got DistributedDataParallel; accepted: the network in it: model\.module"):
        check(model, SHAPE)


def test_quantised_models_are_refused() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(SmallCNN(3, width=2), {nn.Linear})
    with pytest.raises(InputError, match=r"of which 'linear.*' holds whole numbers; accepted: floating-point weights"):
        check_trainable(quantised, SHAPE)
    with pytest.raises(InputError, match="with respect to the images"):
        check_differentiable(quantised, SHAPE)


@pytest.mark.parametrize("check", [check_trainable, check_differentiable])
def test_those_checks_change_nothing(check: Callable[[nn.Module, tuple[int, int, int]], None]) -> None:
    model = Around(lambda net, x: net(x)).train().requires_grad_(False)
    model.net[0].bn2.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check(model, SHAPE)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("check", [check_trainable, check_differentiable])
def test_models_that_train_pass_whatever_their_dtype(check: Callable[..., None]) -> None:
    pooled = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    for model in (pooled, SmallCNN(3, width=2).bfloat16(), SmallCNN(3, width=2).double(), SmallCNN(3, width=2).half()):
        check(model, SHAPE)
        with torch.no_grad():
            check(model, SHAPE)


@pytest.mark.gpu
def test_a_model_on_the_gpu_is_checked_there() -> None:
    assert check_model(SmallCNN(2, width=2).cuda(), (1, 8, 8), 2) == 2


def test_the_way_out_of_missing_classes_is_one_that_every_caller_has() -> None:
    with pytest.warns(
        PBEWarning, match=r"2 classes and the model 3 logits.*pbe_fast\.as_image_set\(data, class_names="
    ):
        check_model(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (1, 2, 2), 2)
