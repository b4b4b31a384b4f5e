"""Loads models as torch tensors. Replaces ``safetensors.torch``.

``save``, ``save_file``, ``save_model``, and ``load``, which parses bytes, are those of
``safetensors.torch``, which must be installed for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from . import _load
from ._convert import moved
from ._load import Options, Paths, Progress

if TYPE_CHECKING:
    import torch

__all__ = ["load_file", "load_model"]


def load_file(
    filename: Paths,
    device: Any = "cpu",
    *,
    backend: str | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> dict[str, torch.Tensor]:
    """Loads all tensors of a file, a folder or several files, and returns a dictionary of them.

    On the CPU, tensors share the loaded memory, which is private and writable. Tensors that are
    not aligned in the file are copied. For other devices, each tensor is copied while later ones
    are still being read, and its host memory is freed.
    GGUF blocks become ``uint8``: the last dimension is in bytes, and the tensor's attribute
    ``ggml_type`` is the type of the blocks.

    ``progress`` and ``options`` are those of :func:`dmaload.load`. ``backend`` is accepted for
    compatibility, but ignored.
    """
    del backend
    if str(device) == "cpu":
        with _load.load(filename, progress=progress, **options) as image:
            return {name: tensor.torch() for name, tensor in image.items()}
    with _load.stream(filename, progress=progress, **options) as tensors:
        return {name: moved(tensor.torch(), device) for name, tensor in tensors}


def load_model(
    model: torch.nn.Module,
    filename: Paths,
    strict: bool = True,
    device: Any = "cpu",
    *,
    backend: str | None = None,
) -> tuple[set[str], list[str]]:
    """Loads a file into a module, and returns the missing and the unexpected names.

    A name that the file lacks is not missing if its tensor is the same memory as one that the file
    has, as with tied weights. Of several missing names for the same memory, only the first counts.
    If ``strict``, other missing or unexpected names are an error. ``backend`` is accepted for
    compatibility, but ignored.
    """
    del backend
    tensors = load_file(filename, device)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    own = model.state_dict()
    loaded = {_place(own[name]) for name in tensors if name in own}
    # One name for each tensor, even if several names share it.
    named = {_place(own[name]) if name in own else name: name for name in sorted(missing, reverse=True)}
    absent = {name for place, name in named.items() if place not in loaded}
    if strict and (absent or unexpected):
        lines = [f"{type(model).__name__} and {filename} do not match:"]
        if absent:
            lines.append(f"missing in the file: {', '.join(sorted(absent))}")
        if unexpected:
            lines.append(f"missing in the module: {', '.join(sorted(unexpected))}")
        raise RuntimeError("\n".join(lines))
    return absent, list(unexpected)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns what two tensors have in common if they are the same memory."""
    storage = tensor.untyped_storage()
    # Tensors without memory are never the same.
    identity = storage.data_ptr() or id(storage)
    return tensor.device, identity, tensor.storage_offset(), tensor.shape, tensor.stride()


def __getattr__(name: str) -> Any:
    if name in ("load", "save", "save_file", "save_model"):
        import safetensors.torch

        return getattr(safetensors.torch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
