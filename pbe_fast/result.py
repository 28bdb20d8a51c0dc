"""What `purify` and the other defences return, and how it is saved."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pbe_fast.config import PurifyConfig, to_dict
from pbe_fast.data import ImageSet
from pbe_fast.engine.files import atomic_write, prepare_output, write_text
from pbe_fast.engine.machine import describe
from pbe_fast.models import ModelSpec, save_model
from pbe_fast.ranking import Ranking


@dataclass(frozen=True, eq=False, kw_only=True)
class PurifyResult:
    """A purified model and the evidence.

    Attributes:
        model: In eval mode, with the device and dtypes of the model that was given.
        ranking: Of the training set (Eq. 9); None where none was given.
        history: One entry per round: ``extra_set_size``, losses per epoch, ``seconds``, and where the truth is known
            ``ap_of_poisoned``, ``ap_of_clean`` and ``extra_set_poison_rate``.
        config: The options of the run.
        seed: Of the run.
        seconds: By phase.
        precision: Of the matrix products.
        train_data: The ranked set.
    """

    model: nn.Module
    ranking: Ranking | None
    history: list[dict[str, Any]]
    config: PurifyConfig
    seed: int
    seconds: dict[str, float]
    precision: str
    train_data: ImageSet | None = field(default=None, repr=False)

    def suspected(self) -> Tensor:
        """(N,) bool over the training set: images that look poisoned; see `Ranking.suspected`.

        Raises:
            ValueError: There was no training set to rank.
        """
        if self.ranking is None:
            raise ValueError("no ranking; got a run without train_data; accepted: one with a training set")
        return self.ranking.suspected()

    def report(self) -> dict[str, Any]:
        """Everything but the tensors, as plain JSON values."""
        return {
            "rounds": self.history,
            "seconds": self.seconds,
            "config": to_dict(self.config),
            "seed": self.seed,
            "precision": self.precision,
            "machine": describe(),
        }

    def save(
        self, folder: str | os.PathLike[str], *, spec: ModelSpec | None = None, force: bool = False, **more: Any
    ) -> Path:
        """Write ``model.safetensors``, ``ranking.csv`` (index, label, score, suspected) and ``report.json``.

        Args:
            folder: Made if need be.
            spec: How to build the network again; without it the weights can only be loaded with an architecture given.
            force: Replace what a run left in the folder.
            more: Further entries of the report.

        Raises:
            OutputError: The folder cannot be written to, or holds a run.
        """
        out = prepare_output(folder, force=force)
        save_model(self.model, spec, out)
        if self.ranking is not None and self.train_data is not None:
            write_ranking(out / "ranking.csv", self.ranking, self.train_data)
        report = self.report() | more
        report["outputs"] = {p.name: sha256_of_file(p) for p in sorted(out.iterdir()) if p.name in _OUTPUTS}
        write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
        return out


_OUTPUTS = ("model.safetensors", "ranking.csv", "model.onnx")


def write_ranking(path: Path, ranking: Ranking, data: ImageSet) -> None:
    """The ranking as CSV, most suspicious image first."""
    suspected = ranking.suspected()
    order = ranking.order.flip(0)
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "label", "score", "suspected"])
        columns = (order, data.labels[order], ranking.score[order].double(), suspected[order])
        for index, label, score, flag in zip(*(c.tolist() for c in columns), strict=True):
            writer.writerow([index, label, f"{score:.7f}", int(flag)])


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
