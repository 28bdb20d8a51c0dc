from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pbe_fast.errors import InputError, OutputError, UnsafeFileError
from pbe_fast.models import ModelSpec, Normalized, PreActResNet18, SmallCNN, build_model, load_model, save_model

SPEC = ModelSpec("small_cnn", 4, 1, (8, 8), 3, (0.5,), (0.25,))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Normalized(SmallCNN(4, width=3), [0.5], [0.25])
    net(torch.rand(16, 1, 8, 8))  # moves the running statistics
    return net


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert set(one) == set(two)
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


def test_round_trip(model: nn.Module, tmp_path: Path) -> None:
    assert save_model(model, SPEC, tmp_path / "new" / "out") == tmp_path / "new" / "out"
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == ["config.json", "model.safetensors"]
    for path in (tmp_path / "new" / "out", tmp_path / "new" / "out" / "model.safetensors"):
        loaded, spec = load_model(path)
        assert spec == SPEC
        assert not loaded.training
        assert_same_state(loaded, model)
        x = torch.rand(3, 1, 8, 8)
        assert torch.equal(loaded(x), model.eval()(x))


def test_channels_last_parallel_and_compiled_models_are_saved_plain(model: nn.Module, tmp_path: Path) -> None:
    compiled = torch.compile(model.to(memory_format=torch.channels_last), backend="eager")
    save_model(nn.DataParallel(compiled), SPEC, tmp_path)
    assert_same_state(load_model(tmp_path)[0], model)


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    save_model(model, ModelSpec("unknown", 4, 1, (2, 2)), tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["2.weight"], model[1].weight)


