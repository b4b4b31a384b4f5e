"""Checks each of the format's types bit for bit, with each way of converting a tensor."""

import ctypes
import struct

import ml_dtypes
import numpy
import pytest
from safetensors import safe_open

import dmaload
from files import BITS, ML_DTYPES, NUMPY, byte_size, numpy_dtype, tensor, write

SHAPES = [(), (0,), (3, 0, 5), (1,), (7,), (5, 3), (2, 3, 4, 5)]


def shapes(dtype):
    """Returns shapes whose tensors fill whole bytes and, for small types, whole blocks of four."""
    return SHAPES if BITS[dtype] >= 8 else [(0,), (3, 0, 8), (8,), (5, 8), (2, 3, 4)]


def elements(expected):
    """Unpacks elements smaller than a byte. The first element has the lowest bits."""
    bits, data = BITS[expected.dtype], int.from_bytes(expected.data, "little")
    for number in range(len(expected.data) * 8 // bits):
        yield data >> number * bits & (1 << bits) - 1


@pytest.fixture
def everything(tmp_path):
    """Writes a file with each type in each of its shapes."""
    tensors = {
        f"{dtype} {shape}": tensor(dtype, shape) for dtype in BITS for shape in shapes(dtype)
    }
    return write(tmp_path / "model.safetensors", tensors, {"format": "pt"}), tensors


def test_all_types_keep_names_shapes_and_bits(everything):
    path, tensors = everything
    image = dmaload.load(path)
    assert sorted(image) == sorted(tensors)
    for name, expected in tensors.items():
        found = image[name]
        assert (found.name, found.dtype, found.shape) == (name, expected.dtype, expected.shape)
        assert found.nbytes == len(expected.data) == byte_size(expected.dtype, expected.shape)
        assert memoryview(found).tobytes() == expected.data, name


def test_numpy_arrays_keep_type_and_bits(everything):
    path, tensors = everything
    image = dmaload.load(path)
    for name, expected in tensors.items():
        array = image[name].numpy()
        assert (array.dtype, array.shape) == (numpy_dtype(expected.dtype), expected.shape), name
        if BITS[expected.dtype] >= 8:
            assert array.tobytes() == expected.data, name
        else:
            assert array.tobytes() == bytes(elements(expected)), name


def test_arrays_equal_those_of_safetensors(everything):
    path, tensors = everything
    own = dmaload.numpy.load_file(path)
    compared = 0
    with safe_open(path, framework="np") as oracle:
        for name in oracle.keys():
            try:
                expected = oracle.get_tensor(name)
            except Exception:
                # safetensors lacks some types for NumPy. Other tests compare their bits.
                assert tensors[name].dtype in ML_DTYPES, name
                continue
            assert own[name].dtype == expected.dtype, name
            assert own[name].shape == expected.shape, name
            assert own[name].tobytes() == expected.tobytes(), name
            compared += 1
    assert compared >= len(SHAPES) * (len(NUMPY) - len(ML_DTYPES))


def test_buffers_have_numpys_format_and_shape(everything):
    path, tensors = everything
    image = dmaload.load(path)
    for name, expected in tensors.items():
        view = memoryview(image[name])
        assert view.contiguous, name
        if expected.dtype not in ML_DTYPES:
            array = numpy.asarray(view)
            assert (array.dtype, array.shape) == (numpy_dtype(expected.dtype), expected.shape), (
                name
            )
            assert array.tobytes() == expected.data, name
        else:
            assert view.nbytes == len(expected.data), name


def test_arrays_share_the_tensors_memory(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": tensor("F32", (4, 4))})
    found = dmaload.load(path)["w"]
    first, second = found.numpy(), numpy.asarray(memoryview(found))
    address = first.ctypes.data
    assert second.ctypes.data == address
    assert numpy.from_dlpack(found).ctypes.data == address
    first[0, 0] = 42
    assert struct.unpack("<f", memoryview(found).tobytes()[:4]) == (42,)
    assert second[0, 0] == 42


def test_values_equal_those_written(tmp_path):
    """Known numbers survive a load, even in types that only ml_dtypes has."""
    numbers = [0.0, -1.5, 3.25, 448.0]
    from files import Expected

    values = {
        "F32": numpy.array(numbers, numpy.float32),
        "F16": numpy.array(numbers, numpy.float16),
        "BF16": numpy.array(numbers, ml_dtypes.bfloat16),
        "F8_E4M3": numpy.array(numbers, ml_dtypes.float8_e4m3fn),
        "I32": numpy.array([-1, 2], numpy.int32),
        "BOOL": numpy.array([True, False]),
    }
    path = write(
        tmp_path / "model.safetensors",
        {name: Expected(name, each.shape, each.tobytes()) for name, each in values.items()},
    )
    image = dmaload.load(path)
    for name, each in values.items():
        assert image[name].numpy().tolist() == each.tolist(), name


# Type codes, bit widths and structures from dlpack.h, for reading exported capsules.

CODES = {
    "BOOL": (6, 8),
    "U8": (1, 8),
    "I8": (0, 8),
    "I16": (0, 16),
    "U16": (1, 16),
    "F16": (2, 16),
    "BF16": (4, 16),
    "I32": (0, 32),
    "U32": (1, 32),
    "F32": (2, 32),
    "C64": (5, 64),
    "F64": (2, 64),
    "I64": (0, 64),
    "U64": (1, 64),
}
# Types that DLPack has had since version 1.1.
SMALL_CODES = {
    "F8_E4M3": (10, 8),
    "F8_E4M3FNUZ": (11, 8),
    "F8_E5M2": (12, 8),
    "F8_E5M2FNUZ": (13, 8),
    "F8_E8M0": (14, 8),
    "F6_E2M3": (15, 6),
    "F6_E3M2": (16, 6),
    "F4": (17, 4),
}
READ_ONLY = 1


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


def pointer_of(capsule, name):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return get(capsule, name)


def check_dlpack(found, expected, dl):
    assert (dl.device_type, dl.device_id) == (1, 0)
    assert tuple(dl.shape[: dl.ndim]) == expected.shape
    code, bits = (CODES | SMALL_CODES)[expected.dtype]
    assert (dl.dtype.code, dl.dtype.bits, dl.dtype.lanes) == (code, bits, 1)
    if expected.data:
        assert ctypes.string_at(dl.data + dl.byte_offset, len(expected.data)) == expected.data
    if dl.strides:
        strides, step = [], 1
        for dim in reversed(expected.shape):
            strides.append(step)
            step *= max(dim, 1)
        if expected.data:
            assert list(dl.strides[: dl.ndim]) == strides[::-1]


def test_dlpack_describes_the_tensor(everything):
    path, tensors = everything
    image = dmaload.load(path)
    for name, expected in tensors.items():
        if expected.dtype not in CODES:
            continue
        found = image[name]
        assert found.__dlpack_device__() == (1, 0)
        capsule = found.__dlpack__(max_version=(1, 0))
        versioned = Versioned.from_address(pointer_of(capsule, b"dltensor_versioned"))
        assert versioned.major == 1
        assert not versioned.flags & READ_ONLY, "private memory must be writable"
        check_dlpack(found, expected, versioned.tensor)
        # Importers older than DLPack 1 pass no version.
        old = found.__dlpack__()
        check_dlpack(found, expected, DLTensor.from_address(pointer_of(old, b"dltensor")))


def test_dlpack_1_1_describes_floats_of_fewer_than_16_bits(everything):
    path, tensors = everything
    image = dmaload.load(path)
    seen = set()
    for name, expected in tensors.items():
        if expected.dtype not in SMALL_CODES:
            continue
        found = image[name]
        capsule = found.__dlpack__(max_version=(1, 1))
        versioned = Versioned.from_address(pointer_of(capsule, b"dltensor_versioned"))
        assert (versioned.major, versioned.minor) == (1, 1)
        check_dlpack(found, expected, versioned.tensor)
        # An older consumer would misread the type.
        for keywords in ({}, {"max_version": (1, 0)}, {"max_version": (0, 8)}):
            with pytest.raises(dmaload.ExportError, match=expected.dtype):
                found.__dlpack__(**keywords)
        seen.add(expected.dtype)
    assert seen == set(SMALL_CODES)
    assert set(BITS) == set(CODES) | set(SMALL_CODES)


def test_dlpack_refuses_unsupported_exports(tmp_path):
    path = write(tmp_path / "model.safetensors", {"w": tensor("F32", (4,))})
    found = dmaload.load(path)["w"]
    with pytest.raises((BufferError, ValueError)):
        found.__dlpack__(dl_device=(2, 0))
    # CPU memory has no streams.
    with pytest.raises((BufferError, ValueError, TypeError)):
        found.__dlpack__(stream=1)
    copied = numpy.from_dlpack(found, copy=True)
    copied[:] = 0
    assert memoryview(found).tobytes() == tensor("F32", (4,)).data
