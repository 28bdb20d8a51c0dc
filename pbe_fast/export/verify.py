"""Proving a saved ONNX file: the same logits, the same predictions, the same ACC and ASR as the model."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pbe_fast.data import ImageSet, as_image_set
from pbe_fast.engine.progress import progress as show
from pbe_fast.engine.seeding import check_seed
from pbe_fast.errors import InputError, VerificationError
from pbe_fast.export.graph import Graph, read_graph
from pbe_fast.export.runtime import Floats, run, start_sessions
from pbe_fast.export.write import reference_copy
from pbe_fast.metrics import attack_success

IMAGES, TRIGGERED, RANDOM = "images", "triggered", "random"
# Batch sizes of the random images, so that a batch dimension frozen at any one of them is found.
RANDOM_BATCHES = (1, 2, 3, 7, 51)


@dataclass(frozen=True)
class OnnxReport:
    """What `verify_onnx` found. ``ok`` when there are no ``problems``.

    Args:
        path: The file.
        sha256: Digest of the bytes that were checked.
        opset: Version of the standard operator set in the file.
        providers: The onnxruntime providers that really ran it; the figures below are the worst over them.
        max_abs_diff: Largest absolute difference of any logit; infinite where one side is not finite.
        argmax_agreement: Fraction of images with the same prediction, in [0, 1]; ties count as they fall.
        images_compared: Real images compared, per provider.
        random_images: Random images compared, per provider.
        batch_sizes: Batch sizes that were run.
        acc: Accuracy on the labelled images through onnxruntime.
        asr: Attack success rate through onnxruntime; None where no triggered images are known.
        acc_model: The same through the torch model.
        asr_model: The same through the torch model.
        tolerance: The largest ``max_abs_diff`` that is accepted.
        problems: Why the file is not what the model is, one sentence each.
    """

    path: str
    sha256: str
    opset: int
    providers: tuple[str, ...]
    max_abs_diff: float
    argmax_agreement: float
    images_compared: int
    random_images: int
    batch_sizes: tuple[int, ...]
    acc: float
    asr: float | None
    acc_model: float
    asr_model: float | None
    tolerance: float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when the file computes what the model computes."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite difference becomes None."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        if not math.isfinite(self.max_abs_diff):
            values["max_abs_diff"] = None
        return {**values, "ok": self.ok}


def verify_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    images: Any,
    *,
    triggered: Any = None,
    providers: Sequence[str] | None = None,
    tolerance: float = 1e-4,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> OnnxReport:
    """Compare the saved file with the model on real and on random images, and measure ACC and ASR through the file.

    Args:
        path: A file that `export_onnx` wrote.
        model: The model it should be. Compared as a CPU, float32, eval-mode copy; not changed.
        images: Clean images with their labels (an `ImageSet`, or anything `as_image_set` takes): all are compared, and
            give ACC.
        triggered: Images with the trigger; ``labels`` are the attacker's, ``true_labels`` the truth. Those where both
            agree are compared, but left out of ASR.
        providers: onnxruntime providers to run; every one that works on this machine when None.
        tolerance: Largest absolute difference of a logit that is accepted.
        batch_size: Images at a time, besides a first batch of one.
        seed: Of the random images, uniform in [0, 1].
        progress: Show a bar when it takes more than two seconds.

    Returns:
        The figures; differences make ``ok`` false rather than raise.

    Raises:
        InputError: No such file, one that is not ONNX, or images that do not fit the model.
        VerificationError: A file that is cut short, or has another interface than the images and model.
        BackendUnavailableError: onnxruntime is missing, or a provider asked for by name does not work here.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("ONNX file", got=f"{path}, which is no file", accepted="a file that export_onnx wrote")
    images = as_image_set(images, progress=progress)
    triggered = None if triggered is None else as_image_set(triggered, progress=progress)
    _check_options(providers, tolerance, batch_size)
    seed = check_seed(seed)
    # One reading for the digest, the checks and every session, so that they speak of the same bytes.
    data = path.read_bytes()
    graph = read_graph(data, str(path))
    _check_sets(graph, path, images, triggered)
    sessions = start_sessions(data, str(path), providers)

    sources = _sources(images, triggered, graph, batch_size, seed)
    reference = reference_copy(model)
    expected = {s.name: _torch_logits(reference, s, graph, progress) for s in sources}
    found = _Comparison(tolerance)
    measured: dict[str, tuple[float, float | None]] = {}
    for provider, session in sessions.items():
        logits = {s.name: _onnx_logits(session, s, provider, progress) for s in sources}
        for name in logits:
            found.add(provider, name, logits[name], expected[name])
        measured[provider] = _acc_asr(logits, images, triggered)
    acc_model, asr_model = _acc_asr(expected, images, triggered)
    # The provider that is furthest from the model speaks for the file.
    acc = max((acc for acc, _ in measured.values()), key=lambda acc: abs(acc - acc_model))
    asr = max(
        (asr for _, asr in measured.values() if asr is not None), key=lambda a: abs(a - (asr_model or 0)), default=None
    )
    return OnnxReport(
        path=str(path),
        sha256=hashlib.sha256(data).hexdigest(),
        opset=graph.opset,
        providers=tuple(sessions),
        max_abs_diff=found.max_abs_diff,
        argmax_agreement=found.same / found.count,
        images_compared=sum(len(s) for s in sources if s.name != RANDOM),
        random_images=sum(RANDOM_BATCHES),
        batch_sizes=tuple(sorted({size for s in sources for size in s.sizes})),
        acc=acc,
        asr=asr,
        acc_model=acc_model,
        asr_model=asr_model,
        tolerance=tolerance,
        problems=tuple(found.problems),
    )


