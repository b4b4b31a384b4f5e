"""Models as NumPy arrays, in the place of ``safetensors.numpy``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from . import _load
from ._load import Options, Paths, Progress

if TYPE_CHECKING:
    import numpy

__all__ = ["load_file"]


def load_file(
    filename: Paths, *, progress: Progress | None = None, **options: Unpack[Options]
) -> dict[str, numpy.ndarray[Any, Any]]:
    """All tensors of a file, a folder or several files as arrays, by their names.

    Their memory is what the device wrote into: private and writable, without a copy. ``BF16``,
    ``F8_…`` and smaller types are those of ``ml_dtypes``. Blocks of GGUF are bytes, of which the
    last dimension has as many as its blocks have.

    ``progress`` and ``options`` are those of :func:`dmaload.load`.
    """
    with _load.load(filename, progress=progress, **options) as image:
        return {name: tensor.numpy() for name, tensor in image.items()}
