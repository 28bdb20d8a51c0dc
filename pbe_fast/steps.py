"""The steps of Algorithm 1 on one model, each with the time that it takes."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pbe_fast.config import PurifyConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine.copies import frozen_copy, restored, without_hook
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.profile import Profile
from pbe_fast.engine.rounding import precision_for
from pbe_fast.engine.seeding import generator_for, seeded
from pbe_fast.engine.streaming import fits
from pbe_fast.finetune import FineTuner, steps_per_epoch
from pbe_fast.forgetting import forgotten_labels, warn_of_forgotten
from pbe_fast.mirroring import resolve_augment
from pbe_fast.ranking import Ranking, rank_images
from pbe_fast.result import PurifyResult

# Told after each round: its number, the model as it then is, and its ranking (None where nothing is ranked).
OnRound = Callable[[int, nn.Module, Ranking | None], object]
_ROUND_PHASES = ("adversarial", "clean", "ranking")


class Steps:
    """``model`` is theta^t, ``infected`` stays theta'. The arguments are `pbe_fast.purify`'s."""

    def __init__(
        self,
        model: nn.Module,
        config: PurifyConfig,
        data: ImageSet,
        *,
        seed: int,
        device: torch.device,
        precision: str,
        limit: int | None,
        progress: bool,
    ) -> None:
        self.seed = seed
        self.dtype = precision_for(model, data.image_shape, device=device, requested=precision)
        self.progress = progress
        self.device = device
        self.limit = limit
        self.infected = frozen_copy(model, device, data.image_shape)
        self.model = copy.deepcopy(self.infected).requires_grad_(True)
        self.original = model
        self.generator = generator_for(seed, "purify")
        finetune = resolve_augment(
            config.finetune,
            self.infected,
            data,
            device=device,
            generator=self.generator,
            dtype=self.dtype,
            show_progress=progress,
        )
        self.config = dataclasses.replace(config, finetune=finetune)
        # Step 1a's turns.
        self.attacks = self.config.attacks
        self.history: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.round_seconds: dict[str, float] = {}
        self.profile: Profile | None = None
        self.on_round: OnRound | None = None
        # As of the last round, (K,) bool.
        self.forgotten = torch.zeros(data.num_classes, dtype=torch.bool)
        # One for all rounds, each of which restarts it: what it records for a GPU serves all without a teacher.
        self.tuner = FineTuner(
            self.model,
            finetune,
            total_steps=1,
            generator=self.generator,
            dtype=self.dtype,
            show_progress=progress,
        )

    def _finish_round(self, t: int, entry: dict[str, Any], ranking: Ranking | None = None) -> None:
        self.history.append({"round": t, **entry})
        if self.on_round is not None:
            # Neither the model that goes on nor the random numbers that are still to be drawn are within its reach.
            with seeded(self.seed, self.device):
                self.on_round(t, without_hook(frozen_copy(self.model, self.device)), ranking)

    def _purify_model(
        self,
        data: ImageSet,
        chosen: Tensor | None = None,
        *,
        desc: str,
        teacher: nn.Module | None = None,
        where_right: bool = False,
        counted_as: str = "",
    ) -> dict[str, Any]:
        """Steps 1 and 2 on the extra set: the images of ``data`` that are ``chosen``, or all.

        With a ``teacher`` only on images that are trusted, or hardly ever poisoned: what it says of a poisoned one is
        the backdoor. Of images that are not trusted it is heeded ``where_right``: a trigger may be on one with its own
        label, too.
        """
        config = self.config
        size = len(data) if chosen is None else len(chosen)
        clean_steps = max(config.clean_steps, config.clean_epochs * steps_per_epoch(size, config.finetune.batch_size))
        self.tuner.restart(total_steps=config.adversarial_steps + clean_steps, teacher=teacher, where_right=where_right)
        streamed = self._streamed(data)
        self.round_seconds = {}
        # Steps 1a and 1b, batch by batch: adversarial images of the current model, and an update on them (Eq. 8)
        with self._phase(f"{counted_as}adversarial"):
            adversarial_loss = self.tuner.run(
                data,
                among=chosen,
                steps=config.adversarial_steps,
                attack=self.attacks,
                streamed=streamed,
                desc=f"{desc}: adversarial",
            )
        # Step 2: the extra set as it is
        with self._phase(f"{counted_as}clean"):
            clean_loss = self.tuner.run(data, among=chosen, steps=clean_steps, streamed=streamed, desc=f"{desc}: clean")
        self.model.eval()
        return {
            "extra_set_size": size,
            "adversarial_loss": adversarial_loss if config.adversarial_steps else None,
            "clean_loss": clean_loss if clean_steps else None,
            # The ranking that follows adds its own.
            "seconds": self.round_seconds,
        }

    def _rank(self, train: ImageSet, infected_logits: Tensor, counted_as: str = "") -> tuple[Ranking, Tensor]:
        """The ranking, and where the purified model agrees with the label."""
        with self._phase(f"{counted_as}ranking"):
            purified_logits = self._logits(self.model, train, "ranking")
            ranking = rank_images(infected_logits, purified_logits)
        agrees = purified_logits.argmax(1) == train.labels
        agreed = infected_logits.argmax(1) == train.labels
        self.forgotten = forgotten_labels(train.labels, agreed, agrees, train.num_classes)
        return ranking, agrees

    def _look_for_forgotten(self, clean: ImageSet) -> None:
        """What a ranking sees in passing, where nothing is ranked."""
        with self._phase("clean images"):
            agreed, agrees = (
                self._logits(net, clean, "clean images").argmax(1) == clean.labels
                for net in (self.infected, self.model)
            )
        self.forgotten = forgotten_labels(clean.labels, agreed, agrees, clean.num_classes)

    def _infected_logits(self, train: ImageSet) -> Tensor:
        """Once per run: theta' never changes."""
        with self._phase("infected logits"):
            return self._logits(self.infected, train, "infected logits")

    def _logits(self, model: nn.Module, data: ImageSet, desc: str) -> Tensor:
        return predict_logits(
            model,
            data.images,
            dtype=self.dtype,
            streamed=self._streamed(data),
            desc=desc,
            show_progress=self.progress,
        )

    def placed(self, data: ImageSet) -> ImageSet:
        """The set on the device, or where it is if it is too large."""
        return data.to(self.device) if fits(data.images, self.device, self.limit) else data.to("cpu")

    def _streamed(self, data: ImageSet) -> bool:
        return data.device.type == "cpu" and not fits(data.images, self.device, self.limit)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with self.profile.phase(name) if self.profile else nullcontext():
            yield
        spent = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        if name in _ROUND_PHASES:
            self.round_seconds[name] = spent

    def _result(
        self, ranking: Ranking | None, train: ImageSet | None, names: Sequence[str] | None = None
    ) -> PurifyResult:
        names = train.class_names if train is not None else names
        assert names is not None
        warn_of_forgotten(self.forgotten, names)
        return PurifyResult(
            model=restored(self.model, self.original),
            ranking=ranking,
            history=self.history,
            config=self.config,
            seed=self.seed,
            seconds=self.seconds,
            precision=str(self.dtype).removeprefix("torch."),
            train_data=train,
            profile=self.profile,
        )
