"""Read the data in a pickle, or in an archive of torch.save, and run nothing of it.

A pickle is a program. This reader knows the opcodes for numbers, text, lists, tuples and dicts, and the functions of
`_KNOWN`, all of which are ours: tensors and arrays are made here from their bytes. Anything else is refused by name.
Work and memory stay in proportion to the file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from typing import Any

import torch
from torch import Tensor

from steerfast.formats.reading import Malformed, brief, malformed_unless, packed

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
_STEERING_VECTOR = "steering_vectors.steering_vector.SteeringVector"
_MOST_PICKLE = 32 << 20
_MOST_READS = 1 << 16  # of a pickle's parts; a vector takes about fifty
_MOST_CALLS = 1 << 10  # of the functions in `_KNOWN`; a vector takes at most four
_MOST_ENTRIES = 4096  # of an archive
_FLOATS = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16}


class SteeringVector:
    """Stand in for the class of that name in steering-vectors: the pickled fields become its attributes."""


class _Array:
    """Stand in for a numpy array until its state comes."""


class _Dtype:
    """Stand in for a numpy dtype: a kind such as f4, and the order of bytes."""

    def __init__(self, kind: object, align: object = False, copy: object = True) -> None:
        self.kind, self.order = kind, "<"

    def numbers(self, raw: object, shape: object) -> Tensor:
        """Return the numbers in `raw` as float32; a scalar has shape ()."""
        names = {"f2": "float16", "f4": "float32", "f8": "float64"}
        if self.order not in ("<", "=") or self.kind not in names or not isinstance(raw, bytes):
            raise Malformed(f"numpy array: expected little-endian floats, got {brief(self.kind)}, {brief(self.order)}")
        sizes = list(shape) if isinstance(shape, tuple) else None
        made = packed("numpy array", raw, names[str(self.kind)], sizes or [1])
        return made if sizes else made[0]


def archive_name(data: bytes) -> str:
    """Return the name that torch.save gave an archive, which is that of the file it wrote; empty for other content."""
    if not data.startswith(ZIP) or len(data) < 30:
        return ""
    length = struct.unpack_from("<H", data, 26)[0]
    return data[30 : 30 + min(length, 255)].decode("utf-8", "replace").partition("/")[0]


def load(data: bytes) -> Any:
    """Return the tensors, plain containers or `SteeringVector` in a pickle or an archive of torch.save.

    Raises:
        Malformed: another class or function, damaged, or too large.
    """
    archive = _Archive(data) if data.startswith(ZIP) else None
    program = archive.entry("data.pkl") if archive else data
    if len(program) > _MOST_PICKLE:
        raise Malformed(f"pickle: expected at most {_MOST_PICKLE >> 20} MiB, got {len(program) >> 20} MiB")
    with malformed_unless("a file of tensors" if archive else "a pickle of tensors"):
        return _Unpickler(_Counted(program), archive).load()


class _Archive:
    """The entries of a zip archive that torch.save wrote."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._storages: dict[str, Tensor] = {}
        if data.count(b"PK\x01\x02") > _MOST_ENTRIES:
            raise Malformed(f"archive: expected at most {_MOST_ENTRIES} entries, got more")
        try:
            entries = zipfile.ZipFile(io.BytesIO(data)).infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
            raise Malformed(f"expected a zip archive as torch.save writes, got a damaged one ({error})") from None
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                name = brief(entry.filename)
                raise Malformed(f"archive: expected entries stored as torch.save does, got {name} compressed")
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        if "byteorder" in self._entries and self.entry("byteorder") != b"little":
            raise Malformed("byteorder: expected little")

    def entry(self, name: str) -> bytes:
        """Return the content of an entry, by its name without the archive's."""
        if name not in self._entries:
            raise Malformed(f"archive: expected an entry {name[:40]!r} as torch.save writes, found none")
        start, size = self._entries[name].header_offset, self._entries[name].file_size
        start += 30 + sum(struct.unpack_from("<HH", self._data, start + 26))
        if len(self._data) - start < size:
            raise Malformed(f"archive: expected {size} bytes of {name[:40]!r}, got {len(self._data) - start}")
        return self._data[start : start + size]

    def storage(self, identifier: Any) -> Tensor:
        """Return a storage as 1-D tensor; tensors that share it get the same."""
        word, dtype, key, _, count = identifier
        if word != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise Malformed(f"storage: expected one of torch, got {brief(identifier)}")
        if key not in self._storages:
            self._storages[key] = _numbers(self.entry(f"data/{key}"), dtype)
        found = self._storages[key]
        if found.dtype != dtype or len(found) != count:
            raise Malformed(f"storage {key[:40]!r}: expected {brief(count)} numbers of {dtype}, got {len(found)}")
        return found


