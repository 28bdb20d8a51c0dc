from __future__ import annotations

import pytest
from attacked import smooth_network, some_images, some_labels
from torch import Tensor, nn


@pytest.fixture
def model() -> nn.Module:
    return smooth_network()


@pytest.fixture
def images() -> Tensor:
    return some_images()


@pytest.fixture
def labels() -> Tensor:
    return some_labels()
