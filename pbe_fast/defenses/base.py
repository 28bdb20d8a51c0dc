"""What every baseline does around its own idea: look at the data, work on a copy, rank, give back."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from pbe_fast.baselines import BASELINES, BaselineConfig
from pbe_fast.config import FineTuneConfig
from pbe_fast.data import ImageSet, as_train_and_clean, require_classes, split
from pbe_fast.engine.copies import frozen_copy, restored
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.gradients import gradients
from pbe_fast.engine.precision import resolve_device
from pbe_fast.engine.rounding import precision_for
from pbe_fast.engine.seeding import check_seed, generator_for, seeded
from pbe_fast.errors import InputError
from pbe_fast.finetune import FineTuner, steps_per_epoch
from pbe_fast.mirroring import resolve_augment
from pbe_fast.models import check_batch, check_model, check_trainable
from pbe_fast.options import check_kind
from pbe_fast.ranking import Ranking, rank_images
from pbe_fast.result import PurifyResult

C = TypeVar("C", bound=BaselineConfig)


class Work:
    """A run of one defence: ``model`` is changed in place, ``infected`` stays as it was given.

    Args:
        model: The user's; copied.
        clean: The trusted images, all that a defence may look at; on ``device``.
        seed: Fixes every random choice.
        device: Where to compute.
        precision: As for `resolve_precision`.
        progress: Whether to show bars.
    """

    def __init__(
        self, model: nn.Module, clean: ImageSet, *, seed: int, device: torch.device, precision: str, progress: bool
    ) -> None:
        self.infected = frozen_copy(model, device, clean.image_shape)
        self.model = copy.deepcopy(self.infected).requires_grad_(True)
        self.clean = clean
        self.seed = seed
        self.dtype = precision_for(model, clean.image_shape, device=device, requested=precision)
        self.progress = progress
        self.generator = generator_for(seed, "defense")
        self.history: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.pictures: dict[str, Tensor] = {}
        self._configs: dict[FineTuneConfig, FineTuneConfig] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """An entry of the history, to be filled in; it also gets the block's seconds."""
        entry: dict[str, Any] = {"step": name}
        start = time.perf_counter()
        yield entry
        self.seconds[name] = entry["seconds"] = time.perf_counter() - start
        self.history.append(entry)

    def fine_tune(
        self,
        data: ImageSet,
        config: FineTuneConfig,
        *,
        epochs: int,
        min_updates: int,
        name: str = "fine-tuning",
        model: nn.Module | None = None,
        tuner: type[FineTuner] = FineTuner,
        **options: Any,
    ) -> None:
        """A step of the history: ``epochs`` passes over ``data`` and at least ``min_updates`` updates of ``model``."""
        config = self._settled(config)
        updates = max(min_updates, epochs * steps_per_epoch(len(data), config.batch_size))
        with self.step(name) as entry:
            run = tuner(
                self.model if model is None else model,
                config,
                total_steps=updates,
                generator=self.generator,
                dtype=self.dtype,
                show_progress=self.progress,
                **options,
            )
            loss = run.run(data, steps=updates, desc=name)
            entry |= {"images": len(data), "updates": updates, "augment": config.augment, "loss": loss}

    def _settled(self, config: FineTuneConfig) -> FineTuneConfig:
        """With "auto" settled, once for all steps: by the infected model, as PBE does it."""
        if config not in self._configs:
            self._configs[config] = resolve_augment(
                config,
                self.infected,
                self.clean,
                device=self.clean.device,
                generator=self.generator,
                dtype=self.dtype,
                show_progress=self.progress,
            )
        return self._configs[config]

    def hold_out(self, share: float) -> tuple[ImageSet, ImageSet]:
        """The clean set in two, class by class: to work on, and to check accuracy on.

        Raises:
            InputError: Too few images for two parts.
        """
        held_out, rest = split(self.clean, share, seed=self.seed)
        return rest, held_out

    def logits(self, model: nn.Module, data: ImageSet, desc: str = "") -> Tensor:
        """(N, K) float32."""
        return predict_logits(model, data.images, dtype=self.dtype, desc=desc, show_progress=self.progress)

    def accuracy(self, model: nn.Module, data: ImageSet) -> float:
        """In [0, 1]."""
        return accuracy_of(self.logits(model, data), data.labels)


class Defense(ABC, Generic[C]):
    """A defence that needs clean images: `pbe_fast.purify` with these as its second argument.

    Subclasses name their ``method`` and write `run`.
    """

    method: ClassVar[str]

    @gradients()
    def __call__(
        self,
        model: nn.Module,
        clean_data: Any,
        *,
        train_data: Any = None,
        config: C | None = None,
        seed: int = 0,
        device: str | torch.device = "auto",
        precision: str = "auto",
        progress: bool = True,
    ) -> PurifyResult:
        """Erase the backdoor that ``model`` may carry.

        Args:
            model: Any module that returns (B, K) logits for float images (B, C, H, W) in [0, 1]. It is not changed.
            clean_data: Trusted images: an `ImageSet`, a pair (images, labels), a torch Dataset, or a path; see
                `as_image_set`.
            train_data: What the model was trained on, in any of these forms. It is ranked by Eq. 9 for the record, and
                changes nothing else.
            config: The options of this defence.
            seed: Fixes every random choice.
            device: "auto", "cpu", "cuda", "cuda:1", ...
            precision: "auto", "fp32" or "bf16".
            progress: Whether steps longer than two seconds show a bar, on stderr.

        Returns:
            The purified model, one entry of history per step, and the ranking where there is a training set.

        Raises:
            InputError: Data or a model that this defence cannot use, before any work starts.
        """
        config = cast(C, BASELINES[self.method]) if config is None else config
        check_kind(config, type(BASELINES[self.method]))
        seed = check_seed(seed)
        where = resolve_device(device)
        if clean_data is None:
            raise InputError(f"clean_data of {self.method}", got="none", accepted="a few trusted images")
        train, clean = as_train_and_clean(train_data, clean_data, progress=progress)
        assert clean is not None
        check_model(model, clean.image_shape, clean.num_classes)
        check_trainable(model, clean.image_shape)
        check_batch(model, len(clean), "clean images")
        require_classes(clean)
        work = Work(model, clean.to(where), seed=seed, device=where, precision=precision, progress=progress)
        with seeded(seed, where):
            self.run(work, config)
            train = train.to(where) if train is not None else None
            ranking = _rank(work, train) if train is not None else None
        return PurifyResult(
            model=restored(work.model, model),
            ranking=ranking,
            history=work.history,
            config=config,
            seed=seed,
            seconds=work.seconds,
            precision=str(work.dtype).removeprefix("torch."),
            train_data=train,
            method=self.method,
            pictures=work.pictures,
        )

    @abstractmethod
    def run(self, work: Work, config: C) -> None:
        """Change ``work.model``; first refuse what cannot be done."""


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """Share of (N, K) logits whose largest is at the label."""
    return float((logits.argmax(1) == labels).double().mean())


def _rank(work: Work, train: ImageSet) -> Ranking:
    start = time.perf_counter()
    ranking = rank_images(
        work.logits(work.infected, train, "infected logits"), work.logits(work.model, train, "ranking")
    )
    work.seconds["ranking"] = time.perf_counter() - start
    return ranking
