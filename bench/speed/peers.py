"""PGD as others compute it: a plain loop, torchattacks, Foolbox and the Adversarial Robustness Toolbox.

Each is a function of (images, labels) that returns adversarial images, on a model as it is or on a `Strengthened` one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from cases import compiled
from torch import Tensor, nn
from torch.nn import functional as F

Attack = Callable[[Tensor, Tensor], Tensor]

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 10


class Strengthened(nn.Module):
    """A model as a user in a hurry would prepare it: frozen, channels_last, 16-bit products, compiled if wanted."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, compile: bool = True) -> None:
        super().__init__()
        self.net = copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)
        self._dtype = dtype
        self._fast = compiled(self._logits) if compile else self._logits
        # The wrapper, too: torchattacks puts what it found in train mode back there, batch normalisation and all.
        self.eval()

    def _logits(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            return self.net(images).float()

    def forward(self, images: Tensor) -> Tensor:
        """Logits; the images' layout is made the same for all, so that they share what was compiled."""
        return self._fast(images.contiguous(memory_format=torch.channels_last))


def plain_loop(model: nn.Module, *, steps: int = STEPS) -> Attack:
    """Eq. 5 and 6 as they stand."""

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        adversarial = images.clone()
        for _ in range(steps):
            adversarial.requires_grad_()
            loss = F.cross_entropy(model(adversarial), labels)
            (gradient,) = torch.autograd.grad(loss, adversarial)
            moved = adversarial.detach() + ALPHA * gradient.sign()
            adversarial = (images + (moved - images).clamp(-EPS, EPS)).clamp(0, 1)
        return adversarial

    return attack


def with_torchattacks(model: nn.Module) -> Attack:
    """torchattacks.PGD."""
    import torchattacks

    attack: Attack = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=False)
    return attack


def with_foolbox(model: nn.Module) -> Attack:
    """foolbox.attacks.LinfPGD."""
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=next(model.parameters()).device)
    pgd = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=STEPS, random_start=False)

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = pgd.run(wrapped, images, labels, epsilon=EPS)
        return found

    return attack


def with_art(model: nn.Module) -> Attack:
    """art.attacks.evasion.ProjectedGradientDescent, which takes and returns NumPy arrays."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    device = next(model.parameters()).device
    pgds: dict[tuple[int, ...], ProjectedGradientDescentPyTorch] = {}

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if shape not in pgds:
            classifier = PyTorchClassifier(
                model,
                loss=nn.CrossEntropyLoss(),
                input_shape=shape[1:],
                nb_classes=10,
                clip_values=(0, 1),
                device_type="gpu" if device.type == "cuda" else "cpu",
            )
            pgds[shape] = ProjectedGradientDescentPyTorch(
                classifier, eps=EPS, eps_step=ALPHA, max_iter=STEPS, batch_size=shape[0], verbose=False
            )
        found = pgds[shape].generate(x=images.cpu().numpy(), y=labels.cpu().numpy())
        return torch.from_numpy(found).to(device)

    return attack


PEERS: dict[str, Callable[[nn.Module], Attack]] = {
    "plain loop": plain_loop,
    "torchattacks": with_torchattacks,
    "foolbox": with_foolbox,
    "ART": with_art,
}
