"""Making, naming, measuring and comparing the models of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pbe_fast.data import ImageSet
from pbe_fast.metrics import evaluate
from pbe_fast.models import ModelSpec, Normalized, SmallCNN, save_model
from pbe_fast.ranking import rank_images
from pbe_fast.runs import measure, name_models, networks, new_model, rank_with
from pbe_fast.runs.networks import channel_statistics


def make_set(n: int = 40, channels: int = 3) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(n) % 4)


def test_channel_statistics_are_those_of_the_floats() -> None:
    data = make_set()
    mean, std = channel_statistics(data)
    pixels = data.floats().double().transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-4)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-4)
    black = ImageSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    assert channel_statistics(black) == ((0.0,), (1.0,))


def test_a_new_model_is_fixed_by_its_seed() -> None:
    data = make_set()
    (first, spec), (second, _), (other, _) = (new_model("small_cnn", data, width=4, seed=s) for s in (1, 1, 2))
    assert isinstance(first, Normalized)
    assert spec.image_shape == data.image_shape and spec.num_classes == 4 and spec.width == 4
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    bare, spec = new_model("small_cnn", data, normalize=False)
    assert isinstance(bare, SmallCNN) and spec.mean is None


def test_names_of_models(tmp_path: Path) -> None:
    spec = ModelSpec("small_cnn", 4, 3, width=4)
    for folder, role in (("a", "infected"), ("b", "purified"), ("c", "purified"), ("d", None)):
        save_model(SmallCNN(4, 3, 4), spec, tmp_path / folder, extra={"role": role} if role else None)
    weights = tmp_path / "net.safetensors"
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c", tmp_path / "d", weights, weights]
    assert list(name_models(paths)) == ["infected", "purified", "c", "d", "net", "net_"]


def test_measure_is_evaluate_and_nothing_without_a_test_set() -> None:
    data = make_set()
    model = SmallCNN(4, 3, 4)
    model.train()
    assert measure(model, data, device="cpu", progress=False) == evaluate(model, data).to_dict()
    assert model.training
    assert set(measure(model, None).values()) == {None}


def test_rank_with_two_models() -> None:
    data = make_set()
    models = [new_model("small_cnn", data, width=4, seed=s)[0].eval() for s in (0, 1)]
    ranking = rank_with(*models, data, device="cpu", precision="fp32", progress=False)
    with torch.no_grad():
        expected = rank_images(*(model(data.floats()) for model in models))
    torch.testing.assert_close(ranking.distance, expected.distance, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("too_large", "place"), [(False, "meta"), (True, "cpu")])
def test_rank_with_sends_what_is_too_large_batch_by_batch(
    monkeypatch: pytest.MonkeyPatch, too_large: bool, place: str
) -> None:
    # A device without memory stands for one with too little.
    data, seen = make_set(), []

    def predict(model: torch.nn.Module, images: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append((next(model.parameters()).device.type, images.device.type))
        return torch.randn(len(images), 4)

    monkeypatch.setattr(networks, "resolve_device", torch.device)
    monkeypatch.setattr(networks, "precision_for", lambda *arguments, **options: torch.float32)
    monkeypatch.setattr(networks, "predict_logits", predict)
    monkeypatch.setattr(networks, "fits", lambda images, device: not too_large)
    models = [new_model("small_cnn", data, width=4, seed=s)[0].eval() for s in (0, 1)]
    assert len(rank_with(*models, data, device="meta", progress=False).order) == 40
    assert seen == [("meta", place)] * 2
