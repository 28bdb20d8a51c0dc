"""Findings of a report as lines for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def ranking_text(summary: Mapping[str, Any]) -> str:
    """How many images are suspected, and how right that is where the truth is known."""
    text = f"suspected: {summary['suspected']:,} of {summary['images']:,} training images"
    if "recall" in summary:
        text += (
            f", {_percent(summary['precision'])} of them poisoned; {_percent(summary['recall'])} of the "
            f"{summary['poisoned']:,} poisoned images are among them (AP {summary['ap_of_poisoned']:.2f})"
        )
    labels = summary["suspected_labels"]
    if labels:
        text += f"\nlabels that changed far more than the others: {', '.join(labels)}"
    return text


def findings_text(history: Iterable[Mapping[str, Any]], class_names: Sequence[str]) -> list[str]:
    """What the steps of a defence, or the first round of PBE, found, where they say so."""
    lines = []
    for entry in history:
        if "finding" in entry:
            lines.append(f"{entry['step']}: {entry['finding']}")
        if wave := entry.get("wave"):
            leads = f"to {class_names[wave['label']]}" if "label" in wave else f"from y to y + {wave['shift']}"
            lines.append(
                f"a wave of {wave['down']} periods down and {wave['across']} across the picture led the infected model "
                f"{leads}"
            )
    return lines


def onnx_text(onnx: Mapping[str, Any]) -> str:
    """What the comparison of an ONNX file with its model gave."""
    largest = onnx["max_abs_diff"]
    verdict = "computes what the model computes" if onnx["ok"] else "differs from the model"
    count = onnx["images_compared"] + onnx["random_images"]
    measured = f"ACC {_percent(onnx['acc'])}" + (f", ASR {_percent(onnx['asr'])}" if onnx["asr"] is not None else "")
    return "\n".join(
        [
            f"{onnx['path']} {verdict}:",
            f"  {count:,} images on {', '.join(onnx['providers'])}: {measured}",
            f"  equal predictions {_percent(onnx['argmax_agreement'], 2)}, largest difference of a logit "
            + ("not finite" if largest is None else f"{largest:.1e}"),
        ]
    )


def _percent(fraction: float | None, digits: int = 1) -> str:
    return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"
