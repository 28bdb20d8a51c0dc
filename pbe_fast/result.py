"""What `purify` and the other defences return, and the files that keep a run: its ranking and its report."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from pbe_fast.baselines import BaselineConfig
from pbe_fast.config import PurifyConfig
from pbe_fast.data import ImageSet
from pbe_fast.engine.files import atomic_write, prepare_output, replacing, write_text
from pbe_fast.engine.forward import eval_mode
from pbe_fast.engine.machine import describe
from pbe_fast.engine.profile import Profile
from pbe_fast.errors import InputError
from pbe_fast.models import ModelSpec, save_model, spec_of
from pbe_fast.options import to_dict
from pbe_fast.ranking import Ranking, changed_labels, label_distances

RANKING_NAME = "ranking.csv"
TRACE_NAME = "trace.json"
REPORT_NAME = "report.json"
# Made from a model that a new run replaces: kept beside the new one they would pass for its own.
DERIVED = (REPORT_NAME, RANKING_NAME, "model.onnx", "figure.png", "report.html", TRACE_NAME, "trigger_*.png")


@dataclass(frozen=True, eq=False, kw_only=True)
class PurifyResult:
    """A purified model and the evidence.

    Attributes:
        model: In eval mode, with the device and dtypes of the model that was given.
        ranking: Of the training set (Eq. 9; of a label that changed far more than others by the largest distance of all
            rounds); None where none was given.
        history: Of PBE one entry per round: ``extra_set_size``, ``adversarial_loss`` and ``clean_loss`` (the mean over
            the images of steps 1b and 2, None where a step has no updates), ``seconds`` by phase (adversarial, clean,
            ranking), ``labels_apart`` (whose images were chosen with more care), of the first round
            ``wave`` where one led the infected model to a ``label``, or by a ``shift`` from each to another (``down``
            and ``across`` in periods over the image), and where the truth is known ``ap_of_poisoned``,
            ``ap_of_clean`` and ``extra_set_poison_rate``.
            Of another defence one entry per ``step``, with its ``seconds`` and what it found as ``finding``.
        config: The options of the run.
        seed: Of the run.
        seconds: By phase.
        precision: Of the matrix products.
        train_data: The ranked set.
        method: "pbe", or the baseline of `pbe_fast.defenses.DEFENSES` that made it.
        profile: Where the time went, if that was asked for.
        pictures: Evidence to look at, such as recovered triggers: (C, H, W) uint8 on the CPU by name.
    """

    model: nn.Module
    ranking: Ranking | None
    history: list[dict[str, Any]]
    config: PurifyConfig | BaselineConfig
    seed: int
    seconds: dict[str, float]
    precision: str
    train_data: ImageSet | None = field(default=None, repr=False)
    method: str = "pbe"
    profile: Profile | None = field(default=None, repr=False)
    pictures: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def suspected(self) -> Tensor:
        """(N,) bool over the training set: images that look poisoned; see `Ranking.suspected`.

        Raises:
            InputError: There was no training set to rank.
        """
        if self.ranking is None:
            raise _no_ranking()
        return self.ranking.suspected()

    def suspected_labels(self) -> list[int]:
        """Labels whose images the purification changed far more than those of others: the attacker's target, if any.

        An attack from every label to the next one names none.

        Raises:
            InputError: There was no training set to rank.
        """
        if self.ranking is None or self.train_data is None:
            raise _no_ranking()
        return suspected_labels(self.ranking, self.train_data)

    def report(self) -> dict[str, Any]:
        """Everything but the tensors, as plain JSON values: the contents of ``report.json``."""
        report: dict[str, Any] = {
            "method": self.method,
            "rounds": self.history,
            "seconds": self.seconds,
            "config": to_dict(self.config),
            "seed": self.seed,
            "precision": self.precision,
            **describe(),
        }
        if self.profile is not None:
            report["profile"] = self.profile.report()
        if self.train_data is not None:
            report["sha256"] = {"inputs": {"train": self.train_data.sha256()}}
            if self.ranking is not None:
                report["ranking"] = summarize(self.ranking, self.train_data)
        return {name: plain(entry) for name, entry in report.items()}

    def save(
        self, folder: str | os.PathLike[str], *, spec: ModelSpec | None = None, force: bool = False, **more: Any
    ) -> Path:
        """Write ``model.safetensors``, ``config.json``, ``ranking.csv``, pictures and ``report.json``, the report last.

        What an earlier run left there stays until all of them are written.

        Args:
            folder: Made if need be.
            spec: How to build the network again. By default what can be told from the model: all of it for our own
                networks; for others, `load_model` will ask for the architecture.
            force: Replace what a run left in the folder.
            more: Further entries of the report; a dict is merged into an entry that is there already.

        Raises:
            InputError: A model whose logits and channels cannot be told without a ``spec``.
            OutputError: The folder cannot be written to, or holds a run.
        """
        out = prepare_output(folder, force=force)
        spec = spec or self._spec()
        with replacing(out, last=REPORT_NAME, stale=DERIVED) as new:
            save_model(self.model, spec, new, extra={"role": "purified"})
            names = ["model.safetensors", "config.json"]
            if self.ranking is not None and self.train_data is not None:
                write_ranking(new / RANKING_NAME, self.ranking, self.train_data)
                names.append(RANKING_NAME)
            names += [write_picture(new / f"{name}.png", picture).name for name, picture in self.pictures.items()]
            if self.profile is not None:
                # Of the first steps of every phase, for chrome://tracing or Perfetto.
                names.append(self.profile.write_trace(new / TRACE_NAME).name)
            # What was asked for at the top, the circumstances below.
            write_report(new, {**more, **merged(self.report(), more)}, outputs=names)
        return out

    def _spec(self) -> ModelSpec:
        if self.train_data is not None:
            shape = self.train_data.image_shape
            weight = next(self.model.parameters())
            with eval_mode(self.model), torch.no_grad():
                logits = self.model(torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype))
            return spec_of(
                self.model,
                num_classes=logits.shape[1],
                image_shape=shape,
                class_names=self.train_data.class_names,
            )
        convolutions = [m for m in self.model.modules() if isinstance(m, nn.Conv2d)]
        linears = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        if not convolutions or not linears:
            raise InputError(
                "spec of a model without a convolution or a linear layer",
                got="none",
                accepted="save(folder, spec=ModelSpec(...))",
            )
        channels = convolutions[0].in_channels
        spec = spec_of(self.model, num_classes=linears[-1].out_features, image_shape=(channels, 1, 1))
        return dataclasses.replace(spec, image_size=None)


def summarize(ranking: Ranking, data: ImageSet) -> dict[str, Any]:
    """How many images are suspected, and where the truth is known how many of them rightly so."""
    suspected = ranking.suspected().to(data.device)
    summary: dict[str, Any] = {
        "images": len(data),
        "suspected": int(suspected.sum()),
        "not_finite": ranking.num_nonfinite,
        "suspected_labels": [data.class_names[k] for k in suspected_labels(ranking, data)],
    }
    if data.poison_mask is not None and 0 < int(data.poison_mask.sum()) < len(data):
        found = int((suspected & data.poison_mask).sum())
        summary |= {
            "poisoned": int(data.poison_mask.sum()),
            "ap_of_poisoned": ranking.ap_of_poisoned(data.poison_mask),
            "ap_of_clean": ranking.ap_of_clean(data.poison_mask),
            "precision": found / summary["suspected"] if summary["suspected"] else None,
            "recall": found / int(data.poison_mask.sum()),
        }
    return summary


def suspected_labels(ranking: Ranking, data: ImageSet) -> list[int]:
    """Labels whose images changed far more than those of others: the attacker's target, where there is one."""
    return changed_labels(label_distances(ranking, data.labels, data.num_classes)).nonzero()[:, 0].tolist()


