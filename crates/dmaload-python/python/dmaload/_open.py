"""Single tensors, and slices of them, of models of which only the headers are read."""

from __future__ import annotations

import math
import os
import weakref
from types import EllipsisType
from typing import Any, NamedTuple, TypeAlias

from . import _native
from ._convert import to_numpy, to_torch
from ._errors import ChangedError, ClosedError, ConfigError, InvalidInputError, IoError, TensorNotFoundError
from ._load import Path, load, wait
from ._native import Tensor

Index: TypeAlias = "int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]"

# Up to here reading takes less time than starting a load.
_SMALL_BYTES = 256 << 10

_FRAMEWORKS = {"pt": "pt", "torch": "pt", "pytorch": "pt", "np": "np", "numpy": "np"}


class _Entry(NamedTuple):
    """A tensor, as the header of file number ``file`` describes it."""

    file: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    block_elements: int
    block_bytes: int


class _Identity(NamedTuple):
    """What changes when a file is replaced or written to."""

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
        raise IoError(f"{path}: cannot open: {error.strerror}", error.errno, path) from error
    return _File(path, descriptor, _Identity.of(os.fstat(descriptor)))


def _close(files: list[_File]) -> None:
    while files:
        os.close(files.pop().descriptor)


def _is_same(file: _File) -> bool:
    """Whether its path still names it, and nothing has written to it."""
    try:
        return _Identity.of(os.stat(file.path)) == file.identity == _Identity.of(os.fstat(file.descriptor))
    except OSError:
        return False


def _headers(path: str, format: str | None) -> list[dict[str, Any]]:
    headers: list[dict[str, Any]] = wait(_native.read_header(path, format))
    for header in headers:
        if header["format"] is None:
            # Says what is wrong with it.
            wait(_native.read_header(header["path"], "safetensors"))
    return headers


def _opened(path: str, format: str | None) -> tuple[list[dict[str, Any]], list[_File]]:
    """The headers of a model's files, and these files, open: what a header says is about them."""
    files: list[_File] = []
    try:
        if os.path.isfile(path) and os.access(path, os.R_OK):
            files.append(_open(path))
        headers = _headers(path, format)
        if [header["path"] for header in headers] == [file.path for file in files] and all(map(_is_same, files)):
            return headers, files
        # Several files, which are known only now: their headers are read again, from what is open.
        _close(files)
        files.extend(_open(header["path"]) for header in headers)
        if _headers(path, format) == headers and all(map(_is_same, files)):
            return headers, files
        raise ChangedError(f"{path}: was changed while it was opened", filename=path)
    except BaseException:
        _close(files)
        raise


