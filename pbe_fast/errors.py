"""The exceptions of the package. Every message says what was got and what is accepted."""

from __future__ import annotations


class PBEError(Exception):
    """Base class: everything that pbe_fast raises on purpose derives from it."""


class InputError(PBEError, ValueError):
    """An argument, an image set or a model that cannot be used; raised before any work starts.

    Args:
        what: What is wrong, as a phrase: "labels out of range".
        got: What was given, as the user would recognise it.
        accepted: What would have been accepted instead.
    """

    def __init__(self, what: str, *, got: object = None, accepted: str | None = None) -> None:
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if accepted is not None:
            parts.append(f"accepted: {accepted}")
        super().__init__("; ".join(parts))


class UnsafeFileError(PBEError):
    """A weights file that would run code when read. Nothing of it has been executed."""


class OutputError(PBEError, OSError):
    """An output folder that is not writable, or that already holds a run."""


class VerificationError(PBEError):
    """An exported file that does not compute what the model computes."""


class PBEWarning(UserWarning):
    """Something that is allowed and that the caller may not have meant."""


class BackendUnavailableError(PBEError, RuntimeError):
    """A backend that was asked for by name and is not there."""