def write_ranking(path: str | os.PathLike[str], ranking: Ranking, data: ImageSet) -> Path:
    """The ranking as CSV (index, label, score, suspected), most suspicious image first.

    The score is the cosine of Eq. 9 with seven digits; where it ties, the order of the lines still tells.
    """
    path = Path(path)
    suspected = ranking.suspected()
    order = ranking.order.flip(0)
    columns = (order, data.labels[order], ranking.score[order].double(), suspected[order])
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", "label", "score", "suspected"])
        for index, label, score, flag in zip(*(c.tolist() for c in columns), strict=True):
            writer.writerow([index, label, f"{score:.7f}", int(flag)])
    return path


def write_picture(path: Path, picture: Tensor) -> Path:
    """A (C, H, W) uint8 picture, C of 1 or 3, as PNG."""
    pixels = picture.permute(1, 2, 0).numpy()
    with atomic_write(path) as temporary:
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(temporary)
    return path


def write_report(folder: Path, report: Mapping[str, Any], *, outputs: Iterable[str]) -> dict[str, Any]:
    """Write ``report.json`` with the digests of the files called ``outputs``; returns what was written."""
    digests = {name: sha256_of_file(folder / name) for name in outputs}
    written = merged(plain(dict(report)), {"sha256": {"outputs": digests}})
    write_text(folder / REPORT_NAME, json.dumps(written, indent=2, allow_nan=False) + "\n")
    return written


def read_report(folder: Path) -> dict[str, Any] | None:
    """The ``report.json`` of a folder; None where there is none that can be read."""
    try:
        report = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def discard(folder: Path, names: Iterable[str]) -> None:
    """Remove files of an earlier run that a new one makes untrue; names may be patterns."""
    for name in names:
        for path in folder.glob(name):
            path.unlink()


def merged(report: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``report`` with ``more`` in it; dicts that both hold are merged too, and ``more`` wins."""
    both = {k: merged(report[k], v) for k, v in more.items() if isinstance(v, Mapping) and _is_dict(report.get(k))}
    return {**report, **more, **both}


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


def plain(value: Any) -> Any:
    """Values that JSON has: tuples become lists, paths text, and numbers that are not finite None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _no_ranking() -> InputError:
    return InputError("no ranking", got="a run without train_data", accepted="one with a training set")