class safe_open:  # noqa: N801, the name that programs know
    """Opens a model for single tensors, in the place of ``safetensors.safe_open``.

    - ``filename``: a file of safetensors or GGUF, or a folder or an index of several.
    - ``framework``: ``"pt"`` for torch, ``"np"`` or ``"numpy"`` for NumPy.
    - ``device``: where torch is to have the tensors.
    - ``format``: ``safetensors`` or ``gguf``, where it is not to be found out.

    Only the headers are read, and of each tensor only its bytes; of slices along the first
    dimension only their rows. The files stay open: what replaces one of them is not seen, and one
    that is written to raises :class:`ChangedError`.

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
        # The way to read is ours to choose.
        del backend
        if framework not in _FRAMEWORKS:
            raise ConfigError(f"framework {framework!r} is not known: pt and numpy are")
        self._framework = _FRAMEWORKS[framework]
        self._device = device
        if self._framework == "np" and str(device) != "cpu":
            raise ConfigError(f"NumPy has no device {device!r}: its arrays are on the cpu")
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
        """The names of all tensors, sorted."""
        self._check_open()
        return sorted(self._entries)

    def offset_keys(self) -> list[str]:
        """The names of all tensors, in the order in which they are in their files."""
        self._check_open()
        return list(self._entries)

    def metadata(self) -> dict[str, Any] | None:
        """What the files say of themselves; ``None`` where they say nothing.

        That of several files is put together, and the first file that has a key counts.
        """
        self._check_open()
        merged: dict[str, Any] = {}
        for header in reversed(self._headers):
            merged.update(header["metadata"] or {})
        return merged or None

    def get_tensor(self, name: str) -> Any:
        """The tensor of this name, of which nothing else is read."""
        entry = self._entry(name)
        return self._convert(self._read(entry, entry.start, entry.end, entry.shape))

    def get_tensors(self) -> dict[str, Any]:
        """All tensors by their names, loaded at once."""
        self._check_open()
        with load(self._path, format=self._format) as image:
            for file in self._files:
                if not _is_same(file):
                    raise self._changed(file)
            return {name: self._convert(image[name]) for name in self._entries}

    def get_slice(self, name: str) -> SafeSlice:
        """The tensor of this name, to be cut by ``[...]``: only what is needed of it is read."""
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
            f"{file.path}: was changed since it was opened",
            filename=file.path,
            hint="open it again when nothing writes to it",
        )

    def _read(self, entry: _Entry, start: int, end: int, shape: tuple[int, ...]) -> Tensor:
        """These bytes of a file, as a tensor of this shape."""
        self._check_open()
        file = self._files[entry.file]
        described = (entry.name, entry.dtype, list(shape), start, end)
        if end - start <= _SMALL_BYTES:
            tensor = _native.read_small(file.descriptor, described)
        else:
            tensor = wait(_native.start_read(file.descriptor, described))
        # Read before it was looked at, so a change of what was read shows.
        if _Identity.of(os.fstat(file.descriptor)) != file.identity:
            raise self._changed(file)
        return tensor

    def _convert(self, tensor: Tensor) -> Any:
        if self._framework == "np":
            return to_numpy(tensor)
        made = to_torch(tensor)
        return made if str(self._device) == "cpu" else made.to(self._device)


class SafeSlice:
    """A tensor of which parts are read. Made by :meth:`safe_open.get_slice`.

    ``[...]`` takes integers, slices with positive steps, and an ellipsis. Rows of the first
    dimension that are not asked for are not read; of the other dimensions, all is.
    """

    def __init__(self, model: safe_open, entry: _Entry) -> None:
        self._model = model
        self._entry = entry

    def get_shape(self) -> list[int]:
        """The lengths of the dimensions, outermost first."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """The type of the elements, as safetensors or ggml spell it."""
        return self._entry.dtype

    def __getitem__(self, index: Index) -> Any:
        entry = self._entry
        items = self._expanded(index)
        shape, start, end = entry.shape, entry.start, entry.end
        inner = math.prod(shape[1:])
        if items and shape[0] and inner and inner % entry.block_elements == 0:
            # Rows are whole bytes: the others need not be read.
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
            # Bytes in the place of elements: rows of whole bytes can be cut, and nothing else.
            rows = len(shape) - 1 if len(whole.shape) == len(shape) else 0
            for item, length in zip(items[rows:], shape[rows:], strict=True):
                if not isinstance(item, slice) or item.indices(length) != (0, length, 1):
                    raise InvalidInputError(f'tensor "{entry.name}" of {entry.dtype} cannot be cut within its rows')
            items = items[:rows]
        cut = whole[tuple(items)]
        if self._model._framework == "np":
            import numpy

            return numpy.asarray(cut, order="C")
        return cut.contiguous()

    def _expanded(self, index: Index) -> list[int | slice]:
        """An integer or a slice for each dimension."""
        shape, name = self._entry.shape, self._entry.name
        given = list(index) if isinstance(index, tuple) else [index]
        if sum(item is Ellipsis for item in given) > 1:
            raise InvalidInputError(f'tensor "{name}": an index has one ellipsis at most')
        if Ellipsis in given:
            at = given.index(Ellipsis)
            given[at : at + 1] = [slice(None)] * (len(shape) - len(given) + 1)
        if len(given) > len(shape):
            raise InvalidInputError(f'tensor "{name}" has {len(shape)} dimensions, and the index {len(given)}')
        given += [slice(None)] * (len(shape) - len(given))
        items: list[int | slice] = []
        for dimension, (item, length) in enumerate(zip(given, shape, strict=True)):
            if isinstance(item, slice):
                if item.step is not None and item.step < 1:
                    message = f'tensor "{name}": the step of a slice must be positive, and is {item.step}'
                    raise InvalidInputError(message)
                items.append(item)
                continue
            try:
                position = item.__index__()  # type: ignore[union-attr]
            except AttributeError:
                message = f'tensor "{name}": an index has integers, slices and an ellipsis, and not {item!r}'
                raise InvalidInputError(message) from None
            if not -length <= position < length:
                message = f'tensor "{name}": index {position} is out of dimension {dimension}, which has {length}'
                raise IndexError(message)
            items.append(position % length)
        return items
