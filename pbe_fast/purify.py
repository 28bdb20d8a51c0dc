"""Algorithm 1: Progressive Backdoor Erasing, with a clean set or without."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pbe_fast.attraction import attack_shares, attracting_labels
from pbe_fast.config import PurifyConfig
from pbe_fast.data import ImageSet, as_train_and_clean
from pbe_fast.engine.copies import frozen_copy, restored
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.precision import resolve_device, resolve_precision
from pbe_fast.engine.seeding import seeded
from pbe_fast.extra_set import initial_extra_set, next_extra_set
from pbe_fast.finetune import FineTuner, steps_per_epoch
from pbe_fast.models import check_model
from pbe_fast.ranking import Ranking, poisoned_share, rank_images
from pbe_fast.result import PurifyResult


def purify(
    model: nn.Module,
    train_data: Any = None,
    *,
    clean_data: Any = None,
    config: PurifyConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    progress: bool = True,
) -> PurifyResult:
    """Erase the backdoor that ``model`` may carry.

    Without ``clean_data``, all rounds of Algorithm 1 on the training set. With it, steps 1 and 2 once, on the clean
    images; the training set, where given, is then ranked once.

    Args:
        model: Any module that returns (B, K) logits for float images (B, C, H, W) in [0, 1]; pixel normalisation
            belongs inside (`pbe_fast.Normalized`). It is not changed.
        train_data: What the model was trained on: an `ImageSet`, a pair (images, labels), a torch Dataset, or a path;
            see `as_image_set`.
        clean_data: A few trusted images in any of these forms.
        config: The algorithm's options.
        seed: Fixes every random choice.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: "auto", "fp32" or "bf16".
        progress: Whether steps longer than two seconds show a bar, on stderr.

    Returns:
        The purified model, the ranking of the training set, and the history of the rounds.

    Raises:
        InputError: Data or a model that cannot be used, before any work starts.
    """
    config = config or PurifyConfig()
    where = resolve_device(device)
    train, clean = as_train_and_clean(train_data, clean_data, progress=progress)
    data = clean if clean is not None else train
    assert data is not None
    check_model(model, data.image_shape, data.num_classes)
    run = _Run(model, config, seed=seed, device=where, precision=precision, progress=progress)

    with seeded(seed, where):
        if clean is not None:
            return run.with_clean_set(clean.to(where), train.to(where) if train is not None else None)
        assert train is not None
        return run.without_clean_set(train.to(where))


class _Run:
    """One run of Algorithm 1; ``model`` is theta^t, ``infected`` stays theta'."""

    def __init__(
        self, model: nn.Module, config: PurifyConfig, *, seed: int, device: torch.device, precision: str, progress: bool
    ) -> None:
        self.config = config
        self.seed = seed
        self.dtype = resolve_precision(device, precision)
        self.progress = progress
        self.device = device
        self.infected = frozen_copy(model, device)
        self.model = copy.deepcopy(self.infected).requires_grad_(True)
        self.original = model
        self.generator = torch.Generator().manual_seed(seed)
        self.history: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}

    def with_clean_set(self, clean: ImageSet, train: ImageSet | None) -> PurifyResult:
        """Steps 1 and 2, once; then, for the record, step 3."""
        entry = self._purify_model(clean, round_index=0, teacher=self.infected)
        ranking = None
        if train is not None:
            ranking, _ = self._rank(train, self._logits(self.infected, train, "infected logits"))
            entry.update(_truth(ranking, None, train))
        self.history.append(entry)
        return self._result(ranking, train)

    def without_clean_set(self, train: ImageSet) -> PurifyResult:
        """Algorithm 1, line by line."""
        infected_logits = self._logits(self.infected, train, "infected logits")
        # Initialisation: D_ext^0
        attracting = self._attracting_labels(train)
        chosen = initial_extra_set(infected_logits, train.labels, attracting, self.config, self.generator)
        ranking: Ranking | None = None
        for t in range(len(self.config.fractions)):
            extra = train.select(chosen, name=f"extra set {t}")
            # Steps 1 and 2: theta^t becomes theta^(t+1)
            # Without images of the target label nothing in D_ext^0 can teach the trigger: the infected model may
            # teach what it knows of the labels left out.
            teacher = self.infected if t == 0 and attracting.any() else None
            entry = self._purify_model(extra, round_index=t, teacher=teacher)
            entry["attracting_labels"] = attracting.nonzero()[:, 0].tolist()
            # Step 3: the next extra set
            ranking, agrees = self._rank(train, infected_logits)
            entry.update(_truth(ranking, chosen, train))
            self.history.append(entry)
            if t + 1 < len(self.config.fractions):
                fraction = self.config.fractions[t + 1]
                chosen = next_extra_set(ranking, train.labels, attracting, fraction, agrees=agrees)
        return self._result(ranking, train)

    def _attracting_labels(self, train: ImageSet) -> Tensor:
        if self.config.initial == "random":
            return torch.zeros(train.num_classes, dtype=torch.bool)
        with self._phase("attracting labels"):
            return attracting_labels(
                attack_shares(self.infected, train, self.config.pgd, generator=self.generator, dtype=self.dtype)
            )

    def _purify_model(self, extra: ImageSet, *, round_index: int, teacher: nn.Module | None = None) -> dict[str, Any]:
        """Steps 1 and 2; with a ``teacher`` only on trusted images: what it says of a poisoned one is the backdoor."""
        config = self.config
        clean_steps = max(
            config.clean_steps, config.clean_epochs * steps_per_epoch(len(extra), config.finetune.batch_size)
        )
        tuner = FineTuner(
            self.model,
            config.finetune,
            total_steps=config.adversarial_steps + clean_steps,
            generator=self.generator,
            dtype=self.dtype,
            teacher=teacher,
            show_progress=self.progress,
        )
        start = time.perf_counter()
        # Steps 1a and 1b, batch by batch: adversarial images of the current model, and an update on them (Eq. 8)
        with self._phase("adversarial"):
            adversarial_loss = tuner.run(
                extra, steps=config.adversarial_steps, attack=config.pgd, desc=f"round {round_index}: adversarial"
            )
        # Step 2: the extra set as it is
        with self._phase("clean"):
            clean_loss = tuner.run(extra, steps=clean_steps, desc=f"round {round_index}: clean")
        self.model.eval()
        return {
            "round": round_index,
            "extra_set_size": len(extra),
            "adversarial_loss": adversarial_loss,
            "clean_loss": clean_loss,
            "seconds": time.perf_counter() - start,
        }

    def _rank(self, train: ImageSet, infected_logits: Tensor) -> tuple[Ranking, Tensor]:
        """The ranking, and where the purified model agrees with the label."""
        with self._phase("ranking"):
            purified_logits = self._logits(self.model, train, "ranking")
            return rank_images(infected_logits, purified_logits), purified_logits.argmax(1) == train.labels

    def _logits(self, model: nn.Module, data: ImageSet, desc: str) -> Tensor:
        return predict_logits(model, data.images, dtype=self.dtype, desc=desc, show_progress=self.progress)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _result(self, ranking: Ranking | None, train: ImageSet | None) -> PurifyResult:
        return PurifyResult(
            model=restored(self.model, self.original),
            ranking=ranking,
            history=self.history,
            config=self.config,
            seed=self.seed,
            seconds=self.seconds,
            precision=str(self.dtype).removeprefix("torch."),
            train_data=train,
        )


def _truth(ranking: Ranking, chosen: Tensor | None, train: ImageSet) -> dict[str, Any]:
    """What can be said of a ranking where it is known which images are poisoned."""
    if train.poison_mask is None or not 0 < int(train.poison_mask.sum()) < len(train):
        return {}
    known: dict[str, Any] = {
        "ap_of_poisoned": ranking.ap_of_poisoned(train.poison_mask),
        "ap_of_clean": ranking.ap_of_clean(train.poison_mask),
    }
    if chosen is not None:
        known["extra_set_poison_rate"] = poisoned_share(chosen, train.poison_mask)
    return known