def test_saving_takes_nothing_from_the_random_state(model: nn.Module, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    save_model(model, SPEC, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_spec_of_another_network_is_refused_before_anything_is_written(model: nn.Module, tmp_path: Path) -> None:
    for spec in (ModelSpec("small_cnn", 4, 1, (8, 8), 3), ModelSpec("small_cnn", 5, 1, 8, 3, (0.5,), (0.25,))):
        with pytest.raises(InputError, match="do not fit the network: the model to be saved as small_cnn"):
            save_model(model, spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_save_leaves_the_old_files_whole(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, SPEC, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def interrupted(state: dict[str, torch.Tensor], path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("pbe_fast.models.io.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(SmallCNN(9), ModelSpec("small_cnn", 9, 1, (8, 8)), tmp_path)
    with pytest.raises(TypeError):
        save_model(model, SPEC, tmp_path, extra={"no json": object()})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_output_that_cannot_be_written(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_model(model, SPEC, tmp_path / "file")


def test_extra_values_stand_in_the_config_and_do_not_disturb(model: nn.Module, tmp_path: Path) -> None:
    save_model(model, SPEC, tmp_path, extra={"attack": {"name": "blend"}})
    assert json.loads((tmp_path / "config.json").read_text())["attack"] == {"name": "blend"}
    assert load_model(tmp_path)[1] == SPEC
    with pytest.raises(InputError, match="got model"):
        save_model(model, SPEC, tmp_path, extra={"model": 1})


def test_bare_weights_tell_their_own_sizes(model: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pt")
    loaded, spec = load_model(tmp_path / "w.pt", arch="small_cnn")
    assert spec == ModelSpec("small_cnn", 4, 1, None, 3, (0.5,), (0.25,))
    assert_same_state(loaded, model)
    net = PreActResNet18(6, in_channels=1, width=2)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    loaded, spec = load_model(tmp_path / "net.pth", arch="preact_resnet18", image_size=(12, 16))
    assert spec == ModelSpec("preact_resnet18", 6, 1, (12, 16), 2)
    assert_same_state(loaded, net)


def test_torchvision_weights_by_arch(tmp_path: Path) -> None:
    net = build_model("torchvision:squeezenet1_1", num_classes=3)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    # Its classifier is a convolution.
    loaded, spec = load_model(tmp_path / "w.safetensors", arch="torchvision:squeezenet1_1")
    assert_same_state(loaded, net)
    assert (spec.in_channels, spec.num_classes) == (3, 3)


def test_sizes_are_found_in_files_without_an_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels):\n"
        "    net = nn.Sequential()\n"
        "    net.add_module('z', nn.Conv2d(in_channels, 8, 3))\n"
        "    net.add_module('a', nn.Conv2d(8, 4, 3))\n"
        "    net.add_module('p', nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))\n"
        "    net.add_module('x', nn.Linear(16, 16))\n"
        "    net.add_module('b', nn.Linear(16, num_classes))\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    net = build_model(f"{name}:net", num_classes=5, in_channels=2)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    loaded, spec = load_model(tmp_path / "w.safetensors", arch=f"{name}:net")
    assert (spec.num_classes, spec.in_channels, spec.width) == (5, 2, None)
    assert_same_state(loaded, net)
    torch.save(build_model("resnet18", num_classes=6).state_dict(), tmp_path / "resnet.pt")
    assert load_model(tmp_path / "resnet.pt", arch="resnet18")[1].num_classes == 6


def test_given_normalisation_goes_around_bare_weights(model: nn.Module, tmp_path: Path) -> None:
    assert isinstance(model, Normalized)
    save_file(model.net.state_dict(), tmp_path / "w.safetensors")
    loaded, spec = load_model(tmp_path / "w.safetensors", arch="small_cnn", mean=[0.5], std=[0.25])
    assert (spec.mean, spec.std) == ((0.5,), (0.25,))
    assert_same_state(loaded, model)


def test_a_given_size_overrules_the_config(model: nn.Module, tmp_path: Path) -> None:
    save_model(model, SPEC, tmp_path)
    assert load_model(tmp_path, image_size=(9, 9))[1].image_size == (9, 9)


def test_another_normalisation_than_the_model_has_is_refused(model: nn.Module, tmp_path: Path) -> None:
    save_model(model, SPEC, tmp_path / "folder")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    for path, arch in ((tmp_path / "folder", None), (tmp_path / "w.safetensors", "small_cnn")):
        assert_same_state(load_model(path, arch=arch, mean=[0.5], std=[0.25])[0], model)
        with pytest.raises(InputError, match=r"mean of .* \(--mean\); got 0.1; accepted: 0.5, as .* has: it is part"):
            load_model(path, arch=arch, mean=[0.1], std=[0.25])
        with pytest.raises(InputError, match=r"std of .* \(--std\); got 0.25, 0.25, 0.25; accepted: 0.25, as"):
            load_model(path, arch=arch, mean=[0.5], std=[0.25] * 3)


@pytest.mark.parametrize("prefix", ["model.", "net.", "network.", "backbone.", "model.module.", "a.b."])
def test_a_prefix_of_other_programs_comes_off(model: nn.Module, prefix: str, tmp_path: Path) -> None:
    assert isinstance(model, Normalized)
    for name, net in (("bare", model.net), ("normalized", model)):
        state = {f"{prefix}{key}": value for key, value in net.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / f"{name}.ckpt")
        loaded, spec = load_model(tmp_path / f"{name}.ckpt", arch="small_cnn")
        assert_same_state(loaded, net)
        assert spec == ModelSpec("small_cnn", 4, 1, None, 3, *((0.5,), (0.25,)) * (net is model))
    # Also where the config says what the network is.
    save_model(model, SPEC, tmp_path / "folder")
    save_file({f"{prefix}{k}": v for k, v in model.state_dict().items()}, tmp_path / "folder" / "model.safetensors")
    assert_same_state(load_model(tmp_path / "folder")[0], model)


def test_keys_of_another_network_are_shown(model: nn.Module, tmp_path: Path) -> None:
    assert isinstance(model, Normalized)
    save_file({f"model.{k}": v for k, v in model.net.state_dict().items()}, tmp_path / "w.safetensors")
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / "w.safetensors", arch="resnet18")
    for part in ("weights do not fit", "unexpected (model.bn1.", "tensors of ResNet (conv1.weight, bn1.weight"):
        assert part in str(caught.value)
    assert "linear layer" not in str(caught.value)


def wrapped(folder: Path, monkeypatch: pytest.MonkeyPatch, signature: str, of: str) -> str:
    """A user's function that returns a `Normalized`, in a module of its own; its name as --arch takes it."""
    module = f"wrapped_{folder.name}"
    (folder / f"{module}.py").write_text(
        f"from pbe_fast.models import Normalized, SmallCNN\ndef {signature}: return Normalized({of})\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    return f"{module}:{signature.partition('(')[0]}"


def test_an_own_network_with_the_names_of_a_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = wrapped(tmp_path, monkeypatch, "make()", "SmallCNN(4, 1, 3), [0.5], [0.25]")
    net = build_model(arch, num_classes=4)
    torch.save({f"model.{k}": v for k, v in net.state_dict().items()}, tmp_path / "w.pt")
    loaded, spec = load_model(tmp_path / "w.pt", arch=arch, num_classes=4, in_channels=1)
    assert_same_state(loaded, net)
    assert spec.mean is None


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_a_network_whose_only_child_has_the_name_of_a_prefix(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"own{name}.py").write_text(
        "from torch import nn\nfrom pbe_fast.models import SmallCNN\n\nclass Own(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        f"        self.{name} = SmallCNN(4, 1, 3)\n"
        f"    def forward(self, images):\n        return self.{name}(images)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arch = f"own{name}:Own"
    net = build_model(arch, num_classes=4)
    assert all(key.startswith(f"{name}.") for key in net.state_dict())
    save_model(net, ModelSpec(arch, 4, 1), tmp_path / "folder")
    assert_same_state(load_model(tmp_path / "folder", arch=arch)[0], net)
    for prefix in ("", "module.", "model."):
        torch.save({f"{prefix}{k}": v for k, v in net.state_dict().items()}, tmp_path / "w.pt")
        assert_same_state(load_model(tmp_path / "w.pt", arch=arch, num_classes=4, in_channels=1)[0], net)
    save_model(nn.DataParallel(net), ModelSpec(arch, 4, 1), tmp_path / "parallel")
    assert_same_state(load_model(tmp_path / "parallel", arch=arch)[0], net)
    normalised = Normalized(net, [0.5], [0.25])
    save_model(normalised, ModelSpec(arch, 4, 1, mean=(0.5,), std=(0.25,)), tmp_path / "normalised")
    assert_same_state(load_model(tmp_path / "normalised", arch=arch)[0], normalised)


def test_weights_that_do_not_fit_are_named(model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    state["stranger"] = state.pop("net.bn1.weight")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / "w.safetensors", arch="small_cnn", num_classes=7, mean=[0.5], std=[0.25])
    for part in (
        "w.safetensors",
        "1 missing (net.bn1.weight)",
        "1 unexpected (stranger)",
        "2 of another shape (net.linear.",
    ):
        assert part in str(caught.value)


def test_shapes_that_do_not_fit_are_named(model: nn.Module, tmp_path: Path) -> None:
    save_model(model, SPEC, tmp_path)
    with pytest.raises(InputError, match=r"2 of another shape \(net\.linear\.weight \(4, 6\) for \(7, 6\)"):
        load_model(tmp_path, num_classes=7)
    with pytest.raises(InputError, match=r"\d+ of another shape \(([^,]+ \([^)]*\) for \([^)]*\), ){4}\.\.\.\)"):
        load_model(tmp_path, width=5)


def test_no_config_and_no_arch(model: nn.Module, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"no config\.json of ours .*accepted: 'preact_resnet18'"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ResNet"], "model_type": "resnet"}))
    with pytest.raises(InputError, match=r"no config\.json of ours"):
        load_model(tmp_path)
    assert load_model(tmp_path, arch="small_cnn")[1].num_classes == 4


@pytest.mark.parametrize(
    "text",
    [
        "{ not json",
        '{"format": "pbe_fast.model/1"}',
        '{"format": "pbe_fast.model/99", "model": {}}',
        '{"format": "pbe_fast.model/1", "model": {"arch": "small_cnn"}}',
    ],
)
def test_damaged_config(model: nn.Module, tmp_path: Path, text: str) -> None:
    save_model(model, SPEC, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"got .*accepted"):
        load_model(tmp_path)


def test_a_model_without_a_name_asks_for_one(tmp_path: Path) -> None:
    save_model(nn.Linear(2, 2), ModelSpec("unknown", 2, 1), tmp_path)
    with pytest.raises(InputError, match="without its architecture's name"):
        load_model(tmp_path)


def test_a_config_cannot_make_us_import_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, witness = f"payload_{tmp_path.name}", tmp_path / "it_ran"
    (tmp_path / f"{name}.py").write_text(
        f"from torch import nn\nopen({str(witness)!r}, 'w').close()\n"
        "def net(num_classes): return nn.Linear(2, num_classes)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "model"
    save_model(nn.Linear(2, 3), ModelSpec("unknown", 3, 1), folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["arch"] = f"{name}:net"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsafeFileError, match=f"{name}:net"):
        load_model(folder)
    assert not witness.exists()
    loaded, _ = load_model(folder, arch=f"{name}:net")
    assert loaded.weight.shape == (3, 2)
    assert witness.exists()


def test_user_wrapper_with_our_names_is_not_wrapped_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = wrapped(tmp_path, monkeypatch, "net(num_classes)", "SmallCNN(num_classes), [0.5], [0.5]")
    model = build_model(arch, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert_same_state(load_model(tmp_path / "w.pt", arch=arch)[0], model)
