"""Opens models by reading only their headers, and reads single tensors and slices."""

from __future__ import annotations

import math
import os
import weakref
from typing import Any, NamedTuple, TypeAlias

from . import _native
from ._convert import moved, to_numpy, to_torch, with_type_of
from ._errors import (
    ChangedError,
    ClosedError,
    ConfigError,
    Error,
    InvalidInputError,
    TensorNotFoundError,
)
from ._load import Path, load, wait
from ._native import Tensor

# Also None, lists, masks, arrays and tensors, if the framework accepts them.
Index: TypeAlias = Any

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


class _Model:
    """The open files of a model. They are closed when nothing refers to this object any more."""

    def __init__(self, path: str, format: str | None, framework: str, device: Any) -> None:
        self.path, self.framework, self.device = path, framework, device
        self.headers, self.files = _opened(path, format)
        self._finalizer = weakref.finalize(self, _close, self.files)

    def changed(self, file: _File) -> ChangedError:
        return ChangedError(
            f"{file.path}: changed since it was opened",
            filename=file.path,
            hint="open it again when nothing writes to it",
        )

    def read(self, entry: _Entry, start: int, end: int, shape: tuple[int, ...]) -> Any:
        """Reads these bytes of a file as an array or a torch tensor with this shape."""
        file = self.files[entry.file]
        described = (entry.name, entry.dtype, list(shape), start, end)
        if end - start <= _SMALL_BYTES:
            tensor = _native.read_small(file.path, file.descriptor, described)
        else:
            tensor = wait(_native.start_read(file.path, file.descriptor, described))
        # Check this after the read, so that a change during the read is detected.
        if _Identity.of(os.fstat(file.descriptor)) != file.identity:
            raise self.changed(file)
        return self.convert(tensor)

    def convert(self, tensor: Tensor) -> Any:
        if self.framework == "np":
            return to_numpy(tensor)
        made = to_torch(tensor)
        return made if str(self.device) == "cpu" else moved(made, self.device)


