from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pbe_fast.engine import forward
from pbe_fast.engine.folding import FrozenCopy
from pbe_fast.engine.forward import eval_mode, predict_logits, to_input, weight_dtype


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (23, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 4 * 3, 7)
    )


class Fits(nn.Module):
    """Has memory for so many images at a time."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.tried: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.tried.append(len(images))
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images.flatten(1)[:, :4] * 2


class Remembers(nn.Module):
    """Keeps something it computed on its first pass, as networks with lazily made position tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.linear = nn.Linear(3 * 6 * 5, 2)

    def forward(self, images: Tensor) -> Tensor:
        if self.table is None:
            self.table = images.new_full((90,), 2.0) * 1
        logits: Tensor = self.linear(images.flatten(1) * self.table)
        return logits


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_predict_many_images(model: nn.Sequential, images: Tensor) -> None:
    many = images.repeat(200, 1, 1, 1)
    found = predict_logits(torch.jit.script(model), many)
    torch.testing.assert_close(found, predict_logits(model, many), rtol=1e-4, atol=1e-4)


def test_input_is_float_in_0_1_and_channels_last(images: Tensor) -> None:
    fed = to_input(images)
    assert fed.dtype == torch.float32
    assert fed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fed, images / 255)
    assert to_input(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)).eq(1).all()


@pytest.mark.parametrize("batch_size", [1, 4, 23, 512])
def test_logits_are_those_of_the_model_in_eval_mode(model: nn.Module, images: Tensor, batch_size: int) -> None:
    got = predict_logits(model, images, batch_size=batch_size)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(got, model.eval()(images.float() / 255))


def test_the_mode_of_every_submodule_is_as_before(model: nn.Sequential, images: Tensor) -> None:
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    statistics = {k: v.clone() for k, v in model.state_dict().items()}
    predict_logits(model, images)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, statistics[k]) for k, v in model.state_dict().items())


def test_eval_mode_ends_with_an_error_too(model: nn.Sequential) -> None:
    model.train()
    model[3].eval()
    with pytest.raises(ZeroDivisionError), eval_mode(model) as inside:
        assert not any(m.training for m in inside.modules())
        raise ZeroDivisionError
    assert [m.training for m in model] == [True, True, True, False, True, True]


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_dropped(images: Tensor) -> None:
    model = Fits(3)
    got = predict_logits(model, images, batch_size=16)
    torch.testing.assert_close(got, images.float().div(255).flatten(1)[:, :4] * 2)
    assert model.tried == [16, 8, 4] + [2] * 11 + [1]


@pytest.mark.parametrize(("amx", "sizes"), [(False, [128] * 3 + [16]), (True, [400])])
def test_the_size_of_batches_that_is_fastest_on_a_processor(
    two_threads: None, monkeypatch: pytest.MonkeyPatch, amx: bool, sizes: list[int]
) -> None:
    monkeypatch.setattr(forward, "has_amx", lambda: amx)
    model = Fits(1000)
    predict_logits(model, torch.zeros(400, 3, 6, 5, dtype=torch.uint8))
    assert model.tried == sizes


def test_memory_that_gives_out_later_costs_no_image(images: Tensor) -> None:
    class Shrinks(Fits):
        def forward(self, images: Tensor) -> Tensor:
            self.limit = 8 if len(self.tried) < 2 else 5
            return super().forward(images)

    model = Shrinks(8)
    got = predict_logits(model, images, batch_size=8)
    torch.testing.assert_close(got, images.float().div(255).flatten(1)[:, :4] * 2)
    assert model.tried == [8, 8, 7, 4, 3]


def test_one_image_that_does_not_fit_is_an_error(images: Tensor) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        predict_logits(Fits(0), images, batch_size=4)


def test_an_error_leaves_the_mode_as_it_was(images: Tensor) -> None:
    model = Fits(0).train()
    with pytest.raises(torch.OutOfMemoryError):
        predict_logits(model, images)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_dtype_gets_images_of_it(model: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
    expected = predict_logits(model, images)
    got = predict_logits(model.to(dtype), images)
    assert weight_dtype(model) == dtype
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)
    if dtype == torch.float64:
        torch.testing.assert_close(got, expected)


def test_mixed_precision_is_close_and_not_the_same(model: nn.Module, images: Tensor) -> None:
    expected = predict_logits(model, images)
    got = predict_logits(model, images, dtype=torch.bfloat16)
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)


def test_what_the_model_keeps_can_be_used_for_training(images: Tensor) -> None:
    model = Remembers()
    predict_logits(model, images)
    fed = to_input(images).requires_grad_()
    model(fed).sum().backward()
    assert fed.grad is not None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        (RuntimeError, "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (torch.AcceleratorError, "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        (RuntimeError, "CUDA driver error: out of memory"),
        (RuntimeError, "Triton Error [CUDA]: out of memory"),
    ],
)
def test_memory_may_run_out_in_other_words(images: Tensor, kind: type[RuntimeError], text: str) -> None:
    class Words(Fits):
        def forward(self, images: Tensor) -> Tensor:
            try:
                return super().forward(images)
            except torch.OutOfMemoryError:
                raise kind(text) from None

    model = Words(5)
    got = predict_logits(model, images)
    torch.testing.assert_close(got, images.float().div(255).flatten(1)[:, :4] * 2)
    assert model.tried == [23, 11, 5, 5, 5, 5, 3]


@pytest.mark.parametrize(
    "text", ["mat1 and mat2 shapes cannot be multiplied", "CUDA error: an illegal memory access was encountered"]
)
def test_another_error_is_not_taken_for_lack_of_memory(images: Tensor, text: str) -> None:
    class Broken(Fits):
        def forward(self, images: Tensor) -> Tensor:
            self.tried.append(len(images))
            raise RuntimeError(text)

    model = Broken(0)
    with pytest.raises(RuntimeError, match=text):
        predict_logits(model, images)
    assert model.tried == [23]


@pytest.mark.parametrize("batch_size", [1, 4, 23, 512])
def test_images_sent_batch_by_batch_get_the_same_logits(model: nn.Module, images: Tensor, batch_size: int) -> None:
    resident = predict_logits(model, images, batch_size=batch_size)
    assert torch.equal(predict_logits(model, images, batch_size=batch_size, streamed=True), resident)


def test_a_streamed_batch_that_does_not_fit_is_halved_too(images: Tensor) -> None:
    model = Fits(3)
    got = predict_logits(model, images, batch_size=16, streamed=True)
    torch.testing.assert_close(got, images.float().div(255).flatten(1)[:, :4] * 2)
    assert model.tried == [16, 8, 4] + [2] * 11 + [1]


def test_many_images_go_through_a_folded_copy(
    model: nn.Sequential, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.train()
    for _ in range(3):
        model(to_input(images))
    expected = predict_logits(model, images)
    monkeypatch.setattr(forward, "_WORTH_FOLDING", 23)
    calls: list[tuple[tuple[str, str], ...]] = []

    class Watched(FrozenCopy):
        def forward(self, images: Tensor) -> Tensor:
            calls.append(self.folded)
            return super().forward(images)

    monkeypatch.setattr(forward, "FrozenCopy", Watched)
    torch.testing.assert_close(predict_logits(model, images), expected, atol=1e-5, rtol=1e-4)
    assert calls == [(("0", "1"),)]
    assert model.training