@dataclass(frozen=True)
class _Source:
    """Images to run through both sides, batch by batch so that only one batch at a time is in float."""

    name: str
    sizes: tuple[int, ...]
    floats: Callable[[slice], Tensor]

    def __len__(self) -> int:
        return sum(self.sizes)

    def batches(self) -> Iterator[Tensor]:
        start = 0
        for size in self.sizes:
            yield self.floats(slice(start, start + size)).cpu()
            start += size


@dataclass
class _Comparison:
    """What has been seen so far of the differences between the file and the model."""

    tolerance: float
    max_abs_diff: float = 0.0
    same: int = 0
    count: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, provider: str, name: str, logits: Floats, expected: Floats) -> None:
        """Compare the logits (N, K) of one set of images through one provider."""
        where = f"{provider} on {name}"
        same = int((logits.argmax(1) == expected.argmax(1)).sum())
        self.same += same
        self.count += len(expected)
        if not np.isfinite(logits).all():
            self.max_abs_diff = math.inf
            self.problems.append(f"{where}: got logits that are not finite; accepted: finite ones, as the model's")
            return
        difference = float(np.abs(logits - expected).max())
        self.max_abs_diff = max(self.max_abs_diff, difference)
        if difference > self.tolerance:
            scale = f"{difference:.3g} off the model's, which reach {float(np.abs(expected).max()):.3g}"
            self.problems.append(f"{where}: got logits {scale}; accepted: {self.tolerance:g}")
        if same < len(expected):
            self.problems.append(
                f"{where}: got {len(expected) - same} of {len(expected)} predictions other than the model's"
            )


def _check_options(providers: object, tolerance: object, batch_size: object) -> None:
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise InputError("batch_size", got=repr(batch_size), accepted="a whole number above 0")
    if not isinstance(tolerance, int | float | np.number) or not tolerance > 0:
        raise InputError("tolerance", got=repr(tolerance), accepted="a number above 0")
    if isinstance(providers, str):
        raise InputError("providers", got=repr(providers), accepted="a list of names, or None for all that work here")


def _check_sets(graph: Graph, path: Path, images: ImageSet, triggered: ImageSet | None) -> None:
    if triggered is not None and triggered.true_labels is None:
        raise InputError(
            "triggered images without true labels",
            got=f"image set '{triggered.name}'",
            accepted="one whose labels are the attacker's targets and whose true_labels are the truth",
        )
    for data in (images, triggered) if triggered is not None else (images,):
        if data.image_shape != graph.image_shape:
            raise VerificationError(
                f"images of {path}: got (C, H, W) of {graph.image_shape}; "
                f"accepted: {data.image_shape}, as those of {data.name}"
            )
        if int(data.labels.max()) >= graph.num_classes:
            raise InputError(
                f"labels of {data.name}",
                got=f"up to {int(data.labels.max())}",
                accepted=f"below {graph.num_classes} logits",
            )


def _sources(images: ImageSet, triggered: ImageSet | None, graph: Graph, batch_size: int, seed: int) -> list[_Source]:
    sources = [_Source(IMAGES, _sizes(len(images), batch_size), images.floats)]
    if triggered is not None:
        sources.append(_Source(TRIGGERED, _sizes(len(triggered), batch_size), triggered.floats))
    noise = torch.rand(
        sum(RANDOM_BATCHES), *graph.image_shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed)
    )
    return [*sources, _Source(RANDOM, RANDOM_BATCHES, noise.__getitem__)]


def _sizes(count: int, batch_size: int) -> tuple[int, ...]:
    """One image alone, then full batches, then what is left."""
    full, left = divmod(count - 1, batch_size)
    return (1, *[batch_size] * full, *([left] if left else []))


def _torch_logits(model: nn.Module, source: _Source, graph: Graph, progress: bool) -> Floats:
    bar = show(source.batches(), total=len(source.sizes), desc=f"torch, {source.name}", enabled=progress)
    with torch.no_grad():
        logits = np.concatenate([model(batch).numpy() for batch in bar])
    if logits.shape[1] != graph.num_classes:
        raise VerificationError(
            f"logits of the file: got {graph.num_classes}; accepted: {logits.shape[1]}, as the model's"
        )
    if not np.isfinite(logits).all():
        raise InputError(
            f"logits of the model on {source.name}", got="values that are not finite", accepted="finite ones"
        )
    return logits


def _onnx_logits(session: Any, source: _Source, provider: str, progress: bool) -> Floats:
    bar = show(source.batches(), total=len(source.sizes), desc=f"{provider}, {source.name}", enabled=progress)
    return np.concatenate([run(session, batch.numpy(), f"{provider} on {source.name}") for batch in bar])


def _acc_asr(logits: Mapping[str, Floats], images: ImageSet, triggered: ImageSet | None) -> tuple[float, float | None]:
    """ACC, and ASR as `pbe_fast.metrics` defines it (None where every triggered image was of the target class)."""
    acc = float((logits[IMAGES].argmax(1) == images.labels.cpu().numpy()).mean())
    if triggered is None:
        return acc, None
    asr = attack_success(torch.from_numpy(logits[TRIGGERED].argmax(1)), triggered.to("cpu"))["asr"]
    return acc, None if math.isnan(asr) else asr
