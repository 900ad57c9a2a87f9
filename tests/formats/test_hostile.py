"""Files made to harm: nothing in them runs, nothing large is reserved, and one line says what is wrong with them."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steerfast import formats
from steerfast.errors import ProfileError
from steerfast.formats import reading

HIDDEN = 16
ROW = np.linspace(-1, 1, HIDDEN, dtype="f4")
_ROOM = 3 << 30  # bytes of address space that a refusal may take beyond what is taken already


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """A reader that believes a size it is told fails here, instead of taking the machine's memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(path: Path, data: bytes | str, message: str, format: str | None = None) -> None:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(ProfileError, match=message) as caught:
        formats.read(path, format)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


# ---- GGUF ----------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def architecture(name: str) -> bytes:
    return text("general.architecture") + struct.pack("<I", 8) + text(name)


ARCHITECTURE = architecture("controlvector")


def gguf(
    *infos: bytes,
    body: bytes = b"",
    tensors: int | None = None,
    values: int = 1,
    first: bytes = ARCHITECTURE,
    extra: bytes = b"",
    version: int = 3,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos) if tensors is None else tensors, values)
    head += first + extra + b"".join(infos)
    return head + bytes(-len(head) % 32) + body


def info(name: str = "direction.1", *, dims: int = 1, size: int = HIDDEN, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", dims) + struct.pack("<Q", size) * dims + struct.pack("<IQ", kind, offset)


BODY = ROW.tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUF", "truncated"),
        (gguf(info(), body=BODY, version=1), "GGUF version: expected 2 or 3"),
        (gguf(info(), body=BODY, version=0x03000000), "GGUF version: expected 2 or 3, little-endian"),
        (gguf(info(), body=BODY, tensors=1 << 62), "truncated"),
        (gguf(info(), body=BODY, values=1 << 62), "truncated|value type|malformed"),
        (gguf(info(), body=BODY, values=2, extra=text("a") + struct.pack("<IIQ", 9, 4, 1 << 62)), "truncated"),
        (gguf(info(), body=BODY, values=2, extra=text("a") + struct.pack("<IIQ", 9, 9, 1)), "array: expected scalars"),
        (gguf(info(), body=BODY, values=2, extra=text("a") + struct.pack("<IQ", 8, 1 << 60)), "truncated"),
        (gguf(info(), body=BODY, values=2, extra=ARCHITECTURE), "key 'general.architecture': expected once"),
        (
            gguf(info(), body=BODY, values=2, extra=text("general.alignment") + struct.pack("<II", 4, 0)),
            "general.alignment: expected a size in bytes, got 0",
        ),
        (
            gguf(info(), body=BODY, first=architecture("llama")),
            "general.architecture: expected 'controlvector', got 'llama'",
        ),
        (gguf(info(), body=BODY, values=0, first=b""), "general.architecture: expected 'controlvector', got None"),
        (
            gguf(info(), body=BODY, values=2, extra=text("a") + struct.pack("<IIQ", 9, 0, 1 << 20) + bytes(1 << 20)),
            "at most",
        ),
        (gguf(info(), body=BODY, values=2, extra=text("a") + struct.pack("<IIQ", 9, 9, 0)), "array: expected scalars"),
        (gguf(info(offset=(1 << 64) - 32), body=BODY), "truncated"),
        (gguf(info(size=1 << 61), body=BODY), "truncated"),
        (gguf(info(size=1 << 40), body=BODY), "truncated"),
        (gguf(info(offset=1 << 63), body=BODY), "truncated"),
        (gguf(info(), body=BODY[:-1]), "truncated"),
        (gguf(info(size=0), body=BODY), "expected shape 1-D and not empty"),
        (gguf(info(dims=2), body=BODY), "expected 1-D, got 2-D"),
        (gguf(info(dims=0), body=BODY), "expected 1-D, got 0-D"),
        (gguf(info(kind=1), body=BODY), r"expected F32 \(type 0\), got type 1"),
        (gguf(info("direction.-1"), body=BODY), "tensor 'direction.-1': expected direction.<layer>"),
        (gguf(info("direction.1.5"), body=BODY), "expected direction.<layer>"),
        (gguf(info("direction.9999999"), body=BODY), "expected direction.<layer>"),
        (gguf(info("token_embd.weight"), body=BODY), "tensor 'token_embd.weight': expected direction.<layer>"),
        (gguf(info(), info(), body=BODY), "tensor 'direction.1': expected once, got twice"),
        (gguf(), "expected tensors direction.<layer>, got none"),
        (gguf(info(), info("direction.2", size=8), body=BODY), r"tensors: expected one length, got \[8, 16\]"),
        (gguf(info(), body=np.full(HIDDEN, np.nan, "f4").tobytes()), "expected finite numbers .* got nan or infinity"),
    ],
)
def test_gguf(data: bytes, message: str, tmp_path: Path) -> None:
    refused(tmp_path / "v.gguf", data, message)


