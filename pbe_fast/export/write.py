"""Writing a model as one ONNX file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pbe_fast.engine.copies import deep_copy
from pbe_fast.engine.files import atomic_write
from pbe_fast.errors import InputError, VerificationError
from pbe_fast.export.graph import INPUT, OUTPUT, first_line, read_graph, require
from pbe_fast.models import check_module

# torch's exporter starts from 18 and leaves anything older at 18 without failing.
MIN_OPSET = 18
# protobuf cannot hold more in one message.
MAX_BYTES = 2**31 - 1
# The exporter's loggers, with all below them; and a lock, as of two exports at a time one would put back the other's.
_TALKATIVE = ("torch", "torch.__trace", "onnxscript", "onnx_ir")
_silencing = threading.Lock()


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    image_shape: tuple[int, int, int],
    metadata: Mapping[str, str] | None = None,
    opset: int = 20,
) -> Path:
    """Write ``model`` as one ONNX file that any runtime with the standard operators can read.

    The graph takes ``images``, float32 (batch, C, H, W) in [0, 1] with any batch size, and gives ``logits``, float32
    (batch, K): pixel normalisation that is part of the model (`pbe_fast.Normalized`) is part of the graph. What is
    written is a CPU, float32, eval-mode copy; the model itself is not touched. The same weights give the same bytes.

    Args:
        model: A classifier that returns logits (B, K).
        path: Where to write; appears only once the file is whole and has passed its checks.
        image_shape: (C, H, W) of the images.
        metadata: More properties to store in the file, for instance ``class_names`` as a JSON list. Always stored:
            ``pbe_fast_version``, ``weights_sha256``, ``image_shape``, ``num_classes``, ``input_range``.
        opset: Version of the ONNX operator set, 18 or later.

    Returns:
        ``path``.

    Raises:
        InputError: A model, shape or opset that cannot be exported.
        VerificationError: The exported graph holds custom operators, another opset or a fixed batch.
        OutputError: ``path`` cannot be written.
        BackendUnavailableError: onnx or onnxscript is missing.
    """
    onnx = require("onnx")
    require("onnxscript")
    path = Path(path)
    _check_arguments(image_shape, metadata, opset, onnx.defs.onnx_opset_version())
    # numpy's integers, too: JSON and protobuf know none.
    channels, height, width = (int(size) for size in image_shape)
    image_shape, opset = (channels, height, width), int(opset)
    reference = reference_copy(model)
    num_classes = _count_logits(reference, image_shape)
    properties = {
        **(metadata or {}),
        "pbe_fast_version": importlib.import_module("pbe_fast").__version__,
        "weights_sha256": weights_sha256(model),
        "image_shape": json.dumps(list(image_shape)),
        "num_classes": str(num_classes),
        "input_range": "[0, 1]",
    }
    # Opened before the tracing, so that a place that cannot be written to is known at once.
    with atomic_write(path) as temporary:
        proto = _trace(reference, image_shape, opset)
        _strip(proto)
        onnx.helper.set_model_props(proto, dict(sorted(properties.items())))
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
        graph = read_graph(temporary.read_bytes(), str(path))
        if (graph.opset, graph.image_shape, graph.num_classes) != (opset, tuple(image_shape), num_classes):
            raise VerificationError(
                f"the exporter wrote another graph than was asked for: got opset {graph.opset}, images "
                f"{graph.image_shape}, {graph.num_classes} logits; "
                f"accepted: opset {opset}, images {image_shape}, {num_classes} logits"
            )
    return path


def reference_copy(model: nn.Module) -> nn.Module:
    """``model`` as a CPU, float32, eval-mode copy: what an ONNX file is made from and measured against."""
    copied = deep_copy(_unwrap(check_module(model)))
    # Plain NCHW strides: a channels_last copy would leave transposes in the graph.
    copied = copied.eval().to("cpu", torch.float32)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data = tensor.data.contiguous()
    return copied


def weights_sha256(model: nn.Module) -> str:
    """Digest of every parameter and buffer: name, dtype, shape and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(_unwrap(model).state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and data-parallel wrappers, which cannot be traced."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrap(inner.module)
    return inner


def _check_arguments(image_shape: object, metadata: Mapping[str, str] | None, opset: int, newest: int) -> None:
    if not (
        isinstance(image_shape, tuple)
        and len(image_shape) == 3
        and all(isinstance(n, int | np.integer) and n > 0 for n in image_shape)
    ):
        raise InputError("image_shape", got=repr(image_shape), accepted="(C, H, W), three positive integers")
    if not isinstance(opset, int | np.integer) or not MIN_OPSET <= opset <= newest:
        raise InputError("opset", got=repr(opset), accepted=f"{MIN_OPSET} to {newest}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError("metadata", got=f"{key!r}: {value!r}", accepted="strings only; json.dumps the rest")


def _count_logits(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *image_shape, dtype=torch.float32))
    except Exception as error:
        raise InputError(
            f"model on images of shape {image_shape}", got=first_line(error), accepted="a model of (B, C, H, W) images"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 2 or not logits.is_floating_point():
        got = f"{logits.dtype} of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError("output of the model for two images", got=got, accepted="float logits of shape (B, K)")
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, Tensor))
    if size > MAX_BYTES:
        raise InputError("model too large for one ONNX file", got=f"{size} bytes", accepted=f"at most {MAX_BYTES}")
    return int(logits.shape[1])


def _trace(model: nn.Module, image_shape: tuple[int, int, int], opset: int) -> Any:
    try:
        with _silence():
            # Two images: with one, the tracer takes the batch for a constant.
            program = torch.onnx.export(
                model,
                (torch.zeros(2, *image_shape, dtype=torch.float32),),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise InputError(
            "model that torch.onnx cannot export",
            got=first_line(root),
            accepted="a model that torch.export can trace with a dynamic batch, in operators that ONNX has",
        ) from error
    if program is None:
        raise VerificationError("torch.onnx.export gave no program; accepted: torch 2.11 or later")
    return program.model_proto


def _strip(proto: Any) -> None:
    """Drop the tracer's notes (source paths of this machine among them) and what varies from process to process."""
    nodes_and_values = [*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer]
    for part in [proto, proto.graph, *nodes_and_values, *proto.functions]:
        del part.metadata_props[:]
        part.doc_string = ""
    del proto.graph.value_info[:]
    weights = sorted(proto.graph.initializer, key=lambda tensor: str(tensor.name))
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(weights)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Inside, the exporter says nothing; what others log, or this thread's model does, goes its way."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    with _silencing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL + 1)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
