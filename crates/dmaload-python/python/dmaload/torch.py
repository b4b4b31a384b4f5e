"""Models as torch tensors, in the place of ``safetensors.torch``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from . import _load
from ._load import Options, Paths, Progress

if TYPE_CHECKING:
    import torch

__all__ = ["load_file"]


def load_file(
    filename: Paths, device: Any = "cpu", *, progress: Progress | None = None, **options: Unpack[Options]
) -> dict[str, torch.Tensor]:
    """All tensors of a file, a folder or several files as torch tensors, by their names.

    On the CPU their memory is what the device wrote into: private and writable, without a copy.
    For other devices each is copied there.

    ``progress`` and ``options`` are those of :func:`dmaload.load`.
    """
    with _load.load(filename, progress=progress, **options) as image:
        tensors = {name: tensor.torch() for name, tensor in image.items()}
    if str(device) == "cpu":
        return tensors
    return {name: tensor.to(device) for name, tensor in tensors.items()}
