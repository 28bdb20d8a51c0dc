"""The models of the matrix: trained once, kept on the disk, and brought back with their image sets."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pbe_fast import runs
from pbe_fast.attack import InfectedModel, train_infected
from pbe_fast.config import AttackConfig
from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.engine.files import atomic_write, write_text
from pbe_fast.engine.machine import describe
from pbe_fast.engine.precision import resolve_device, resolve_precision
from pbe_fast.errors import InputError
from pbe_fast.finetune import FineTuner, steps_per_epoch
from pbe_fast.models import ModelSpec, build_from_spec, load_model, save_model
from pbe_fast.models.weights import read_weights
from pbe_fast.options import to_dict
from pbe_fast.poison import triggered_test_set
from pbe_fast.reproduce.cells import BENIGN, Subject
from pbe_fast.reproduce.scales import SOURCES, Plan, Scale
from pbe_fast.reproduce.store import Store
from pbe_fast.result import plain, sha256_of_file
from pbe_fast.runs.triggers import TRIGGER_NAME
from pbe_fast.triggers import TRIGGERS, Trigger, make_trigger

_POISONED, _RECORD = "poisoned.safetensors", "infection.json"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """A subject with its image sets, on the CPU.

    Attributes:
        model: In eval mode.
        train: What it was trained on, with ``poison_mask`` where it is infected.
        clean: Trusted images that it was not trained on.
        test: Clean test images.
        triggered: The same with the trigger; None of a benign model.
        record: How it was made.
    """

    model: nn.Module
    train: ImageSet
    clean: ImageSet
    test: ImageSet
    triggered: ImageSet | None
    record: Mapping[str, Any]


class Workshop:
    """Trains and opens the models of one scale.

    Args:
        scale: Of all models.
        store: Where they are kept.
        data: Folder with the image sets; not needed for the digits.
        weights: An ImageNet checkpoint of the network whose plan says ``pretrained``; None trains from scratch.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "fp32" or "bf16".
    """

    def __init__(
        self,
        scale: Scale,
        store: Store,
        *,
        data: Path | None = None,
        weights: Path | None = None,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        self.scale = scale
        self.device, self.precision = device, precision
        self._store = store
        self._data = data
        self._weights = weights
        # One of each: a data set may take gigabytes, and cells of one model follow each other.
        self._sets: dict[tuple[str, int], tuple[ImageSet, ImageSet, ImageSet]] = {}
        self._prepared: dict[Subject, Prepared] = {}

    def has(self, subject: Subject) -> bool:
        """Whether its model is on the disk."""
        return (self._store.model_folder(subject) / _RECORD).is_file()

    def make(self, subject: Subject) -> None:
        """Train the model of a subject and keep it.

        Raises:
            InputError: Images that are not there, or too few for the attack.
            DivergedError: The training did.
        """
        plan = self.scale.plan_of(subject.data, subject.attack, subject.setting)
        train, _, _ = self.sets(subject.data, subject.seed)
        model, spec = self._new_model(plan, train, subject.seed)
        start = time.perf_counter()
        if subject.attack == BENIGN:
            losses = self._train_benign(model, train, plan, subject.seed)
            made = None
        else:
            config = attack_config(self.scale, subject, train)
            made = train_infected(model, train, config=config, seed=subject.seed, **self.running())
            model, losses = made.model, made.losses
        self._save(subject, model, spec, made, train, {"losses": losses, "seconds": time.perf_counter() - start})

    def open(self, subject: Subject) -> Prepared:
        """The subject as it was made; the last two stay in memory."""
        if subject not in self._prepared:
            while len(self._prepared) >= 2:
                self._prepared.pop(next(iter(self._prepared)))
            self._prepared[subject] = self._open(subject)
        return self._prepared[subject]

    def running(self) -> dict[str, Any]:
        """Keyword arguments that training and every defence take."""
        return {"device": self.device, "precision": self.precision, "progress": False}

    def sets(self, name: str, seed: int) -> tuple[ImageSet, ImageSet, ImageSet]:
        """Training images, clean images and test images."""
        if (name, seed) not in self._sets:
            self._sets.clear()
            plan = self.scale.plans[name]
            whole, test = (read_images(name, part, self._data, plan.image_size) for part in ("train", "test"))
            available = len(whole) if plan.limit is None else min(len(whole), plan.limit)
            count = round(plan.clean_share * available)
            train, clean = runs.reserve(whole, limit=min(available, len(whole) - count), clean_count=count, seed=seed)
            assert clean is not None
            self._sets[name, seed] = (train, clean, test)
        return self._sets[name, seed]

    def _new_model(self, plan: Plan, data: ImageSet, seed: int) -> tuple[nn.Module, ModelSpec]:
        model, spec = runs.new_model(plan.arch, data, width=plan.width, seed=seed)
        if self._weights is None or not plan.pretrained:
            return model, spec
        spec = dataclasses.replace(spec, mean=_IMAGENET[0], std=_IMAGENET[1])
        torch.manual_seed(seed)
        model = build_from_spec(spec)
        load_backbone(model.get_submodule("net"), read_weights(self._weights), str(self._weights))
        return model, spec

    def _train_benign(self, model: nn.Module, train: ImageSet, plan: Plan, seed: int) -> list[float]:
        where = resolve_device(self.device)
        model.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]
        per_epoch = steps_per_epoch(len(train), plan.training.batch_size)
        tuner = FineTuner(
            model,
            plan.training,
            total_steps=plan.epochs * per_epoch,
            generator=torch.Generator().manual_seed(seed),
            dtype=resolve_precision(where, self.precision),
        )
        data = train.to(where)
        losses = [tuner.run(data, steps=per_epoch, desc="benign") for _ in range(plan.epochs)]
        model.eval().cpu()
        return losses

    def _save(
        self,
        subject: Subject,
        model: nn.Module,
        spec: ModelSpec,
        made: InfectedModel | None,
        clean_train: ImageSet,
        record: dict[str, Any],
    ) -> None:
        folder = self._store.model_folder(subject)
        save_model(model, spec, folder)
        if made is not None:
            with atomic_write(folder / _POISONED) as temporary:
                save_file(changes(clean_train, made.train_data), temporary)
            runs.save_trigger_weights(made.trigger, folder)
            record |= {"config": to_dict(made.config), "trigger": made.trigger.spec()}
        record["weights"] = self._digest(subject)
        # Last: with it the model is there.
        write_text(folder / _RECORD, json.dumps(plain({**record, **describe()}), allow_nan=False) + "\n")

    def _digest(self, subject: Subject) -> str | None:
        pretrained = self.scale.plans[subject.data].pretrained
        return sha256_of_file(self._weights) if self._weights is not None and pretrained else None

    def _open(self, subject: Subject) -> Prepared:
        folder = self._store.model_folder(subject)
        train, clean, test = self.sets(subject.data, subject.seed)
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        model, _ = load_model(folder)
        triggered = None
        if subject.attack != BENIGN:
            train = changed(train, load_file(folder / _POISONED))
            trigger = self._trigger(folder, record)
            triggered = triggered_test_set(test, trigger, setting=subject.setting, target_label=subject.target)
        return Prepared(model=model, train=train, clean=clean, test=test, triggered=triggered, record=record)

    def _trigger(self, folder: Path, record: Mapping[str, Any]) -> Trigger:
        trigger = make_trigger(**record["trigger"])
        if trigger.weights():
            trigger.load_weights(read_weights(folder / TRIGGER_NAME))
        return trigger


def read_images(name: str, part: str, folder: Path | None, size: int | None = None) -> ImageSet:
    """The training or test images of a data set of `SOURCES`.

    Args:
        name: "cifar10", "gtsrb", "tiny-imagenet" or "digits".
        part: "train" or "test".
        folder: With NAME-train.parquet and NAME-test.parquet, or torchvision's folder of the set.
        size: Images are resized to it.

    Raises:
        InputError: They are not there.
    """
    if name == "digits":
        return as_image_set(f"digits:{part}", size=size, progress=False)
    if folder is None:
        raise InputError(f"images of {name}", got="no folder", accepted="--data ROOT, the folder that they are in")
    for stem in SOURCES[name]:
        path = folder / f"{stem}-{part}.parquet"
        if path.is_file():
            return as_image_set(path, size=size, progress=False)
    if name == "tiny-imagenet":
        accepted = " or ".join(f"{stem}-{part}.parquet" for stem in SOURCES[name])
        raise InputError(f"images of {name}", got=f"none of them in {folder}", accepted=accepted)
    try:
        return as_image_set(f"{name}:{folder}:{part}", size=size, progress=False)
    except InputError as error:
        accepted = f"{name}-{part}.parquet, or torchvision's folder of the set"
        raise InputError(f"images of {name}", got=f"neither form of them in {folder}", accepted=accepted) from error


def attack_config(scale: Scale, subject: Subject, train: ImageSet) -> AttackConfig:
    """The attack on a subject, with a poison rate that the target's class allows."""
    plan, rate = scale.plan_of(subject.data, subject.attack, subject.setting), scale.poison_rate
    if TRIGGERS[subject.attack].clean_label and subject.setting == "all_to_one":
        share = float((train.labels == subject.target).double().mean())
        rate = min(rate, plan.clean_label_rate * share)
    return AttackConfig(
        attack=subject.attack,
        setting=subject.setting,
        target_label=subject.target,
        poison_rate=rate,
        epochs=plan.epochs,
        training=plan.training,
    )


