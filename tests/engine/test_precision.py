from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

from pbe_fast.engine import precision
from pbe_fast.engine.precision import autocast, exact_float32, resolve_device, resolve_precision
from pbe_fast.errors import InputError

CPU = torch.device("cpu")


def test_device() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_device_may_be_torch_s_own() -> None:
    assert resolve_device(CPU) == CPU
    with pytest.raises(InputError, match="device; got 'meta'"):
        resolve_device(torch.device("meta"))
    for thing in (None, 3.5):
        with pytest.raises(InputError, match=f'device; got {thing}; accepted: text such as "cuda:1"'):
            resolve_device(thing)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=f"device; got '{name}'.*accepted: auto, cpu, or cuda"):
        resolve_device(name)


def test_precision_asked_for_by_name() -> None:
    assert resolve_precision(CPU, "fp32") == torch.float32
    assert resolve_precision(CPU, "bf16") == torch.bfloat16
    with pytest.raises(InputError, match="precision; got 'fp16'; accepted: auto, fp32, bf16"):
        resolve_precision(CPU, "fp16")


def test_auto_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve_precision(CPU, "auto")
    monkeypatch.setattr(precision.F, "conv2d", None)
    assert resolve_precision(CPU, "auto") == first


def test_auto_asks_the_cpu_only_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_prefers_bf16", lambda: True)
    assert resolve_precision(CPU) == torch.bfloat16
    assert resolve_precision(torch.device("meta")) == torch.float32


def test_the_probe_is_quick_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    took = []
    for _ in range(5):
        precision._cpu_prefers_bf16.cache_clear()
        start = time.process_time()
        precision._cpu_prefers_bf16()
        took.append(time.process_time() - start)
    assert torch.get_num_threads() == threads
    # Of processor time, so that a busy machine does not count.
    assert min(took) < 0.05


def test_autocast_is_on_below_float32_only() -> None:
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    with autocast(CPU, torch.bfloat16):
        assert F.linear(x, w).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert F.linear(x, w).dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_exact_float32_on_a_gpu_and_afterwards_what_was_there(device: str) -> None:
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = (convolutions.fp32_precision, products.fp32_precision)
    with pytest.raises(KeyboardInterrupt), exact_float32(torch.device(device)):
        seen = (convolutions.fp32_precision, products.fp32_precision)
        raise KeyboardInterrupt
    assert before[0] == "tf32"
    assert seen == (("ieee", "ieee") if device == "cuda" else before)
    assert (convolutions.fp32_precision, products.fp32_precision) == before
    # Settings that contradict each other are an error where they are read by their former name.
    assert torch.backends.cudnn.allow_tf32


def test_no_weight_of_before_is_left_where_the_caller_has_mixed_precision_on() -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value in (1.0, 2.0):
            with torch.no_grad(), autocast(CPU, torch.bfloat16):
                weight.fill_(value)
                assert (F.linear(x, weight) == 3 * value).all()
        with autocast(CPU, torch.bfloat16):
            assert F.linear(x, weight).requires_grad
