"""Loads models as NumPy arrays. Replaces ``safetensors.numpy``.

``save``, ``save_file``, and ``load``, which parses bytes, are those of ``safetensors.numpy``,
which must be installed for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from . import _load
from ._load import Options, Paths, Progress

if TYPE_CHECKING:
    import numpy

__all__ = ["load_file"]


def load_file(
    filename: Paths,
    *,
    backend: str | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> dict[str, numpy.ndarray[Any, Any]]:
    """Loads all tensors of a file, a folder or several files, and returns a dictionary of arrays.

    The arrays share the loaded memory, which is private and writable. ``BF16``, ``F8_…`` and
    smaller types use ``ml_dtypes``; types smaller than a byte are unpacked into a copy. GGUF
    blocks become ``uint8``: the last dimension is in bytes, and the array's attribute
    ``ggml_type`` is the type of the blocks.

    ``progress`` and ``options`` are those of :func:`dmaload.load`. ``backend`` is accepted for
    compatibility, but ignored.
    """
    del backend
    with _load.load(filename, progress=progress, **options) as image:
        return {name: tensor.numpy() for name, tensor in image.items()}


def __getattr__(name: str) -> Any:
    if name in ("load", "save", "save_file"):
        import safetensors.numpy

        return getattr(safetensors.numpy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
