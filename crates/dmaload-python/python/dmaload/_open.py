"""Opens models by reading only their headers, and reads single tensors and slices."""

from __future__ import annotations

import math
import os
import weakref
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias

from . import _native
from ._convert import moved, to_numpy, to_torch, with_type_of
from ._errors import (
    ChangedError,
    ClosedError,
    ConfigError,
    InvalidInputError,
    TensorNotFoundError,
)
from ._load import Path, load, wait
from ._native import Tensor

Index: TypeAlias = "int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]"

# Tensors of up to this size, in bytes, are read through the page cache. This takes less time than
# starting a load.
_SMALL_BYTES = 256 << 10

_FRAMEWORKS = {"pt": "pt", "torch": "pt", "pytorch": "pt", "np": "np", "numpy": "np"}


class _Entry(NamedTuple):
    """A tensor, as described in the header of the file with the index ``file``."""

    file: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    block_elements: int
    block_bytes: int


class _Identity(NamedTuple):
    """Attributes that change when a file is replaced or written to."""

    device: int
    inode: int
    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> _Identity:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class _File(NamedTuple):
    path: str
    descriptor: int
    identity: _Identity


def _open(path: str) -> _File:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        _native.raise_open_error(path, error.errno or 0)
    return _File(path, descriptor, _Identity.of(os.fstat(descriptor)))


def _close(files: list[_File]) -> None:
    while files:
        os.close(files.pop().descriptor)


def _is_same(file: _File) -> bool:
    """Returns whether the path still refers to the file, and the file has not been written to."""
    try:
        return _Identity.of(os.stat(file.path)) == file.identity == _Identity.of(os.fstat(file.descriptor))
    except OSError:
        return False


def _headers(path: str, format: str | None) -> list[dict[str, Any]]:
    headers: list[dict[str, Any]] = wait(_native.read_header(path, format))
    for header in headers:
        if header["format"] is None:
            # The file is not a model. Reading it as safetensors raises an error that says why.
            wait(_native.read_header(header["path"], "safetensors"))
    return headers


def _opened(path: str, format: str | None) -> tuple[list[dict[str, Any]], list[_File]]:
    """Returns the headers of a model's files, and the open files that the headers describe."""
    files: list[_File] = []
    try:
        if os.path.isfile(path) and os.access(path, os.R_OK):
            files.append(_open(path))
        headers = _headers(path, format)
        if [header["path"] for header in headers] == [file.path for file in files] and all(map(_is_same, files)):
            return headers, files
        # Either the path does not name the model's only file, or that file has just changed. Open
        # the files that the headers name, and read the headers again.
        _close(files)
        files.extend(_open(header["path"]) for header in headers)
        if _headers(path, format) == headers and all(map(_is_same, files)):
            return headers, files
        raise ChangedError(f"{path}: changed while it was being opened", filename=path)
    except BaseException:
        _close(files)
        raise


class safe_open:  # noqa: N801, the name that safetensors uses
    """Opens a model to read single tensors. Replaces ``safetensors.safe_open``.

    - ``filename``: a safetensors or GGUF file, a folder, or an index.
    - ``framework``: ``"pt"`` for torch, ``"np"`` or ``"numpy"`` for NumPy.
    - ``device``: the torch device to which the tensors are moved.
    - ``format``: ``safetensors`` or ``gguf``. By default, the format is detected.

    Opening reads only the headers. ``get_tensor`` reads only that tensor, and a slice reads only
    the rows from the first to the last one that it selects. The files stay open, so these reads
    still work after a file has been replaced. If a file has been written to, they raise
    :class:`ChangedError`.

        with dmaload.safe_open("model.safetensors", framework="np") as model:
            for name in model.keys():
                print(name, model.get_tensor(name).shape)
    """

    def __init__(
        self,
        filename: Path,
        framework: str,
        device: Any = "cpu",
        *,
        backend: str | None = None,
        format: str | None = None,
    ) -> None:
        # Accepted for compatibility, but ignored.
        del backend
        if framework not in _FRAMEWORKS:
            raise ConfigError(f"unknown framework {framework!r}: use pt or numpy")
        self._framework = _FRAMEWORKS[framework]
        self._device = device
        if self._framework == "np" and str(device) != "cpu":
            raise ConfigError(f"NumPy does not support device {device!r}: its arrays are on the cpu")
        self._path, self._format = os.fsdecode(os.fspath(filename)), format
        self._headers, self._files = _opened(self._path, format)
        self._finalizer = weakref.finalize(self, _close, self._files)
        self._entries = {
            name: _Entry(number, name, dtype, tuple(shape), *rest)
            for number, header in enumerate(self._headers)
            for name, dtype, shape, *rest in header["tensors"]
        }

    def __enter__(self) -> safe_open:
        self._check_open()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._finalizer()

    def keys(self) -> list[str]:
        """Returns the names of all tensors, sorted."""
        self._check_open()
        return sorted(self._entries)

    def offset_keys(self) -> list[str]:
        """Returns the names of all tensors, in file order."""
        self._check_open()
        return list(self._entries)

    def metadata(self) -> dict[str, Any] | None:
        """Returns the metadata of the files, or ``None`` if there is none.

        If several files have the same key, the value comes from the first of these files.
        """
        self._check_open()
        merged: dict[str, Any] = {}
        for header in reversed(self._headers):
            merged.update(header["metadata"] or {})
        return merged or None

    def get_tensor(self, name: str) -> Any:
        """Reads the tensor with this name."""
        entry = self._entry(name)
        return self._convert(self._read(entry, entry.start, entry.end, entry.shape))

    def get_tensors(self) -> dict[str, Any]:
        """Loads the whole model, and returns a dictionary of its tensors.

        Unlike the other methods, raises :class:`ChangedError` even if a file was only replaced.
        """
        self._check_open()
        with load(self._path, format=self._format) as image:
            for file in self._files:
                if not _is_same(file):
                    raise self._changed(file)
            return {name: self._convert(image[name]) for name in self._entries}

    def get_slice(self, name: str) -> SafeSlice:
        """Returns an object that reads slices of this tensor when it is indexed with ``[...]``."""
        return SafeSlice(self, self._entry(name))

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise ClosedError(f"{self._path}: was closed", filename=self._path)

    def _entry(self, name: str) -> _Entry:
        self._check_open()
        try:
            return self._entries[name]
        except KeyError:
            raise TensorNotFoundError(f'no tensor named "{name}"', filename=self._path) from None

    def _changed(self, file: _File) -> ChangedError:
        return ChangedError(
            f"{file.path}: changed since it was opened",
            filename=file.path,
            hint="open it again when nothing writes to it",
        )

    def _read(self, entry: _Entry, start: int, end: int, shape: tuple[int, ...]) -> Tensor:
        """Reads these bytes of a file as a tensor with this shape."""
        self._check_open()
        file = self._files[entry.file]
        described = (entry.name, entry.dtype, list(shape), start, end)
        if end - start <= _SMALL_BYTES:
            tensor = _native.read_small(file.path, file.descriptor, described)
        else:
            tensor = wait(_native.start_read(file.path, file.descriptor, described))
        # Check this after the read, so that a change during the read is detected.
        if _Identity.of(os.fstat(file.descriptor)) != file.identity:
            raise self._changed(file)
        return tensor

    def _convert(self, tensor: Tensor) -> Any:
        if self._framework == "np":
            return to_numpy(tensor)
        made = to_torch(tensor)
        return made if str(self._device) == "cpu" else moved(made, self._device)


