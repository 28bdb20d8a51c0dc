"""The trigger search of Neural Cleanse: for every label the smallest mask and a pattern that lead all images to it.

The labels are independent of each other, so their masks and patterns are optimised side by side, in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pbe_fast.baselines import NeuralCleanseConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine.folding import FrozenCopy
from pbe_fast.engine.forward import to_input
from pbe_fast.engine.progress import progress as progress_bar
from pbe_fast.finetune import endless_batches

# Pixels of one forward pass: 2,048 images at 32 x 32. What does not fit beside is searched afterwards.
_MAX_PIXELS = 2**21
_ADAM_BETAS = (0.5, 0.9)
# Rounds without progress that end a label's search, in units of `patience`.
_STOP_AFTER = 5


@dataclass(frozen=True, eq=False)
class Triggers:
    """What was found for each label.

    Attributes:
        masks: (K, 1, H, W) float32 in [0, 1] on the CPU.
        patterns: (K, C, H, W) likewise.
        reached: (K,) bool, whether the trigger led enough images to its label.
        rounds: Rounds of each label's search.
    """

    masks: Tensor
    patterns: Tensor
    reached: Tensor
    rounds: list[int]

    def norms(self) -> Tensor:
        """L1 norms of the masks, (K,) float64; where no mask was good enough the whole picture counts."""
        whole = float(self.masks[0].numel())
        return torch.where(self.reached, self.masks.double().sum((1, 2, 3)), whole)

    def stamp(self, images: Tensor, label: int) -> Tensor:
        """Float images in [0, 1] with the trigger of one label on them."""
        mask, pattern = (t[label].to(images.device) for t in (self.masks, self.patterns))
        return (1 - mask) * images + mask * pattern

    def picture(self, label: int) -> Tensor:
        """The pattern where the mask is, on black: (C, H, W) uint8."""
        return (self.masks[label] * self.patterns[label] * 255).round().to(torch.uint8)


class CostSchedule:
    """The weight of a mask's size, by how well its trigger does: one label's, moved once a round.

    It is zero until a trigger has succeeded ``patience`` rounds in a row. From then on it rises after as many successes
    in a row, and falls after as many failures.

    Attributes:
        cost: The weight.
        best: Norm of the smallest mask that succeeded, infinite before that.
        done: Whether the weight has risen and fallen, and no smaller mask was found for long.
    """

    def __init__(self, config: NeuralCleanseConfig) -> None:
        self._config = config
        self.cost = 0.0
        self.best = math.inf
        self.done = False
        self._successes = self._failures = self._stalled = 0
        self._has_risen = self._has_fallen = False

    def update(self, success: float, norm: float) -> bool:
        """After a round: its mean success rate and mask norm. True if its mask is the best so far."""
        config = self._config
        succeeded = success >= config.trigger_success
        improved = succeeded and norm < self.best
        if improved:
            self.best, self._stalled = norm, 0
        elif self.best < math.inf:
            self._stalled += 1
        self._successes = self._successes + 1 if succeeded else 0
        self._failures = 0 if succeeded else self._failures + 1
        if self._successes >= config.patience:
            self._successes = 0
            if self.cost == 0:
                self.cost = config.cost
            else:
                self.cost *= config.cost_up
                self._has_risen = True
        elif self._failures >= config.patience and self.cost > 0:
            self._failures = 0
            self.cost /= config.cost_down
            self._has_fallen = True
        self.done = self._has_risen and self._has_fallen and self._stalled >= _STOP_AFTER * config.patience
        return improved


def search_triggers(
    model: nn.Module,
    data: ImageSet,
    config: NeuralCleanseConfig,
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Triggers:
    """A trigger for every label of ``data``.

    Args:
        model: On the device of ``data``; a frozen copy of it is searched.
        data: Clean images.
        config: Of the search.
        generator: On the CPU: starting points and batches.
        dtype: Of the matrix products.
        progress: Whether to show a bar.
    """
    network = FrozenCopy(model, dtype=dtype, image_shape=data.image_shape)
    channels, height, width = data.image_shape
    batch = min(config.trigger_batch, len(data))
    side_by_side = max(1, _MAX_PIXELS // (batch * height * width))
    groups = torch.arange(data.num_classes).split(side_by_side)
    # Uniform in mask and pattern; tanh of what is optimised keeps both in [0, 1].
    start = torch.rand(data.num_classes, 1 + channels, height, width, dtype=torch.float32, generator=generator)
    start = torch.atanh((start * 2 - 1) * (1 - 1e-4)).to(data.device)
    total = config.trigger_rounds * len(groups)
    with progress_bar(range(total), desc="trigger search", enabled=progress) as bar:
        found = [
            _search_group(network, data, labels, start[labels], config, generator, lambda: bar.update(1))
            for labels in groups
        ]
    return Triggers(
        torch.cat([f.masks for f in found]),
        torch.cat([f.patterns for f in found]),
        torch.cat([f.reached for f in found]),
        [rounds for f in found for rounds in f.rounds],
    )


def _search_group(
    network: FrozenCopy,
    data: ImageSet,
    labels: Tensor,
    raw: Tensor,
    config: NeuralCleanseConfig,
    generator: torch.Generator,
    after_round: Callable[[], object],
) -> Triggers:
    """The search for these labels, side by side; ``raw`` is (L, 1 + C, H, W), masks in front, before the tanh."""
    raw = raw.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([raw], lr=config.trigger_lr, betas=_ADAM_BETAS, fused=True)
    schedules = [CostSchedule(config) for _ in labels]
    rounds = [0] * len(labels)
    best = raw.detach().clone()
    batches = endless_batches(len(data), config.trigger_batch, generator, device=data.device)
    labels = labels.to(data.device)
    for _ in range(config.trigger_rounds):
        # Those that are done leave the batch.
        active = [i for i, schedule in enumerate(schedules) if not schedule.done]
        if not active:
            break
        where = torch.tensor(active, device=data.device)
        cost = torch.tensor([schedules[i].cost for i in active], dtype=torch.float32, device=data.device)
        figures = torch.zeros(2, len(active), dtype=torch.float32, device=data.device)
        for _ in range(config.updates_per_round):
            images = to_input(data.images[next(batches)])
            masks, patterns = _unit(raw[where])
            logits = _stamped_logits(network, images, masks, patterns)
            targets = labels[where][:, None].expand(logits.shape[:2])
            entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
            sizes = masks.sum((1, 2, 3))
            # The labels' losses share no variable: the gradient of the sum is that of each.
            (raw.grad,) = torch.autograd.grad((entropy.mean(1) + cost * sizes).sum(), raw)
            optimizer.step()
            figures += torch.stack([(logits.argmax(2) == targets).float().mean(1), sizes.detach()])
        # Once a round the figures come to the CPU, all labels' at a time.
        for i, success, norm in zip(active, *(figures / config.updates_per_round).tolist(), strict=True):
            rounds[i] += 1
            # The latest will do until one has succeeded.
            if schedules[i].update(success, norm) or schedules[i].best == math.inf:
                best[i] = raw.detach()[i]
        after_round()
    masks, patterns = (t.cpu() for t in _unit(best))
    return Triggers(masks, patterns, torch.tensor([s.best < math.inf for s in schedules]), rounds)


def _unit(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (L, 1, H, W) and patterns (L, C, H, W) in [0, 1]."""
    both = torch.tanh(raw) / 2 + 0.5
    return both[:, :1], both[:, 1:]


def _stamped_logits(network: FrozenCopy, images: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    """(L, B, K) float32: every image with every label's trigger on it."""
    kept, added = (1 - masks)[:, None], (masks * patterns)[:, None]
    stamped = (kept * images + added).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    logits: Tensor = network(stamped)
    return logits.float().view(len(masks), len(images), -1)
