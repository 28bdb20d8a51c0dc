"""A model as one ONNX file, and the proof that the file computes what the model computes."""

from __future__ import annotations

from pbe_fast.export.verify import OnnxReport, verify_onnx
from pbe_fast.export.write import export_onnx

__all__ = ["OnnxReport", "export_onnx", "verify_onnx"]