class safe_open:  # noqa: N801, the name that safetensors uses
    """Opens a model to read single tensors. Replaces ``safetensors.safe_open``.

    - ``filename``: a safetensors or GGUF file, a folder, or an index.
    - ``framework``: ``"pt"`` for torch, ``"np"`` or ``"numpy"`` for NumPy.
    - ``device``: the torch device to which the tensors are moved.
    - ``format``: ``safetensors`` or ``gguf``. By default, the format is detected.

    Opening reads only the headers. ``get_tensor`` reads only that tensor, and a slice reads only
    the rows from the first to the last one that it selects. The files stay open while this object
    is open or one of its slices exists, so these reads still work after a file has been replaced.
    If a file has been written to, they raise :class:`ChangedError`.

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
        if _FRAMEWORKS[framework] == "np" and str(device) != "cpu":
            raise ConfigError(f"NumPy does not support device {device!r}: its arrays are on the cpu")
        self._path, self._format = os.fsdecode(os.fspath(filename)), format
        model = _Model(self._path, format, _FRAMEWORKS[framework], device)
        # None once this object is closed.
        self._open: _Model | None = model
        self._entries = {
            name: _Entry(number, name, dtype, tuple(shape), *rest)
            for number, header in enumerate(model.headers)
            for name, dtype, shape, *rest in header["tensors"]
        }

    def __enter__(self) -> safe_open:
        self._model()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._open = None

    def keys(self) -> list[str]:
        """Returns the names of all tensors, sorted."""
        self._model()
        return sorted(self._entries)

    def offset_keys(self) -> list[str]:
        """Returns the names of all tensors, in file order."""
        self._model()
        return list(self._entries)

    def metadata(self) -> dict[str, Any] | None:
        """Returns the metadata of the files, or ``None`` if there is none.

        If several files have the same key, the value comes from the first of these files.
        """
        found = [header["metadata"] for header in self._model().headers]
        merged: dict[str, Any] = {}
        for metadata in reversed(found):
            merged.update(metadata or {})
        return None if all(metadata is None for metadata in found) else merged

    def get_tensor(self, name: str) -> Any:
        """Reads the tensor with this name."""
        model, entry = self._model(), self._entry(name)
        return model.read(entry, entry.start, entry.end, entry.shape)

    def get_tensors(self) -> dict[str, Any]:
        """Loads the whole model, and returns a dictionary of its tensors.

        Unlike the other methods, raises :class:`ChangedError` even if a file was only replaced.
        """
        model = self._model()
        with load(self._path, format=self._format) as image:
            for file in model.files:
                if not _is_same(file):
                    raise model.changed(file)
            return {name: model.convert(image[name]) for name in self._entries}

    def get_slice(self, name: str) -> SafeSlice:
        """Returns an object that reads slices of this tensor when it is indexed with ``[...]``.

        It can still be used after this object was closed.
        """
        return SafeSlice(self._model(), self._entry(name))

    def _model(self) -> _Model:
        if self._open is None:
            raise ClosedError(f"{self._path}: was closed", filename=self._path)
        return self._open

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise TensorNotFoundError(f'no tensor named "{name}"', filename=self._path) from None


class SafeSlice:
    """A tensor whose slices can be read. Created by :meth:`safe_open.get_slice`.

    An index can be whatever the framework accepts. Only the selected part is read if the index
    begins with integers, or with integers and a slice with a positive step: then the rows of that
    dimension are read from the first to the last selected one, with all of their elements. Other
    indices (``None``, lists, masks, arrays), and rows that are not whole blocks, require reading
    the entire tensor.
    """

    def __init__(self, model: _Model, entry: _Entry) -> None:
        self._model = model
        self._entry = entry

    def get_shape(self) -> list[int]:
        """Returns the lengths of the dimensions, outermost first."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Returns the name of the element type in safetensors or ggml."""
        return self._entry.dtype

    def __getitem__(self, index: Index) -> Any:
        entry, items = self._entry, list(index) if isinstance(index, tuple) else [index]
        try:
            shape, start, end, items = self._narrowed(items)
            whole = self._model.read(entry, start, end, shape)
            if tuple(whole.shape) != shape:
                items = self._rows_only(items, shape, tuple(whole.shape))
            cut = whole[items[0]] if len(items) == 1 else whole[tuple(items)]
        except Error:
            raise
        except IndexError as error:
            raise IndexError(f'tensor "{entry.name}": {error}') from None
        except (TypeError, ValueError) as error:
            raise InvalidInputError(f'tensor "{entry.name}": {error}') from None
        if self._model.framework == "np":
            import numpy

            return numpy.asanyarray(cut, order="C")
        return with_type_of(whole, cut.contiguous())

    def _narrowed(self, items: list[Any]) -> tuple[tuple[int, ...], int, int, list[Any]]:
        """Returns the shape and byte range of the part to read, and the index into that part."""
        entry, items = self._entry, list(items)
        shape, start, end = list(entry.shape), entry.start, entry.end
        for dimension in range(min(len(items), len(shape))):
            item, length, inner = items[dimension], shape[dimension], math.prod(shape[dimension + 1 :])
            if not length or not inner or inner % entry.block_elements:
                break
            position = _position(item)
            if position is not None:
                if not -length <= position < length:
                    raise IndexError(f"index {position} is out of range: dimension {dimension} has length {length}")
                rows, items[dimension] = range(position % length, position % length + 1), 0
            elif isinstance(item, slice) and (item.step is None or item.step > 0):
                rows = range(*item.indices(length))
                items[dimension] = slice(None, None, rows.step)
            else:
                break
            low, high = (rows[0], rows[-1] + 1) if rows else (0, 0)
            row_bytes = inner // entry.block_elements * entry.block_bytes
            start, end = start + low * row_bytes, start + high * row_bytes
            shape[dimension] = high - low
            if position is None:
                # The rows are contiguous, but parts of them are not.
                break
        return tuple(shape), start, end, items

    def _rows_only(self, items: list[Any], shape: tuple[int, ...], found: tuple[int, ...]) -> list[Any]:
        """Returns the part of an index that selects whole rows.

        Used if elements were converted to bytes. An index that selects parts of rows is an error.
        """
        name, dtype = self._entry.name, self._entry.dtype
        kept = len(shape) - 1 if len(found) == len(shape) else 0
        items = _expanded(items, len(shape))
        if len(items) > len(shape):
            raise InvalidInputError(f'tensor "{name}": too many indices: {len(items)}, for {len(shape)} dimensions')
        are_rows = all(isinstance(item, slice) or _position(item) is not None for item in items[:kept])
        for item, length in zip(items[kept:], shape[kept:], strict=True):
            are_rows &= isinstance(item, slice) and item.indices(length) == (0, length, 1)
        if not are_rows:
            raise InvalidInputError(f'tensor "{name}" of {dtype} cannot be cut within its rows')
        return items[:kept] or [slice(None)]


def _position(item: Any) -> int | None:
    """Returns an integer index, or ``None`` if the item is something else."""
    is_mask = isinstance(item, bool) or str(getattr(item, "dtype", "")).endswith("bool")
    if is_mask or tuple(getattr(item, "shape", ())) or not hasattr(item, "__index__"):
        return None
    try:
        return int(item.__index__())
    except TypeError:
        # An array or a tensor that is not an integer.
        return None


def _expanded(items: list[Any], dimensions: int) -> list[Any]:
    """Expands an ellipsis, and adds missing dimensions."""
    places = [place for place, item in enumerate(items) if item is Ellipsis]
    if len(places) == 1:
        missing = dimensions - len(items) + 1
        return [*items[: places[0]], *[slice(None)] * missing, *items[places[0] + 1 :]]
    return [*items, *[slice(None)] * (dimensions - len(items))]
