"""Algorithm 1, round by round: what `pbe_fast.purify` does once its arguments are checked."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pbe_fast.attraction import attack_counts, attracting_labels
from pbe_fast.config import PurifyConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine.copies import frozen_copy, restored
from pbe_fast.engine.forward import predict_logits
from pbe_fast.engine.precision import resolve_precision
from pbe_fast.engine.profile import Profile
from pbe_fast.engine.seeding import seeded
from pbe_fast.engine.streaming import fits
from pbe_fast.extra_set import first_of_each, initial_extra_set, judging_extra_set, next_extra_set
from pbe_fast.finetune import FineTuner, steps_per_epoch
from pbe_fast.forgetting import forgotten_labels, warn_of_forgotten
from pbe_fast.mirroring import resolve_augment
from pbe_fast.ranking import (
    FEWEST_LABELS,
    Ranking,
    changed_labels,
    label_distances,
    poisoned_share,
    rank_distances,
    rank_images,
)
from pbe_fast.result import PurifyResult
from pbe_fast.steadiness import fragility

# Told after each round: its number, the model as it then is, and its ranking (None where nothing is ranked).
OnRound = Callable[[int, nn.Module, Ranking | None], object]
_ROUND_PHASES = ("adversarial", "clean", "ranking")
# Before the name of a phase that is of no round.
_LEFT_OUT = "labels left out: "


class Run:
    """One run of Algorithm 1; ``model`` is theta^t, ``infected`` stays theta'. The arguments are `purify`'s."""

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

    def with_clean_set(self, clean: ImageSet, train: ImageSet | None) -> PurifyResult:
        """Steps 1 and 2 on the clean images; then, where there is a training set, on what of it ranks clean."""
        entry = self._purify_model(clean, teacher=self.infected, desc="round 0")
        if train is None:
            self._finish_round(0, entry)
            agreed, agrees = (
                self._logits(net, clean, "clean images").argmax(1) == clean.labels
                for net in (self.infected, self.model)
            )
            self.forgotten = forgotten_labels(clean.labels, agreed, agrees, clean.num_classes)
            return self._result(None, None, names=clean.class_names)
        infected_logits = self._infected_logits(train)
        ranking, agrees = self._rank(train, infected_logits)
        # No poisoned image has taught this model anything: what it changed most is the attacker's.
        changed = changed_labels(label_distances(ranking, train.labels, train.num_classes))
        self._finish_round(0, entry | _found(ranking, train, changed), ranking)
        fractions = self.config.refining_fractions
        ranking = self._later_rounds(
            train, infected_logits, ranking, agrees, fractions, suspects=changed, changed=changed
        )
        return self._result(ranking, train)

    def without_clean_set(self, train: ImageSet) -> PurifyResult:
        """Algorithm 1, line by line."""
        infected_logits = self._infected_logits(train)
        # Initialisation: D_ext^0
        suspects = self._attracting_labels(train)
        changed = torch.zeros_like(suspects)
        steady = None
        fragile = self._fragility(train, infected_logits, suspects)
        if fragile is not None:
            changed = suspects = self._labels_forgotten_when_left_out(train, infected_logits, fragile)
            if int(suspects.sum()) != 1:
                # Else nothing of the other labels is poisoned: later rounds need not keep to steady images. The first
                # one does all the same, as the label may have stood out by chance.
                steady = torch.zeros_like(fragile, dtype=torch.bool)
                share, floor = 1 - self.config.fragile_share, self.config.label_floor
                steady[first_of_each(fragile.argsort(stable=True), train.labels, share, floor)] = True
        # Without images of the target label nothing in D_ext^0 can teach the trigger: the infected model may teach
        # what it knows of the labels left out.
        chosen = initial_extra_set(
            infected_logits, train.labels, suspects, self.config, self.generator, fragility=fragile
        )
        teacher = self.infected if suspects.any() else None
        # Steps 1 and 2: theta^0 becomes theta^1; step 3
        entry = self._purify_model(train, chosen, teacher=teacher, desc="round 0")
        ranking, agrees = self._rank(train, infected_logits)
        self._finish_round(0, entry | _found(ranking, train, suspects, chosen), ranking)
        fractions = self.config.fractions[1:]
        ranking = self._later_rounds(
            train,
            infected_logits,
            ranking,
            agrees,
            fractions,
            suspects=suspects,
            changed=changed,
            steady=steady,
            floor=self.config.label_floor,
        )
        return self._result(ranking, train)

    def _later_rounds(
        self,
        train: ImageSet,
        infected_logits: Tensor,
        ranking: Ranking,
        agrees: Tensor,
        fractions: Sequence[float],
        *,
        suspects: Tensor,
        changed: Tensor,
        steady: Tensor | None = None,
        floor: float = 0.0,
    ) -> Ranking:
        """Rounds 1 and on, each on the images that rank clean after the one before; the last ranking.

        The model of round 0 knows the target's poisoned images best: it has learned from trusted ones, or from none of
        the label. Later ones learn the label again, from its clean images, and no longer tell poisoned ones whose label
        is right (SIG). So of a suspected label that was found by how far its images ``changed`` an image ranks by its
        largest distance so far, and all models have to agree with its label.
        """
        of_changed = changed.to(train.device)[train.labels]
        for t, fraction in enumerate(fractions, start=1):
            chosen = next_extra_set(
                ranking,
                train.labels,
                suspects,
                fraction,
                agrees=agrees,
                changed=changed,
                steady=steady,
                floor=floor,
            )
            entry = self._purify_model(train, chosen, desc=f"round {t}")
            now, agrees_now = self._rank(train, infected_logits)
            ranking = rank_distances(torch.where(of_changed, ranking.distance.maximum(now.distance), now.distance))
            agrees = agrees_now & (agrees | ~of_changed)
            self._finish_round(t, entry | _found(ranking, train, suspects, chosen), ranking)
        return ranking

    def _finish_round(self, t: int, entry: dict[str, Any], ranking: Ranking | None = None) -> None:
        self.history.append({"round": t, **entry})
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

    def _labels_forgotten_when_left_out(self, train: ImageSet, infected_logits: Tensor, fragile: Tensor) -> Tensor:
        """Labels whose images the purified model sees otherwise once it learns from none of them, (K,) bool.

        A trigger that no gradient leads to (SIG's wave) cannot be found in the model, but images of one label alone
        teach it. So each half of the labels is left out in turn: of benign labels little is forgotten then. Each half
        is judged by itself, and of few labels nothing is said.
        """
        forgotten = torch.zeros(train.num_classes, dtype=torch.bool)
        present = train.labels.unique().cpu()
        if not self.config.leave_out or len(present) < 2 * FEWEST_LABELS:
            return forgotten
        for half in range(2):
            left_out = torch.zeros_like(forgotten)
            left_out[present[half::2]] = True
            self.model.load_state_dict(self.infected.state_dict())
            chosen = judging_extra_set(infected_logits, train.labels, left_out, fragile, self.config, self.generator)
            desc = f"without half of the labels, {half + 1} of 2"
            self._purify_model(train, chosen, teacher=self.infected, desc=desc, counted_as=_LEFT_OUT)
            ranking, _ = self._rank(train, infected_logits, _LEFT_OUT)
            forgotten |= changed_labels(label_distances(ranking, train.labels, train.num_classes) * left_out)
        self.model.load_state_dict(self.infected.state_dict())
        return forgotten

    def _purify_model(
        self,
        data: ImageSet,
        chosen: Tensor | None = None,
        *,
        desc: str,
        teacher: nn.Module | None = None,
        counted_as: str = "",
    ) -> dict[str, Any]:
        """Steps 1 and 2 on the extra set: the images of ``data`` that are ``chosen``, or all.

        With a ``teacher`` only on images that are trusted, or hardly ever poisoned: what it says of a poisoned one is
        the backdoor.
        """
        config = self.config
        size = len(data) if chosen is None else len(chosen)
        clean_steps = max(config.clean_steps, config.clean_epochs * steps_per_epoch(size, config.finetune.batch_size))
        self.tuner.restart(total_steps=config.adversarial_steps + clean_steps, teacher=teacher)
        streamed = self._streamed(data)
        self.round_seconds = {}
        # Steps 1a and 1b, batch by batch: adversarial images of the current model, and an update on them (Eq. 8)
        with self._phase(f"{counted_as}adversarial"):
            adversarial_loss = self.tuner.run(
                data,
                among=chosen,
                steps=config.adversarial_steps,
                attack=config.attacks,
                streamed=streamed,
                desc=f"{desc}: adversarial",
            )
        # Step 2: the extra set as it is
        with self._phase(f"{counted_as}clean"):
            clean_loss = self.tuner.run(data, among=chosen, steps=clean_steps, streamed=streamed, desc=f"{desc}: clean")
        self.model.eval()
        return {
            "extra_set_size": size,
            "adversarial_loss": adversarial_loss,
            "clean_loss": clean_loss,
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


def _found(ranking: Ranking, train: ImageSet, suspects: Tensor, chosen: Tensor | None = None) -> dict[str, Any]:
    """What a ranking tells; more where it is known which images are poisoned."""
    found: dict[str, Any] = {"labels_apart": suspects.nonzero()[:, 0].tolist()}
    if train.poison_mask is None or not 0 < int(train.poison_mask.sum()) < len(train):
        return found
    found["ap_of_poisoned"] = ranking.ap_of_poisoned(train.poison_mask)
    found["ap_of_clean"] = ranking.ap_of_clean(train.poison_mask)
    if chosen is not None:
        found["extra_set_poison_rate"] = poisoned_share(chosen, train.poison_mask)
    return found