# ---- torch files and pickles ---------------------------------------------------------------------


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def rewritten(
    data: bytes, change: Callable[[str, bytes], tuple[str, bytes]], compression: int = zipfile.ZIP_STORED
) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return stream.getvalue()


@pytest.mark.parametrize("format", ["hotwire", "steering-vectors"])
def test_code_in_a_torch_file_does_not_run(format: str, tmp_path: Path) -> None:
    for value in (Runs(tmp_path / "ran"), {"v": torch.ones(2, HIDDEN), "x": Runs(tmp_path / "ran")}):
        refused(tmp_path / "v.pt", saved(value), r"expected tensors alone, got \w+\.system", format)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    for protocol in range(2, 6):
        data = pickle.dumps({"layer_activations": Runs(tmp_path / "ran")}, protocol=protocol)
        refused(tmp_path / "v.pkl", data, r"steering-vectors file .*: expected tensors alone, got \w+\.system")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes.__globals__"),
        ("steering_vectors.steering_vector", "SteeringVector.__init__"),
        ("collections", "namedtuple"),
        ("_codecs", "decode"),
        ("steerfast.formats.torchfile", "_SteeringVector"),
    ],
)
def test_names_that_a_pickle_may_not_say(module: str, name: str, tmp_path: Path) -> None:
    data = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)) + b"\x93."
    refused(tmp_path / "v.pkl", data, f"expected tensors alone, got {module}.{name}".replace(".", r"\."))


def test_a_pickle_does_not_change_the_functions_it_may_call(tmp_path: Path) -> None:
    before = torch._utils._rebuild_tensor_v2.__defaults__
    for state in ((None, {"__defaults__": (1, 2)}), {"x": 1}):
        function = b"\x80\x04\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93"
        data = function + pickle.dumps(state, protocol=2)[2:-1] + b"b."
        refused(tmp_path / "v.pkl", data, "expected attributes of a SteeringVector alone, got those of function")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    assert not vars(torch._utils._rebuild_tensor_v2)


def test_a_pickle_inside_a_pickled_tensor_is_not_run(tmp_path: Path) -> None:
    """torch's own loader of storages would run it."""
    inner = pickle.dumps(Runs(tmp_path / "ran"))
    for bomb in (inner, saved(Runs(tmp_path / "ran"))):
        load = b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93"
        data = load + b"B" + struct.pack("<I", len(bomb)) + bomb + b"\x85R."
        refused(tmp_path / "v.pkl", data, "steering-vectors file .*: (expected tensors alone|not a pickle of tensors)")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04r\xff\xff\xff\x7f.",  # a memo of 2**31 entries
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 2**63
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of 2**63
        b"\x80\x04]" + b"2\x86" * 60 + b".",  # 2**60 lists, were they copied
        b"\x80\x04" + b"(" * 100_000 + b".",
        b"\x80\x63.",
        b"\x80\x04Q.",
        b"\x80",
    ],
)
def test_pickles_that_ask_for_much_or_make_no_sense(data: bytes, tmp_path: Path) -> None:
    refused(
        tmp_path / "v.pkl",
        data,
        ": (not a pickle|pickle: expected fewer|expected a (SteeringVector|pickle))",
    )


def test_archives_that_reach_out_of_themselves(tmp_path: Path) -> None:
    """Entries are looked up by name in memory: others are never read, and none is written anywhere."""
    whole = saved(torch.ones(2, HIDDEN))
    for name in ("../../evil", "/etc/evil", "a/../../evil", "..\\evil", "C:/evil"):
        stream = io.BytesIO(whole)
        with zipfile.ZipFile(stream, "a") as archive:
            archive.writestr(name, b"x")
        (tmp_path / "v.pt").write_bytes(stream.getvalue())
        assert torch.equal(formats.read(tmp_path / "v.pt").vectors[1], torch.ones(HIDDEN))
    assert [file.name for file in tmp_path.iterdir()] == ["v.pt"]
    assert not (tmp_path.parent / "evil").exists()