class SafeSlice:
    """A tensor whose slices can be read. Created by :meth:`safe_open.get_slice`.

    An index can consist of integers, slices with positive steps, and an ellipsis. Rows (along the
    first dimension) are read from the first to the last selected one, always with all of their
    elements. A tensor whose rows are not whole blocks is read entirely.
    """

    def __init__(self, model: safe_open, entry: _Entry) -> None:
        self._model = model
        self._entry = entry

    def get_shape(self) -> list[int]:
        """Returns the lengths of the dimensions, outermost first."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Returns the name of the element type in safetensors or ggml."""
        return self._entry.dtype

    def __getitem__(self, index: Index) -> Any:
        entry = self._entry
        items = self._expanded(index)
        shape, start, end = entry.shape, entry.start, entry.end
        inner = math.prod(shape[1:])
        if items and shape[0] and inner and inner % entry.block_elements == 0:
            # Rows are whole blocks, so they can be read separately.
            first = items[0]
            if isinstance(first, int):
                rows, items[0] = range(first, first + 1), 0
            else:
                rows = range(*first.indices(shape[0]))
                items[0] = slice(None, None, rows.step)
            low, high = (rows[0], rows[-1] + 1) if rows else (0, 0)
            row_bytes = inner // entry.block_elements * entry.block_bytes
            start, end = start + low * row_bytes, start + high * row_bytes
            shape = (high - low, *shape[1:])
        whole = self._model._convert(self._model._read(entry, start, end, shape))
        if tuple(whole.shape) != shape:
            # Elements were converted to bytes, so only whole rows can be selected.
            rows = len(shape) - 1 if len(whole.shape) == len(shape) else 0
            for item, length in zip(items[rows:], shape[rows:], strict=True):
                if not isinstance(item, slice) or item.indices(length) != (0, length, 1):
                    raise InvalidInputError(f'tensor "{entry.name}" of {entry.dtype} cannot be cut within its rows')
            items = items[:rows]
        cut = whole[tuple(items)]
        if self._model._framework == "np":
            import numpy

            return numpy.asanyarray(cut, order="C")
        return with_type_of(whole, cut.contiguous())

    def _expanded(self, index: Index) -> list[int | slice]:
        """Expands an index to an integer or a slice for each dimension."""
        shape, name = self._entry.shape, self._entry.name
        given = list(index) if isinstance(index, tuple) else [index]
        if sum(item is Ellipsis for item in given) > 1:
            raise InvalidInputError(f'tensor "{name}": an index can have only one ellipsis')
        if Ellipsis in given:
            at = given.index(Ellipsis)
            given[at : at + 1] = [slice(None)] * (len(shape) - len(given) + 1)
        if len(given) > len(shape):
            message = f'tensor "{name}": too many indices: {len(given)}; number of dimensions: {len(shape)}'
            raise InvalidInputError(message)
        given += [slice(None)] * (len(shape) - len(given))
        items: list[int | slice] = []
        for dimension, (item, length) in enumerate(zip(given, shape, strict=True)):
            if isinstance(item, slice):
                if item.step is not None and item.step < 1:
                    message = f'tensor "{name}": the step of a slice must be positive, not {item.step}'
                    raise InvalidInputError(message)
                items.append(item)
                continue
            try:
                position = item.__index__()  # type: ignore[union-attr]
            except AttributeError:
                message = f'tensor "{name}": an index can contain only integers, slices and an ellipsis, not {item!r}'
                raise InvalidInputError(message) from None
            if not -length <= position < length:
                message = (
                    f'tensor "{name}": index {position} is out of range: dimension {dimension} has length {length}'
                )
                raise IndexError(message)
            items.append(position % length)
        return items
