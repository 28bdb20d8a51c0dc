"""The networks of the package, exported and verified."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pbe_fast.data import ImageSet
from pbe_fast.export import export_onnx, verify_onnx
from pbe_fast.models import build_model

NETWORKS = [
    ("preact_resnet18", 16, (3, 32, 32), 10),
    ("small_cnn", None, (1, 8, 8), 10),
    ("torchvision:resnet18", None, (3, 64, 64), 43),
]


@pytest.mark.parametrize(("arch", "width", "shape", "num_classes"), NETWORKS, ids=[n[0] for n in NETWORKS])
def test_export_and_verify(arch, width, shape, num_classes, tmp_path):
    torch.manual_seed(0)
    channels = shape[0]
    model = build_model(
        arch, num_classes=num_classes, in_channels=channels, width=width, mean=[0.5] * channels, std=[0.25] * channels
    )
    # Statistics as training leaves them, so that batch norm does something.
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.rand(8, *shape))
    path = export_onnx(model, tmp_path / "model.onnx", image_shape=shape)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (11, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, num_classes, (11,), generator=generator)
    names = tuple(str(k) for k in range(num_classes))
    report = verify_onnx(path, model, ImageSet(images, labels, names), batch_size=np.int64(4), progress=False)
    assert report.ok, report.problems
    assert report.max_abs_diff <= 1e-4
    assert report.argmax_agreement == 1.0