def test_compressed_and_lying_archives(tmp_path: Path) -> None:
    whole = saved(torch.ones(2, HIDDEN))
    bomb = rewritten(whole, lambda name, data: (name, data * 1000), zipfile.ZIP_DEFLATED)
    refused(
        tmp_path / "v.pt", bomb, "archive: expected entries stored as torch.save does, got .* compressed", "hotwire"
    )
    size = struct.pack("<I", 2 * HIDDEN * 4)
    at = whole.rindex(size, 0, whole.rindex(b"/data/0"))  # the size of the storage in the directory of the archive
    lying = whole[:at] + struct.pack("<I", 1 << 30) + whole[at + 4 :]
    refused(tmp_path / "v.pt", lying, "archive: expected 1073741824 bytes of 'data/0'|not a file of tensors|damaged")
    for data in (whole[:100], b"PK\x03\x04", b"PK\x03\x04" + bytes(1000)):
        refused(tmp_path / "v.pt", data, "expected a zip archive as torch.save writes, got a damaged one", "hotwire")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(1).expand(1 << 20, 1 << 20), "expected at most 48 MiB, got shape"),
        (torch.tensor([1.0, float("inf")]), "expected finite numbers"),
        (torch.tensor([[1.0, float("nan")]]), "expected finite numbers"),
        (torch.full((2, HIDDEN), 1e300, dtype=torch.float64), "expected finite numbers of float32's range"),
        (torch.ones(2, 3, HIDDEN), r"expected shape 1-D or 2-D and not empty, got \[2, 3, 16\]"),
        (torch.ones(0, HIDDEN), r"not empty, got \[0, 16\]"),
        (torch.ones(2, HIDDEN, dtype=torch.int64), "expected tensors alone, got torch.LongStorage"),
        (torch.ones(2, HIDDEN, dtype=torch.complex64), "expected tensors alone, got torch.ComplexFloatStorage"),
        (torch.ones(2, HIDDEN).to_sparse(), "expected tensors alone, got torch._utils._rebuild_sparse_tensor"),
        (torch.ones(2, HIDDEN, device="meta"), "expected tensors alone, got torch._utils._rebuild_meta_tensor"),
        ({"a": 1}, "expected a tensor, or a dict of one tensor, got int"),
        ([torch.ones(2)], "expected a tensor, or a dict of one tensor, got list"),
    ],
)
def test_tensors_that_are_no_vectors(value: object, message: str, tmp_path: Path) -> None:
    refused(tmp_path / "v.pt", saved(value), message, "hotwire")


def test_a_tensor_that_claims_more_than_it_stores(tmp_path: Path) -> None:
    """The sizes in the pickle, made larger than the storage beside it."""
    whole = saved(torch.ones(200, 100))

    def larger(name: str, data: bytes) -> tuple[str, bytes]:
        at = data.rfind(b"K\xc8Kd")  # 200, 100
        return name, data if at < 0 else data[:at] + b"J\xff\xff\xff\x7fKd" + data[at + 4 :]

    changed = rewritten(whole, larger)
    assert changed != whole
    refused(tmp_path / "v.pt", changed, "not a file of tensors|expected at most 48 MiB")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({-1: torch.ones(HIDDEN)}, "layer: expected a whole number from 0, got -1"),
        ({True: torch.ones(HIDDEN)}, "layer: expected a whole number from 0, got True"),
        ({"x": torch.ones(HIDDEN)}, "layer: expected a whole number from 0, got 'x'"),
        ({1.5: torch.ones(HIDDEN)}, "dict: expected text or whole numbers as keys"),
        ({10**9: torch.ones(HIDDEN)}, "layer: expected a number of at most 6 digits"),
        ({1: torch.ones(2, HIDDEN)}, r"layer 1: expected shape 1-D and not empty, got \[2, 16\]"),
        ({1: [1.0]}, "layer 1: expected a tensor, got list"),
        ({}, "layer_activations: expected tensors by layer, got none"),
        ([1], "layer_activations: expected tensors by layer, got none"),
    ],
)
def test_layers_that_are_none(layers: object, message: str, tmp_path: Path) -> None:
    refused(tmp_path / "v.pkl", pickle.dumps({"layer_activations": layers}), message)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("{", "recognised none"),
        ({"layer_index": -3, "behavior": "x"}, "layer: expected a whole number from 0, got -3"),
        ({"layer_index": "../1", "behavior": "x"}, "layer: expected a whole number from 0, got '../1'"),
        ({"layer_index": 1, "behavior": "x", "vector_shape": [4]}, r"layer_1.json: says shape \[4\], its tensor has"),
    ],
)
def test_rotalabs_pairs_that_do_not_agree(about: Any, message: str, tmp_path: Path) -> None:
    torch.save(torch.ones(HIDDEN), tmp_path / "layer_1.pt")
    refused(tmp_path / "layer_1.json", about if isinstance(about, str) else json.dumps(about), message)


