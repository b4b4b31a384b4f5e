"""Converts tensors to NumPy arrays and torch tensors. Both packages are imported on first use."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from ._errors import UnsupportedError

if TYPE_CHECKING:
    import numpy
    import torch

    from ._native import Tensor

_NUMPY = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

# Types that have the same name in ml_dtypes and in torch.
_SMALL_FLOATS = {
    "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}

_ML_DTYPES = _SMALL_FLOATS | {
    "F4": "float4_e2m1fn",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
}

# The number of bits in an element, for types whose elements are smaller than a byte.
_SUB_BYTE = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

_TORCH = _NUMPY | _SMALL_FLOATS | {"F4": "float4_e2m1fn_x2"}


@cache
def _numpy_dtype(name: str) -> Any:
    import numpy

    if name in _NUMPY:
        return numpy.dtype(_NUMPY[name])
    if name not in _ML_DTYPES:
        return None
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"cannot convert {name} to NumPy: install ml_dtypes, or use the buffer protocol to get bytes"
        ) from error
    return numpy.dtype(getattr(ml_dtypes, _ML_DTYPES[name]))


def _byte_shape(tensor: Tensor) -> tuple[int, ...]:
    """Returns the shape that a tensor has as an array of bytes. The last dimension is in bytes.

    A scalar, or a tensor whose rows are not whole blocks, becomes one-dimensional.
    """
    shape, block = tensor.shape, tensor.block_elements
    if not shape or shape[-1] % block:
        return (tensor.nbytes,)
    return (*shape[:-1], shape[-1] // block * tensor.block_bytes)


def to_numpy(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    """Implements ``Tensor.numpy``."""
    import numpy

    dtype = _numpy_dtype(tensor.dtype)
    if tensor.nbytes == 0:
        # Request the buffer, so that memory that cannot be exported raises an error here, too.
        memoryview(tensor).release()
        return _blocks(tensor, numpy.empty(0, numpy.uint8)) if dtype is None else numpy.empty(tensor.shape, dtype)
    if dtype is None:
        return _blocks(tensor, numpy.frombuffer(tensor, numpy.uint8))
    if tensor.dtype in _SUB_BYTE:
        return _unpacked(tensor, _SUB_BYTE[tensor.dtype]).view(dtype).reshape(tensor.shape)
    return numpy.frombuffer(tensor, dtype).reshape(tensor.shape)


def _blocks(tensor: Tensor, data: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    from ._blocks import Blocks

    made = data.reshape(_byte_shape(tensor)).view(Blocks)
    made._ggml_type = tensor.dtype
    return made


def _unpacked(tensor: Tensor, bits: int) -> numpy.ndarray[Any, Any]:
    """Unpacks elements smaller than a byte into one byte each, starting with the lowest bits."""
    import numpy

    packed = numpy.frombuffer(tensor, numpy.uint8)
    if bits == 4:
        both = numpy.empty((packed.size, 2), numpy.uint8)
        numpy.bitwise_and(packed, 15, out=both[:, 0])
        numpy.right_shift(packed, 4, out=both[:, 1])
        return both.reshape(-1)
    first, second, third = (packed[n::3].astype(numpy.uint32) for n in range(3))
    word = first | second << 8 | third << 16
    return numpy.stack([(word >> 6 * n & 63).astype(numpy.uint8) for n in range(4)], axis=1).reshape(-1)


@cache
def _torch_dtype(name: str) -> Any:
    """Returns torch's type, or ``None`` for blocks and for types that torch does not have."""
    import torch

    return getattr(torch, _TORCH.get(name, ""), None)


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Implements ``Tensor.torch``."""
    import torch

    dtype, shape = _torch_dtype(tensor.dtype), tensor.shape
    if dtype is None:
        dtype, shape = torch.uint8, _byte_shape(tensor)
    elif tensor.dtype == "F4":
        if not shape or shape[-1] % 2:
            dtype, shape = torch.uint8, _byte_shape(tensor)
        else:
            shape = (*shape[:-1], shape[-1] // 2)
    if tensor.nbytes == 0:
        memoryview(tensor).release()
        made = torch.empty(0, dtype=torch.uint8)
    else:
        made = torch.frombuffer(tensor, dtype=torch.uint8)
        if dtype.itemsize > 1 and made.data_ptr() % min(dtype.itemsize, 8):
            # torch requires aligned elements.
            made = made.clone()
    made = made.view(dtype).reshape(shape)
    if tensor.dtype not in _TORCH and tensor.dtype not in _SUB_BYTE:
        made.ggml_type = tensor.dtype  # type: ignore[attr-defined]
    return made


def moved(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    """Moves a tensor to a device. Unlike torch, keeps the type of blocks."""
    return with_type_of(tensor, tensor.to(device))


def with_type_of(tensor: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Gives ``made`` the type of the blocks of ``tensor``, if that has one."""
    if hasattr(tensor, "ggml_type"):
        made.ggml_type = tensor.ggml_type  # type: ignore[attr-defined]
    return made