def _numbers(raw: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)


# -- what a pickle may call ------------------------------------------------------------------------


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
    """Return a view of a storage; torch checks that it lies inside."""
    return storage.as_strided(size, stride, offset)


def _storage(raw: bytes) -> Tensor:
    """Return the storage inside a pickled tensor: five pickles, of which one names the type, a count, the numbers."""
    file = io.BytesIO(raw)
    named = [word for _ in range(5) for code, word, _ in pickletools.genops(file) if code.name == "GLOBAL"]
    dtype = _FLOATS.get(str(named[0]).removeprefix("torch ").removesuffix("Storage")) if len(named) == 1 else None
    count = int.from_bytes(file.read(8), "little")
    numbers = file.read()
    if dtype is None or len(numbers) != count * dtype.itemsize:
        raise Malformed(f"storage: expected numbers of torch, got {brief(named)}")
    return _numbers(numbers, dtype)


def _encoded(text: str, encoding: str) -> bytes:
    """Return the bytes that a pickle of protocol 2 holds as text."""
    if encoding != "latin1":
        raise Malformed(f"bytes: expected latin1, got {brief(encoding)}")
    return text.encode("latin1")


_KNOWN: dict[str, Any] = {
    _STEERING_VECTOR: SteeringVector,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.storage._load_from_bytes": _storage,
    "collections.OrderedDict": lambda: {},
    "_codecs.encode": _encoded,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    **{f"torch.{name}Storage": dtype for name, dtype in _FLOATS.items()},
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _KNOWN[f"{_module}._reconstruct"] = lambda *_: _Array()
    _KNOWN[f"{_module}.scalar"] = lambda dtype, raw: dtype.numbers(raw, ())


class _Counted(io.BytesIO):
    """A file that is read in few parts."""

    _left = _MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise Malformed("pickle: expected fewer parts, got more than vectors take")
        return super().read(size)


_Python: Any = pickle._Unpickler  # the C one reserves memory for any memo index


class _Unpickler(_Python):
    """Load plain data, what `_KNOWN` makes of it, and the storages of an archive."""

    _PLAIN = (
        "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
        "BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
        "APPEND APPENDS GLOBAL STACK_GLOBAL BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE BINPERSID"
    )
    dispatch = {  # noqa: RUF012 (as the class above has it)
        code: _Python.dispatch[code] for code in (getattr(pickle, name)[0] for name in _PLAIN.split())
    }

    def __init__(self, file: io.BytesIO, archive: _Archive | None) -> None:
        super().__init__(file)
        self._archive, self._calls, self._bytes = archive, _MOST_CALLS, 2 * len(file.getvalue())

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[f"{module}.{name}"]
        except KeyError:
            raise Malformed(f"expected tensors alone, got {module}.{name}"[:200]) from None

    def persistent_load(self, identifier: Any) -> Any:
        if self._archive is None:
            raise Malformed("expected a pickle that stands alone, got one that refers to other data")
        return self._archive.storage(identifier)

    def _spend(self, *values: Any) -> None:
        self._calls -= 1
        self._bytes -= sum(len(value) for value in values if isinstance(value, str | bytes))
        if self._calls < 0 or self._bytes < 0:
            raise Malformed("pickle: expected each array once, got one many times, or too many")

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if not isinstance(arguments, tuple) or not callable(function):
            raise Malformed("pickle: expected a function and a tuple of its arguments")
        self._spend(*arguments)
        self.stack[-1] = function(*arguments)

    def _build(self) -> None:
        """Set an object's state: only a stand-in's, since a pickle may hold torch's objects as well."""
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, SteeringVector) and isinstance(state, dict):
            vars(made).update(state)
        elif isinstance(made, _Array) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, by_columns, raw = state
            self._spend(raw)
            numbers = dtype.numbers(raw, shape if by_columns is not True else shape[::-1])
            self.stack[-1] = numbers.T if by_columns is True else numbers
        elif isinstance(made, _Dtype) and isinstance(state, tuple) and len(state) > 1:
            made.order = state[1]
        else:
            kind = type(made).__name__
            raise Malformed(f"expected attributes of a SteeringVector alone, got those of {kind}")

    def _set_items(self, items: list[Any]) -> None:
        """Add to a dict; only text and numbers are keys, because the hash of a nested tuple may take for ever."""
        if type(self.stack[-1]) is not dict or not all(isinstance(key, str | int) for key in items[::2]):
            raise Malformed("dict: expected text or whole numbers as keys")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = _reduce  # a new object is the class, called
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = lambda self: self._set_items(self.pop_mark())
    dispatch[pickle.FRAME[0]] = lambda self: self.read(8)  # a hint only; without frames every part is counted
