"""The file that export_onnx writes, and what it refuses to write."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from pbe_fast import __version__
from pbe_fast.errors import InputError, OutputError, VerificationError
from pbe_fast.export import write
from pbe_fast.export.graph import read_graph
from pbe_fast.export.write import export_onnx, reference_copy, weights_sha256

SHAPE = (3, 8, 8)


def logits(path, batch):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": batch.numpy()})[0]


def test_one_file_with_the_promised_interface(saved):
    assert [p.name for p in saved.parent.iterdir()] == ["tiny.onnx"]
    proto = onnx.load(saved)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 20)]
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    session = onnxruntime.InferenceSession(str(saved), providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", ["batch", 3, 8, 8])
    assert (result.name, result.type, result.shape) == ("logits", "tensor(float)", ["batch", 5])


def test_normalisation_and_batch_norm_are_in_the_graph(tiny, saved):
    batch = torch.rand(7, *SHAPE, generator=torch.Generator().manual_seed(3))
    expected = copy.deepcopy(tiny).eval()(batch).detach().numpy()
    for size in (1, 2, 7):
        np.testing.assert_allclose(logits(saved, batch[:size]), expected[:size], atol=1e-5, rtol=0)


def test_metadata_reads_back(tiny, saved):
    session = onnxruntime.InferenceSession(str(saved), providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["class_names"]) == ["cat", "lämp"]
    assert properties["pbe_fast_version"] == __version__
    assert properties["weights_sha256"] == weights_sha256(tiny)
    assert json.loads(properties["image_shape"]) == list(SHAPE)
    assert properties["num_classes"] == "5"


def test_no_trace_of_this_machine_is_in_the_file(saved):
    data = saved.read_bytes()
    for trace in (b"stack_trace", b"site-packages", b"/torch/", b".py", os.path.expanduser("~").encode() + b"/"):
        assert trace not in data


def test_the_same_weights_give_the_same_bytes_in_another_process(tiny, saved, tmp_path):
    torch.save(tiny.state_dict(), tmp_path / "weights.pt")
    network = os.path.join(os.path.dirname(__file__), "conftest.py")
    code = (
        "import importlib.util, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location('c', {network!r})\n"
        "c = importlib.util.module_from_spec(spec); sys.modules['c'] = c; spec.loader.exec_module(c)\n"
        "net = c.Normalized(c.TinyNet(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))\n"
        f"net.load_state_dict(torch.load({str(tmp_path / 'weights.pt')!r}, weights_only=True))\n"
        f"c.export_onnx(net, {str(tmp_path / 'again.onnx')!r}, image_shape=(3, 8, 8),"
        " metadata={'class_names': '[\"cat\", \"lämp\"]'})\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Nor does the exporter say anything.
    assert (done.stdout, done.stderr) == ("", "")
    assert (
        hashlib.sha256((tmp_path / "again.onnx").read_bytes()).digest() == hashlib.sha256(saved.read_bytes()).digest()
    )


def test_the_model_and_the_process_are_as_before(tiny, tmp_path):
    model = copy.deepcopy(tiny).double().to(memory_format=torch.channels_last)
    model.net.drop.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    filters, level = list(warnings.filters), logging.root.manager.disable
    export_onnx(model, tmp_path / "m.onnx", image_shape=SHAPE)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert model.net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(state[0], torch.get_rng_state())
    assert (state[1], state[2]) == (random.getstate(), np.random.get_state()[1].tolist())
    assert (filters, level) == (list(warnings.filters), logging.root.manager.disable)
    assert all(p.grad is None for p in model.parameters())


class Talking(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        logging.getLogger("app").error("seen")
        return self.net(x)


def test_only_the_exporter_is_silent(tiny, tmp_path, caplog):
    levels = [logging.getLogger(name).level for name in ("torch", "onnxscript", "onnx_ir")]
    with caplog.at_level(logging.DEBUG):
        export_onnx(Talking(tiny), tmp_path / "m.onnx", image_shape=SHAPE)
    # Once to count the logits; then in the exporter, which may run it more than once.
    assert len([record for record in caplog.records if record.name == "app"]) > 1
    assert not [record for record in caplog.records if record.name.split(".")[0] in ("torch", "onnxscript", "onnx_ir")]
    assert [logging.getLogger(name).level for name in ("torch", "onnxscript", "onnx_ir")] == levels


def test_weights_sha256_sees_every_value(tiny):
    other = copy.deepcopy(tiny)
    assert weights_sha256(other) == weights_sha256(tiny)
    other.net.norm.running_mean[3] += 1e-6
    assert weights_sha256(other) != weights_sha256(tiny)
    half = copy.deepcopy(tiny).to(torch.bfloat16)
    assert weights_sha256(half) not in (weights_sha256(tiny), weights_sha256(other))


def test_wrappers_are_taken_off(tiny):
    compiled = torch.compile(copy.deepcopy(tiny), backend="eager")
    assert type(reference_copy(compiled)) is type(tiny)
    assert type(reference_copy(nn.DataParallel(copy.deepcopy(tiny)))) is type(tiny)
    assert weights_sha256(compiled) == weights_sha256(nn.DataParallel(copy.deepcopy(tiny))) == weights_sha256(tiny)


class Foreign(nn.Module):
    """Asks the exporter for an operator that no ONNX runtime has."""

    def forward(self, images):
        rows = images.flatten(1)[:, :5]
        return torch.onnx.ops.symbolic("pbe.example::Purify", (rows,), dtype=rows.dtype, shape=rows.shape, version=1)


class FixedBatch(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :5] + torch.zeros(2, 1)


class NoOperator(nn.Module):
    """float64 error function of the second kind: torch has it, ONNX does not."""

    def forward(self, images):
        return torch.special.bessel_j1(images.flatten(1)[:, :5])


class Refuses(nn.Module):
    def forward(self, images):
        raise RuntimeError("I want greyscale\nand a second line")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Foreign(), VerificationError, r"not ONNX's own: got pbe\.example::Purify; accepted: the standard"),
        (FixedBatch(), VerificationError, r"got float images \(2, 3, 8, 8\); accepted: .* the batch dynamic"),
        (NoOperator(), InputError, "torch.onnx cannot export.*bessel_j1"),
        (Refuses(), InputError, r"got I want greyscale; accepted"),
        ("net.pt", InputError, "model; got str; accepted: a torch.nn.Module"),
        (nn.Identity(), InputError, r"got torch.float32 of shape \(2, 3, 8, 8\); accepted: float logits"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_models_that_cannot_be_exported(model, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_onnx(model, tmp_path / "m.onnx", image_shape=SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_sizes_may_be_numpys(tiny, tmp_path):
    path = export_onnx(tiny, tmp_path / "m.onnx", image_shape=tuple(np.array(SHAPE)), opset=np.int64(20))
    assert path.read_bytes() == export_onnx(tiny, tmp_path / "n.onnx", image_shape=SHAPE, opset=20).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opset": 17}, "opset; got 17; accepted: 18 to"),
        ({"opset": "20"}, "opset; got '20'; accepted: 18 to"),
        ({"opset": 999}, "opset; got 999; accepted: 18 to"),
        ({"image_shape": (8, 8)}, r"image_shape; got \(8, 8\)"),
        ({"image_shape": (3, 0, 8)}, "image_shape"),
        ({"metadata": {"classes": ["a"]}}, "metadata; got 'classes'"),
    ],
)
def test_bad_arguments(tiny, changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export_onnx(tiny, tmp_path / "m.onnx", **{"image_shape": SHAPE, **changes})
    assert list(tmp_path.iterdir()) == []


def test_another_opset_is_really_that_opset(tiny, tmp_path):
    path = export_onnx(tiny, tmp_path / "m.onnx", image_shape=SHAPE, opset=18)
    assert read_graph(path.read_bytes(), "m").opset == 18


def test_a_failed_check_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_text("old")

    def interrupted(data, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "read_graph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(tiny, path, image_shape=SHAPE)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_an_unwritable_place(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write in"):
        export_onnx(tiny, tmp_path / "file" / "m.onnx", image_shape=SHAPE)
