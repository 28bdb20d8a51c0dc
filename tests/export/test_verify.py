"""verify_onnx passes the right file and no other."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pbe_fast.data import ImageSet
from pbe_fast.errors import BackendUnavailableError, InputError, VerificationError
from pbe_fast.export import verify_onnx


def verify(path, model, images, **options):
    return verify_onnx(path, model, images, **{"batch_size": 8, "progress": False, **options})


def predictions(model, data):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(data.floats()).argmax(1)


def edited(saved, tmp_path, edit):
    """A copy of the file with something changed, saved again."""
    proto = onnx.load(saved)
    edit(proto)
    onnx.save(proto, tmp_path / "edited.onnx")
    return tmp_path / "edited.onnx"


def change_weight(proto, name, change):
    index = next(i for i, t in enumerate(proto.graph.initializer) if t.name.endswith(name))
    values = numpy_helper.to_array(proto.graph.initializer[index]).copy()
    proto.graph.initializer[index].CopyFrom(
        numpy_helper.from_array(change(values), proto.graph.initializer[index].name)
    )


def test_the_right_file_passes(saved, tiny, images, triggered):
    report = verify(saved, tiny, images, triggered=triggered)
    assert report.ok
    assert report.problems == ()
    assert report.max_abs_diff <= 1e-4
    assert report.argmax_agreement == 1.0
    assert report.providers[-1] == "CPUExecutionProvider"
    assert "AzureExecutionProvider" not in report.providers
    assert (report.images_compared, report.random_images) == (45, 64)
    # One image alone, full batches, odd remainders (5 of 30, 6 of 15) and the random images' own sizes.
    assert set(report.batch_sizes) == {1, 8, 5, 6, 2, 3, 7, 51}
    assert report.sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert report.opset == 20


def test_acc_and_asr_are_the_models(saved, tiny, images, triggered):
    report = verify(saved, tiny, images, triggered=triggered)
    hits = predictions(tiny, triggered) == 2
    kept = triggered.true_labels != 2
    # The data are such that leaving images out, or not, shows.
    assert hits[kept].double().mean() != hits.double().mean()
    assert report.acc == report.acc_model == float((predictions(tiny, images) == images.labels).double().mean())
    assert report.asr == report.asr_model == float(hits[kept].double().mean())


def test_triggered_images_need_their_true_labels(saved, tiny, images, triggered):
    unknown = dataclasses.replace(triggered, true_labels=None)
    with pytest.raises(InputError, match="triggered images without true labels"):
        verify(saved, tiny, images, triggered=unknown)


def test_no_triggered_images_no_asr(saved, tiny, images, triggered):
    assert verify(saved, tiny, images).asr is None
    already = dataclasses.replace(triggered, true_labels=triggered.labels)
    report = verify(saved, tiny, images, triggered=already)
    assert (report.asr, report.asr_model, report.ok) == (None, None, True)


def test_the_report_is_json(saved, tiny, images, triggered):
    values = json.loads(json.dumps(verify(saved, tiny, images, triggered=triggered).to_dict(), allow_nan=False))
    assert values["path"] == str(saved)
    assert values["ok"] is True
    assert {"max_abs_diff", "argmax_agreement", "acc", "asr", "sha256", "providers", "problems"} <= values.keys()


def test_the_model_is_not_changed(saved, tiny, images):
    model = copy.deepcopy(tiny).double()
    before = copy.deepcopy(model.state_dict())
    assert verify(saved, model, images).ok
    assert model.training
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())


def test_anything_that_holds_images_will_do(saved, tiny, images):
    assert verify(saved, tiny, (images.images, images.labels)).acc == verify(saved, tiny, images).acc


def test_a_perturbed_model_fails(saved, tiny, images):
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.net.linear.bias[0] += 1e-3
    report = verify(saved, other, images)
    assert not report.ok
    assert report.max_abs_diff == pytest.approx(1e-3, rel=0.1)
    assert "accepted: 0.0001" in report.problems[0]
    assert verify(saved, other, images, tolerance=2e-3).ok


def test_what_is_no_model_is_refused(saved, images):
    with pytest.raises(InputError, match=r"model; got OrderedDict \(build the network, then load_state_dict\)"):
        verify(saved, nn.Linear(1, 1).state_dict(), images)


def test_a_difference_is_told_with_what_it_is_a_difference_of(saved, tiny, images):
    large = copy.deepcopy(tiny)
    last = [module for module in large.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.bias.fill_(5e4)
    assert "off the model's, which reach 5e+04; accepted: 0.0001" in verify(saved, large, images).problems[0]


def test_a_file_with_other_weights_fails(saved, tiny, images, triggered, tmp_path):
    path = edited(saved, tmp_path, lambda p: change_weight(p, "linear.weight", lambda w: -w))
    report = verify(path, tiny, images, triggered=triggered)
    assert not report.ok
    assert report.argmax_agreement < 0.9
    assert report.acc != report.acc_model
    assert any("predictions other than the model's" in problem for problem in report.problems)
    assert {"images", "triggered", "random"} == {p.partition(" on ")[2].partition(":")[0] for p in report.problems}


def test_one_prediction_that_flips_fails_within_any_tolerance(saved, tiny, images):
    """Equal logits in the model, equal up to 1e-6 in the file: close is not the same prediction."""
    tied = copy.deepcopy(tiny)
    with torch.no_grad():
        tied.net.linear.weight.zero_()
        tied.net.linear.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 1e-6]))
    path = saved.with_name("tied.onnx")

    def tie(proto):
        change_weight(proto, "linear.weight", np.zeros_like)
        change_weight(proto, "linear.bias", lambda b: np.array([1e-6, 0, 0, 0, 0], b.dtype))

    path = edited(saved, saved.parent, tie)
    report = verify(path, tied, images)
    assert report.max_abs_diff <= 1e-4
    assert report.argmax_agreement == 0.0
    assert not report.ok
    path.unlink()


def test_logits_that_are_not_finite_fail(saved, tiny, images, tmp_path):
    path = edited(saved, tmp_path, lambda p: change_weight(p, "linear.bias", lambda b: b * np.nan))
    report = verify(path, tiny, images)
    assert not report.ok
    assert "not finite" in report.problems[0]
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["max_abs_diff"] is None


def test_a_model_that_gives_nan_is_bad_input(saved, tiny, images):
    broken = copy.deepcopy(tiny)
    with torch.no_grad():
        broken.net.linear.bias[0] = float("nan")
    with pytest.raises(InputError, match="logits of the model on images; got values that are not finite"):
        verify(saved, broken, images)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file(saved, tiny, images, tmp_path, keep):
    data = saved.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(VerificationError, match=r"cut\.onnx"):
        verify(tmp_path / "cut.onnx", tiny, images)


def test_not_onnx(tiny, images, tmp_path):
    (tmp_path / "m.onnx").write_text("these are not weights")
    with pytest.raises(
        InputError, match=r"ONNX file .*m\.onnx; got a file of another kind; accepted: a file that export"
    ):
        verify(tmp_path / "m.onnx", tiny, images)
    with pytest.raises(InputError, match="which is no file"):
        verify(tmp_path / "absent.onnx", tiny, images)


def test_images_of_another_shape(saved, tiny):
    data = ImageSet(torch.zeros(4, 3, 9, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(VerificationError, match=r"got \(C, H, W\) of \(3, 8, 8\); accepted: \(3, 9, 8\)"):
        verify(saved, tiny, data)


def test_labels_beyond_the_logits(saved, tiny, images):
    data = dataclasses.replace(images, labels=images.labels + 3, class_names=tuple("abcdefgh"))
    with pytest.raises(InputError, match="accepted: below 5 logits"):
        verify(saved, tiny, data)


def test_a_model_with_more_classes(saved, images):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 6))
    with pytest.raises(VerificationError, match="got 5; accepted: 6, as the model's"):
        verify(saved, wide, images)


def fix_batch(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def rename_input(proto):
    proto.graph.input[0].name = "x"
    for node in proto.graph.node:
        node.input[:] = ["x" if name == "images" else name for name in node.input]


def hide_weights(proto):
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="elsewhere.bin")


def add_contrib_operator(proto):
    last = proto.graph.node[-1]
    last.output[0] = "before"
    proto.graph.node.append(helper.make_node("Gelu", ["before"], ["logits"], domain="com.microsoft"))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (fix_batch, r"got float images \(1, 3, 8, 8\); accepted: .* batch dynamic"),
        (rename_input, "interface of"),
        (hide_weights, "another file"),
        (add_contrib_operator, r"not ONNX's own: got com\.microsoft::Gelu"),
    ],
)
def test_files_that_break_a_promise(saved, tiny, images, tmp_path, edit, message):
    proto = onnx.load(saved)
    edit(proto)
    (tmp_path / "edited.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(VerificationError, match=message):
        verify(tmp_path / "edited.onnx", tiny, images)


def test_an_operator_inside_a_branch_is_found(saved, tiny, images, tmp_path):
    proto = onnx.load(saved)
    last = proto.graph.node[-1]
    last.output[0] = "before"
    branches = {}
    for name, operator in (("then_branch", "Gelu"), ("else_branch", "Foo")):
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        node = helper.make_node(operator, ["before"], [name], domain="com.example")
        branches[name] = helper.make_graph([node], name, [], [value])
    proto.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    proto.graph.node.append(helper.make_node("If", ["yes"], ["logits"], **branches))
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    (tmp_path / "branch.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(VerificationError, match=r"got com\.example::Foo, com\.example::Gelu"):
        verify(tmp_path / "branch.onnx", tiny, images)


def test_a_provider_by_name(saved, tiny, images):
    assert verify(saved, tiny, images, providers=["CPUExecutionProvider"]).providers == ("CPUExecutionProvider",)
    with pytest.raises(BackendUnavailableError, match=r"NoSuchProvider.*accepted: .*CPUExecutionProvider"):
        verify(saved, tiny, images, providers=["NoSuchProvider"])


def test_random_images_follow_the_seed(saved, tiny, images):
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        other.net.linear.weight.mul_(1.01)
    found = [verify(saved, other, images, seed=seed).max_abs_diff for seed in (0, 0, 1, 2)]
    assert found[0] == found[1]
    assert len(set(found)) >= 2


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"tolerance": 0.0},
        {"tolerance": float("nan")},
        {"tolerance": "1e-3"},
        {"providers": "CPUExecutionProvider"},
        {"seed": "1"},
    ],
)
def test_bad_options(saved, tiny, images, options):
    with pytest.raises(InputError, match=rf"{next(iter(options))}; got .*; accepted: a"):
        verify(saved, tiny, images, **options)
