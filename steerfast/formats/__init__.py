"""Steering files of other projects: read them as profiles, write profiles as such files.

    profile, notes = formats.read("vector.gguf").profile(model_identity)
    notes = formats.write(profile, "vector.gguf")

Files may come from strangers: nothing in them is run, sizes are checked before memory is allocated, and content that
a profile cannot hold is refused. Layer numbers become 0-based decoder blocks whose output is edited; notes say so.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from steerfast._files import is_foreign, write_atomically, write_folder
from steerfast.errors import ProfileError
from steerfast.formats.arrays import NUMPY, SAKLAS
from steerfast.formats.base import Condition, Format, Imported, ImportOptions, export_rows
from steerfast.formats.gguf import EASYSTEER, GGUF, GLP
from steerfast.formats.jsonfile import RHIZONYMPH, SVEC, VLLM_LENS, condition_file, condition_of
from steerfast.formats.reading import Malformed, content
from steerfast.formats.torchfile import HOTWIRE, REFUSAL, ROTALABS, STEERING_VECTORS, VLLM_HOOK
from steerfast.profile import SteeringProfile

__all__ = [
    "FORMATS",
    "Condition",
    "Format",
    "ImportOptions",
    "Imported",
    "condition_of",
    "detect",
    "is_profile",
    "read",
    "write",
]

# In the order in which a file is tried: the more specific format comes first.
_KNOWN = (
    *(GLP, EASYSTEER, GGUF),
    *(NUMPY, SAKLAS),
    *(ROTALABS, STEERING_VECTORS, REFUSAL, VLLM_HOOK, HOTWIRE),
    *(SVEC, VLLM_LENS, RHIZONYMPH),
)
FORMATS = {known.name: known for known in _KNOWN}
_POINTER = b"version https://git-lfs.github.com/spec/"


def named(name: str) -> Format:
    """Return the format of that name."""
    if name not in FORMATS:
        raise ProfileError(f"format: expected one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def detect(path: str | os.PathLike[str]) -> str:
    """Return the name of the format of a file or folder, by its content.

    Raises:
        ProfileError: missing, too large, or of an unknown format.
    """
    source = Path(path)
    return _detect(source, content(source)).name


def is_profile(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is to be read as a profile: by its ending, unless its content is of another project."""
    return Path(path).suffix == ".safetensors" and not is_foreign(Path(path))


def _detect(path: Path, data: bytes) -> Format:
    if data.startswith(_POINTER):
        raise ProfileError(
            f"file {str(path)!r}: expected vectors, got a git-lfs pointer to them: run `git lfs pull` in its "
            "repository, or download the file itself"
        )
    for known in FORMATS.values():
        if known.detects(path, data):
            return known
    raise ProfileError(f"file {str(path)!r}: expected one of {', '.join(FORMATS)}, recognised none")


def read(path: str | os.PathLike[str], format: str | None = None) -> Imported:
    """Return the content of a file or folder.

    Args:
        format: a name of `FORMATS`; None: recognised by the content.

    Raises:
        ProfileError: missing, of another format, malformed, or something that no profile holds.
    """
    source = Path(path)
    data = content(source)
    known = _detect(source, data) if format is None else named(format)
    try:
        imported = known.read(source, data)
    except Malformed as error:
        raise ProfileError(f"{known.name} file {str(source)!r}: {_line(error)}") from None
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProfileError(f"{known.name} file {str(source)!r}: incomplete or malformed ({error!r:.200})") from None
    return replace(imported, notes=(f"read as {known.name}", *imported.notes))


def _line(error: Exception) -> str:
    """Return a message as one short line: it may quote names out of the file."""
    return "".join(c if c.isprintable() else "?" for c in str(error)[:400])


def write(
    profile: SteeringProfile,
    path: str | os.PathLike[str],
    format: str,
    *,
    condition: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Write the vectors of a profile, whole or not at all, and return notes on losses, the gate above all.

    Args:
        condition: for svec, a second file for the directions of the gate.

    Raises:
        ProfileError: the format is only read, or cannot hold the profile's edit.
        OutputError: a file cannot be written.
    """
    known = named(format)
    if known.encode is None:
        raise ProfileError(f"format: {known.name} files are pickles and only read, expected another format")
    if condition is not None and known is not SVEC:
        raise ProfileError(f"condition: only svec has files for it, got {known.name}")
    rows = export_rows(profile, edit=known.edit, gate_apart=condition is not None)
    try:
        made, notes = known.encode(rows)
        gate, how = condition_file(profile) if condition is not None else (b"", [])
    except Malformed as error:
        raise ProfileError(f"{known.name}: {error}") from None
    if condition is not None:
        write_atomically(condition, gate)
    if isinstance(made, bytes):
        write_atomically(path, made)
    else:
        write_folder(Path(path), made)
    return [f"layers: {known.layers}", *rows.notes, *notes, *how]
