"""What an ONNX file says about itself, and the promises of this package that it must keep."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pbe_fast.errors import BackendUnavailableError, InputError, VerificationError

INPUT = "images"
OUTPUT = "logits"
# Both spell the standard operator set; anything else needs a runtime that knows the operators.
STANDARD_DOMAINS = ("", "ai.onnx")
# In protobuf's encoding: field 1, a whole number.
_FIRST_FIELD = b"\x08"


@dataclass(frozen=True)
class Graph:
    """The interface of a checked file.

    Args:
        opset: Version of the standard operator set.
        image_shape: (C, H, W) of the input ``images``, float32 in [0, 1].
        num_classes: K of the output ``logits``, float32 (batch, K).
        metadata: The file's metadata properties.
    """

    opset: int
    image_shape: tuple[int, int, int]
    num_classes: int
    metadata: dict[str, str]


def require(module: str) -> Any:
    """An optional dependency, or an error that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailableError(
            f"ONNX needs the package {module}: got {error}; "
            "accepted: an environment with pip install 'pbe-fast[cpu]' or 'pbe-fast[gpu]'"
        ) from error


def read_graph(data: bytes, name: str) -> Graph:
    """Check the bytes of an ONNX file against what `export_onnx` promises.

    Args:
        data: The whole file.
        name: What to call it in an error.

    Returns:
        Its interface.

    Raises:
        InputError: A file of another kind.
        VerificationError: Cut short, weights in another file, an operator outside the standard set, or
            another interface than ``images`` (batch, C, H, W) to ``logits`` (batch, K) with a dynamic batch.
    """
    onnx = require("onnx")
    # An ONNX file begins with its ir_version; of an empty one nobody can tell.
    if data and not data.startswith(_FIRST_FIELD):
        raise InputError(f"ONNX file {name}", got="a file of another kind", accepted="a file that export_onnx wrote")
    try:
        proto = onnx.load_model_from_string(data)
    except Exception as error:
        raise VerificationError(f"{name} is not a whole ONNX model: got {first_line(error)}") from error
    # Before the checker, which would look for that other file.
    external = [t.name for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if external:
        raise VerificationError(f"{name} keeps weights in another file: got {external[0]}; accepted: one file")
    _require_standard(proto, name)
    try:
        onnx.checker.check_model(proto)
    except Exception as error:
        raise VerificationError(f"{name} is not a whole ONNX model: got {first_line(error)}") from error
    channels, height, width = _interface(proto.graph.input, INPUT, ("C", "H", "W"), name)
    (num_classes,) = _interface(proto.graph.output, OUTPUT, ("K",), name)
    opset = next(o.version for o in proto.opset_import if o.domain in STANDARD_DOMAINS)
    return Graph(opset, (channels, height, width), num_classes, {p.key: p.value for p in proto.metadata_props})


def first_line(error: BaseException) -> str:
    """The first line of an error's message; exporters and runtimes add pages to it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _require_standard(proto: Any, name: str) -> None:
    bodies = [proto.graph.node, *(function.node for function in proto.functions)]
    foreign = {f"{n.domain}::{n.op_type}" for body in bodies for n in _walk(body) if n.domain not in STANDARD_DOMAINS}
    foreign |= {f"{f.domain}::{f.name}" for f in proto.functions if f.domain not in STANDARD_DOMAINS}
    if foreign:
        raise VerificationError(
            f"{name} holds operators that are not ONNX's own: got {', '.join(sorted(foreign))}; "
            "accepted: the standard operator set only"
        )


def _walk(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _walk(attribute.g.node)
            for graph in attribute.graphs:
                yield from _walk(graph.node)


def _interface(values: Any, wanted: str, axes: tuple[str, ...], name: str) -> tuple[int, ...]:
    """Sizes after the batch of the one input or output."""
    if len(values) == 1 and _spell(values[0]).startswith(f"float {wanted} "):
        dims = values[0].type.tensor_type.shape.dim
        if len(dims) == 1 + len(axes) and dims[0].dim_param and all(d.dim_value > 0 for d in dims[1:]):
            return tuple(int(d.dim_value) for d in dims[1:])
    raise VerificationError(
        f"interface of {name}: got {', '.join(map(_spell, values)) or 'nothing'}; "
        f"accepted: float {wanted} (batch, {', '.join(axes)}), the batch dynamic and the rest fixed"
    )


def _spell(value: Any) -> str:
    tensor = value.type.tensor_type
    dims = ", ".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
    dtype = require("onnx").TensorProto.DataType.Name(tensor.elem_type).lower()
    return f"{dtype} {value.name} ({dims})"
