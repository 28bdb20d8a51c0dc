"""Reading the tensors of a weights file without running anything that is in it."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pbe_fast.errors import InputError, UnsafeFileError

ACCEPTED_FILES = "a .safetensors file, or a .pt, .pth or .ckpt file that holds a state_dict of tensors"
# Under these names training scripts put the state_dict beside optimiser states and counters; "netC" is WaNet's.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "netC")
# DataParallel's and torch.compile's.
_PREFIXES = ("module.", "_orig_mod.")
# How torch's restricted unpickler reports that a pickle asks for more than tensors and containers.
_REFUSED = re.compile(
    r"unsupported GLOBAL (\S+) whose|Unsupported global: GLOBAL (\S+) was not"
    r"|reduce for unrecognized function (.+)|via `add_safe_globals`,? but got (.+)"
)
_HARMLESS = re.compile(r"collections\.OrderedDict|torch\.(\w+Storage|Size|device|\w+\._rebuild_\w+)")


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state_dict in a file, on the CPU, without the wrappers that training scripts put around it.

    Args:
        path: ``.safetensors``, or ``.pt`` / ``.pth`` / ``.ckpt``: a state_dict, or a dictionary that has one under
            ``state_dict`` or ``model``. Key prefixes of DataParallel and torch.compile are taken off.

    Raises:
        InputError: Not there, damaged, of another kind, or without a state_dict of tensors.
        UnsafeFileError: A pickle that would run code. None of it has run.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("weights file", got=f"{path}, which is no file", accepted=ACCEPTED_FILES)
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"weights file {path} cannot be read", got=error, accepted=ACCEPTED_FILES) from error
    elif path.suffix in (".pt", ".pth", ".ckpt"):
        state = _find_state_dict(_load_pickle(path), path)
    else:
        raise InputError("kind of weights file", got=path, accepted=ACCEPTED_FILES)
    return strip_prefixes(state)


def strip_prefixes(state: Mapping[str, Any], own: Iterable[str] = ()) -> dict[str, Any]:
    """The state_dict without the prefixes ``module.`` and ``_orig_mod.``, where all its keys share them.

    Args:
        state: Weights by name.
        own: The network's own keys: a prefix that they share is kept.
    """
    shared, kept = _shared_prefix(state), _shared_prefix(own)
    return {kept + key.removeprefix(shared): value for key, value in state.items()}


def _shared_prefix(names: Iterable[str]) -> str:
    """What of ``module.`` and ``_orig_mod.``, in any order, all of these names begin with."""
    names, shared = list(names), ""
    for prefix in _PREFIXES * 2:
        if names and all(name.startswith(shared + prefix) for name in names):
            shared += prefix
    return shared


def without_prefix(state: dict[str, Tensor], names: Set[str]) -> dict[str, Tensor]:
    """The state_dict without a prefix that all its keys share, such as Lightning's ``model.``.

    Args:
        state: Weights by name, maybe those of a `Normalized`.
        names: The network's own keys, without such a wrapper. Where they are not what is left, nothing is taken off.
            A network whose only child is called ``module`` gets back what `strip_prefixes` took for DataParallel's.
    """
    shorter = state
    shared = _shared_prefix(names)
    stripped = {name.removeprefix(shared) for name in names}
    while shorter:
        inner = {key.removeprefix("net.") for key in shorter if key not in ("mean", "std")}
        if names == shorter.keys() or (is_normalized(shorter) and names == inner):
            return shorter
        if stripped == shorter.keys():
            return {shared + key: value for key, value in shorter.items()}
        first, dot, _ = next(iter(shorter)).partition(".")
        if not dot or not all(key.startswith(first + dot) for key in shorter):
            break
        shorter = {key.removeprefix(first + dot): value for key, value in shorter.items()}
    return state


def is_normalized(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a `Normalized` with a network in it."""
    return {"mean", "std"} < state.keys() and any(key.startswith("net.") for key in state)


def _load_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message begins with the advice to load the file all the same, which we do not pass on.
        refused = _REFUSED.search(str(error))
        name = next(filter(None, refused.groups())) if refused else _suspect_global(path)
        if name is None:
            raise InputError(f"weights file {path} cannot be read", got=_last(error), accepted=ACCEPTED_FILES) from None
        raise UnsafeFileError(
            f"{path} is a pickle with code in it and was not loaded; got a use of {name}; accepted: {ACCEPTED_FILES} "
            "(of a whole saved model, save model.state_dict())"
        ) from None
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise UnsafeFileError(
                f"{path} was not loaded; got a TorchScript archive, which is a program; accepted: {ACCEPTED_FILES}"
            ) from None
        raise InputError(f"weights file {path} cannot be read", got=_last(error), accepted=ACCEPTED_FILES) from error
    except Exception as error:  # a damaged pickle fails in whatever way its bytes suggest
        raise InputError(f"weights file {path} cannot be read", got=repr(error), accepted=ACCEPTED_FILES) from error


def _suspect_global(path: Path) -> str | None:
    """The first name that a pickle imports besides those of tensors, found by reading its opcodes as text.

    For pickles of protocol 4 and 5, which torch's unpickler refuses at their first unknown opcode. Nothing is run.
    """
    strings: list[str] = []
    try:
        with _pickle_stream(path) as stream:
            while stream.peek(1):  # the legacy format is several pickles in a row
                for opcode, argument, _ in pickletools.genops(stream):
                    name = None
                    if opcode.name == "GLOBAL":
                        name = str(argument).replace(" ", ".")
                    elif opcode.name == "STACK_GLOBAL":
                        name = ".".join(strings[-2:])
                    elif isinstance(argument, str):
                        strings.append(argument)
                    if name and not _HARMLESS.fullmatch(name):
                        return name
    except (ValueError, OSError, zipfile.BadZipFile):
        return None
    return None


def _pickle_stream(path: Path) -> io.BufferedReader:
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    with zipfile.ZipFile(path) as archive:
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    return io.BufferedReader(io.BytesIO(b"".join(pickles)))


def _last(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    candidates = [content]
    if isinstance(content, Mapping):
        candidates += [content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)]
    for candidate in candidates:
        if isinstance(candidate, Mapping) and candidate and all(isinstance(v, Tensor) for v in candidate.values()):
            return {str(key): value.detach() for key, value in candidate.items()}
    for candidate in reversed(candidates):
        if isinstance(candidate, Mapping) and any(isinstance(v, Tensor) for v in candidate.values()):
            name, kind = next((k, type(v).__name__) for k, v in candidate.items() if not isinstance(v, Tensor))
            raise InputError(f"'{name}' in the state_dict of {path}", got=kind, accepted="tensors only")
    got = type(content).__name__
    if isinstance(content, Mapping):
        got += f" of {', '.join(map(str, list(content)[:6])) or 'nothing'}"
    accepted = f"tensors by name, alone or under one of {', '.join(_WRAPPERS)}"
    raise InputError(f"no state_dict in {path}", got=got, accepted=accepted)
