"""Running a file in onnxruntime, on every provider that this machine really has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pbe_fast.errors import BackendUnavailableError, VerificationError
from pbe_fast.export.graph import INPUT, OUTPUT, first_line, require

Floats = npt.NDArray[np.float32]

CPU = "CPUExecutionProvider"
# Listed by the CPU wheel, but sends images to a service instead of computing here.
REMOTE_PROVIDERS = ("AzureExecutionProvider",)
# TF32 rounds to 10 bits of mantissa: about 1e-3, which is no float32 check.
PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}


def start_sessions(data: bytes, name: str, wanted: Sequence[str] | None) -> dict[str, Any]:
    """One session per provider that really works here.

    Args:
        data: The bytes of an ONNX file.
        name: What to call it in an error.
        wanted: Providers by their onnxruntime names; all that work when None.

    Returns:
        Sessions by provider; the CPU's is always there when ``wanted`` is None.

    Raises:
        VerificationError: onnxruntime cannot load the file.
        BackendUnavailableError: onnxruntime is missing, or a wanted provider does not work here.
    """
    ort = require("onnxruntime")
    available = ort.get_available_providers()
    for provider in wanted or ():
        if provider not in available:
            raise BackendUnavailableError(f"onnxruntime provider {provider!r}; accepted: {', '.join(available)}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    sessions: dict[str, Any] = {}
    for provider in wanted or [p for p in available if p not in REMOTE_PROVIDERS]:
        try:
            session = ort.InferenceSession(
                data, options, providers=[(provider, PROVIDER_OPTIONS.get(provider, {}))], enable_fallback=0
            )
        except Exception as error:
            if provider != CPU and wanted is None:
                continue
            raise VerificationError(f"{name} in onnxruntime, {provider}: got {first_line(error)}") from error
        # The GPU wheel lists CUDA without a GPU, and then runs on the CPU without a word.
        if session.get_providers()[0] == provider:
            sessions[provider] = session
        elif wanted is not None:
            raise BackendUnavailableError(f"onnxruntime provider {provider!r} does not start on this machine")
    return sessions


def run(session: Any, images: Floats, where: str) -> Floats:
    """Logits (B, K) of images (B, C, H, W), float32 in [0, 1]."""
    try:
        logits: Floats = session.run([OUTPUT], {INPUT: images})[0]
    except Exception as error:
        raise VerificationError(f"onnxruntime, {where}: got {first_line(error)}") from error
    return logits
