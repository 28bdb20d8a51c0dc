"""Reading weights files, hostile ones first: each of those would make a file if its code ran."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pbe_fast.errors import InputError, UnsafeFileError
from pbe_fast.models import load_model
from pbe_fast.models.weights import read_weights


class Malicious:
    """Unpickling this runs a shell command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def zip_format(content: object, path: Path) -> None:
    torch.save(content, path)


def zip_protocol_4(content: object, path: Path) -> None:
    torch.save(content, path, pickle_protocol=4)


def legacy_format(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def legacy_protocol_4(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False, pickle_protocol=4)


def bare_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def bare_pickle_0(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=0))


WRITERS = [zip_format, zip_protocol_4, legacy_format, legacy_protocol_4, bare_pickle, bare_pickle_0]
Writer = Callable[[object, Path], None]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("forced", [False, True])
def test_malicious_pickle_is_named_and_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Writer, suffix: str, forced: bool
) -> None:
    if forced:  # torch's own switch to unsafe loading does not reach us
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    witness, path = tmp_path / "it_ran", tmp_path / f"weights{suffix}"
    write({"extra": Malicious(witness), "state_dict": {"w": torch.zeros(2)}}, path)
    with pytest.raises(UnsafeFileError, match=rf"{path.name} .*got a use of {os.system.__module__}\.system"):
        load_model(path, arch="small_cnn", num_classes=2)
    assert not witness.exists()


def test_the_malicious_pickle_does_run_when_unpickled(tmp_path: Path) -> None:
    """Without this, the test above could pass on a harmless file."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "it_ran")))
    assert (tmp_path / "it_ran").exists()


def test_pickle_under_the_name_of_a_safetensors_file(tmp_path: Path) -> None:
    bare_pickle(Malicious(tmp_path / "it_ran"), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(tmp_path / "model.safetensors")
    assert not (tmp_path / "it_ran").exists()


def test_whole_saved_model_is_refused_with_advice(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UnsafeFileError, match=r"torch\.nn\.modules\.linear\.Linear.*save model\.state_dict"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.ReLU()), str(tmp_path / "model.pt"))
    with pytest.raises(UnsafeFileError, match="TorchScript"):
        read_weights(tmp_path / "model.pt")


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "n": torch.tensor(3)}


@pytest.mark.parametrize("content", [{"state_dict": {**STATE, "threshold": 0.5}, "t": 1}, {**STATE, "threshold": 0.5}])
def test_an_entry_that_is_no_tensor_is_named(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(
        InputError, match=r"'threshold' in the state_dict of .*w\.pt; got float; accepted: tensors only"
    ):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("write", [zip_format, legacy_format])
@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        {"netC": STATE, "best_clean_acc": torch.tensor(0.9)},
        {f"module.{k}": v for k, v in STATE.items()},
        {"state_dict": {f"module._orig_mod.{k}": v for k, v in STATE.items()}},
        {f"_orig_mod.module.{k}": nn.Parameter(v) if v.is_floating_point() else v for k, v in STATE.items()},
    ],
)
def test_wrappers_and_prefixes_come_off(tmp_path: Path, write: Writer, content: object) -> None:
    write(content, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    assert list(found) == list(STATE)
    assert all(torch.equal(found[k], v) and not found[k].requires_grad for k, v in STATE.items())


def test_a_prefix_that_only_some_keys_have_stays(tmp_path: Path) -> None:
    save_file({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.safetensors")
    assert set(read_weights(tmp_path / "w.safetensors")) == {"module.a", "b"}


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [torch.ones(2)], torch.ones(2), {"model": {"a": 1}}])
def test_no_state_dict_inside(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"no state_dict in .*got .*accepted: tensors by name"):
        read_weights(tmp_path / "w.pt")


def test_harmless_file_of_a_newer_pickle_protocol_is_not_called_unsafe(tmp_path: Path) -> None:
    zip_protocol_4(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_damaged_files(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    save_file(STATE, path) if name.endswith("safetensors") else torch.save(STATE, path)
    data = {"empty": b"", "text": b"these are no weights\n" * 40, "truncated": path.read_bytes()[:-20]}
    path.write_bytes(data[damage])
    with pytest.raises(InputError, match=r"cannot be read; got .*accepted: a \.safetensors"):
        read_weights(path)


def test_other_kinds_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / "w.onnx").write_bytes(b"x")
    for path in (tmp_path / "w.onnx", tmp_path / "absent.pt", tmp_path):
        with pytest.raises(InputError, match=r"accepted: a \.safetensors"):
            read_weights(path)
