"""Careful reading of other projects' files: their bytes, JSON, numbers, shapes and layer numbers."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import math
import os
import re
import reprlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.errors import ProfileError, first_line

# A vector for each of 126 layers of 16384 is 8 MB, its JSON 45 MB. A reader holds a file about three times.
MOST_BYTES = 48 << 20
_MOST_CONTAINERS, _MOST_COMMAS = 1 << 16, 1 << 21  # of a JSON file; an empty list takes 64 bytes, a number 32
_LAYER = re.compile(r"(?:(?<![A-Za-z])[Ll]ayer[-_ ]?|(?<![A-Za-z0-9])L)(\d{1,3})(?!\d|[-.]\d)")


class Malformed(ValueError):
    """The content of a file is wrong; `steerfast.formats.read` adds the file's name to the message."""


@contextlib.contextmanager
def malformed_unless(what: str) -> Iterator[None]:
    """Turn any error into `Malformed`: a file that is a program may fail in any way; then it is not `what`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Malformed:
        raise
    except Exception as error:
        raise Malformed(f"not {what} ({type(error).__name__}: {first_line(error)[:120]})") from None


def brief(value: object) -> str:
    """Return a short text of any value, without control characters; data may nest to no end."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 2, 60, 60, 40


def layer_in(*names: str) -> tuple[int, str] | None:
    """Return the one layer that names of a file or its parts tell, such as `layer15` or `L12`, and that name."""
    found = {int(number): name for name in names[::-1] for number in _LAYER.findall(name)}
    return found.popitem() if len(found) == 1 else None


def content(path: Path) -> bytes:
    """Return the bytes of a file; none for a folder.

    Raises:
        ProfileError: missing, not readable, too large.
    """
    if path.is_dir():
        return b""
    if not path.is_file():
        raise ProfileError(f"file: expected a file or folder at {str(path)!r}, found none")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MOST_BYTES:
                raise ProfileError(
                    f"file: expected at most {MOST_BYTES >> 20} MiB, got {size >> 20} MiB in {str(path)!r}"
                )
            return file.read(MOST_BYTES)
    except OSError as error:
        raise ProfileError(f"file: cannot read {str(path)!r} ({error.strerror})") from None


def json_of(data: bytes, *keys: str) -> Any:
    """Return the JSON value in a file; None for other content, or where it has none of `keys`, if such are given."""
    if data[:64].lstrip()[:1] not in (b"{", b"[") or (keys and not any(b'"%b"' % key.encode() in data for key in keys)):
        return None
    try:
        return _parsed(data)
    except Malformed:
        return None


def json_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a file."""
    return mapping("the file", _parsed(data))


def _parsed(data: bytes) -> Any:
    if data.count(b"[") + data.count(b"{") > _MOST_CONTAINERS or data.count(b",") > _MOST_COMMAS:
        raise Malformed(f"not JSON of vectors: expected at most {_MOST_CONTAINERS} lists and {_MOST_COMMAS} numbers")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON ({error})") from None


def mapping(what: str, value: object) -> dict[str, Any]:
    """Return `value`, a JSON object, or raise."""
    if not isinstance(value, dict):
        raise Malformed(f"{what}: expected an object, got {type(value).__name__}")
    return value


def layer_number(value: object) -> int:
    """Return a layer number of a file: a whole number from 0, or its text."""
    text = str(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not (text.isascii() and text.isdigit()):
        raise Malformed(f"layer: expected a whole number from 0, got {brief(value)}")
    if len(text) > 6:
        raise Malformed(f"layer: expected a number of at most 6 digits, got {text[:20]}...")
    return int(text)


def number(what: str, value: object) -> float:
    """Return `value`, a finite number, or raise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Malformed(f"{what}: expected a finite number, got {brief(value)}")
    return float(value)


def floats(what: str, value: object) -> Tensor:
    """Return a JSON list of numbers as float32 [n]."""
    if not isinstance(value, list) or not value or not all(type(entry) in (int, float) for entry in value):
        raise Malformed(f"{what}: expected a list of numbers, got {brief(value)}")
    try:
        return vector(what, torch.tensor(value, dtype=torch.float64))
    except OverflowError:
        raise Malformed(f"{what}: expected numbers of float32's range") from None


def vector(what: str, value: object, dims: tuple[int, ...] = (1,)) -> Tensor:
    """Return a tensor of a file as finite float32 on the CPU."""
    if not isinstance(value, Tensor):
        raise Malformed(f"{what}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or not value.is_floating_point() or value.device.type != "cpu":
        raise Malformed(f"{what}: expected dense floating point, got {value.dtype}, {value.layout}, {value.device}")
    if value.dim() not in dims or 0 in value.shape:
        expected = " or ".join(f"{n}-D" for n in dims)
        raise Malformed(f"{what}: expected shape {expected} and not empty, got {list(value.shape)}")
    if value.numel() * 4 > MOST_BYTES:  # a view may claim any shape over little memory
        raise Malformed(f"{what}: expected at most {MOST_BYTES >> 20} MiB, got shape {list(value.shape)}")
    made = value.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
    if not bool(made.isfinite().all()):
        raise Malformed(f"{what}: expected finite numbers of float32's range, got nan or infinity")
    return made


def packed(what: str, data: bytes, dtype: object, shape: object) -> Tensor:
    """Return little-endian raw numbers as float32 of `shape`.

    Args:
        dtype: float64, float32, float16 or bfloat16.
    """
    known = ("float64", "float32", "float16", "bfloat16")
    if dtype not in known:
        raise Malformed(f"{what}: expected dtype {', '.join(known)}, got {brief(dtype)}")
    expected, kind = checked_shape(what, shape), getattr(torch, str(dtype))
    if len(data) != (size := math.prod(expected) * kind.itemsize):
        raise Malformed(f"{what}: expected {size} bytes for {dtype} {expected}, got {len(data)}")
    return vector(what, torch.frombuffer(bytearray(data), dtype=kind).reshape(expected), (1, 2, 3))


def checked_shape(what: str, shape: object) -> list[int]:
    """Return a shape of a file: up to 3 sizes from 1, of no more numbers than a file may hold."""
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= 3
        or not all(type(size) is int and 1 <= size <= MOST_BYTES for size in shape)
        or math.prod(shape) * 4 > MOST_BYTES
    ):
        raise Malformed(
            f"{what}: expected a shape of 1 to 3 sizes and at most {MOST_BYTES >> 20} MiB, got {brief(shape)}"
        )
    return shape


def base64_bytes(what: str, value: object) -> bytes:
    """Return the bytes that base64 text encodes."""
    if not isinstance(value, str):
        raise Malformed(f"{what}: expected base64 text, got {type(value).__name__}")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"{what}: not base64 ({error})") from None
