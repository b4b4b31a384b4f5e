"""Loads model files of gigabytes from storage straight into memory, without the page cache.

    import dmaload

    image = dmaload.load("model.safetensors")
    print(image["lm_head.weight"].torch())

``load`` gives an :class:`Image`, a mapping from names to tensors; ``stream`` gives the tensors as
they come. Both have twins for asyncio. ``safe_open``, ``dmaload.torch.load_file`` and
``dmaload.numpy.load_file`` take the place of those of ``safetensors``. Files are safetensors or
GGUF, alone, in several parts, or in folders with an index.

The memory is this process' own, and writable: arrays are made of it without a copy, and keep it.
"""

import atexit as _atexit
import os as _os
from collections.abc import Mapping as _Mapping

from . import _native, numpy, share, torch
from ._errors import (
    AmbiguousError,
    ChangedError,
    ClosedError,
    ConfigError,
    CorruptError,
    DeviceError,
    Error,
    ExportError,
    ForkedError,
    IncompleteError,
    InUseError,
    InvalidInputError,
    InvalidModelError,
    IoError,
    NotFoundError,
    NotInManifestError,
    NotLoadedError,
    OutOfMemoryError,
    OverLimitError,
    PanickedError,
    PermissionDeniedError,
    PlacementError,
    ShareError,
    ShutDownError,
    TensorNotFoundError,
    TooLargeError,
    UnsupportedError,
)
from ._load import Stream, load, load_async, stream, stream_async
from ._native import DmaBuf, Image, Tensor
from ._open import SafeSlice, safe_open

__version__: str = _native.VERSION

__all__ = [
    "AmbiguousError",
    "ChangedError",
    "ClosedError",
    "ConfigError",
    "CorruptError",
    "DeviceError",
    "DmaBuf",
    "Error",
    "ExportError",
    "ForkedError",
    "Image",
    "InUseError",
    "IncompleteError",
    "InvalidInputError",
    "InvalidModelError",
    "IoError",
    "NotFoundError",
    "NotInManifestError",
    "NotLoadedError",
    "OutOfMemoryError",
    "OverLimitError",
    "PanickedError",
    "PermissionDeniedError",
    "PlacementError",
    "SafeSlice",
    "ShareError",
    "ShutDownError",
    "Stream",
    "Tensor",
    "TensorNotFoundError",
    "TooLargeError",
    "UnsupportedError",
    "dma_buf",
    "load",
    "load_async",
    "numpy",
    "safe_open",
    "share",
    "stream",
    "stream_async",
    "torch",
]


def dma_buf(tensor: Tensor) -> list[DmaBuf]:
    """The descriptors of the dma-bufs that a tensor lies in, in order, for importers.

    The tensor must have been loaded with ``heap="dma-buf"``, ``"udmabuf"`` or ``"dma-heap:NAME"``.
    Each :class:`DmaBuf` owns its descriptor, and says where in the dma-buf its bytes begin
    (``offset``) and how many they are (``length``). Most tensors lie in one; a large one may lie
    in several.

    Raises :class:`UnsupportedError` for memory that has no dma-bufs.
    """
    return _native.dma_bufs(tensor)


_Mapping.register(Image)
# A child that was forked has none of the loader's threads: it starts anew.
_os.register_at_fork(after_in_child=_native.after_fork_in_child)
# Threads that still wait for loads then are not let back into an interpreter that ends.
_atexit.register(_native.before_exit)