def test_rotalabs_files_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "layer_1.json").write_text(json.dumps({"layer_index": 1, "behavior": "x"}))
    with pytest.raises(ProfileError, match=r"expected a file or folder at .*layer_1\.pt', found none"):
        formats.read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProfileError, match="recognised none"):
        formats.read(tmp_path / "empty")
    with pytest.raises(ProfileError, match=r"expected pairs layer_<L>\.json"):
        formats.read(tmp_path / "empty", "rotalabs")


# ---- JSON ----------------------------------------------------------------------------------------


def svec(**directions: object) -> str:
    return json.dumps({"model_type": "llama", "directions": {key[1:]: value for key, value in directions.items()}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[" * 100_000, "not JSON"),
        ("", "not JSON"),
        ("[]", "the file: expected an object, got list"),
        ("{}", "directions: expected an object, got NoneType"),
        (json.dumps({"directions": {}}), "directions: expected vectors by layer, got none"),
        ('{"directions": {"1": [NaN]}}', "layer 1: expected finite numbers"),
        ('{"directions": {"1": [1e999]}}', "layer 1: expected finite numbers"),
        ('{"directions": {"1": [1e300]}}', "layer 1: expected finite numbers of float32's range"),
        ('{"directions": {"1": [1' + "0" * 400 + "]}}", "layer 1: expected numbers of float32's range"),
        ('{"directions": {"1": [1' + "0" * 5000 + "]}}", "not JSON"),
        (svec(_1=["x"]), "layer 1: expected a list of numbers"),
        (svec(_1=[[1.0]]), "layer 1: expected a list of numbers"),
        (svec(_1=[True]), "layer 1: expected a list of numbers"),
        (svec(_1=[]), "layer 1: expected a list of numbers"),
        (svec(_1=1.0), "layer 1: expected a list of numbers, got 1.0"),
        (json.dumps({"directions": {"-1": [1.0]}}), "layer: expected a whole number from 0, got '-1'"),
        (json.dumps({"directions": {"²": [1.0]}}), "layer: expected a whole number from 0"),
        (json.dumps({"directions": {"1": [1.0], "01": [1.0]}}), "directions: expected each layer once"),
        (b"\xff\xfe{", "not JSON"),
    ],
)
def test_svec(data: bytes | str, message: str, tmp_path: Path) -> None:
    refused(tmp_path / "v.svec", data, message, "svec")


def lens(**tensor: Any) -> str:
    activations = {"data": base64.b64encode(BODY).decode(), "dtype": "float32", "shape": [1, HIDDEN], **tensor}
    return json.dumps({"activations": activations, "layer_indices": [3], "scale": 1.0})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lens(data="###"), "activations.data: not base64"),
        (lens(data=7), "activations.data: expected base64 text, got int"),
        (lens(dtype="object"), "expected dtype float64, float32, float16, bfloat16, got 'object'"),
        (lens(dtype=["f4"]), "expected dtype"),
        (lens(shape=[1, HIDDEN + 1]), r"expected 68 bytes for float32 \[1, 17\], got 64"),
        (lens(shape=[1 << 40, 1 << 40]), "expected a shape of 1 to 3 sizes and at most 48 MiB"),
        (lens(shape=[-1, HIDDEN]), "expected a shape of 1 to 3 sizes"),
        (lens(shape=[True, HIDDEN]), "expected a shape of 1 to 3 sizes"),
        (lens(shape=[1] * 50), "expected a shape of 1 to 3 sizes"),
        (lens(shape=[1, 1, HIDDEN]), "expected one row for each of layer_indices, got shape"),
        (lens(shape=[2, HIDDEN // 2]), r"expected one row for each of layer_indices, got shape \[2, 8\]"),
        (lens(compression="gzip"), "compression: expected 'zstd' or none, got 'gzip'"),
        (lens().replace("[3]", "[-3]"), "layer: expected a whole number from 0, got -3"),
        (lens().replace("[3]", "3"), "expected one row for each of layer_indices"),
        (lens().replace('"scale": 1.0', '"scale": NaN'), "scale: expected a finite number, got nan"),
        (lens().replace('"scale": 1.0', '"scale": "1"'), "scale: expected a finite number, got '1'"),
        ('[{"activations": 1, "layer_indices": [1]}, 7]', "activations: expected an object, got int"),
    ],
)
def test_vllm_lens(data: str, message: str, tmp_path: Path) -> None:
    refused(tmp_path / "v.json", data, message, "vllm-lens")


def test_vllm_lens_zstd_bombs(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 100_000
    packed = lens(data=base64.b64encode(bomb).decode(), compression="zstd")
    refused(tmp_path / "v.json", packed, "activations.data: expected at most 128 bytes for its shape, got more")
    refused(tmp_path / "v.json", lens(compression="zstd"), "activations.data: not zstd")


def module(**hook: Any) -> str:
    blob = {"dtype": "float32", "shape": [1, HIDDEN], "layer_indices": [3], "data": base64.b64encode(BODY).decode()}
    return json.dumps({"vectors": {"post_block": {**blob, **hook}}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (module(data="A" * 1001), "data: not base64"),
        (module(shape=[1 << 50]), "expected a shape"),
        (module(layer_indices=[1, 2]), "expected a row for each of layer_indices"),
        (module(layer_indices=[-1]), "layer: expected a whole number from 0, got -1"),
        (module(scales=[1.0, 2.0]), "scales: expected one for each of 1 layers"),
        (module(scales=[None]), "scale: expected a finite number, got None"),
        (module(shape=[2, HIDDEN // 2], layer_indices=[3, 3]), r"expected each layer once, got \[3, 3\]"),
        ('{"vectors": {"post_block": {"1": {"vector": [1.0]}}}}', "layer 1: scale: expected a finite number, got None"),
        ('{"vectors": {"post_block": {"-1": [1.0]}}}', "layer: expected a whole number from 0, got '-1'"),
        ('{"vectors": {"post_block": {}}}', r"post_block: expected each layer once, got \[\]"),
        ('{"vectors": {"post_block": [1]}}', "post_block: expected an object, got list"),
        ('{"vectors": {}}', "got none"),
    ],
)
def test_rhizonymph(data: str, message: str, tmp_path: Path) -> None:
    refused(tmp_path / "m.json", data, message, "rhizonymph")


# ---- any file ------------------------------------------------------------------------------------


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF")
        file.truncate(reading.MOST_BYTES + 1)
    with pytest.raises(ProfileError, match="expected at most 48 MiB, got 48 MiB"):
        formats.read(path)


def test_no_file_and_no_known_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"expected a file or folder at .*, found none"):
        formats.read(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ProfileError, match=r"expected a file or folder at .*, found none"):
        formats.read(tmp_path / "pipe")
    for data in (b"", b"hello", b"{}", b"[]", b'{"a": 1}', b"\x00" * 100):
        refused(tmp_path / "v", data, "expected one of glp, easysteer, .*, recognised none")
    with pytest.raises(ProfileError, match=r"format: expected one of .*, got 'nothing'"):
        formats.read(tmp_path / "v", "nothing")


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


WHOLE = {
    "gguf": gguf(
        info(),
        body=BODY,
        values=2,
        extra=text("controlvector.model_hint") + struct.pack("<I", 8) + text("x"),
    ),
    "glp": gguf(
        info(),
        body=BODY,
        values=4,
        extra=b"".join(
            text(f"glp.{name}") + struct.pack("<I", 8) + text(value)
            for name, value in (("mode", "project"), ("hook_point", "residual_stream_post_layer"))
        )
        + text("glp.spec_version")
        + struct.pack("<II", 4, 1),
    ),
    "hotwire": saved(torch.from_numpy(ROW)[None]),
    "vllm-hook": saved({"dir": ROW, "avg_proj": torch.tensor(1.0)}),
    "numpy": npy(ROW),
    "saklas": safetensors.torch.save({"layer_1": torch.from_numpy(ROW)}),
    "steering-vectors": pickle.dumps({"layer_activations": {1: torch.from_numpy(ROW)}, "layer_type": "decoder_block"}),
    "svec": svec(_1=[1.0, 2.0]).encode(),
    "vllm-lens": lens().encode(),
    "rhizonymph": module().encode(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(WHOLE[name])
    found = formats.read(tmp_path / "file", name)
    assert found.vectors or found.anywhere is not None


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """Some bytes changed, or the end cut off: vectors come out, or one error does."""
    changed = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "file").write_bytes(changed[: data.draw(st.integers(0, len(changed)))])
    try:
        found = formats.read(tmp_path / "file", name)
    except ProfileError:
        return
    assert all(bool(row.isfinite().all()) and row.dim() == 1 for row in found.vectors.values())
