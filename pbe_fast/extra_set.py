"""Which training images make up the extra set D_ext, without any trusted image (Algorithm 1, lines 1 and 7).

The paper draws D_ext^0 at random. Where the trigger is easy to learn, its poisoned tenth then teaches it again, and the
ranking comes out inverted: poisoned images change least. What a defender can see keeps them out: labels that attract
adversarial images, or that change far more than others when nothing is learned from them (both "attracting" here), high
losses, labels that withstand no small change.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pbe_fast.config import PurifyConfig
from pbe_fast.ranking import Ranking, otsu_threshold

# Distances below that of bfloat16's rounding are alike.
_NEAREST = 1e-6
_STEADY_HALF = 0.5


def initial_extra_set(
    infected_logits: Tensor,
    labels: Tensor,
    attracting: Tensor,
    config: PurifyConfig,
    generator: torch.Generator,
    *,
    fragility: Tensor | None = None,
) -> Tensor:
    """D_ext^0: indices drawn at random, from all images (the paper) or from those that are seldom poisoned.

    A label that attracts adversarial images may be the attacker's target, and its images poisoned ones: none is taken.
    Of the rest, what the infected model finds hard (a high loss) seldom carries a trigger, which is the easiest thing
    that it learned, and makes the strongest adversarial images. Where no label attracts, only images are taken whose
    label withstands small changes of the picture best: of the others it may be a trigger's. In an all-to-all attack,
    whose trigger tells a label only along with the picture, it is not the easiest thing: hard images are no choice.

    Args:
        infected_logits: (N, K) of the training set.
        labels: (N,) int64.
        attracting: (K,) bool, see `pbe_fast.attraction.attracting_labels`.
        config: ``fractions[0]`` sets the size, ``initial``, ``steady_share`` and ``hard_quantile`` the choice.
        generator: On the CPU.
        fragility: (N,) where fragile images are to be left out, see `pbe_fast.steadiness`.

    Returns:
        int64 indices; of steady images up to one of each label more than ``fractions[0]`` says.
    """
    count = max(1, round(config.fractions[0] * len(labels)))
    candidates = torch.arange(len(labels), device=labels.device)
    if config.initial != "random":
        trusted = candidates[~attracting.to(labels.device)[labels]]
        if len(trusted) > 0:
            if fragility is not None:
                share = max(config.steady_share, count / len(trusted))
                order = trusted[fragility[trusted].argsort(stable=True)]
                candidates = first_of_each(order, labels, share, config.label_floor)
                # Drawn label by label, so that none has less by chance.
                return first_of_each(
                    _drawn(candidates, len(candidates), generator), labels, count / len(candidates), 1.0
                )
            else:
                loss = F.cross_entropy(infected_logits, labels, reduction="none")
                candidates = _hardest(loss, labels, trusted, config.hard_quantile, count)
    return _drawn(candidates, count, generator)


def judging_extra_set(
    infected_logits: Tensor,
    labels: Tensor,
    left_out: Tensor,
    fragility: Tensor,
    config: PurifyConfig,
    generator: torch.Generator,
) -> Tensor:
    """The images of a run that only shows which labels change when none of their images is learned from.

    Benign labels have to change little. That takes images near the borders between labels: the hard ones, of the half
    that withstands small changes best.

    Args:
        infected_logits: (N, K) of the training set.
        labels: (N,) int64.
        left_out: (K,) bool.
        fragility: (N,), see `pbe_fast.steadiness`.
        config: ``fractions[0]`` sets the size, ``hard_quantile`` the choice.
        generator: On the CPU.

    Returns:
        int64 indices.
    """
    count = max(1, round(config.fractions[0] * len(labels)))
    others = (~left_out.to(labels.device)[labels]).nonzero()[:, 0]
    steady = others[fragility[others].argsort(stable=True)][: max(count, math.ceil(_STEADY_HALF * len(others)))]
    loss = F.cross_entropy(infected_logits, labels, reduction="none")
    share = config.hard_quantile * len(others) / len(steady)
    return _drawn(_hardest(loss, labels, steady, share, count), count, generator)


def next_extra_set(
    ranking: Ranking,
    labels: Tensor,
    attracting: Tensor,
    fraction: float,
    *,
    agrees: Tensor | None = None,
    changed: Tensor | None = None,
    steady: Tensor | None = None,
    floor: float = 0.0,
) -> Tensor:
    """D_ext^(t+1): the top ``fraction`` of the ranking, with a rank of their own for labels that attract.

    Labels left out of D_ext^0 have been forgotten a little, so that all their images rank low, poisoned or not; within
    such a label the poisoned ones still rank lowest. So it gives the top ``fraction`` of its better part, as far as
    the purified model agrees with the label: of a poisoned image it should not. The part is split by Otsu's threshold;
    of a label that changed far more than others by that of the distances' logarithms: where most images are poisoned
    (SIG) the threshold between the means lies among them.

    Args:
        ranking: Of the training set.
        labels: (N,) int64.
        attracting: (K,) bool.
        fraction: Of the images.
        agrees: (N,) bool, True where the purified model predicts the label. If not given, all of an attracting label,
            and no fragile image.
        changed: (K,) bool, of the attracting labels those that changed far more than others; none, if not given.
        steady: (N,) bool, the images that the fraction is of; all, if not given. A few dozen poisoned images among
            thousands teach a patch again, and the ranking alone does not keep them out. Any of the others (fragile
            images, of which a third may be poisoned) comes in on top if it ranks no lower than the last of these and
            ``agrees``.
        floor: Of labels that do not attract, see `first_of_each`.

    Returns:
        int64 indices; of labels that do not attract in the order of the ranking, fragile images after the steady ones.
        Without any attracting label or floor, and of all images, exactly ``ranking.top(fraction)``.
    """
    ranked = ranking.order if steady is None else ranking.order[steady[ranking.order]]
    apart = attracting.to(labels.device)[labels]
    others = ranked[~apart[ranked]]
    chosen = [first_of_each(others, labels, fraction, floor)]
    if steady is not None and agrees is not None and len(others) > 0:
        worst = ranking.distance[_first(others, fraction)[-1]]
        trusted = agrees & ~steady & ~apart & (ranking.distance <= worst)
        chosen.append(ranking.order[trusted[ranking.order]])
    for k in attracting.nonzero()[:, 0].tolist():
        order = ranked[labels[ranked] == k]
        distance = ranking.distance[order]
        values = distance.clamp_min(_NEAREST).log() if changed is not None and changed[k] else distance
        better = order[values <= otsu_threshold(values[distance.isfinite()])]
        if agrees is not None and agrees[better].any():
            better = better[agrees[better]]
        chosen.append(_first(better, fraction))
    return torch.cat(chosen)


def first_of_each(order: Tensor, labels: Tensor, fraction: float, floor: float) -> Tensor:
    """The first ``fraction`` of an order, in which every label has at least ``floor`` of what would be its part.

    A label that has lost images ranks low, and so would lose more of them in the next round, until it is forgotten.

    Args:
        order: int64 indices of images.
        labels: (N,) int64, of all images.
        fraction: Of ``order``.
        floor: In [0, 1]. 0 is the beginning of the order whatever its labels, 1 the beginning of every label's.

    Returns:
        int64 indices in their order, at least one.
    """
    count = max(1, round(fraction * len(order)))
    if floor == 0:
        return order[:count]
    kept = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for k in labels[order].unique():
        mine = order[labels[order] == k]
        kept[mine[: math.ceil(floor * fraction * len(mine))]] = True
    kept[order[~kept[order]][: max(0, count - int(kept.sum()))]] = True
    return order[kept[order]]


def steady_images(fragility: Tensor, labels: Tensor, config: PurifyConfig) -> Tensor:
    """All images but the most fragile ones, which have to show more to come into a later extra set.

    Args:
        fragility: (N,), see `pbe_fast.steadiness`.
        labels: (N,) int64.
        config: ``fragile_share`` sets how many are fragile, ``label_floor`` what every label keeps at least.

    Returns:
        (N,) bool.
    """
    steady = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    order = fragility.argsort(stable=True)
    steady[first_of_each(order, labels, 1 - config.fragile_share, config.label_floor)] = True
    return steady


def _drawn(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of them, or all, in random order."""
    return candidates[torch.randperm(len(candidates), generator=generator)[:count].to(candidates.device)]


def _first(order: Tensor, fraction: float) -> Tensor:
    return order[: max(1, round(fraction * len(order)))]


def _hardest(loss: Tensor, labels: Tensor, indices: Tensor, share: float, count: int) -> Tensor:
    """The ``share`` of every label's ``indices`` with the highest loss, at least ``count`` in all and one of each."""
    share = min(1.0, max(share, count / len(indices)))
    kept = labels[indices]
    by_label = [indices[kept == k] for k in kept.unique()]
    return torch.cat(
        [some[loss[some].argsort(descending=True, stable=True)[: math.ceil(share * len(some))]] for some in by_label]
    )
