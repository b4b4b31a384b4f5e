"""Writes model files without a library, so that no library is tested only on its own output."""

import json
import os
import random
import struct
from dataclasses import dataclass, field
from pathlib import Path

# The number of bits in an element, by the name of the type in a safetensors header.
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# The names of the types in NumPy and ml_dtypes.
NUMPY = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
# Types that NumPy lacks and ml_dtypes adds.
ML_DTYPES = {name for name in NUMPY if "_" in name or name in ("BF16", "F4")}


def numpy_dtype(dtype):
    import ml_dtypes
    import numpy

    return numpy.dtype(getattr(ml_dtypes, NUMPY[dtype]) if dtype in ML_DTYPES else NUMPY[dtype])


@dataclass
class Expected:
    """A tensor's type, shape and bytes in the file."""

    dtype: str
    shape: tuple
    data: bytes = field(repr=False)


def byte_size(dtype, shape):
    elements = 1
    for dim in shape:
        elements *= dim
    bits = elements * BITS[dtype]
    assert bits % 8 == 0, (dtype, shape)
    return bits // 8


def tensor(dtype, shape, seed=1):
    """Returns a tensor with random bits. Booleans are 0 or 1."""
    source = random.Random(f"{seed} {dtype} {shape}")
    data = source.randbytes(byte_size(dtype, shape))
    if dtype == "BOOL":
        data = bytes(byte & 1 for byte in data)
    return Expected(dtype, tuple(shape), data)


def header(entries, metadata=None, pad=8):
    """Returns the header of a safetensors file, preceded by its length."""
    content = {} if metadata is None else {"__metadata__": metadata}
    content.update(entries)
    text = json.dumps(content, ensure_ascii=False).encode()
    text += b" " * (-len(text) % pad)
    return struct.pack("<Q", len(text)) + text


def write(path, tensors, metadata=None, pad=8):
    """Writes a safetensors file; `tensors` maps names to `Expected`, in the order of the data."""
    entries, at = {}, 0
    for name, each in tensors.items():
        end = at + len(each.data)
        entry = {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": [at, end]}
        entries[name], at = entry, end
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header(entries, metadata, pad))
        for each in tensors.values():
            file.write(each.data)
    return path


def write_index(folder, files):
    """Writes a multi-file model with its index; `files` maps file names to tensors."""
    weight_map = {}
    for name, tensors in files.items():
        write(Path(folder) / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))
    total = sum(len(each.data) for tensors in files.values() for each in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))
    return Path(folder)


def sharded(folder, seed=1):
    """Writes a three-file model with an index. Returns the folder and all tensors."""
    files = {
        f"model-{number + 1:05}-of-00003.safetensors": {
            f"layers.{number}.{name}": tensor(dtype, shape, seed + number)
            for name, dtype, shape in [
                ("weight", "BF16", (33, 65)),
                ("bias", "F32", (65,)),
                ("scale", "F8_E4M3", (7, 3)),
            ]
        }
        for number in range(3)
    }
    write_index(folder, files)
    everything = {name: each for tensors in files.values() for name, each in tensors.items()}
    return Path(folder), everything


def large(path, mib, seed=1):
    """Writes F32 matrices of 1 MiB each, `t0`, `t1`, …. Returns the path and the tensors."""
    block = random.Random(seed).randbytes(1 << 20)
    tensors = {
        f"t{number}": Expected("F32", (512, 512), struct.pack("<Q", number) + block[8:])
        for number in range(mib)
    }
    return write(path, tensors), tensors


def sparse(path, tensors):
    """Writes a sparse file with zeros for weights; `tensors` maps names to dtype and shape."""
    entries, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + byte_size(dtype, shape)
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        entries[name], at = entry, end
    start = header(entries)
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(len(start) + at)
    return path


def random_file(path, seed):
    """Writes a valid file with random types, ranks, names, padding and metadata."""
    source = random.Random(seed)
    tensors = {}
    for number in range(source.randrange(0, 20)):
        dtype = source.choice(list(BITS))
        shape = [source.choice([1, 2, 3, 5, 8, 16, 31]) for _ in range(source.randrange(0, 5))]
        if shape and source.random() < 0.1:
            shape[source.randrange(len(shape))] = 0
        if BITS[dtype] < 8:
            # A last dimension of 8 ensures whole bytes and whole blocks of four elements.
            shape = [*shape, 8]
        name = source.choice(["w", "layer.é", "a b", "日本", "x" * 300, "\n\x1b[31m"]) + str(
            number
        )
        tensors[name] = tensor(dtype, shape, seed)
    metadata = {"format": "pt", "seed": str(seed)} if source.random() < 0.5 else None
    write(path, tensors, metadata, pad=source.choice([1, 8, 4096]))
    return tensors, metadata


def make_cold(path):
    """Removes a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
