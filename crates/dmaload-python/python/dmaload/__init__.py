"""Loads large model files straight from storage into memory.

    import dmaload

    image = dmaload.load("model.safetensors")
    print(image["lm_head.weight"].torch())

``load`` returns an :class:`Image`, a mapping from names to tensors; ``stream`` yields tensors as
they arrive. Both have asyncio versions. ``safe_open``, ``dmaload.torch.load_file`` and
``dmaload.numpy.load_file`` replace the functions with the same names in ``safetensors``. Models
can be in safetensors or GGUF format. Files in other formats can be loaded with ``format="raw"``,
but have no tensors. A model can be a single file, several files, or a folder.

Tensors are writable, and writes are visible only in this process. Arrays share a tensor's memory
and keep it alive.
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

# The name that programs written for safetensors catch.
SafetensorError = Error

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
    "SafetensorError",
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
    """Returns the descriptors of the dma-bufs that contain a tensor, in order.

    The tensor must have been loaded with ``heap="dma-buf"``, ``"udmabuf"`` or ``"dma-heap:NAME"``,
    or come from a server that shares dma-bufs.

    Each :class:`DmaBuf` owns its descriptor; ``offset`` and ``length`` are the range of the
    tensor's bytes in the dma-buf. Most tensors are in one dma-buf; a large one may span several.

    Raises :class:`UnsupportedError` if the tensor's memory has no dma-buf.
    """
    return _native.dma_bufs(tensor)


_Mapping.register(Image)
# A forked child has none of the loader's threads, so it needs new state.
_os.register_at_fork(after_in_child=_native.after_fork_in_child)
# Keeps threads that are still waiting for loads from attaching to an exiting interpreter.
_atexit.register(_native.before_exit)