def load_backbone(net: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Put a checkpoint of the same network with another number of classes into ``net``; its head stays random.

    Raises:
        InputError: Weights that are missing or of another shape.
    """
    own = net.state_dict()
    head = {name for name in own if name.rpartition(".")[0] in ("fc", "linear", "classifier")}
    wrong = [n for n, v in own.items() if n not in head and (n not in weights or weights[n].shape != v.shape)]
    if wrong:
        got = f"{len(wrong)} of {len(own)} tensors missing or of another shape, the first: {wrong[0]}"
        raise InputError(f"--weights {what}", got=got, accepted=f"a checkpoint of {type(net).__name__}")
    net.load_state_dict({name: weights[name] if name not in head else value for name, value in own.items()})


def changes(clean: ImageSet, poisoned: ImageSet) -> dict[str, Tensor]:
    """What `changed` needs to make ``poisoned`` of ``clean`` again: the images that differ, and all labels."""
    where = (clean.images != poisoned.images).flatten(1).any(1).nonzero()[:, 0]
    assert poisoned.poison_mask is not None
    return {
        "where": where,
        "images": poisoned.images[where].contiguous(),
        "labels": poisoned.labels.contiguous(),
        "poison_mask": poisoned.poison_mask.contiguous(),
    }


def changed(clean: ImageSet, difference: Mapping[str, Tensor]) -> ImageSet:
    """The poisoned set of `changes`."""
    images = clean.images.clone()
    images[difference["where"]] = difference["images"]
    return dataclasses.replace(
        clean,
        images=images,
        labels=difference["labels"],
        poison_mask=difference["poison_mask"],
        true_labels=clean.labels,
    )
