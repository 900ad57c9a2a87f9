"""Small files that ask for much are refused within a second of work and 200 MB, measured in a process of their own."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steerfast._files import content_checksum

SECONDS, MEGABYTES = 1.0, 200
_CHILD = """
import json, resource, sys, time
from steerfast import formats
from steerfast.errors import ProfileError
from steerfast.profile import SteeringProfile
import gguf, numpy, zstandard  # the packages that readers import when they need them

def megabytes(field):  # ru_maxrss is no help: it begins with the parent's peak
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

limit = resource.getrlimit(resource.RLIMIT_AS)[1]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), limit))
for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before, start = megabytes("VmRSS"), time.process_time()
    read = SteeringProfile.load if "profile" in path else formats.read
    try:
        read(path)
        said = None
    except ProfileError as error:
        said = str(error)
    print(json.dumps([path, said, time.process_time() - start, megabytes("VmHWM") - before]), flush=True)
"""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors: int, values: int, content: bytes) -> bytes:
    architecture = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + architecture + content
    return head + bytes(-len(head) % 32)


def overlapping_gguf() -> bytes:
    """800 tensors over one body of 1 MiB: 800 MiB, were each read."""
    infos = (text(f"direction.{n}") + struct.pack("<IQIQ", 1, 1 << 18, 0, 0) for n in range(800))
    return gguf(800, 1, b"".join(infos)) + bytes(1 << 20)


def archive(program: bytes, entries: int = 1) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("v/data.pkl", program)
        for index in range(1, entries):
            made.writestr(f"v/data/{index}", b"")
    return stream.getvalue()


def doubled(levels: int, *, duplicate: bool) -> bytes:
    """A dict whose key is a tuple of twice a tuple of twice ...: its hash takes 2**levels steps."""
    if duplicate:
        return b"\x80\x02}K\x00" + b"2\x86" * levels + b"Ns."
    program = b"\x80\x02K\x00q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(levels))
    return program + b"}h%cNs." % levels


def many_encodings() -> bytes:
    """One text of 1 MB, turned into bytes 1,000 times and kept."""
    word = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
    call = b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR"
    return b"\x80\x02" + word + b"q\x00](" + call * 1000 + b"e."


def tensor_of(numbers: int) -> bytes:
    """A tensor whose storage says `numbers` and holds two."""
    stream = io.BytesIO()
    torch.save(torch.zeros(2), stream)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stream.getvalue())) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            count = b"\x8a\x08" + struct.pack("<q", numbers)
            new.writestr(name, old.read(name).replace(b"K\x02tq", count + b"tq"))
    return made.getvalue()


def npy(header: str, version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(header) & 0xFFFF)
    return b"\x93NUMPY" + bytes([version, 0]) + size + header.encode()


def safetensors(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + bytes(64)


def profile(**model: Any) -> bytes:
    model = {"name": "m", "architecture": "llama", "embedding_sketch": None, **model}
    content = {"format": 1, "model": model, "gate": {"kind": "always", "score": "cosine", "sharpness": 0.0}}
    plain = {"edit": "add", "sensor": "own", "positions": "all", "vector_kind": "x"}
    content |= plain | {"fitted": {}, "calibration": {}, "tuned": {}}
    return no_tensors(json.dumps({**content, "checksum": content_checksum(content, {})}))


def no_tensors(header: str) -> bytes:
    """A whole safetensors file without a tensor, whose metadata hold the header of a profile."""
    return safetensors(json.dumps({"__metadata__": {"steerfast": header}}).encode())[:-64]


def sparse(size: int) -> Callable[[Path, bytes], None]:
    def write(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data)
            file.truncate(size)

    return write


BIG = 45 << 20
BOMBS: dict[str, bytes] = {
    "overlap.gguf": overlapping_gguf(),
    "many-tensors.gguf": gguf(1 << 62, 1, b""),
    "many-values.gguf": gguf(0, 1 << 62, b"".join(text(f"a{n}") + struct.pack("<IB", 0, 0) for n in range(99_999))),
    "array.gguf": gguf(0, 2, text("a") + struct.pack("<IIQ", 9, 0, 1 << 24) + bytes(1 << 24)),
    "string.gguf": gguf(0, 2, text("a") + struct.pack("<IQ", 8, 1 << 60)),
    "doubled.pkl": doubled(60, duplicate=True),
    "doubled-by-memo.pkl": doubled(60, duplicate=False),
    "doubled.pt": archive(doubled(60, duplicate=True)),
    "doubled-by-memo.pt": archive(doubled(60, duplicate=False)),
    "doubled-value.pkl": doubled(60, duplicate=False)[:-5]
    + b"}X\n\x00\x00\x00layer_typeh<sX\x11\x00\x00\x00layer_activations}s.",
    "doubled-lists.pkl": b"\x80\x04]" + b"2\x86" * 60 + b".",
    "encodings.pkl": many_encodings(),
    "encodings.pt": archive(many_encodings()),
    "long.pkl": b"\x80\x02" + b"N" * (16 << 20) + b".",
    "long.pt": archive(b"\x80\x02" + b"N" * (16 << 20) + b"."),
    "marks.pkl": b"\x80\x04" + b"(" * (8 << 20) + b".",
    "memo.pkl": b"\x80\x04r\xff\xff\xff\x7f.",
    "entries.pt": archive(b"\x80\x02N.", entries=8000),
    "storage.pt": tensor_of(1 << 40),
    "shape.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }\n"),
    "nested.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 9000 + "\n"),
    "header.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", BIG) + b" " * BIG,
    "nested.json": b"[" * BIG,
    "nested-objects.json": b'{"a":' * (1 << 20),
    "lists.json": b"[" + b"[]," * (BIG // 3) + b"0]",
    "numbers.json": b'{"directions": {"1": [' + b"0," * (BIG // 2) + b"0]}}",
    "word.json": b'{"directions": "' + b"a" * BIG + b'"}',
    "nested.safetensors": safetensors(b'{"layer_1":' + b"[" * 100_000),
    "header.safetensors": safetensors(b"{", 8 << 30),
    "padded.safetensors": safetensors(b"{" + b" " * BIG),
    "overlap.safetensors": safetensors(
        json.dumps(
            {f"layer_{n}": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for n in range(2000)}
        ).encode()
    ),
    "profile-header.safetensors": safetensors(b"{", 8 << 30),
    "profile-padded.safetensors": safetensors(b"{" + b" " * BIG),
    "profile-nested.safetensors": safetensors(b'{"__metadata__":' + b"[" * 100_000),
    "profile-nested-text.safetensors": no_tensors('{"format": 1, "x": ' + "[" * 100_000),
    "profile-layers.safetensors": profile(num_layers=200_000, hidden_size=2000),
}
SPARSE = {"4-gib.gguf": b"GGUF", "4-gib.json": b"[", "4-gib.pt": b"PK\x03\x04", "4-gib.npy": b"\x93NUMPY"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str | None, float, float]]:
    """What reading each file said, its seconds of CPU time, and the megabytes by which memory grew."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("bombs")
    for name, data in BOMBS.items():
        (folder / name).write_bytes(data)
    for name, data in SPARSE.items():
        sparse(4 << 30)(folder / name, data)
    command = [sys.executable, "-c", _CHILD, *(str(folder / name) for name in (*BOMBS, *SPARSE))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    for file in folder.iterdir():
        file.unlink()
    found = {}
    for line in done.stdout.splitlines():
        path, *rest = json.loads(line)
        found[Path(path).name] = tuple(rest)
    assert done.returncode == 0, done.stderr[-2000:]
    return found


@pytest.mark.parametrize("name", [*BOMBS, *SPARSE])
def test_a_bomb_is_refused_at_once(name: str, outcomes: dict[str, tuple[str | None, float, float]]) -> None:
    said, seconds, megabytes = outcomes[name]
    assert said is not None
    assert "\n" not in said
    assert len(said) < 600
    assert seconds < SECONDS
    assert megabytes < MEGABYTES


def test_pickles_of_the_kinds_above_are_read_where_they_are_small() -> None:
    """The programs are valid: Python itself reads smaller ones."""
    assert isinstance(pickle.loads(doubled(4, duplicate=True)), dict)
    assert isinstance(pickle.loads(doubled(4, duplicate=False)), dict)
