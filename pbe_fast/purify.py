"""Algorithm 1: Progressive Backdoor Erasing, with a clean set or without."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pbe_fast.attraction import attack_counts, attracting_labels
from pbe_fast.config import PurifyConfig
from pbe_fast.data import ImageSet, as_train_and_clean
from pbe_fast.engine.allocator import kept_heap
from pbe_fast.engine.copies import frozen_copy, restored
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.gradients import gradients
from pbe_fast.engine.precision import resolve_device, resolve_precision
from pbe_fast.engine.profile import Profile
from pbe_fast.engine.seeding import check_seed, seeded
from pbe_fast.engine.streaming import fits
from pbe_fast.extra_set import initial_extra_set, next_extra_set
from pbe_fast.finetune import FineTuner, steps_per_epoch
from pbe_fast.mirroring import resolve_augment
from pbe_fast.models import check_batch, check_model, check_trainable
from pbe_fast.options import check_kind
from pbe_fast.ranking import Ranking, poisoned_share, rank_images
from pbe_fast.result import PurifyResult
from pbe_fast.steadiness import fragility

# Told after each round: its number, the model as it then is, and its ranking (None where nothing is ranked).
OnRound = Callable[[int, nn.Module, Ranking | None], object]
_ROUND_PHASES = ("adversarial", "clean", "ranking")


@gradients()
def purify(
    model: nn.Module,
    train_data: Any = None,
    *,
    clean_data: Any = None,
    config: PurifyConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    device_memory_limit: int | None = None,
    profile: bool = False,
    on_round: OnRound | None = None,
    progress: bool = True,
) -> PurifyResult:
    """Erase the backdoor that ``model`` may carry.

    Without ``clean_data``, all rounds of Algorithm 1 on the training set. With it, steps 1 and 2 once, on the clean
    images; the training set, where given, is then ranked once.

    Args:
        model: Any module that returns (B, K) logits for float images (B, C, H, W) in [0, 1]; pixel normalisation
            belongs inside (`pbe_fast.Normalized`). It is not changed. All parameters of the copy are trained, those
            with ``requires_grad=False`` too: a backdoor does not keep to the layers that its user would train. The
            purified model has ``requires_grad`` as it was.
        train_data: What the model was trained on: an `ImageSet`, a pair (images, labels), a torch Dataset, or a path;
            see `as_image_set`.
        clean_data: A few trusted images in any of these forms.
        config: The algorithm's options.
        seed: Fixes every random choice.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: "auto", "fp32" or "bf16".
        device_memory_limit: Bytes that the images of a set may take on the device. A larger set stays where it is, in
            memory or in a memory-mapped file, and its batches are sent ahead of their use; the result is the same. By
            default half of a GPU's free memory.
        profile: Whether to measure where the time goes: ``result.profile``.
        on_round: Called after each round with its number (from 0), a copy of the model in eval mode on the device, and
            the ranking of the training set (None without one): to measure how the purification goes. What it returns
            is not looked at, and nothing that it does to the copy or draws at random changes the result.
        progress: Whether steps longer than two seconds show a bar, on stderr.

    Returns:
        The purified model, the ranking of the training set, and the history of the rounds.

    Raises:
        InputError: Data or a model that cannot be used, before any work starts.
    """
    config = PurifyConfig() if config is None else config
    check_kind(config, PurifyConfig)
    seed = check_seed(seed)
    where = resolve_device(device)
    train, clean = as_train_and_clean(train_data, clean_data, progress=progress)
    data = clean if clean is not None else train
    assert data is not None
    check_model(model, data.image_shape, data.num_classes)
    check_trainable(model)
    smallest = len(data) if clean is not None else round(min(config.fractions) * len(data))
    check_batch(model, smallest, "clean images" if clean is not None else "images that the smallest fraction makes")
    run = _Run(
        model, config, data, seed=seed, device=where, precision=precision, limit=device_memory_limit, progress=progress
    )
    if profile:
        run.profile = Profile(run.infected, data.image_shape, device=where, dtype=run.dtype)
    run.on_round = on_round

    with seeded(seed, where), kept_heap(), run.profile.running() if run.profile else nullcontext():
        if clean is not None:
            return run.with_clean_set(run.placed(clean), run.placed(train) if train is not None else None)
        assert train is not None
        return run.without_clean_set(run.placed(train))


class _Run:
    """One run of Algorithm 1; ``model`` is theta^t, ``infected`` stays theta'."""

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
        self.dtype = resolve_precision(device, precision)
        self.progress = progress
        self.device = device
        self.limit = limit
        self.infected = frozen_copy(model, device)
        self.model = copy.deepcopy(self.infected).requires_grad_(True)
        self.original = model
        self.generator = torch.Generator().manual_seed(seed)
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
        self.history: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.round_seconds: dict[str, float] = {}
        self.profile: Profile | None = None
        self.on_round: OnRound | None = None
        # One for all rounds, each of which restarts it: what it records for a GPU serves them all.
        self.tuner = FineTuner(
            self.model,
            finetune,
            total_steps=1,
            generator=self.generator,
            dtype=self.dtype,
            show_progress=progress,
        )

    def with_clean_set(self, clean: ImageSet, train: ImageSet | None) -> PurifyResult:
        """Steps 1 and 2, once; then, for the record, step 3."""
        entry = self._purify_model(clean, round_index=0, teacher=self.infected)
        ranking = None
        if train is not None:
            ranking, _ = self._rank(train, self._infected_logits(train))
            entry.update(_truth(ranking, None, train))
        self.history.append(entry)
        self._report_round(0, ranking)
        return self._result(ranking, train)

    def without_clean_set(self, train: ImageSet) -> PurifyResult:
        """Algorithm 1, line by line."""
        infected_logits = self._infected_logits(train)
        # Initialisation: D_ext^0
        attracting = self._attracting_labels(train)
        fragile = self._fragility(train, infected_logits, attracting)
        steady = None if fragile is None else fragile < 1 - self.config.fragile_share
        chosen = initial_extra_set(
            infected_logits, train.labels, attracting, self.config, self.generator, fragility=fragile
        )
        ranking: Ranking | None = None
        for t in range(len(self.config.fractions)):
            # Steps 1 and 2: theta^t becomes theta^(t+1)
            # Without images of the target label nothing in D_ext^0 can teach the trigger: the infected model may
            # teach what it knows of the labels left out.
            teacher = self.infected if t == 0 and attracting.any() else None
            entry = self._purify_model(train, chosen, round_index=t, teacher=teacher)
            entry["attracting_labels"] = attracting.nonzero()[:, 0].tolist()
            # Step 3: the next extra set
            ranking, agrees = self._rank(train, infected_logits)
            entry.update(_truth(ranking, chosen, train))
            self.history.append(entry)
            self._report_round(t, ranking)
            if t + 1 < len(self.config.fractions):
                fraction = self.config.fractions[t + 1]
                chosen = next_extra_set(ranking, train.labels, attracting, fraction, agrees=agrees, steady=steady)
        return self._result(ranking, train)

    def _report_round(self, t: int, ranking: Ranking | None) -> None:
        if self.on_round is not None:
            # Neither the model that goes on nor the random numbers that are still to be drawn are within its reach.
            with seeded(self.seed, self.device):
                self.on_round(t, frozen_copy(self.model, self.device), ranking)

    def _attracting_labels(self, train: ImageSet) -> Tensor:
        if self.config.initial == "random":
            return torch.zeros(train.num_classes, dtype=torch.bool)
        with self._phase("attracting labels"):
            return attracting_labels(
                attack_counts(
                    self.infected,
                    train,
                    self.config.pgd,
                    patches=self.config.patch_attacks,
                    generator=self.generator,
                    dtype=self.dtype,
                    show_progress=self.progress,
                )
            )

    def _fragility(self, train: ImageSet, infected_logits: Tensor, attracting: Tensor) -> Tensor | None:
        """How little each label withstands, where no attracting label tells what to leave out."""
        if self.config.initial != "steady" or attracting.any():
            return None
        with self._phase("steady images"):
            return fragility(self.infected, train, infected_logits, dtype=self.dtype, show_progress=self.progress)

    def _purify_model(
        self, data: ImageSet, chosen: Tensor | None = None, *, round_index: int, teacher: nn.Module | None = None
    ) -> dict[str, Any]:
        """Steps 1 and 2 on the extra set: the images of ``data`` that are ``chosen``, or all.

        With a ``teacher`` only on trusted images: what it says of a poisoned one is the backdoor.
        """
        config = self.config
        size = len(data) if chosen is None else len(chosen)
        clean_steps = max(config.clean_steps, config.clean_epochs * steps_per_epoch(size, config.finetune.batch_size))
        self.tuner.restart(total_steps=config.adversarial_steps + clean_steps, teacher=teacher)
        streamed = self._streamed(data)
        self.round_seconds = {}
        # Steps 1a and 1b, batch by batch: adversarial images of the current model, and an update on them (Eq. 8)
        with self._phase("adversarial"):
            adversarial_loss = self.tuner.run(
                data,
                among=chosen,
                steps=config.adversarial_steps,
                attack=config.attacks,
                streamed=streamed,
                desc=f"round {round_index}: adversarial",
            )
        # Step 2: the extra set as it is
        with self._phase("clean"):
            clean_loss = self.tuner.run(
                data, among=chosen, steps=clean_steps, streamed=streamed, desc=f"round {round_index}: clean"
            )
        self.model.eval()
        return {
            "round": round_index,
            "extra_set_size": size,
            "adversarial_loss": adversarial_loss,
            "clean_loss": clean_loss,
            # The ranking that follows adds its own.
            "seconds": self.round_seconds,
        }

    def _rank(self, train: ImageSet, infected_logits: Tensor) -> tuple[Ranking, Tensor]:
        """The ranking, and where the purified model agrees with the label."""
        with self._phase("ranking"):
            purified_logits = self._logits(self.model, train, "ranking")
            return rank_images(infected_logits, purified_logits), purified_logits.argmax(1) == train.labels

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
            profile=self.profile,
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
