"""Write files whole or not at all, and safetensors files with a checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from steerfast.errors import OutputError, SteerfastError

_KEY = "steerfast"  # of the safetensors metadata that holds the header
_MOST_LEVELS = 100  # of a header; a file of ours has some five
_MOST_HEADER = 8 << 20  # bytes; a profile with figures of every layer and source has 0.2 MB


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a crash, never meets half a file.

    A device or a pipe (``/dev/stdout``) is written to directly, never replaced by a file.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_bytes(data)
        return
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise OutputError(f"output: cannot write {str(target)!r} ({error.strerror})") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files private; a result gets the usual permissions
        os.replace(name, target)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"output: cannot write {str(target)!r} ({error.strerror})") from None
        raise


def make_folder(path: str | os.PathLike[str], fails: str) -> Path:
    """Make a folder, and those above it, unless it is there; `fails` begins the error.

    Raises:
        OutputError: it cannot be made.
    """
    made = Path(path)
    try:
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{fails} {str(made)!r} ({error.strerror})") from None
    return made


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill; it becomes `target` at the end, and is removed where that fails."""
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield made
        made.chmod(0o755)
        made.replace(target)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder of files, whole or not at all.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    if target.exists():
        raise OutputError(f"output: expected a folder that is not there yet, got {str(target)!r}")
    try:
        with new_folder(target) as made:
            for name, data in files.items():
                (made / name).write_bytes(data)
    except OSError as error:
        raise OutputError(f"output: cannot write {str(target)!r} ({error.strerror})") from None


def content_checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over JSON data and CPU tensors, with their names, dtypes and shapes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def checked_bytes(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Return one safetensors file of contiguous tensors on the CPU and JSON data, with a SHA-256 over both."""
    content = {**header, "checksum": content_checksum(header, tensors)}
    return save(dict(tensors), metadata={_KEY: json.dumps(content, sort_keys=True)})


def write_checked(path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `checked_bytes`.

    Raises:
        OutputError: `path` cannot be written.
    """
    write_atomically(path, checked_bytes(header, tensors))


def read_checked(
    path: str | os.PathLike[str], kind: str, version: int, error: type[SteerfastError]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of a file that `write_checked` wrote.

    Args:
        kind: the name of this kind of file in errors. version: the expected ``format`` of its header.

    Raises:
        error: the file is missing or truncated, has no header, another format or a wrong checksum.
    """
    source = Path(path)
    if not source.is_file():
        raise error(f"{kind}: expected a file at {str(source)!r}, found {'a folder' if source.is_dir() else 'none'}")
    try:
        metadata, tensors = read_safetensors(source)
    except (SafetensorError, OSError, ValueError) as cause:
        raise error(f"{kind} {str(source)!r}: not a readable safetensors file ({cause})") from None
    try:
        header = json.loads(metadata.get(_KEY, "null"))
    except (ValueError, RecursionError) as cause:
        raise error(f"{kind} {str(source)!r}: its header is not JSON ({cause})") from None
    if not isinstance(header, dict) or "format" not in header:
        raise error(f"{kind} {str(source)!r}: a safetensors file, but not a steerfast {kind} (no header)")
    if _levels(header) > _MOST_LEVELS:
        raise error(f"{kind} {str(source)!r}: expected a header of at most {_MOST_LEVELS} levels, got more")
    if header["format"] != version:
        raise error(f"{kind} {str(source)!r}: format {header['format']!r}, this version reads format {version}")
    if header.pop("checksum", None) != content_checksum(header, tensors):
        raise error(f"{kind} {str(source)!r}: its content does not match its checksum, the file is damaged")
    return header, tensors


def read_safetensors(path: Path, *, header_alone: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a safetensors file; with `header_alone` no tensors.

    Raises:
        SafetensorError, OSError, ValueError: not readable, or a header that is too large to parse.
    """
    with path.open("rb") as start:
        size = int.from_bytes(start.read(8), "little")
    if size > _MOST_HEADER:
        raise ValueError(f"expected a header of at most {_MOST_HEADER >> 20} MiB, got {size} bytes")
    with safe_open(path, framework="pt") as file:
        names = [] if header_alone else file.keys()
        return file.metadata() or {}, {name: file.get_tensor(name) for name in names}


def is_checked(path: str | os.PathLike[str]) -> bool:
    """Return whether `write_checked` wrote a file, of any kind; only its header is read."""
    return _KEY in (_metadata(Path(path)) or {})


def is_foreign(path: Path) -> bool:
    """Return whether a file is a whole safetensors file that `write_checked` did not write."""
    metadata = _metadata(path)
    return metadata is not None and _KEY not in metadata


def _metadata(path: Path) -> dict[str, str] | None:
    """Return the metadata of a safetensors file; None for other files."""
    try:
        return read_safetensors(path, header_alone=True)[0]
    except (SafetensorError, OSError, ValueError):
        return None


def _levels(value: Any) -> int:
    """Return how deep JSON data nest, counted up to one more than the most allowed."""
    level, at = 0, [value]
    while at and level <= _MOST_LEVELS:
        level += 1
        parts = (each.values() if isinstance(each, dict) else each for each in at if isinstance(each, dict | list))
        at = [inner for part in parts for inner in part]
    return level
