"""Algorithm 1: Progressive Backdoor Erasing, with a clean set or without."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from pbe_fast.config import PurifyConfig
from pbe_fast.data import as_train_and_clean, require_classes
from pbe_fast.engine.allocator import kept_heap
from pbe_fast.engine.gradients import gradients
from pbe_fast.engine.precision import resolve_device
from pbe_fast.engine.profile import Profile
from pbe_fast.engine.seeding import check_seed, seeded
from pbe_fast.engine.streaming import check_limit
from pbe_fast.errors import InputError
from pbe_fast.forgetting import warn_of_missing
from pbe_fast.models import check_batch, check_differentiable, check_model, check_trainable
from pbe_fast.options import check_kind
from pbe_fast.result import PurifyResult
from pbe_fast.rounds import Run
from pbe_fast.steps import OnRound


@gradients()
def purify(
    model: nn.Module,
    train_data: Any = None,
    *,
    clean_data: Any = None,
    config: PurifyConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    device_memory_limit: int | None = None,
    profile: bool = False,
    on_round: OnRound | None = None,
    progress: bool = True,
) -> PurifyResult:
    """Erase the backdoor that ``model`` may carry.

    Without ``clean_data``, all rounds of Algorithm 1 on the training set. With it, steps 1 and 2 on the clean images;
    where the training set is given as well, further rounds are on those of its images that rank clean, which brings
    accuracy and leaves less of the backdoor. The paper stops after the clean set (``refining_fractions=()``).

    Other threads may go on with models of their own, and purify them. But torch's global random generators are put
    aside for one run at a time: of runs in several threads, a model that draws from them (dropout) learns from other
    draws each time, and afterwards they may stand elsewhere.

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
    check_limit(device_memory_limit)
    _check_on_round(on_round)
    train, clean = as_train_and_clean(train_data, clean_data, progress=progress)
    data = clean if clean is not None else train
    assert data is not None
    check_model(model, data.image_shape, data.num_classes)
    check_trainable(model, data.image_shape)
    check_differentiable(model, data.image_shape)
    if clean is not None:
        check_batch(model, len(clean), "clean images")
        warn_of_missing(clean, train)
    fractions = config.fractions if clean is None else config.refining_fractions
    require_classes(train if train is not None and fractions else data)
    if train is not None and fractions:
        check_batch(model, round(min(fractions) * len(train)), "images that the smallest fraction makes")
    run = Run(
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


def _check_on_round(on_round: OnRound | None) -> None:
    """A round may take hours, after which it would fail."""
    try:
        if on_round is not None:
            inspect.signature(on_round).bind(0, nn.Module(), None)
    except TypeError as error:
        accepted = "a function of a round's number, model and ranking"
        raise InputError("on_round", got=f"{on_round!r} ({error})", accepted=accepted) from error
    except ValueError:
        pass  # of a builtin nobody knows
