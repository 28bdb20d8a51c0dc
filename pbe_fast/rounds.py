"""Algorithm 1, round by round: what `pbe_fast.purify` does once its arguments are checked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.attraction import attack_counts, attracting_labels
from pbe_fast.config import WaveConfig
from pbe_fast.data import ImageSet
from pbe_fast.extra_set import first_of_each, initial_extra_set, judging_extra_set, next_extra_set, steady_images
from pbe_fast.leading_waves import LeadingWaves, leading_waves
from pbe_fast.ranking import (
    FEWEST_LABELS,
    Ranking,
    changed_labels,
    label_ahead,
    label_distances,
    poisoned_share,
    rank_over_rounds,
)
from pbe_fast.result import PurifyResult
from pbe_fast.steadiness import fragility
from pbe_fast.steps import Steps

# How many of a label's images judge whether it was forgotten: no more than are poisoned of a target's.
_SUREST = 0.1
# Before the name of a phase that is of no round.
_LEFT_OUT = "labels left out: "


class Run(Steps):
    """One run of Algorithm 1."""

    def with_clean_set(self, clean: ImageSet, train: ImageSet | None) -> PurifyResult:
        """Steps 1 and 2 on the clean images; then, where there is a training set, on what of it ranks clean."""
        waves = self._leading_waves(clean)
        entry = self._purify_model(clean, teacher=self.infected, desc="round 0")
        entry |= waves.finding()
        if train is None:
            self._finish_round(0, entry)
            self._look_for_forgotten(clean)
            return self._result(None, None, names=clean.class_names)
        infected_logits = self._infected_logits(train)
        ranking, agrees = self._rank(train, infected_logits)
        # No poisoned image has taught this model anything: what it changed most is the attacker's.
        changed = changed_labels(label_distances(ranking, train.labels, train.num_classes)) | waves.labels
        suspects = changed
        fractions = self.config.refining_fractions
        if fractions and waves.shift is None:
            # Of a trigger that this round did not erase it changed little.
            suspects = changed | self._attracting_labels(train)
        self._finish_round(0, entry | _found(ranking, train, suspects), ranking)
        # From label to label, the images of a trigger that is still there rank clean: fragile ones have to show more.
        steady = None
        if fractions and self.config.fragile_share > 0 and not suspects.any():
            steady = steady_images(self._fragility(train, infected_logits, waves), train.labels, self.config)
        ranking = self._later_rounds(
            train, infected_logits, ranking, agrees, fractions, suspects=suspects, changed=changed, steady=steady
        )
        return self._result(ranking, train)

    def without_clean_set(self, train: ImageSet) -> PurifyResult:
        """Algorithm 1, line by line."""
        infected_logits = self._infected_logits(train)
        waves = self._leading_waves(train)
        # Initialisation: D_ext^0
        changed = suspects = torch.zeros(train.num_classes, dtype=torch.bool)
        if self.config.initial != "random":
            # What leads from each label to another leads to none in particular.
            if waves.shift is None:
                suspects = self._attracting_labels(train) | waves.labels
            changed = waves.labels
        steady = fragile = None
        if self.config.initial == "steady" and not suspects.any():
            # No attracting label tells what to leave out.
            fragile = self._fragility(train, infected_logits, waves)
            if waves.shift is None:
                changed = suspects = self._labels_forgotten_when_left_out(train, infected_logits, fragile)
            if int(suspects.sum()) == 1:
                # Nothing of the other labels is poisoned then: no need to keep to steady images.
                fragile = None
            else:
                steady = steady_images(fragile, train.labels, self.config)
        # Without images of the target label no label in D_ext^0 can teach the trigger: the infected model may teach
        # what it knows of the labels left out. Not so where it is wrong: of hard images that are many, and some bear
        # the trigger with their own label (WaNet and input-aware train with such) and are answered with the target.
        chosen = initial_extra_set(
            infected_logits, train.labels, suspects, self.config, self.generator, fragility=fragile
        )
        teacher = self.infected if suspects.any() else None
        # Steps 1 and 2: theta^0 becomes theta^1; step 3
        entry = self._purify_model(train, chosen, teacher=teacher, where_right=True, desc="round 0")
        entry |= waves.finding()
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
        is right (SIG). So of a suspected label that was found by how far its images ``changed``, or by a wave that
        leads to it, an image ranks by its largest distance so far, and all models have to agree with its label.
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
            now = self._rank(train, infected_logits)
            ranking, agrees = rank_over_rounds((ranking, agrees), now, of_changed)
            self._finish_round(t, entry | _found(ranking, train, suspects, chosen), ranking)
        return ranking

    def _attracting_labels(self, train: ImageSet) -> Tensor:
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

    def _leading_waves(self, data: ImageSet) -> LeadingWaves:
        """Waves that lead the infected model; from here on step 1b's are near those."""
        turns = [attack for attack in self.attacks if isinstance(attack, WaveConfig)]
        if not turns:
            return LeadingWaves(torch.zeros(data.num_classes, dtype=torch.bool), None, ())
        with self._phase("leading waves"):
            strongest = max(turns, key=lambda wave: wave.amplitude)
            found = leading_waves(
                self.infected,
                data,
                strongest,
                generator=self.generator,
                dtype=self.dtype,
                show_progress=self.progress,
            )
        self.attacks = tuple(
            dataclasses.replace(attack, near=found.frequencies) if isinstance(attack, WaveConfig) else attack
            for attack in self.attacks
        )
        return found

    def _fragility(self, train: ImageSet, infected_logits: Tensor, waves: LeadingWaves) -> Tensor:
        """How little each label withstands, (N,)."""
        with self._phase("steady images"):
            found = fragility(
                self.infected,
                train,
                infected_logits,
                waves=waves.frequencies,
                dtype=self.dtype,
                show_progress=self.progress,
            )
        # Where nothing tells images apart, any order will do but the file's, in which the poisoned may come first.
        return found if found.any() else torch.rand(found.shape, generator=self.generator).to(found)

    def _labels_forgotten_when_left_out(self, train: ImageSet, infected_logits: Tensor, fragile: Tensor) -> Tensor:
        """Labels whose images the purified model sees otherwise once it learns from none of them, (K,) bool.

        A trigger that no gradient leads to (SIG's wave) cannot be found in the model, but images of one label alone
        teach it. So each half of the labels is left out in turn: of benign labels little is forgotten then. Each half
        is judged by itself, and of few labels nothing is said. What counts is the images that the infected model is
        surest of: of a benign label these are the last to be forgotten, of the target they bear the trigger.

        The infected model is heeded where it is right, as its wrong answers may keep the trigger (input-aware). Where
        that shows no label, on all images: benign labels are forgotten less then (SIG).
        """
        forgotten = torch.zeros(train.num_classes, dtype=torch.bool)
        present = train.labels.unique().cpu()
        if not self.config.leave_out or len(present) < 2 * FEWEST_LABELS:
            return forgotten
        loss = F.cross_entropy(infected_logits, train.labels, reduction="none")
        surest = first_of_each(loss.argsort(stable=True), train.labels, _SUREST, 1.0)
        for where_right, half in itertools.product((True, False), range(2)):
            if half == 0 and forgotten.any():
                break
            left_out = torch.zeros_like(forgotten)
            left_out[present[half::2]] = True
            self.model.load_state_dict(self.infected.state_dict())
            chosen = judging_extra_set(infected_logits, train.labels, left_out, fragile, self.config, self.generator)
            desc = f"without half of the labels, {half + 1} of 2"
            self._purify_model(
                train, chosen, teacher=self.infected, where_right=where_right, desc=desc, counted_as=_LEFT_OUT
            )
            ranking, _ = self._rank(train, infected_logits, _LEFT_OUT)
            distances = label_distances(ranking, train.labels, train.num_classes, among=surest) * left_out
            forgotten |= changed_labels(distances) | label_ahead(distances)
        self.model.load_state_dict(self.infected.state_dict())
        return forgotten


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
