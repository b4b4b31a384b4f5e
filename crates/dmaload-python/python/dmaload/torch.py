"""Loads models as torch tensors. Replaces ``safetensors.torch``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from . import _load
from ._convert import moved
from ._load import Options, Paths, Progress

if TYPE_CHECKING:
    import torch

__all__ = ["load_file"]


def load_file(
    filename: Paths, device: Any = "cpu", *, progress: Progress | None = None, **options: Unpack[Options]
) -> dict[str, torch.Tensor]:
    """Loads all tensors of a file, a folder or several files, and returns a dictionary of them.

    On the CPU, tensors share the loaded memory, which is private and writable. Tensors that are
    not aligned in the file are copied. For other devices, each tensor is copied.
    GGUF blocks become ``uint8``: the last dimension is in bytes, and the tensor's attribute
    ``ggml_type`` is the type of the blocks.

    ``progress`` and ``options`` are those of :func:`dmaload.load`.
    """
    with _load.load(filename, progress=progress, **options) as image:
        tensors = {name: tensor.torch() for name, tensor in image.items()}
    if str(device) == "cpu":
        return tensors
    return {name: moved(tensor, device) for name, tensor in tensors.items()}
