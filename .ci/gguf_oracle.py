"""Writes GGUF files with the package `gguf`, and compares what it and dmaload read from them."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter

dmaload, folder = sys.argv[1], Path(sys.argv[2])
random = numpy.random.default_rng(1)
# Q8_1 is left out: the package says that its blocks are 40 bytes, but in ggml they are 36
# (block_q8_1 in ggml-common.h). No model is stored in this type anyway.
TYPES = {kind: sizes for kind, sizes in GGML_QUANT_SIZES.items() if kind != GGMLQuantizationType.Q8_1}


def write(path: Path, alignment: int | None) -> None:
    writer = GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_string("general.name", "a näme")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63 + 1)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.15625)
    writer.add_float64("f64", 1e300)
    writer.add_bool("bool", True)
    writer.add_array("tokens", ["<s>", "▁the", ""] * 2000)
    writer.add_array("scores", [0.5, -1.25, 3.0])
    writer.add_array("ints", [1, 2, 3, 2**20])
    for kind, (_, size) in TYPES.items():
        rows, blocks = 5, 3
        raw = random.integers(0, 255, (rows, blocks * size), dtype=numpy.uint8)
        writer.add_tensor(f"t.{kind.name}", raw, raw_shape=(rows, blocks * size), raw_dtype=kind)
    writer.add_tensor("deep", random.random((2, 3, 4, 5), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def plain(value):
    return value.tolist() if hasattr(value, "tolist") else value


def check(path: Path) -> int:
    reader = GGUFReader(path)
    seen = json.loads(subprocess.check_output([dmaload, "inspect", "--json", path]))
    assert seen["format"] == "gguf", seen["format"]
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            assert seen["metadata"][name] == plain(field.contents()), (name, seen["metadata"][name])
    assert len(seen["metadata"]) == sum(not name.startswith("GGUF.") for name in reader.fields)
    ours = {tensor["name"]: tensor for tensor in seen["tensors"]}
    assert len(ours) == len(reader.tensors)
    whole = subprocess.check_output([dmaload, "cat", path])
    assert whole == path.read_bytes()
    for tensor in reader.tensors:
        own = ours[tensor.name]
        kind = GGMLQuantizationType(tensor.tensor_type).name
        assert own["dtype"] == kind, (own, kind)
        assert own["shape"] == [int(dim) for dim in reversed(tensor.shape)], (own, tensor.shape)
        assert (own["offset"], own["bytes"]) == (tensor.data_offset, tensor.n_bytes), own
        loaded = whole[own["offset"] : own["offset"] + own["bytes"]]
        assert hashlib.sha256(loaded).digest() == hashlib.sha256(tensor.data.tobytes()).digest(), tensor.name
    return len(ours)


for alignment in (None, 64, 4096):
    path = folder / f"test-{alignment}.gguf"
    write(path, alignment)
    count = check(path)
    # For little-endian files, version 2 differs only in the version number.
    data = bytearray(path.read_bytes())
    data[4] = 2
    old = folder / "test-v2.gguf"
    old.write_bytes(data)
    count += check(old)
    print(f"alignment {alignment or 'default'}: {count} tensors of {len(TYPES)} types, versions 3 and 2: all equal")
    path.unlink()
    old.unlink()
